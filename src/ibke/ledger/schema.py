"""The tables of a ledger, and how those of older versions become these.

Rows are added and never changed: what is in force is a function of all that was ever written down.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ibke.errors import LedgerError

PATIENCE = 60.0  # seconds one writer waits for another

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
)
APPENDED = ("about", "blobs", "edits", "supersedes", "events")


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
        for script in MIGRATIONS[version:]:
            for statement in filter(str.strip, script.split(";")):
                base.execute(statement)
        if version < len(MIGRATIONS):
            _append_only(base)
            base.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        base.execute("COMMIT")
    except BaseException:
        base.execute("ROLLBACK")
        raise


def _append_only(base: sqlite3.Connection) -> None:
    for table in APPENDED:
        for action in ("UPDATE", "DELETE"):
            base.execute(
                f"CREATE TRIGGER IF NOT EXISTS {table}_no_{action.lower()} BEFORE {action} ON {table} "
                "BEGIN SELECT RAISE(ABORT, 'a ledger is only ever added to'); END"
            )
