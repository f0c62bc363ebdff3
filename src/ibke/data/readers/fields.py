"""What readers ask of a record's fields, and the faults they find there.

A fault says the same for every record that has it, so that faults can be counted by what they say; which record it is
stands in :class:`Skipped`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ibke.data.fact_table import equal
from ibke.errors import RequestError
from ibke.files import data_folder
from ibke.request import Probe
from ibke.subjects import place_of

Record = dict[str, Any]
NAMED = 100  # records left out that a report names


class Fault(RequestError):
    """A field that cannot be used. Raised, the record is lost; yielded by a converter, only what it names is."""

    def __init__(self, field: str, why: str):
        super().__init__(f"`{field}` {why}.")
        self.field = field


class Skipped(NamedTuple):
    """A record, or a part of one, that could not be used: its file and index, the field, and what is wrong with it."""

    where: str
    field: str
    why: str


def leave_out(skipped: list[Skipped] | None, where: str, error: RequestError) -> None:
    """Name what is left out, or refuse it where nobody keeps a list.

    Raises:
        RequestError: ``skipped`` is None.
    """
    if skipped is None:
        raise RequestError(error.what, where, "Mend it, or let faulty records be skipped.") from None
    skipped.append(Skipped(where, getattr(error, "field", "record"), error.what))


def count_reasons(skipped: Iterable[Skipped]) -> dict[str, int]:
    """How often each thing was wrong, the most frequent first."""
    return dict(Counter(item.why for item in skipped).most_common())


def account(skipped: Sequence[Skipped]) -> dict[str, Any]:
    """What a report says of what was left out: how much, how often for which reason, and the first of it by name."""
    return {
        "skipped": len(skipped),
        "skipped_reasons": count_reasons(skipped),
        # From the data folder on: a report goes to other machines, where that is elsewhere.
        "skipped_records": [
            item._replace(where=item.where.removeprefix(f"{data_folder()}{os.sep}"))._asdict()
            for item in skipped[:NAMED]
        ],
    }


def name_of(field: str, inside: str = "") -> str:
    """A field as faults call it: ``target_new.str`` for ``str`` inside ``target_new``."""
    return f"{inside}.{field}" if inside else field


def has_any(record: Record, *fields: str) -> bool:
    """Whether a record has one of the fields that tell a layout from the others, lest a missing one lead astray."""
    return not record.keys().isdisjoint(fields)


def value_of(record: Record, field: str, kind: type, called: str, inside: str = "") -> Any:
    """A field that must be there and of a kind.

    Raises:
        Fault: it is not.
    """
    if field not in record:
        raise Fault(name_of(field, inside), "is missing")
    if not isinstance(record[field], kind):
        raise Fault(name_of(field, inside), f"is no {called} but {type(record[field]).__name__}")
    return record[field]


def text(record: Record, field: str, inside: str = "") -> str:
    """A field that must be a text with something in it, without the space around it."""
    value = value_of(record, field, str, "text", inside).strip()
    if not value:
        raise Fault(name_of(field, inside), "is empty")
    return value


def optional_text(record: Record, field: str, inside: str = "") -> str | None:
    """A text that may be missing, null, blank or NaN (which is how tables write an empty cell)."""
    value = record.get(field)
    if value is None or value != value or value == "":
        return None
    return text(record, field, inside) if str(value).strip() else None


def mapping(record: Record, field: str, inside: str = "") -> Record:
    """A field that must be an object."""
    return value_of(record, field, dict, "object", inside)


def objects(record: Record, field: str, inside: str = "") -> list[Record]:
    """A field that must be a list of objects."""
    items = value_of(record, field, list, "list", inside)
    if not all(isinstance(item, dict) for item in items):
        raise Fault(name_of(field, inside), "holds an entry that is no object")
    return items


def text_list(record: Record, field: str, inside: str = "") -> tuple[str, ...]:
    """A field that must be a list of texts, none of them blank."""
    items = value_of(record, field, list, "list", inside)
    if not all(isinstance(item, str) and item.strip() for item in items):
        raise Fault(name_of(field, inside), "holds an entry that is no text or an empty one")
    return tuple(item.strip() for item in items)


def texts(value: Any) -> Iterator[str]:
    """The texts in nested lists of aliases, in order, blank ones left out."""
    if isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def first_text(value: Any) -> str | None:
    """The first of nested aliases, the one an answer is compared with."""
    return next(texts(value), None)


def asked_once(probes: Iterable[Probe]) -> tuple[Probe, ...]:
    """Of one prompt and family the first probe with an answer: some files ask once for each of several right ones.

    Asked for each of them, no greedy answer could be right every time.
    """
    found: dict[tuple[str, str], Probe] = {}
    for probe in probes:
        first = found.setdefault((probe.prompt, probe.family), probe)
        if first.target is None:
            found[probe.prompt, probe.family] = probe
    return tuple(found.values())


def subject_in(prompt: str, record: Record, field: str = "subject", inside: str = "") -> str:
    """The subject, which must stand in the prompt."""
    subject = text(record, field, inside)
    if not place_of(subject, prompt):
        raise Fault(name_of(field, inside), "does not occur in the prompt")
    return subject


def filled(record: Record, field: str, subject: str, inside: str = "") -> str:
    """A template that must have one gap, with the subject in it."""
    template = text(record, field, inside)
    if template.count("{}") != 1:
        raise Fault(name_of(field, inside), "has no single {} for the subject")
    return template.replace("{}", subject)


def nq_question(query: str) -> str:
    """A Natural Questions query as a question: without the prefix ``nq question:``, with the mark it lacks."""
    query = query.removeprefix("nq question: ").strip()
    return query if query.endswith("?") else f"{query}?"


def easyedit_portability(record: Record) -> tuple[Probe, ...]:
    """The question EasyEdit adds to records of zsRE and CounterFact: one more hop from the new answer."""
    if "portability" not in record:
        return ()
    added = mapping(record, "portability")
    question, answer = text(added, "New Question", "portability"), text(added, "New Answer", "portability")
    return (Probe(question, answer, "one_hop"),)


def other_answer(old: str, new: str) -> str | None:
    """The old answer, where it is another one.

    Some records (18 of the 998 of ``zsre_mend_train-1k.json``) are edited to the answer they have. They count as edits,
    as in published figures, but between two answers that are one there is nothing to compare.
    """
    return None if equal(old, new) else old
