"""What a ledger says of an edit, and of what was done with it."""

from __future__ import annotations

import getpass
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ibke.errors import LedgerError, RequestError
from ibke.request import EditRequest


@dataclass(frozen=True)
class Entry:
    """One edit as it was written down.

    Args:
        id: of the edit.
        at: when, UTC (ISO 8601).
        who: did it.
        method: of editing.
        editor: fingerprint of the editor's weights and settings; empty for none.
        parent: the last event when it was made.
        record: what :meth:`Edit.pack` says of it.
        scores: what was found when it was made.
        supersedes: edits it took the place of.
        latent_bytes, factors_bytes: size of its code and of its tensors on disk.
    """

    id: int
    at: str
    who: str
    method: str
    editor: str
    parent: int
    record: dict[str, Any]
    scores: dict[str, Any]
    supersedes: tuple[int, ...]
    latent_bytes: int
    factors_bytes: int

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """What was asked for.

        Raises:
            LedgerError: it is not what was written down.
        """
        return asked(self.record["requests"], f"edit {self.id}")


@dataclass(frozen=True)
class Event:
    """One thing that was done: ``commit``, ``revert`` or ``restore`` of an edit."""

    id: int
    at: str
    who: str
    action: str
    edit: int
    note: str


def asked(written: Iterable[Any], where: str) -> tuple[EditRequest, ...]:
    """Requests as an edit's record has them.

    Args:
        written: what :meth:`EditRequest.to_dict` gave.
        where: it stands, for messages.

    Raises:
        LedgerError: one is no request any more. It was when it was written down.
    """
    try:
        return tuple(EditRequest.from_dict(one) for one in written)
    except RequestError as error:
        what = f"what is written down is damaged: {error.what}"
        raise LedgerError(what, where, "Restore the ledger from a copy.") from error


def now() -> str:
    """The time as it is written down, UTC (ISO 8601)."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def user() -> str:
    """Whoever this process runs as."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a process without a user
        return "unknown"
