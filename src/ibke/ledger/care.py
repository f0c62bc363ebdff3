"""Looking after a ledger: whether all of it is still what it was, and what nothing needs any more."""

from __future__ import annotations

import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import torch

from ibke.edit import Edit
from ibke.editors.base import Editor
from ibke.errors import IBKEError, LedgerError
from ibke.ledger.ledger import Ledger
from ibke.ledger.schema import broken_seals, prompts_of
from ibke.session import set_aside

Progress = Callable[[int, int], None]

# Of its length a tensor may differ that is made again, perhaps on another machine or in a batch of another size.
SAME = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.15}
GRACE = 3600.0  # seconds for which a file that nothing names may belong to an edit that is just being written down


def verify(ledger: Ledger, progress: Progress | None = None) -> list[str]:
    """Everything that is wrong with a ledger, in words; nothing where it is as it was written.

    Looks at the database's own structure, that what was written down is what was sealed, that every file is there and
    holds what its name says, that every edit can be put together from them, and all in force as one.

    Args:
        ledger: what to look at, outside its :meth:`Ledger.reading`.
        progress: told how many edits are done, and how many there are.
    """
    problems: list[str] = []
    try:
        with ledger.reading():  # else what is written meanwhile looks like damage
            for looked_at in (_database(ledger), _shared(ledger), _edits(ledger, progress)):
                for problem in looked_at:
                    problems.append(problem)  # one by one, so that they are told even where the next cannot be read
            if not problems:
                problems += _together(ledger)
    except (LedgerError, sqlite3.DatabaseError) as error:
        problems.append(f"the database cannot be read any further: {error}")
    return problems


def _database(ledger: Ledger) -> Iterator[str]:
    # The quick check does not compare indexes with their tables, and what is in force is read from an index.
    yield from (f"{ledger.folder}: {row[0]}" for row in ledger.rows("PRAGMA integrity_check") if row[0] != "ok")
    for row in ledger.rows("PRAGMA foreign_key_check"):
        yield f"{ledger.folder}: a row of {row[0]} points nowhere."
    for row in ledger.rows("SELECT id FROM edits WHERE id NOT IN (SELECT edit FROM events WHERE action = 'commit')"):
        yield f"edit {row[0]} was never put in force."
    for event in broken_seals(ledger.base):
        yield f"event {event} is not what it was when it was written down; see `ibke log`."


def _shared(ledger: Ledger) -> Iterator[str]:
    """Files that edits of a kind have in common and that are not what they were."""
    for row in ledger.rows("SELECT name, sha256 FROM shared"):
        try:
            ledger.blobs.read(row["sha256"])
        except LedgerError as error:
            yield f"{row['name']}, which edits cannot act without: {error}"


def _edits(ledger: Ledger, progress: Progress | None) -> Iterator[str]:
    shared = {row["name"] for row in ledger.rows("SELECT name FROM shared")}
    asks = defaultdict[int, set[str]](set)
    for row in ledger.rows("SELECT edit, prompt FROM asks"):
        asks[row["edit"]].add(row["prompt"])
    numbers = [row[0] for row in ledger.rows("SELECT id FROM edits ORDER BY id")]
    for done, number in enumerate(numbers, start=1):
        try:
            edit = ledger.load(number)
            for name in {name for part in edit.parts.values() for name in part.needs()} - shared:
                yield f"edit {number} cannot act without {name}, which is not kept."
            if edit.info.fingerprint != ledger.fingerprint:
                yield f"edit {number} is of another model, {edit.info.fingerprint}."
            if asks[number] != prompts_of(ledger.entry(number).record):
                yield f"edit {number} is noted under other prompts than its own."
        except IBKEError as error:
            yield f"edit {number}: {error}"
        if progress:
            progress(done, len(numbers))


def _together(ledger: Ledger) -> Iterator[str]:
    try:
        ledger.state()
    except IBKEError as error:
        yield f"the edits in force do not go together: {error}"


class Replayed(NamedTuple):
    """What came of making edits again.

    Args:
        problems: which are not what they were, in words.
        left_out: which could not be made again and are no worse for it, and why.
    """

    problems: list[str]
    left_out: list[str]


def replay(ledger: Ledger, editor: Editor, progress: Progress | None = None) -> Replayed:
    """Make every edit again from its request and its code, and compare.

    Rounding decides how near they come, so the model should be of the type of numbers that they were made in.

    Raises:
        LedgerError: a file is missing or has changed; see :func:`verify`.
    """
    found = Replayed([], [])
    numbers = [row[0] for row in ledger.rows("SELECT id FROM edits ORDER BY id")]
    for done, number in enumerate(numbers, start=1):
        edit, again = ledger.load(number), None
        if edit.info.method == editor.name and len(edit.requests) == 1:
            with set_aside(editor.lm):
                again = editor.rebuild(edit)
        if again is None:
            what = (
                f"it is by {edit.info.method}, of {len(edit.requests)} request(s), and {editor.name} has no code for it"
            )
            found.left_out.append(f"edit {number} was not made again: {what}.")
        else:
            found.problems.extend(f"edit {number}: {text}" for text in _changed(ledger, number, edit, again, editor))
        if progress:
            progress(done, len(numbers))
    return found


def _changed(ledger: Ledger, number: int, edit: Edit, again: Edit, editor: Editor) -> list[str]:
    found = differences(edit, again, SAME.get(editor.lm.dtype, max(SAME.values())))
    mark = ledger.entry(number).editor
    other = found and mark not in ("", editor.mark)
    return [f"{found[0]} It is by another editor or settings ({mark}, here {editor.mark})."] if other else found


def differences(kept: Edit, again: Edit, same: float) -> list[str]:
    """Where two edits' tensors are not the same but for rounding, up to ``same`` of their length, in words."""
    mine, theirs = kept.tensors(), again.tensors()
    if mine.keys() != theirs.keys():
        return [f"made again it has {', '.join(theirs) or 'nothing'}."]
    found = []
    for name, tensor in mine.items():
        one, other = tensor.double(), theirs[name].double()  # some hold whole numbers
        if one.shape != other.shape:
            found.append(f"made again, {name} is {list(other.shape)} instead of {list(one.shape)}.")
            continue
        far = float((one - other).norm() / one.norm().clamp_min(1e-12))
        if not far <= same:
            found.append(f"made again, {name} differs by {far:.1e} of its length.")
    return found


def gc(ledger: Ledger, grace: float = GRACE) -> tuple[int, int]:
    """Delete files that no edit names, as an interrupted writer leaves them; returns how many, and their bytes.

    Args:
        ledger: it is locked meanwhile.
        grace: seconds; younger files are left alone.
    """
    count, size = 0, 0
    with ledger.writing():
        named = {ledger.blobs.path(row[0]) for row in ledger.rows("SELECT sha256 FROM blobs")}
        for path in ledger.blobs:
            with suppress(FileNotFoundError):  # another writer's, which has its name by now
                about = path.stat()
                if path not in named and time.time() - about.st_mtime >= grace:
                    path.unlink()
                    count, size = count + 1, size + about.st_size
    return count, size
