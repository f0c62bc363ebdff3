"""Readers of editing benchmarks: each turns the records of its original format into edit requests.

Records that cannot be used are never lost quietly: given a list, a reader names each of them there and goes on;
without one, the first of them raises :class:`~ibke.errors.RequestError`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ibke.errors import RequestError
from ibke.request import EditRequest, Probe, read_requests

NQ_PREFIX = "nq question: "

PORTABILITY_FAMILIES = {"Reasoning": "one_hop", "Subject_Aliasing": "alias", "Logical_Generalization": "reversal"}
LOCALITY_FAMILIES = {"Relation_Specificity": "same_subject", "Forgetfulness": "forgetfulness"}


class Skipped(NamedTuple):
    """A record, or a part of one, that could not be used."""

    where: str
    why: str


def read(path: str | Path, format: str, skipped: list[Skipped] | None = None) -> Iterator[EditRequest]:
    """Stream the edit requests of a benchmark file.

    Args:
        path: the file.
        format: a key of ``READERS``.
        skipped: filled with the records that could not be used; without it the first of them is an error. The
            ``jsonl`` format is people's own and always strict.

    Raises:
        RequestError: unknown format, a file that cannot be read or has another shape, or a faulty record.
    """
    if format not in READERS:
        near = difflib.get_close_matches(format, READERS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise RequestError(f"unknown data format {format!r}.", str(path), f"{hint}Known: {', '.join(READERS)}.")
    return READERS[format](Path(path), skipped)


def counterfact(record: dict[str, Any]) -> EditRequest:
    """CounterFact, one paraphrase and one neighbour a record (MEND's layout).

    ``rephrase_prompt`` is the paraphrase; ``locality_prompt`` asks the same relation of another subject.
    """
    return EditRequest(
        prompt=_text(record, "prompt"),
        target_new=_text(record, "target_new"),
        subject=_text(record, "subject"),
        target_true=_text(record, "ground_truth"),
        rephrase_prompts=(_text(record, "rephrase_prompt"),),
        locality=(
            Probe(_text(record, "locality_prompt"), _text(record, "locality_ground_truth"), family="same_relation"),
        ),
    )


def zsre(record: dict[str, Any]) -> EditRequest:
    """ZsRE, MEND's layout: ``src`` is edited to ``alt``, ``loc`` is an unrelated Natural Questions query.

    The query loses its prefix ``nq question:`` and gains the question mark it lacks.
    """
    query = _text(record, "loc").removeprefix(NQ_PREFIX).strip()
    query = query if query.endswith("?") else f"{query}?"
    return EditRequest(
        prompt=_text(record, "src"),
        target_new=_text(record, "alt"),
        subject=_text(record, "subject"),
        target_true=next(iter(_texts(record.get("answers"))), None) or _text(record, "pred"),
        rephrase_prompts=(_text(record, "rephrase"),),
        locality=(Probe(query, _text(record, "loc_ans"), family="unrelated"),),
    )


def knowedit(record: dict[str, Any]) -> EditRequest:
    """KnowEdit (WikiData counterfact and recent).

    The format has no paraphrases, so generality is asked through other names of the subject (``Subject_Aliasing``)
    where their answer is the new target, and otherwise through the prompt's question form (:func:`question_form`).
    Of an answer's aliases the first is its target.
    """
    prompt, target = _text(record, "prompt"), _text(record, "target_new")
    portability = tuple(_probes(record, "portability", PORTABILITY_FAMILIES))
    aliases = (
        p.prompt for p in portability if p.family == "alias" and (p.target or "").casefold() == target.casefold()
    )
    question = question_form(prompt)
    return EditRequest(
        prompt=prompt,
        target_new=target,
        subject=_text(record, "subject"),
        target_true=next(iter(_texts(record.get("ground_truth"))), None),
        rephrase_prompts=tuple(dict.fromkeys(aliases)) or ((question,) if question else ()),
        locality=tuple(_probes(record, "locality", LOCALITY_FAMILIES)),
        portability=portability,
    )


def question_form(prompt: str) -> str | None:
    """A cloze statement as a question: ``The gender of X is`` becomes ``What is the gender of X?``.

    None for a statement of another build.
    """
    for pattern, question in _QUESTIONS:
        if match := re.fullmatch(pattern, prompt.strip()):
            return match.expand(question)
    return None


_QUESTIONS = (
    (r"The (.+) (is|are|was|were)", r"What \2 the \1?"),
    (r"(.+) follows", r"What does \1 follow?"),
    (r"(.+) is followed by", r"What is \1 followed by?"),
)


def _fault(field: str, why: str) -> RequestError:
    return RequestError(f"`{field}` {why}.")


def _text(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if field not in record:
        raise _fault(field, "is missing")
    if not isinstance(value, str):
        raise _fault(field, f"is no text but {type(value).__name__}")
    if not value.strip():
        raise _fault(field, "is empty")
    return value.strip()


def _texts(value: Any) -> Iterator[str]:
    """The texts in nested lists of aliases, in order, blank ones left out."""
    if isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _probes(record: dict[str, Any], field: str, families: dict[str, str]) -> Iterator[Probe]:
    groups = record.get(field) or {}
    if not isinstance(groups, dict):
        raise _fault(field, "is no object")
    for name, items in groups.items():
        if name not in families:
            raise _fault(field, f"has the unknown family {name!r}")
        if not isinstance(items or [], list):
            raise _fault(f"{field}.{name}", "is no list")
        for item in items or []:
            if not isinstance(item, dict):
                raise _fault(f"{field}.{name}", "holds an entry that is no object")
            yield Probe(_text(item, "prompt"), next(_texts(item.get("ground_truth")), None), families[name])


def _load_records(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_bytes())
    except OSError as error:
        raise RequestError(f"cannot be read ({error.strerror}).", str(path), "Check the path.") from None
    except ValueError as error:
        raise RequestError(f"is not valid JSON ({error}).", str(path), "Fetch the file again.") from None
    if not isinstance(records, list) or not records:
        raise RequestError("is no list of records.", str(path), "Check that file and format belong together.")
    return records


def _reader(convert: Callable[[dict[str, Any]], EditRequest]) -> Reader:
    def read_list(path: Path, skipped: list[Skipped] | None) -> Iterator[EditRequest]:
        records, faults = _load_records(path), []
        for index, record in enumerate(records):
            try:
                if not isinstance(record, dict):
                    raise _fault("record", f"is no object but {type(record).__name__}")
                request = convert(record)
            except RequestError as error:
                fault = Skipped(f"{path}, record {index}", error.what)
                if skipped is None:
                    raise RequestError(fault.why, fault.where, "Mend it, or let faulty records be skipped.") from None
                faults.append(fault)
                skipped.append(fault)
            else:
                yield request
        if len(faults) == len(records):
            raise RequestError(
                f"no record has the shape of this format; the first: {faults[0].why}",
                str(path),
                "Check that file and format belong together.",
            )

    return read_list


Reader = Callable[[Path, "list[Skipped] | None"], Iterator[EditRequest]]

READERS: dict[str, Reader] = {
    "counterfact": _reader(counterfact),
    "zsre": _reader(zsre),
    "knowedit": _reader(knowedit),
    "jsonl": lambda path, _: read_requests(path),
}
