"""Files that edits of a kind cannot act without, as the maps that gated edits are told apart by: kept once for all.

Whoever opens a ledger is told where they are, so its edits act even where the editor that made them is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ibke.edit import Edit
from ibke.parts import part_class

if TYPE_CHECKING:
    from ibke.ledger.ledger import Ledger


def share_needs(ledger: Ledger, edit: Edit) -> None:
    """Keep what an edit's parts cannot act without, where it is not kept yet.

    Raises:
        LedgerError: there is no room.
    """
    known = {row["name"] for row in ledger.rows("SELECT name FROM shared")}
    for part in edit.parts.values():
        for name, path in part.needs().items():
            if path and name not in known:
                share(ledger, name, part.kind, path.read_bytes())


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
    """Let kinds of parts know where their files are kept."""
    for row in ledger.rows("SELECT * FROM shared"):
        part_class(row["kind"]).offer(row["name"], ledger.blobs.path(row["sha256"]))
