"""Run the cells of a plan that are not there yet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from ibke.bench import cell as cells
from ibke.bench.cell import data_digest, describe, in_own_process
from ibke.bench.plan import Cell, Plan
from ibke.errors import FormatError
from ibke.files import find_file, to_json, write_atomically

CELLS = "cells"

Execute = Callable[[Cell, cells.Progress], dict[str, Any]]


class Progress(Protocol):
    """Told how far the work is."""

    def __call__(
        self, what: str, done: int, total: int | None, figures: str = "", seconds_left: float | None = None
    ) -> None:
        """Take in what is going on, how much of it is done, how much there is, which cell it is, and seconds left."""


def run(
    plan: Plan, folder: Path, progress: Progress | None = None, execute: Execute = in_own_process
) -> list[dict[str, Any]]:
    """Run what has no result yet, and write down each result as soon as it is there.

    A finished cell is not run again unless its data file holds something else now; one that failed is.

    Args:
        plan: what is to be measured.
        folder: where results go, one JSON file a cell in its folder ``cells``.
        progress: told how many cells are done, and how far the present one is.
        execute: evaluates a cell.

    Returns:
        a document for each cell of the plan: the report, with ``cell`` (what was asked for) and ``cell_seconds``; or
        only these and ``failed``, the reason.

    Raises:
        FormatError: the folder cannot be written.
    """
    home = folder / CELLS
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"it cannot be made ({error.strerror}).", str(home), "Choose another folder.") from None
    found = {cell.file: known for cell, known in zip(plan.cells, finished(plan, folder), strict=True) if known}
    todo = [cell for cell in plan.cells if "failed" in found.get(cell.file, {"failed": ""})]
    for number, cell in enumerate(todo):
        left = seconds_left(todo[number:], (document for document in found.values() if "failed" not in document))
        tick = _ticker(progress, len(plan.cells) - len(todo) + number, len(plan.cells), cell.title, left)
        began = time.perf_counter()
        try:
            document = execute(cell, tick)
        except Exception as error:  # whatever a method died of, the others go on
            document = {"failed": describe(error)}
        document |= {"cell": cell.spec, "cell_seconds": time.perf_counter() - began}
        _write(home / cell.file, document)
        found[cell.file] = document
    return [found[cell.file] for cell in plan.cells]


def finished(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """What :func:`run` would return, with nothing for cells that it would run, but for those that failed."""
    now = cache(lambda path: data_digest(file) if (file := find_file(path)).exists() else None)
    known = [load(folder / CELLS, cell) or {} for cell in plan.cells]
    return [{} if one and _old(one, now) else one for one in known]


def load(home: Path, cell: Cell) -> dict[str, Any] | None:
    """What is written down of a cell; None where there is nothing whole."""
    try:
        document = json.loads((home / cell.file).read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(document, dict) and document.get("cell") == cell.spec
    return document if whole and ("failed" in document or "scores" in document) else None


def _old(document: Mapping[str, Any], now: Callable[[str], str | None]) -> bool:
    """Whether a cell is of a data file that is known to hold something else now."""
    then, current = document.get("config", {}).get("data_sha256"), now(document["cell"]["data"]["path"])
    return None not in (then, current) and then != current


def seconds_left(todo: Iterable[Cell], done: Iterable[dict[str, Any]]) -> float | None:
    """How long some cells will take, by those of the same method and protocol, else of the method, else of any.

    Args:
        todo: the cells.
        done: documents of finished ones.

    Returns:
        seconds; None as long as nothing is known.
    """
    known: dict[tuple[str, ...], list[float]] = {}
    for document in done:
        spec, seconds = document["cell"], document["cell_seconds"]
        label, protocol = spec["contender"]["label"], spec["protocol"]
        for key in ((label, protocol), (label,), ()):
            known.setdefault(key, []).append(seconds)
    if not known:
        return None
    total = 0.0
    for cell in todo:
        label, protocol = cell.contender.label, str(cell.stage.protocol)
        total += fmean(next(known[key] for key in ((label, protocol), (label,), ()) if key in known))
    return total


def _ticker(progress: Progress | None, done: int, total: int, title: str, left: float | None) -> cells.Progress:
    """Passes on how far a cell is, and each time how far the whole is."""
    began = time.perf_counter()

    def tick(what: str, part: int, whole: int | None) -> None:
        if progress:
            now = None if left is None else max(left - (time.perf_counter() - began), 0.0)
            progress("Cells", done, total, title, now)
            progress(what.capitalize(), part, whole)

    tick("loading", 0, None)
    return tick


def _write(path: Path, document: dict[str, Any]) -> None:
    try:
        write_atomically(path, (to_json(document) + "\n").encode())
    except OSError as error:
        raise FormatError(f"it cannot be written ({error.strerror}).", str(path), "Make room for it.") from None
