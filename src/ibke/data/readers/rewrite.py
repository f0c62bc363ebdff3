"""ROME's ``requested_rewrite``, which CounterFact and MQuAKE share."""

from __future__ import annotations

from typing import NamedTuple

from ibke.data.readers.fields import Record, filled, mapping, name_of, text


class Rewrite(NamedTuple):
    """One fact to change, in the order of an :class:`~ibke.request.EditRequest`'s first fields."""

    prompt: str
    target_new: str
    subject: str
    target_true: str


def read_rewrite(record: Record, inside: str) -> Rewrite:
    """A rewrite: a prompt with a gap, the subject that fills it, and objects as ``{"str": …, "id": …}``."""
    subject = text(record, "subject", inside)
    new, true = (
        text(mapping(record, field, inside), "str", name_of(field, inside)) for field in ("target_new", "target_true")
    )
    return Rewrite(filled(record, "prompt", subject, inside), new, subject, true)
