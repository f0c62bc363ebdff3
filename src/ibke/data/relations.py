"""Relations and the wordings in which people state them or ask for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from ibke.errors import FormatError

Kind = Literal["statement", "indirect", "question", "chat"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FIELD_OF: dict[Kind, str] = {
    "statement": "statements",
    "indirect": "indirect",
    "question": "questions",
    "chat": "chat",
}
"""Kinds of wording: a statement to go on with, one that reaches the answer less directly, a question that stands
alone, what a person types to an assistant. The kind tells which frames suit a text.
"""


@dataclass(frozen=True)
class Relation:
    """One relation and its wordings, templates with ``{}`` where the subject goes.

    Args:
        id: what triples call it, e.g. ``P36`` or ``facts:country_capital``.
        label: its name in plain words.
        noun_phrase: template that denotes the object, e.g. ``the capital of {}``; empty where there is none.
        subject_kind: what the subject is, e.g. ``country``.
        object_kind: what the object is, e.g. ``city``.
        statements: cloze prompts that end right before the answer.
        indirect: cloze prompts that reach the answer less directly.
        questions: questions that stand alone.
        chat: what a person would type to an assistant.
    """

    id: str
    label: str
    noun_phrase: str = ""
    subject_kind: str = "thing"
    object_kind: str = "thing"
    statements: tuple[str, ...] = ()
    indirect: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    chat: tuple[str, ...] = ()

    @property
    def many(self) -> bool:
        """Whether a subject has several right answers as a rule, so that none of them is *the* answer."""
        return self.id in MANY_VALUED

    def templates(self, kind: Kind) -> tuple[str, ...]:
        """The wordings of one kind, not yet filled."""
        return getattr(self, FIELD_OF[kind])

    def fill(self, template: str, subject: str) -> str:
        """Put a subject, or a noun phrase in its place, into one of the relation's templates."""
        return fill(template, subject, place=family(self.subject_kind) == "place")


@dataclass(frozen=True)
class Subjects:
    """Things of one kind.

    Args:
        wider: the kind whose questions can be asked of them too, e.g. ``person`` for an ``athlete``; empty for none.
        names: what they are called.
    """

    wider: str
    names: tuple[str, ...]


ASKED = "asked.json"

MANY_VALUED = frozenset({"P40", "P47", "P190", "P463", "P530", "P800", "facts:country_borders"})

FAMILY = {
    **dict.fromkeys(("city", "US city", "country", "continent", "region", "province", "US state"), "place"),
    **dict.fromkeys(("administrative area", "airport", "IANA time zone", "body of water", "river"), "place"),
    **dict.fromkeys(("company", "school", "university", "network", "band"), "organization"),
    **dict.fromkeys(("baseball team", "minor league baseball team", "baseball league"), "organization"),
    **dict.fromkeys(("athlete", "musician", "singer", "US president"), "person"),
    **dict.fromkeys(("adjective", "verb"), "word"),
    **dict.fromkeys(("disease class", "administrative type", "element family"), "category"),
    "villain": "superhero",
    "car model": "product",
}
"""The wider kind that a kind of thing belongs to; a kind not named here stands for itself."""


def family(kind: str) -> str:
    """The widest kind that ``kind`` belongs to."""
    return FAMILY.get(kind, kind)


def fits(kind: str, wanted: str) -> bool:
    """Whether a thing of one kind can stand for another that is wanted: a city for a place, not a place for a city."""
    return wanted in (kind, family(kind))


TAKES_ARTICLE = re.compile(
    r"(United (States|Kingdom|Arab Emirates)\b.*|.+ (Islands|Republic|Empire|Federation|Kingdom|Union)"
    r"|(\w+ ){0,3}(Republic|Kingdom|Federation|Commonwealth|Isle|Principality|Duchy|Province|County) of .+"
    r"|Netherlands|Philippines|Bahamas|Maldives|Gambia|Comoros|Vatican)$"
)


def fill(template: str, subject: str, *, place: bool = False) -> str:
    """Put a subject into a template as a person would write it.

    Places get the article English gives them, an article is not written twice, ``a`` becomes ``an`` before a vowel,
    a full stop or question mark at the subject's end is not doubled, and a sentence begins with a capital letter.

    Args:
        template: text with one ``{}``.
        subject: name or noun phrase.
        place: whether the subject is a place.
    """
    before, after = template.split("{}")
    bare = re.sub(r"^[Tt]he ", "", subject)
    if re.search(r"\b[Tt]he $", before):
        subject = bare
    elif place and TAKES_ARTICLE.match(bare):
        subject = f"the {bare}"
    if re.search(r"\b[Aa] $", before) and re.match(r"[aeiouAEIOU]", subject):
        before = f"{before[:-1]}n "
    if after and after[0] in ".?!" and subject.endswith(after[0]):
        after = after[1:]
    if re.search(r"(^|[.?!] )$", before) and subject.split(" ")[0].islower():
        subject = subject[0].upper() + subject[1:]
    return f"{before}{subject}{after}"


def load_wordings(*files: str | Path, templates_from: str | Path | None = None) -> dict[str, Relation]:
    """Wordings of every relation the package knows facts of, and of those in files of the same form.

    Args:
        files: JSON files with more relations; one of the same name replaces the packaged one.
        templates_from: data folder whose ParaRel patterns and LRE templates join the packaged statements; only
            those that end right before the answer.

    Raises:
        FormatError: a file cannot be read or an entry is malformed; names file and relation.
    """
    packaged = resources.files("ibke.data") / "wordings"
    relations: dict[str, Relation] = {}
    for item in sorted(packaged.iterdir(), key=lambda entry: entry.name):
        if item.name.endswith(".json") and item.name != ASKED:
            relations |= _parse(item.read_text(encoding="utf-8"), item.name)
    for path in map(Path, files):
        try:
            relations |= _parse(path.read_text(encoding="utf-8-sig"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"cannot be read ({error}).", str(path), "Check the path.") from None
    if templates_from is not None:
        for relation, template in _foreign_templates(Path(templates_from)):
            if relation in relations and template not in relations[relation].statements:
                known = relations[relation]
                relations[relation] = replace(known, statements=(*known.statements, template))
    return relations


def load_asked() -> dict[str, Relation]:
    """Relations that are only asked about: there are wordings and no facts.

    They stand apart from :func:`load_wordings`, so that what is drawn from those does not change with them.
    """
    return _parse((resources.files("ibke.data") / "wordings" / ASKED).read_text(encoding="utf-8"), ASKED)


def load_subjects() -> dict[str, Subjects]:
    """Names by kind of subject, to ask of what :func:`load_asked` words."""
    entries = json.loads((resources.files("ibke.data") / "subjects.json").read_text(encoding="utf-8"))
    return {kind: Subjects(entry["wider"], tuple(entry["names"])) for kind, entry in entries.items()}


def _parse(text: str, where: str) -> dict[str, Relation]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"not valid JSON ({error.msg}, line {error.lineno}).", where, "Mend it.") from None
    if not isinstance(entries, dict):
        raise FormatError("not an object.", where, "Write {relation: {label, statements, questions, chat, …}}.")
    return {name: _relation(name, entry, f"{where}, relation {name!r}") for name, entry in entries.items()}


def _relation(name: str, entry: Any, where: str) -> Relation:
    if not isinstance(entry, dict):
        raise FormatError("not an object.", where, "Give it label, statements, questions, chat, …")
    unknown = set(entry) - set(Relation.__dataclass_fields__) - {"sources"}
    if unknown:
        raise FormatError(f"unknown field {sorted(unknown)[0]!r}.", where, "Check its spelling.")
    values: dict[str, Any] = {"id": name, "label": name}
    for key in {"label", "noun_phrase", "subject_kind", "object_kind"} & set(entry):
        if not isinstance(entry[key], str):
            raise FormatError(f"`{key}` is not a text.", where, "Write one text.")
        values[key] = entry[key]
    for key in set(FIELD_OF.values()) & set(entry):
        if not isinstance(entry[key], list) or not all(isinstance(text, str) for text in entry[key]):
            raise FormatError(f"`{key}` is not a list of texts.", where, "Write a list of texts.")
        values[key] = tuple(entry[key])
    relation = Relation(**values)
    templates = [template for kind in KINDS for template in relation.templates(kind)]
    for template in templates + [relation.noun_phrase] * bool(relation.noun_phrase):
        if template.count("{}") != 1:
            raise FormatError(f"{template!r} has no single {{}} for the subject.", where, "Put {} where it goes.")
    if not templates:
        raise FormatError("has no wording at all.", where, "Give it statements, questions or chat wordings.")
    return relation


def _foreign_templates(data_dir: Path) -> Iterator[tuple[str, str]]:
    """(relation, statement template) of ParaRel's patterns and LRE's templates that end right before the answer."""
    for path in sorted(data_dir.glob("pararel/pattern_data/graphs_json/P*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            found = re.fullmatch(r"(.*\[X\].*?)\s*\[Y\][\s.]*", json.loads(line)["pattern"])
            if found and found[1].count("[X]") == 1:
                yield path.stem, " ".join(found[1].replace("[X]", "{}").split()).replace(" ,", ",")
    for path in sorted(data_dir.glob("lre/*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for template in content["prompt_templates"] + content.get("prompt_templates_zs", []):
            if template.count("{}") == 1:
                yield f"lre:{content['name']}", template
