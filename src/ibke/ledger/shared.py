"""Files that edits of a kind cannot act without, as the maps that gated edits are told apart by: kept once for all.

Whoever opens a ledger is told where they are, so its edits act even where the editor that made them is gone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ibke.edit import Edit
from ibke.errors import FormatError, LedgerError
from ibke.parts import part_class

if TYPE_CHECKING:
    from ibke.ledger.ledger import Ledger


def share_needs(ledger: Ledger, edit: Edit) -> None:
    """Keep what an edit's parts cannot act without, where it is not kept yet.

    Raises:
        LedgerError: there is no room, or it cannot be read.
    """
    known = {row["name"] for row in ledger.rows("SELECT name FROM shared")}
    for part in edit.parts.values():
        for name, path in part.needs().items():
            if path and name not in known:
                share(ledger, name, part.kind, _read(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        what = f"what the edit cannot act without cannot be read ({error.strerror or error})."
        raise LedgerError(what, str(path), "Put it back, or load the editor that made the edit again.") from error


def share(ledger: Ledger, name: str, kind: str, raw: bytes) -> None:
    """Keep such a file.

    Args:
        ledger: where, within its :meth:`Ledger.writing`.
        name: that edits know it by.
        kind: of the parts that need it.
        raw: what is in it.

    Raises:
        FormatError: there is no such kind.
        LedgerError: there is no room.
    """
    sha256 = ledger.blobs.write(raw)
    ledger.base.execute("INSERT OR IGNORE INTO blobs VALUES (?, ?)", (sha256, len(raw)))
    ledger.base.execute("INSERT OR IGNORE INTO shared VALUES (?, ?, ?)", (name, kind, sha256))
    part_class(kind).offer(name, ledger.blobs.path(sha256))


def offer_shared(ledger: Ledger) -> None:
    """Let kinds of parts know where their files are kept.

    Raises:
        LedgerError: what is written down of one is damaged, or its kind is one of a newer version.
    """
    for row in ledger.rows("SELECT * FROM shared"):
        try:
            part_class(row["kind"]).offer(row["name"], ledger.blobs.path(row["sha256"]))
        except (FormatError, TypeError) as error:
            what = f"what is written down of the file {row['name']!r} of kind {row['kind']!r} makes no sense."
            todo = "Use the version of ibke that wrote it, or restore it from a copy."
            raise LedgerError(what, str(ledger.folder), todo) from error
