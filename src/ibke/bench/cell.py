"""One cell: a method on some edits, in a process of its own.

A process of its own makes peak memory the method's and not that of whoever ran before it, and leaves the bench standing
when the system ends it for want of memory.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from ibke.bench.plan import Cell
from ibke.errors import IBKEError

# (what is going on, how much of it is done, how much there is)
Progress = Callable[[str, int, int | None], None]


class CellError(IBKEError):
    """A cell has no result."""


def evaluate_cell(cell: Cell, progress: Progress) -> dict[str, Any]:
    """Load everything and evaluate, in this process.

    Returns:
        a report as :func:`~ibke.evaluation.protocols.evaluate` makes it.

    Raises:
        IBKEError: whatever keeps the method from it.
    """
    from ibke.data.readers import Skipped, account, read
    from ibke.editors.base import editor_for
    from ibke.evaluation.baseline import Baseline
    from ibke.evaluation.protocols import evaluate, sample
    from ibke.evaluation.side_effects import Battery
    from ibke.files import find_file
    from ibke.models import load_model

    given, contender, data = cell.conditions, cell.contender, cell.data
    progress("loading", 0, None)
    skipped: list[Skipped] = []
    requests = sample(list(read(find_file(data.path), data.format, skipped)), cell.stage.limit, cell.seed, "random")
    lm = load_model(given.model, device=given.device, dtype=given.dtype, modules=given.modules or None)
    editor = editor_for(lm, contender.method, contender.editor, **contender.settings)
    baseline = Baseline.in_cache(lm)
    return evaluate(
        lm,
        editor,
        requests,
        cell.stage.protocol,
        frames=[cast(Any, frame) for frame in given.frames],
        edit_frame=cast(Any, given.edit_frame),
        battery=Battery.of(lm, given.beside, baseline) if given.beside else None,
        baseline=baseline,
        config={
            "data": data.name,
            "format": data.format,
            "data_sha256": data_digest(find_file(data.path)),
            "limit": cell.stage.limit,
            "seed": cell.seed,
            "order": "random",
            "editor": contender.editor,
            "settings": cell.spec["contender"]["settings"],
            **account(skipped),
        },
        progress=progress,
    )


def data_digest(path: Path) -> str:
    """What a file holds, or the files of a folder (SHA-256)."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as content:
                found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()


def in_own_process(cell: Cell, progress: Progress) -> dict[str, Any]:
    """:func:`evaluate_cell` in a process that ends with this one, however this one ends.

    Raises:
        CellError: it failed, or its process was ended.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(cell, there), daemon=True)
    process.start()
    there.close()
    try:
        while True:
            kind, content = here.recv()
            if kind == "report":
                return content
            if kind == "failed":
                raise CellError(content)
            progress(*content)
    except EOFError:
        process.join()
        raise CellError(f"its process ended with code {process.exitcode} (−9: perhaps out of memory).") from None
    finally:
        process.kill()
        process.join()
        here.close()


def describe(error: Exception) -> str:
    """What a failed cell says of itself, on one line."""
    return " ".join((str(error) if isinstance(error, IBKEError) else f"{type(error).__name__}: {error}").split())


def _work(cell: Cell, to: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts both; the parent ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        report = evaluate_cell(cell, lambda *what: to.send(("progress", what)))
    except Exception as error:  # a method may fail in any way, and the others go on
        to.send(("failed", describe(error)))
    else:
        to.send(("report", report))
    to.close()


def _end_with_parent() -> None:
    # A parent killed outright has no chance to end its children.
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)
