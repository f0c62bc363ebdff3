"""The wordings shipped with the package keep the rules that code relying on them takes for granted."""

import json
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ibke.data.relations import ASKED, KINDS, Relation, load_asked, load_subjects, load_wordings
from ibke.data.split import held_out

WORDINGS_DIR = Path(__file__).parents[1] / "src" / "ibke" / "data" / "wordings"
FILES = sorted(WORDINGS_DIR.glob("*.json"))
CLOZE_FIELDS = ("statements", "indirect")
WORDING_FIELDS = (*CLOZE_FIELDS, "questions", "chat")
TEXT_FIELDS = ("label", "noun_phrase", "subject_kind", "object_kind")
FIELDS = {*TEXT_FIELDS, *WORDING_FIELDS, "sources"}
FEWEST = {"statements": 5, "questions": 4, "chat": 4, "indirect": 2}
FEWEST_ASKED = {"statements": 3, "questions": 3, "chat": 2}  # of more relations, and without facts there is no source
HELD_OUT_SHARE = 0.2


def load(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def faults(key: str, entry: dict[str, Any], asked: bool = False) -> list[str]:
    """Return everything that is wrong with one relation's entry."""
    texts, fewest = (TEXT_FIELDS, FEWEST_ASKED) if asked else ((*TEXT_FIELDS, "sources"), FEWEST)
    if set(entry) != FIELDS:
        return [f"{key}: fields {sorted(set(entry) ^ FIELDS)} are missing or unknown"]
    found = [f"{key}: {field} is empty" for field in texts if not entry[field]]
    found += [f"{key}: too few {field}" for field, least in fewest.items() if len(entry[field]) < least]
    wordings = [wording for field in WORDING_FIELDS for wording in entry[field]]
    found += [
        f"{key}: not exactly one {{}}, or a stray brace: {text!r}"
        for text in (*wordings, entry["noun_phrase"])
        if text.count("{}") != 1 or text.count("{") != 1 or text.count("}") != 1
    ]
    found += [f"{key}: space around {text!r}" for text in wordings if text != text.strip()]
    found += [
        f"{key}: no object can follow {text!r}"
        for field in CLOZE_FIELDS
        for text in entry[field]
        if text[-1] in string.punctuation and not text.endswith("{}")
    ]
    found += [f"{key}: no question mark ends {text!r}" for text in entry["questions"] if not text.endswith("?")]
    times = Counter(wording.casefold() for wording in wordings)
    found += [f"{key}: given {n} times: {text!r}" for text, n in times.items() if n > 1]
    return found


def test_there_are_wordings() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_entry_keeps_the_rules(path: Path) -> None:
    entries = load(path)
    assert entries
    assert [fault for key, entry in entries.items() for fault in faults(key, entry, path.name == ASKED)] == []


def test_every_relation_is_worded_once() -> None:
    times = Counter(key for path in FILES for key in load(path))
    assert [key for key, n in times.items() if n > 1] == []


def test_a_broken_entry_is_noticed() -> None:
    entry = next(iter(load(FILES[0]).values()))
    first = entry["statements"][0]
    for broken in (f"{first} ", f"{first}.", f"{first} {{}}", entry["questions"][0]):
        assert faults("broken", {**entry, "statements": [broken, *entry["statements"][1:]]}), broken


def test_relations_that_are_only_asked_about_stand_apart() -> None:
    asked = load_asked()
    assert asked
    assert all(name.startswith("own:") for name in asked)
    assert not set(asked) & set(load_wordings())


def test_what_is_only_asked_about_is_none_of_the_relations_held_out() -> None:
    def told(relation: Relation) -> set[str]:
        texts = {text.casefold() for kind in KINDS for text in relation.templates(kind)}
        return {*texts, relation.label.casefold(), relation.noun_phrase.casefold()}

    kept_out = {name: told(one) for name, one in load_wordings().items() if held_out(name, HELD_OUT_SHARE)}
    assert kept_out
    found = [
        (mine, other, sorted(told(one) & texts))
        for mine, one in load_asked().items()
        for other, texts in kept_out.items()
        if told(one) & texts
    ]
    assert found == []


def test_there_are_subjects_for_whatever_is_only_asked_about() -> None:
    subjects = load_subjects()
    for kind, one in subjects.items():
        assert len(one.names) >= 20, kind
        times = Counter(name.casefold() for name in one.names)
        assert [name for name, n in times.items() if n > 1 or name != name.strip()] == [], kind
    kinds = {*subjects, *(one.wider for one in subjects.values())}
    assert {relation.subject_kind for relation in load_asked().values()} <= kinds
