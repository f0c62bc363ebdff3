"""People's own requests: JSON Lines and CSV. Both are strict: a faulty line or row is an error."""

from __future__ import annotations

import csv as tables
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ibke.data.readers.fields import Fault, Skipped
from ibke.errors import RequestError
from ibke.request import EditRequest, placed_requests

LISTS = ("rephrase_prompts", "locality", "portability")


def jsonl(path: Path, skipped: list[Skipped] | None = None) -> Iterator[EditRequest]:
    """Your own requests, a JSON object a line.

    Raises:
        RequestError: the file cannot be read, or a line is not a request; names file, line and field.
    """
    for where, request in placed_requests(path):
        _name_unanswered(request, where, skipped)
        yield request


def csv(path: Path, skipped: list[Skipped] | None = None) -> Iterator[EditRequest]:
    """Your own requests, a row of a CSV file each, with a header.

    The columns are the fields of :class:`~ibke.request.EditRequest`, in any order; an empty cell is a field left out.
    Lists are JSON arrays, or texts with ``|`` between them. Rows are counted from 1, the header being the first.

    Raises:
        RequestError: the file cannot be read, or a row is not a request; names file, row and field.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = tables.DictReader(lines, strict=True)
            columns = rows.fieldnames or ()
            for column in columns:
                if columns.count(column) > 1:
                    todo = "Give several wordings in one cell, with | between them."
                    raise RequestError(f"has two columns {column!r}.", str(path), todo)
                if column not in EditRequest.__dataclass_fields__:
                    known = ", ".join(EditRequest.__dataclass_fields__)
                    raise RequestError(f"has an unknown column {column!r}.", str(path), f"Known: {known}.")
            for number, row in enumerate(rows, start=2):
                where = f"{path}, row {number}"
                try:
                    request = _request(row)
                except RequestError as error:
                    raise RequestError(error.what, where, error.todo) from None
                _name_unanswered(request, where, skipped)
                yield request
    except (OSError, UnicodeDecodeError, tables.Error) as error:
        raise RequestError(
            f"cannot be read ({error}).", str(path), "Check the path and that it is UTF-8 CSV."
        ) from None


def _name_unanswered(request: EditRequest, where: str, skipped: list[Skipped] | None) -> None:
    """Name portability prompts without an answer: no fault, a list of prompts may be texts, but nothing to measure."""
    if skipped is not None:
        fault = Fault("portability", "asks a question without an answer")
        skipped += [Skipped(where, fault.field, fault.what) for probe in request.portability if not probe.answer]


def _request(row: dict[str | Any, Any]) -> EditRequest:
    if None in row:
        raise RequestError("has more cells than the header.", "row", "Quote texts that hold a comma.")
    cells = {field: cell.strip() for field, cell in row.items() if cell and cell.strip()}
    return EditRequest.from_dict(
        {field: _items(field, cell) if field in LISTS else cell for field, cell in cells.items()}
    )


def _items(field: str, cell: str) -> list[Any]:
    if not cell.startswith("["):
        return [item.strip() for item in cell.split("|") if item.strip()]
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        todo = 'Write ["one", "two"], or one | two.'
        raise RequestError(f"`{field}` is not a valid JSON array ({error}).", "row", todo) from None
