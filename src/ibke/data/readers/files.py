"""Files of records, read a record at a time: a JSON array, a JSON object of records, JSON Lines, or a folder of them.

Nothing but the record in hand, and the piece of the file it stands in, is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ibke.data.readers.fields import Fault
from ibke.errors import RequestError

CHUNK = 1 << 20  # characters
SUFFIXES = (".json", ".jsonl")  # of what is read in a folder; the rest is copies and leftovers
DECODER = json.JSONDecoder()


class Place(NamedTuple):
    """Where a record stands: its file, and its index from 0, its key, or its line from 1."""

    file: Path
    unit: str
    key: int | str

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.key}"

    @property
    def case(self) -> str:
        """A short name for the requests of this record."""
        return f"{self.file.stem}/{self.key}"


def records(path: Path) -> Iterator[tuple[Place, Any]]:
    """Every record of a file, or of all JSON files of a folder; a line that is not JSON comes as a fault.

    Raises:
        RequestError: a file cannot be read, is not JSON, or holds no record.
    """
    for file in files_of(path):
        try:
            with file.open(encoding="utf-8-sig") as stream:
                empty = True
                for record in _lines(stream, file) if _is_lines(stream, file) else _values(stream, file):
                    empty = False
                    yield record
        except OSError as error:
            raise RequestError(f"cannot be read ({error.strerror}).", str(file), "Check the path.") from None
        except UnicodeDecodeError as error:
            raise RequestError(f"is not UTF-8 ({error.reason}).", str(file), "Convert it, or fetch it again.") from None
        if empty:
            raise RequestError("holds no record.", str(file), "Check that file and format belong together.")


def files_of(path: Path, pattern: str = "*.json*") -> list[Path]:
    """The file itself, or the matching files of a folder, by name.

    Raises:
        RequestError: a folder without any.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob(pattern) if not file.name.startswith(".") and file.suffix in SUFFIXES)
    if not files:
        raise RequestError(f"has no file {pattern}.", str(path), "Check the folder.")
    return files


def _is_lines(stream: TextIO, file: Path) -> bool:
    """Whether a file is JSON Lines: by its name, or because its first line is an object that is a record of its own.

    That is one which other lines follow, or of whose values most are no objects, as those of an object of records are.
    """
    head = next((line for line in iter(lambda: stream.readline(CHUNK), "") if line.strip()), "")
    try:
        first = json.loads(head) if head.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        first = None
    own = False
    if isinstance(first, dict):
        inner = sum(isinstance(value, dict) for value in first.values())
        own = 2 * inner < len(first) or any(line.strip() for line in stream)
    elif head.lstrip().startswith("{") and head.rstrip().endswith("}"):  # broken, and the next is one all the same
        own = next((line for line in stream if line.strip()), "").lstrip().startswith("{")
    stream.seek(0)
    return own or file.suffix == ".jsonl"


def _lines(stream: TextIO, file: Path) -> Iterator[tuple[Place, Any]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError:
                value = Fault("line", "is not valid JSON")
            except RecursionError:
                value = Fault("line", "is nested too deeply")
            yield Place(file, "line", number), value


def _values(stream: TextIO, file: Path) -> Iterator[tuple[Place, Any]]:
    """The elements of the array, or the values of the object, that a file holds."""
    text, done = _Text(stream), 0
    try:
        close = {"[": "]", "{": "}"}.get(text.take(), "")
        if not close:
            raise RequestError("is no list of records.", str(file), "Check that file and format belong together.")
        mark = text.take() if text.peek() == close else ","
        while mark == ",":
            key: int | str = done
            if close == "}":
                key = text.key()
            yield Place(file, "record", key), text.value()
            done, mark = done + 1, text.take()
        if mark != close:
            raise ValueError
        if text.peek():
            raise RequestError(f"goes on after its closing {close}.", str(file), "Make it one list of records.")
    except (ValueError, RecursionError) as error:
        what = "is not valid JSON" if isinstance(error, ValueError) else "is nested too deeply"
        raise RequestError(f"{what} from record {done} on.", str(file), "Fetch the file again.") from None


class _Text:
    """The part of a stream that is being read; grows only as far as a value needs it."""

    def __init__(self, stream: TextIO):
        self.stream, self.text, self.at, self.ended = stream, "", 0, False

    def _more(self) -> None:
        """Twice as much as is left, so that a value of any length costs no more than a few readings of it."""
        rest = self.text[self.at :]
        chunk = self.stream.read(max(CHUNK, len(rest)))
        self.text, self.at, self.ended = rest + chunk, 0, not chunk

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def take(self) -> str:
        """The next character that is no space, left behind."""
        character = self.peek()
        self.at += 1
        return character

    def key(self) -> str:
        """The next key of an object, its colon left behind."""
        key = self.value()
        if not isinstance(key, str) or self.take() != ":":
            raise ValueError
        return key

    def value(self) -> Any:
        """The next JSON value. One that ends with what has been read may go on in what follows."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:
                    self.at = end
                    return value
            except ValueError:
                if self.ended:
                    raise
            self._more()
