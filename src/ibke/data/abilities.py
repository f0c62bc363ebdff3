"""Multiple-choice questions of what a model can do, read from the files they are published in.

A question is asked by likelihood: of its choices, the one the model finds likeliest is its answer.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ibke.errors import FormatError

OWN = Path(__file__).with_name("own.json")
"""66 questions of ours, of the three published kinds, for where there are no others."""


@dataclass(frozen=True)
class Choice:
    """A question with its choices.

    Args:
        prompt: what stands before each choice.
        choices: the answers, at least two.
        right: index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    right: int


def read_abilities(path: Path, limit: int | None = None, seed: int = 0) -> list[Choice]:
    """The questions of one file, known by its fields.

    Args:
        path: BoolQ's JSON Lines, GLUE's table of sentence pairs (``sentence1``, ``sentence2``, ``label``),
            TruthfulQA's CSV, or a JSON list as in ``OWN``: objects with ``prompt``, ``choices`` and ``right``.
        limit: draw at most so many.
        seed: of the draw.

    Raises:
        FormatError: the file cannot be read, is none of these, or a record lacks a field or has one of another kind;
            names the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            found = list(_reader(path, first)(path, file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"it cannot be read ({error}).", str(path), "Give a text file in UTF-8.") from None
    if not found:
        raise FormatError("there is no question in it.", str(path), "Give a file that holds some.")
    return found if limit is None or limit >= len(found) else random.Random(seed).sample(found, limit)


def _reader(path: Path, first: str) -> Callable[[Path, Iterable[str]], Iterator[Choice]]:
    if first.startswith("{") and '"passage"' in first:
        return _boolq
    if first.startswith("["):
        return _listed
    if {"sentence1", "sentence2", "label"} <= set(first.rstrip("\r\n").split("\t")):
        return _pairs
    if {"Question", "Best Answer", "Incorrect Answers"} <= set(next(csv.reader([first]), [])):
        return _truthful
    raise FormatError(
        "its fields are none of those known.",
        str(path),
        "Known are BoolQ (JSON Lines), sentence pairs (TSV), TruthfulQA (CSV) and a JSON list of questions.",
    )


def _boolq(path: Path, lines: Iterable[str]) -> Iterator[Choice]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt = f"{_text(record['passage'])}\nQuestion: {_text(record['question'])}?\nAnswer:"
            right = record["answer"]
            if not isinstance(right, bool):  # a text that says "no" would count as yes
                raise TypeError(f"the answer is {right!r}, neither true nor false")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _fault(path, number, error) from None
        yield Choice(prompt, ("no", "yes"), int(right))


def _listed(path: Path, lines: Iterable[str]) -> Iterator[Choice]:
    try:
        records = json.loads("".join(lines))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"this is not valid JSON ({error}).", str(path), "Mend it.") from None
    for number, record in enumerate(records, 1):
        try:
            prompt, choices, right = _text(record["prompt"]), record["choices"], record["right"]
            if not isinstance(choices, list) or type(right) is not int:
                raise TypeError(f"`choices` is no list, or `right` no index but {right!r}")
            if len(choices) < 2 or not 0 <= right < len(choices):
                raise ValueError(f"{len(choices)} choices, right is {right}")
            choice = Choice(prompt, tuple(map(_text, choices)), right)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"it is no question ({error!r}).",
                f"{path}, record {number}",
                "Give `prompt`, `choices` (two or more) and `right` (the index of one).",
            ) from None
        yield choice


def _pairs(path: Path, lines: Iterable[str]) -> Iterator[Choice]:
    # Quotation marks are text in these tables.
    for number, record in enumerate(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 2):
        try:
            prompt = f"{_text(record['sentence1'])}\nQuestion: {_text(record['sentence2'])} True or False?\nAnswer:"
            right = {"not_entailment": 0, "entailment": 1}[record["label"]]
        except (ValueError, KeyError, TypeError) as error:
            raise _fault(path, number, error) from None
        yield Choice(prompt, ("False", "True"), right)


def _truthful(path: Path, lines: Iterable[str]) -> Iterator[Choice]:
    for number, record in enumerate(csv.DictReader(lines), 2):
        try:
            wrong = [text.strip() for text in record["Incorrect Answers"].split(";") if text.strip()]
            best = record["Best Answer"].strip()
            prompt = f"Q: {_text(record['Question']).strip()}\nA:"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _fault(path, number, error) from None
        if wrong and best:
            yield Choice(prompt, (best, *wrong), 0)


def _text(value: object) -> str:
    """A text that a model can be asked: with something in it, and no half of a character.

    Raises:
        TypeError: it is no text.
        ValueError: it is empty, or cannot be encoded.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    if not value.strip():
        raise ValueError("a text is empty")
    value.encode()
    return value


def _fault(path: Path, number: int, error: Exception) -> FormatError:
    return FormatError(f"the record has not the fields of its kind ({error!r}).", f"{path}, line {number}", "Mend it.")
