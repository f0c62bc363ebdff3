"""ConflictEdit and RoundEdit: edits made one after the other, of which the second meets the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ibke.data.readers.fields import Fault, Record, filled, mapping, name_of, objects, text, value_of
from ibke.request import EditRequest, Probe

TYPES = ("coverage", "reverse", "composite")


def conflictedit(record: Record) -> Iterator[EditRequest | Fault]:
    """ConflictEdit and RoundEdit: pairs of edits, the second of which meets the first.

    Both edits of a record are requests, in order and with one ``case``; the relation's ``query`` is the paraphrase.
    ``coverage`` changes one fact twice. ``reverse`` changes a fact and then its inverse, ``composite`` a fact and then
    one that follows from it: what follows from each edit alone is portability, and the fact it rests on
    (``prerequisites``) must stay. RoundEdit (``edit`` in place of ``edits``) changes a fact and changes it back; the
    other true objects of such a subject are no question of their own and are not read.
    """
    if "edit" in record:
        there = _fact(mapping(record, "edit"), "edit")
        back = there._replace(new=there.old, old=there.new)
        yield from (_request(fact) for fact in (there, back))
        return
    kind = text(record, "type")
    if kind not in TYPES:
        raise Fault("type", f"is none of {', '.join(TYPES)}")
    edits = objects(record, "edits")
    if len(edits) != 2:
        raise Fault("edits", "does not hold two edits")
    first, second = (_fact(edit, "edits") for edit in edits)
    stays = tuple(_prerequisites(record))
    for fact, probes in zip((first, second), _follows(kind, first, second, edits), strict=True):
        yield _request(fact, stays, probes)


class _Fact(NamedTuple):
    prompt: str
    question: str
    subject: str
    old: str
    new: str
    relation: Record


def _label(record: Record, field: str, inside: str) -> str:
    return text(mapping(record, field, inside), "label", name_of(field, inside))


def _fact(record: Record, inside: str) -> _Fact:
    relation, subject = mapping(record, "relation", inside), _label(record, "subject", inside)
    prompt, question = (filled(relation, field, subject, f"{inside}.relation") for field in ("prompt", "query"))
    old, new = _label(record, "object", inside), _label(record, "new_object", inside)
    return _Fact(prompt, question, subject, old, new, relation)


def _request(fact: _Fact, locality: tuple[Probe, ...] = (), portability: tuple[Probe, ...] = ()) -> EditRequest:
    return EditRequest(fact.prompt, fact.new, fact.subject, fact.old, (fact.question,), locality, portability)


def _prerequisites(record: Record) -> Iterator[Probe]:
    triples = objects(record, "triples")
    for index in value_of(record, "prerequisites", list, "list"):
        if not isinstance(index, int) or not 0 <= index < len(triples):
            raise Fault("prerequisites", "does not number the triples")
        relation = mapping(triples[index], "relation", "triples")
        prompt = filled(relation, "prompt", _label(triples[index], "subject", "triples"), "triples.relation")
        yield Probe(prompt, _label(triples[index], "object", "triples"), "prerequisite")


def _follows(kind: str, first: _Fact, second: _Fact, edits: list[Record]) -> list[tuple[Probe, ...]]:
    """What follows from each of the two edits alone."""
    if kind == "reverse":  # read backward, in the words of the other one's relation
        pairs = ((first, second), (second, first))
        return [
            (Probe(filled(other.relation, "prompt", fact.new, "edits.relation"), fact.subject, "reversal"),)
            for fact, other in pairs
        ]
    if kind == "composite":  # with the prerequisite, each gives the other fact an object
        implied = _label(edits[1], "true_object", "edits")
        return [(Probe(second.prompt, implied, "one_hop"),), (Probe(first.prompt, second.new, "one_hop"),)]
    return [(), ()]
