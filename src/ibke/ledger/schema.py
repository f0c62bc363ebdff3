"""The tables of a ledger, and how those of older versions become these.

Rows are added and never changed: what is in force is a function of all that was ever written down.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ibke.errors import LedgerError
from ibke.evaluation.metrics import signed

PATIENCE = 600.0  # seconds one writer waits for another, who may be checking an edit meanwhile

MIGRATIONS = (
    """
    CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE blobs (sha256 TEXT PRIMARY KEY, bytes INTEGER NOT NULL) STRICT;
    CREATE TABLE edits (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at TEXT NOT NULL,
        who TEXT NOT NULL,
        method TEXT NOT NULL,
        editor TEXT NOT NULL,       -- fingerprint of its trained weights and settings, empty for none
        parent INTEGER NOT NULL,    -- the last event when it was made
        record TEXT NOT NULL,       -- JSON: requests and how it was made
        scores TEXT NOT NULL,       -- JSON: what was found when it was made
        latent TEXT NOT NULL REFERENCES blobs (sha256),
        factors TEXT NOT NULL REFERENCES blobs (sha256)
    ) STRICT;
    CREATE TABLE supersedes (
        edit INTEGER NOT NULL REFERENCES edits (id),
        old INTEGER NOT NULL REFERENCES edits (id),
        PRIMARY KEY (edit, old),
        CHECK (old < edit)
    ) STRICT;
    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at TEXT NOT NULL,
        who TEXT NOT NULL,
        action TEXT NOT NULL CHECK (action IN ('commit', 'revert', 'restore')),
        edit INTEGER NOT NULL REFERENCES edits (id),
        note TEXT NOT NULL
    ) STRICT;
    CREATE INDEX events_of_edit ON events (edit, id);
    """,
    """
    CREATE TABLE asks (             -- prompts of edits, in the form in which they are compared
        edit INTEGER NOT NULL REFERENCES edits (id),
        prompt TEXT NOT NULL,
        PRIMARY KEY (prompt, edit)
    ) STRICT;
    CREATE TABLE seals (            -- of each event and all before it
        event INTEGER PRIMARY KEY REFERENCES events (id),
        sha256 TEXT NOT NULL
    ) STRICT;
    CREATE TABLE shared (           -- files that edits of a kind cannot act without
        name TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        sha256 TEXT NOT NULL REFERENCES blobs (sha256)
    ) STRICT;
    """,
)
APPENDED = ("about", "blobs", "edits", "supersedes", "events", "asks", "seals", "shared")


def written(row: sqlite3.Row, column: str, where: str) -> dict[str, Any]:
    """What a row holds as JSON.

    Raises:
        LedgerError: it is none, or not what ibke writes there.
    """
    try:
        found = dict(json.loads(row[column]))
        if column == "record" and not isinstance(found["requests"], list):
            raise TypeError("no requests")
    except (ValueError, KeyError, TypeError) as error:
        what = f"what is written down is damaged: {column} ({type(error).__name__})."
        raise LedgerError(what, where, "Restore the ledger from a copy.") from error
    return found


def prompts_of(record: dict[str, Any]) -> set[str]:
    """What an edit's requests ask, from its record, in the form in which prompts are compared."""
    return {signed(request["prompt"]) for request in record["requests"]}


def note_prompts(base: sqlite3.Connection, edit: int, record: dict[str, Any]) -> None:
    """Write down what an edit's requests ask, from its record."""
    base.executemany("INSERT INTO asks VALUES (?, ?)", [(edit, prompt) for prompt in sorted(prompts_of(record))])


def seal(base: sqlite3.Connection) -> None:
    """Seal the events that are not sealed yet."""
    (last,) = base.execute("SELECT coalesce(max(event), 0) FROM seals").fetchone()
    base.executemany("INSERT INTO seals VALUES (?, ?)", list(_seals(base, last)))


def broken_seals(base: sqlite3.Connection) -> list[int]:
    """Events that, or whose edits, are no longer what they were when they were written down."""
    # A text that is no UTF-8 any more is to break its seal, not the search for broken ones.
    base.text_factory = lambda raw: raw.decode(errors="surrogateescape")
    try:
        kept = dict(base.execute("SELECT event, sha256 FROM seals").fetchall())
        events = [row[0] for row in base.execute("SELECT id FROM events ORDER BY id")]
        gone = sorted(set(kept) ^ set(events))
        return gone or [event for event, sha256 in _seals(base, 0, kept) if kept[event] != sha256]
    finally:
        base.text_factory = str


def _seals(base: sqlite3.Connection, after: int, kept: dict[int, str] | None = None) -> Iterator[tuple[int, str]]:
    """The seals of the events after one: digests of what was done, of the edit where it was made, and of the last seal.

    That is the one kept, where some are given, so that one change breaks one seal.
    """
    row = base.execute("SELECT sha256 FROM seals WHERE event = ?", (after,)).fetchone()
    before = row[0] if row else ""
    for event in base.execute("SELECT * FROM events WHERE id > ? ORDER BY id", (after,)).fetchall():
        what = [before, *event]
        if event["action"] == "commit":
            what += base.execute("SELECT * FROM edits WHERE id = ?", (event["edit"],)).fetchone() or ()
            old = "SELECT old FROM supersedes WHERE edit = ? ORDER BY old"
            what += [one[0] for one in base.execute(old, (event["edit"],))]
        # Damage turns texts into bytes, which JSON does not know and no seal is of.
        sha256 = hashlib.sha256(json.dumps(what, default=repr).encode()).hexdigest()
        yield event["id"], sha256
        before = kept[event["id"]] if kept else sha256


def _fill(base: sqlite3.Connection) -> None:
    for edit, record in base.execute("SELECT id, record FROM edits").fetchall():
        note_prompts(base, edit, json.loads(record))
    seal(base)


FILLED: dict[int, Callable[[sqlite3.Connection], None]] = {2: _fill}  # what new tables of a version begin with


def connect(path: Path) -> sqlite3.Connection:
    """Open a ledger's database, bringing older tables up to date.

    Raises:
        LedgerError: it cannot be opened, is no ledger, or was written by a newer version.
    """
    try:
        base = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
        base.row_factory = sqlite3.Row
        for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            base.execute(f"PRAGMA {setting}")
        _migrate(base, path)
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"the database cannot be used ({error}).", str(path), advice(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        what = f"its edits cannot be read, to bring it up to date ({error!r})."
        raise LedgerError(what, str(path), "Restore it from a copy.") from error
    return base


def advice(error: sqlite3.DatabaseError) -> str:
    """What to do about what the database says."""
    text = str(error)
    if "full" in text or "disk I/O" in text:
        return "Look at the disk and make room on it; nothing was written."
    if "readonly" in text or "unable to open" in text:
        return "Check who may write there."
    return "Try again when the other process is done." if "locked" in text else "Restore it from a copy."


def _migrate(base: sqlite3.Connection, path: Path) -> None:
    # Whoever only reads does not wait for a writer.
    if base.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS):
        return
    base.execute("BEGIN IMMEDIATE")
    try:
        (version,) = base.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise LedgerError(
                f"its tables are of version {version}, understood are those up to {len(MIGRATIONS)}.",
                str(path),
                "Use the version of ibke that wrote it, or a newer one.",
            )
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            for statement in filter(str.strip, script.split(";")):
                base.execute(statement)
            if number in FILLED:
                FILLED[number](base)
        if version < len(MIGRATIONS):
            _append_only(base)
            base.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        base.execute("COMMIT")
    except BaseException:
        if base.in_transaction:  # a full disk has ended it
            base.execute("ROLLBACK")
        raise


def _append_only(base: sqlite3.Connection) -> None:
    for table in APPENDED:
        for action in ("UPDATE", "DELETE"):
            base.execute(
                f"CREATE TRIGGER IF NOT EXISTS {table}_no_{action.lower()} BEFORE {action} ON {table} "
                "BEGIN SELECT RAISE(ABORT, 'a ledger is only ever added to'); END"
            )
