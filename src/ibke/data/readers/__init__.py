"""Readers of editing benchmarks: each turns the records of its original format into edit requests.

Records that cannot be used are never lost quietly: given a list, a reader names each of them there and goes on;
without one, the first of them raises :class:`~ibke.errors.RequestError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ibke.data.readers.conflictedit import conflictedit
from ibke.data.readers.counterfact import counterfact
from ibke.data.readers.entityquestions import entityquestions
from ibke.data.readers.fields import Fault, Record, Skipped, account, count_reasons, leave_out
from ibke.data.readers.files import records
from ibke.data.readers.knowedit import knowedit
from ibke.data.readers.mquake import mquake
from ibke.data.readers.own import csv, jsonl
from ibke.data.readers.qaedit import qaedit
from ibke.data.readers.rippleedits import rippleedits
from ibke.data.readers.uniedit import uniedit
from ibke.data.readers.wikibigedit import wikibigedit
from ibke.data.readers.zsre import zsre
from ibke.errors import RequestError
from ibke.request import EditRequest

__all__ = ["READERS", "STRICT", "Skipped", "account", "count_reasons", "read", "titles"]

Reader = Callable[[Path, "list[Skipped] | None"], Iterator[EditRequest]]
Converter = Callable[[Record], Iterator["EditRequest | Fault"]]


def read(path: str | Path, format: str, skipped: list[Skipped] | None = None) -> Iterator[EditRequest]:
    """Stream the edit requests of a benchmark file, or of a folder of such files.

    Requests that come from one record share a ``case``.

    Args:
        path: the file or folder.
        format: a key of ``READERS``.
        skipped: filled with what could not be used; without it, and always in a format of ``STRICT``, the first of
            that is an error.

    Raises:
        RequestError: unknown format, a file that cannot be read or has another shape, or a faulty record.
    """
    if format not in READERS:
        near = difflib.get_close_matches(format, READERS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise RequestError(f"unknown data format {format!r}.", str(path), f"{hint}Known: {', '.join(READERS)}.")
    return READERS[format](Path(path), skipped)


def titles() -> dict[str, str]:
    """What each format is, in one line."""
    return {name: (reader.__doc__ or "").split("\n")[0] for name, reader in READERS.items()}


def _benchmark(convert: Converter) -> Reader:
    """The reader of a format, given what turns one of its records into requests and faults."""

    def read_all(path: Path, skipped: list[Skipped] | None) -> Iterator[EditRequest]:
        any_request, fault = False, ""
        for place, record in records(path):
            requests, faults = _convert(convert, record)
            for found in faults:
                leave_out(skipped, str(place), found)
                fault = fault or found.what
            any_request = any_request or bool(requests)
            yield from requests if len(requests) == 1 else (replace(item, case=place.case) for item in requests)
        if not any_request:
            raise RequestError(
                f"no record has the shape of this format; the first: {fault}",
                str(path),
                "Check that file and format belong together.",
            )

    read_all.__doc__ = convert.__doc__
    return read_all


def _convert(convert: Converter, record: object) -> tuple[list[EditRequest], list[RequestError]]:
    requests: list[EditRequest] = []
    faults: list[RequestError] = []
    try:
        if isinstance(record, Fault):
            raise record
        if not isinstance(record, dict):
            raise Fault("record", f"is no object but {type(record).__name__}")
        for item in convert(record):
            if isinstance(item, Fault):
                faults.append(item)
            else:
                requests.append(item)
    except RequestError as error:
        faults.append(error)
    except RecursionError:
        faults.append(Fault("record", "is nested too deeply"))
    return requests, faults


STRICT = ("jsonl", "csv")
"""People's own formats, of which one faulty line or row is an error."""

READERS: dict[str, Reader] = {
    "jsonl": jsonl,
    "csv": csv,
    "counterfact": _benchmark(counterfact),
    "zsre": _benchmark(zsre),
    "knowedit": _benchmark(knowedit),
    "mquake": _benchmark(mquake),
    "rippleedits": _benchmark(rippleedits),
    "uniedit": _benchmark(uniedit),
    "wikibigedit": _benchmark(wikibigedit),
    "qaedit": _benchmark(qaedit),
    "conflictedit": _benchmark(conflictedit),
    "entityquestions": entityquestions,
}
