"""Readers that turn tables of facts into (subject, relation, object) triples.

A record that does not fit is never lost quietly: with a :class:`Skips` it is counted and named there, without one
the first such record raises :class:`~ibke.errors.FormatError`.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ibke.errors import FormatError

MAX_WORDS = 12
"""Longest subject or object that is taken, in words."""


class Triple(NamedTuple):
    """One fact. ``relation`` is the key of its wordings; ``source`` says which table it came from."""

    subject: str
    relation: str
    obj: str
    source: str


@dataclass
class Skips:
    """Records that were left out: how many for each reason, and where the first ``keep`` of them stand."""

    keep: int = 20
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """Count one record left out for ``reason``; ``where`` names its file and place, or the fact itself."""
        self.counts[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < self.keep:
            named.append(where)


def leave_out(skips: Skips | None, reason: str, where: str) -> None:
    """Record what is left out, or refuse it where nobody keeps count.

    Raises:
        FormatError: ``skips`` is None.
    """
    if skips is None:
        raise FormatError(f"{reason}.", where, "Mend the record, or pass `Skips()` to count such records and go on.")
    skips.add(reason, where)


def read_facts(data_dir: str | Path, skips: Skips | None = None) -> Iterator[Triple]:
    """Facts from packaged tables, ``facts/triples.jsonl``; relations are called ``facts:country_capital`` and so on."""
    path = Path(data_dir) / "facts" / "triples.jsonl"

    def parse(record: Any) -> list[Triple]:
        relation, source = f"facts:{record['relation']}", f"facts:{record['source']}"
        several = ALTERNATIVES.get(relation)
        objects = record["object"].split(several) if several else [record["object"]]
        return [Triple(_as_spoken(record["subject"]), relation, _as_spoken(obj), source) for obj in objects]

    yield from _checked(_json_lines(path), path, parse, skips)


ALTERNATIVES = {"facts:element_discovery_location": "/"}
"""Relations whose table writes several answers into one field, and what stands between them."""


def _as_spoken(name: str) -> str:
    """A catalogue's name the way people say it: no trailing bracket, and no inversion (Moldova, Republic of)."""
    name = re.sub(r"\s*[(\[][^)\]]*[)\]]$", "", name)
    return re.sub(r"^([^,]+), ([^,]+ (?:of|de|the))$", r"\2 \1", name)


def read_pararel(data_dir: str | Path, skips: Skips | None = None) -> Iterator[Triple]:
    """ParaRel's T-REx facts, ``pararel/trex_lms_vocab/P*.jsonl``; relations are Wikidata properties."""
    for path in _matching(Path(data_dir), "pararel/trex_lms_vocab/P*.jsonl"):

        def parse(record: Any, relation: str = path.stem) -> list[Triple]:
            return [Triple(record["sub_label"], relation, record["obj_label"], "pararel")]

        yield from _checked(_json_lines(path), path, parse, skips)


def read_lre(data_dir: str | Path, skips: Skips | None = None) -> Iterator[Triple]:
    """LRE's samples, ``lre/*/*.json``; relations are called ``lre:country capital city`` and so on."""
    for path in _matching(Path(data_dir), "lre/*/*.json"):
        content = _json(path)
        if not isinstance(content, dict) or not {"name", "samples"} <= set(content):
            raise FormatError("has no `name` and `samples`.", str(path), "Fetch the data set again.")

        def parse(
            record: Any, relation: str = f"lre:{content['name']}", source: str = f"lre:{path.parent.name}"
        ) -> list[Triple]:
            subject, obj = _unescaped(record["subject"]), _unescaped(record["object"])
            return [Triple(subject, relation, obj, source)]

        yield from _checked(enumerate(content["samples"]), path, parse, skips)


def _unescaped(text: str) -> str:
    r"""Some of LRE's names were escaped twice and come out of the JSON with ``\u00e1`` for á."""
    return re.sub(r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), text)


def read_entityquestions(data_dir: str | Path, split: str = "train", skips: Skips | None = None) -> Iterator[Triple]:
    """EntityQuestions, ``entityquestions/SPLIT/P*.SPLIT.json``; one triple for each answer, relations as in Wikidata.

    The subject is what is left of a question without the words that all questions of its file share.
    """
    for path in _matching(Path(data_dir), f"entityquestions/{split}/P*.{split}.json"):
        records = _json(path)
        prefix, suffix = shared_ends([record["question"] for record in records if _asks(record)])

        def parse(
            record: Any, relation: str = path.name.split(".")[0], prefix: str = prefix, suffix: str = suffix
        ) -> list[Triple]:
            question = record["question"]
            if not (question.startswith(prefix) and question.endswith(suffix)):
                raise ValueError(f"question not of the form {prefix + '…' + suffix!r}")
            subject = question[len(prefix) : len(question) - len(suffix)]
            return [Triple(subject, relation, answer, f"entityquestions:{split}") for answer in record["answers"]]

        yield from _checked(enumerate(records), path, parse, skips)


def read_csv(path: str | Path, skips: Skips | None = None) -> Iterator[Triple]:
    """Anybody's facts: a CSV file with the columns ``subject``, ``relation`` and ``object``, in any order.

    Relations are keys of the wordings at hand: the packaged ones, or those of a JSON file given to
    :func:`~ibke.data.relations.load_wordings`.

    Raises:
        FormatError: the file cannot be read or lacks a column.
    """
    path = Path(path)
    source = f"csv:{path.name}"

    def parse(row: dict[str, str]) -> list[Triple]:
        return [Triple(row["subject"], row["relation"].strip(), row["object"], source)]

    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            missing = {"subject", "relation", "object"} - set(rows.fieldnames or ())
            if missing:
                todo = "The first line must name `subject`, `relation` and `object`."
                raise FormatError(f"has no column `{sorted(missing)[0]}`.", str(path), todo)
            yield from _checked(enumerate(rows, start=2), path, parse, skips)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"cannot be read ({error}).", str(path), "Check the path and that it is UTF-8 CSV.") from None


def _checked(
    records: Iterable[tuple[int, Any]], path: Path, parse: Callable[[Any], list[Triple]], skips: Skips | None
) -> Iterator[Triple]:
    """Triples of every record that can be read and is neither blank nor overlong; the rest is left out by name."""
    for index, record in records:
        where = f"{path}, record {index}"
        try:
            triples = [_tidy(triple) for triple in parse(record)]
        except (KeyError, TypeError, AttributeError) as error:
            leave_out(skips, f"malformed record ({type(error).__name__}: {error})", where)
            continue
        except ValueError as error:
            leave_out(skips, str(error), where)
            continue
        for triple in triples:
            if not (triple.subject and triple.obj):
                leave_out(skips, "blank subject or object", where)
            elif max(len(triple.subject.split()), len(triple.obj.split())) > MAX_WORDS:
                leave_out(skips, f"subject or object of more than {MAX_WORDS} words", where)
            else:
                yield triple


def _tidy(triple: Triple) -> Triple:
    return triple._replace(subject=" ".join(triple.subject.split()), obj=" ".join(triple.obj.split()))


def _asks(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("question"), str)


def shared_ends(questions: list[str], share: float = 0.98) -> tuple[str, str]:
    """Longest beginning (up to a space) and longest end that at least ``share`` of the questions have in common."""
    prefix = _shared_start(questions, share)
    prefix = prefix[: prefix.rfind(" ") + 1]
    return prefix, _shared_start([question[len(prefix) :][::-1] for question in questions], share)[::-1]


def _shared_start(texts: list[str], share: float) -> str:
    start = ""
    while True:
        following = Counter(text[len(start)] for text in texts if text.startswith(start) and len(text) > len(start))
        letter, count = following.most_common(1)[0] if following else ("", 0)
        if count < share * len(texts) or not count:
            return start
        start += letter


def _matching(data_dir: Path, pattern: str) -> list[Path]:
    paths = sorted(data_dir.glob(pattern))
    if not paths:
        raise FormatError("no such files.", str(data_dir / pattern), "Fetch the data set, or check the data folder.")
    return paths


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot be read ({error}).", str(path), "Fetch the data set again.") from None


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbered parsed lines; a line that is not JSON comes as None, which no parser takes."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError:
                    yield number, None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"cannot be read ({error}).", str(path), "Fetch the data set again.") from None
