"""A ledger as JSON Lines, to be read, kept elsewhere, and taken in again.

The first line says what it is, of which model, and how much there is; then comes a line for each file that edits have
in common, for each edit and for each event, in the order in which they were written down. Tensors are safetensors files
in base64, so what is taken in again is the same, bit for bit.
"""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from ibke.errors import FingerprintMismatchError, FormatError
from ibke.ledger.ledger import Ledger
from ibke.ledger.schema import note_prompts, seal
from ibke.ledger.shared import share

FORMAT, VERSION = "ibke-ledger", 2
READABLE = (1, VERSION)  # the first had no files in common
COUNTED = ("edits", "events", "shared")
COPIED = ("at", "who", "method", "editor", "parent", "record", "scores")


def export_lines(ledger: Ledger) -> Iterator[str]:
    """The lines of a ledger, as it is at the first of them.

    Raises:
        LedgerError: a file is missing or has changed.
    """
    with ledger.reading():
        yield from _lines(ledger)


def _lines(ledger: Ledger) -> Iterator[str]:
    about = {row["name"]: row["value"] for row in ledger.rows("SELECT name, value FROM about")}
    counts = {name: ledger.rows(f"SELECT count(*) FROM {name}")[0][0] for name in COUNTED}
    yield _line({"format": FORMAT, "version": VERSION, **about, **counts})
    for row in ledger.rows("SELECT * FROM shared ORDER BY name"):
        file = base64.b64encode(ledger.blobs.read(row["sha256"])).decode()
        yield _line({"shared": row["name"], "kind": row["kind"], "file": file})
    for row in ledger.rows("SELECT * FROM edits ORDER BY id"):
        old = ledger.rows("SELECT old FROM supersedes WHERE edit = ? ORDER BY old", row["id"])
        files = {part: base64.b64encode(ledger.blobs.read(row[part])).decode() for part in ("latent", "factors")}
        texts = {name: json.loads(row[name]) for name in ("record", "scores")}
        kept = {name: row[name] for name in COPIED} | texts
        yield _line({"edit": row["id"], **kept, "supersedes": [one[0] for one in old], **files})
    for event in ledger.events():
        yield _line(
            {"event": event.id, "at": event.at, "who": event.who, "action": event.action}
            | {"of": event.edit, "note": event.note}
        )


def import_lines(ledger: Ledger, lines: Iterable[str], where: str) -> int:
    """Take edits and events of another ledger of the same model in, behind what is there; all or none.

    Args:
        ledger: where to.
        lines: as :func:`export_lines` gives them.
        where: they come from, for messages.

    Returns:
        how many edits came in.

    Raises:
        FormatError: a line is not what it should be, or some are missing; says which.
        FingerprintMismatchError: they are of another model.
        LedgerError: there is no room, or the edits in force would not go together.
    """
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    numbers: dict[int, int] = {}
    told: dict[str, int] = {}
    found = dict.fromkeys(COUNTED, 0)
    with ledger.writing():
        shift, last = ledger.head(), ledger.rows("SELECT coalesce(max(id), 0) FROM edits")[0][0]
        for count, (number, line) in enumerate(numbered):
            at = f"{where}, line {number}"
            try:
                one = json.loads(line)
                if not count:
                    _check_head(one, ledger, at)
                    told = {name: int(one.get(name, 0)) for name in found}
                elif "shared" in one:
                    share(ledger, one["shared"], one["kind"], base64.b64decode(one["file"], validate=True))
                    found["shared"] += 1
                elif "edit" in one:
                    numbers[one["edit"]] = _take_edit(ledger, one, numbers, shift)
                    found["edits"] += 1
                else:
                    row = (one["at"], one["who"], one["action"], numbers[one["of"]], one["note"])
                    question = "INSERT INTO events (at, who, action, edit, note) VALUES (?, ?, ?, ?, ?)"
                    ledger.base.execute(question, row)
                    found["events"] += 1
            except (ValueError, KeyError, TypeError, RecursionError, sqlite3.IntegrityError) as error:
                raise FormatError(f"this is no line of a ledger ({error!r}).", at, "Export it again.") from error
        _stand_over(ledger, last)
        seal(ledger.base)
        if found != told:
            counted = ", ".join(f"{found[name]} of {told[name]} {name}" for name in told) or "there is nothing in it"
            raise FormatError(f"it is not whole: {counted}.", where, "Export it again.")
        ledger.state()  # which has to come together
    return len(numbers)


def _stand_over(ledger: Ledger, last: int) -> None:
    """Let edits after one take the place of all up to it that have their prompts, and of all that these stand over.

    In force or not: what is not in force may be, once something is taken back.
    """
    pairs = "SELECT new.edit, old.edit FROM asks AS new JOIN asks AS old USING (prompt) WHERE old.edit <= ?1"
    ledger.base.execute(f"INSERT OR IGNORE INTO supersedes {pairs} AND new.edit > ?1", (last,))
    reached = """
        WITH RECURSIVE reached (edit, old) AS (
            SELECT edit, old FROM supersedes WHERE edit > ?
            UNION SELECT reached.edit, further.old FROM reached JOIN supersedes AS further ON further.edit = reached.old
        )
    """
    ledger.base.execute(f"{reached} INSERT OR IGNORE INTO supersedes SELECT edit, old FROM reached", (last,))


def _check_head(one: Any, ledger: Ledger, at: str) -> None:
    if not isinstance(one, dict) or one.get("format") != FORMAT or one.get("version") not in READABLE:
        raise FormatError("this is no exported ledger of this version.", at, f"Its `format` should be {FORMAT!r}.")
    if one.get("fingerprint") != ledger.fingerprint:
        raise FingerprintMismatchError(
            f"it is of a model {one.get('fingerprint')}, the ledger of one {ledger.fingerprint}.",
            at,
            "Take it into a ledger of the same model.",
        )


def _take_edit(ledger: Ledger, one: dict[str, Any], numbers: dict[int, int], shift: int) -> int:
    files = []
    for part in ("latent", "factors"):
        raw = base64.b64decode(one[part], validate=True)
        files.append((ledger.blobs.write(raw), len(raw)))
    ledger.base.executemany("INSERT OR IGNORE INTO blobs VALUES (?, ?)", files)
    kept: dict[str, Any] = {name: one[name] for name in COPIED} | {"parent": one["parent"] + shift}
    kept |= {name: json.dumps(one[name], ensure_ascii=False) for name in ("record", "scores")}
    marks = ", ".join("?" * (len(COPIED) + 2))
    number = ledger.base.execute(
        f"INSERT INTO edits ({', '.join(COPIED)}, latent, factors) VALUES ({marks})",
        (*kept.values(), files[0][0], files[1][0]),
    ).lastrowid
    assert number is not None
    old = [(number, numbers[one]) for one in one["supersedes"]]
    ledger.base.executemany("INSERT INTO supersedes VALUES (?, ?)", old)
    note_prompts(ledger.base, number, one["record"])
    ledger.load(number)  # whole, or nothing is taken in
    return number


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
