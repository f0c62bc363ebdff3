"""A ledger as JSON Lines, to be read, kept elsewhere, and taken in again.

The first line says what it is, of which model, and how much there is; then comes a line for each file that edits have
in common, for each edit and for each event, in the order in which they were written down. Tensors are safetensors files
in base64, so what is taken in again is the same, bit for bit.

Each line ends with a digest of itself and of all before it, and names the SHA-256 of the files in it, so what has
changed on the way is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from ibke.errors import FingerprintMismatchError, FormatError, LedgerError
from ibke.ledger.conflicts import same_facts
from ibke.ledger.ledger import Ledger
from ibke.ledger.schema import note_prompts, seal, written
from ibke.ledger.shared import share

FORMAT, VERSION = "ibke-ledger", 3
READABLE = (1, 2, VERSION)  # the first had no files in common, the first two no digests
COUNTED = ("edits", "events", "shared")
TENSORS = ("latent", "factors")
NO_LINE = (ValueError, KeyError, TypeError, RecursionError)
COPIED = ("at", "who", "method", "editor", "parent", "record", "scores")


def export_lines(ledger: Ledger) -> Iterator[str]:
    """The lines of a ledger, as it is at the first of them.

    Raises:
        LedgerError: a file is missing or has changed, or what is written down is damaged.
    """
    with ledger.reading():
        digest = ""
        for value in _values(ledger):
            try:
                digest = _digest(digest, value)
            except TypeError as error:  # damage has made bytes of a text
                what = f"what is written down is damaged ({error})."
                raise LedgerError(what, str(ledger.folder), "See `ibke verify`, and restore it from a copy.") from error
            yield json.dumps(value | {"digest": digest}, ensure_ascii=False) + "\n"


def _digest(before: str, value: dict[str, Any]) -> str:
    """Of a line and, by the digest before it, of all lines up to it."""
    return hashlib.sha256((before + json.dumps(value, sort_keys=True)).encode()).hexdigest()


def _values(ledger: Ledger) -> Iterator[dict[str, Any]]:
    about = {row["name"]: row["value"] for row in ledger.rows("SELECT name, value FROM about")}
    counts = {name: ledger.rows(f"SELECT count(*) FROM {name}")[0][0] for name in COUNTED}
    yield {"format": FORMAT, "version": VERSION, **about, **counts}
    for row in ledger.rows("SELECT * FROM shared ORDER BY name"):
        yield {"shared": row["name"], "kind": row["kind"], **_files(ledger, {"file": row["sha256"]})}
    for row in ledger.rows("SELECT * FROM edits ORDER BY id"):
        old = ledger.rows("SELECT old FROM supersedes WHERE edit = ? ORDER BY old", row["id"])
        where = f"edit {row['id']} of {ledger.folder}"
        texts = {name: written(row, name, where) for name in ("record", "scores")}
        kept = {name: row[name] for name in COPIED} | texts
        files = _files(ledger, {part: row[part] for part in TENSORS})
        yield {"edit": row["id"], **kept, "supersedes": [one[0] for one in old], **files}
    for event in ledger.events():
        yield (
            {"event": event.id, "at": event.at, "who": event.who, "action": event.action}
            | {"of": event.edit, "note": event.note}
        )


def _files(ledger: Ledger, named: dict[str, str]) -> dict[str, Any]:
    """Files in base64, and their SHA-256."""
    files = {part: base64.b64encode(ledger.blobs.read(sha256)).decode() for part, sha256 in named.items()}
    return {**files, "sha256": named}


def import_lines(ledger: Ledger, lines: Iterable[str], where: str) -> int:
    """Take edits and events of another ledger of the same model in, behind what is there; all or none.

    Args:
        ledger: where to.
        lines: as :func:`export_lines` gives them.
        where: they come from, for messages.

    Returns:
        how many edits came in.

    Raises:
        FormatError: a line is not what it should be or has changed, or some are missing; says which.
        FingerprintMismatchError: they are of another model.
        LedgerError: there is no room, or the edits in force would not go together.
    """
    numbers: dict[int, int] = {}
    told: dict[str, int] = {}
    found = dict.fromkeys(COUNTED, 0)
    with ledger.writing():
        shift, last = ledger.head(), ledger.rows("SELECT coalesce(max(id), 0) FROM edits")[0][0]
        for at, one in _checked(lines, where):
            try:
                if not told:
                    _check_model(one, ledger, at)
                    told = {name: int(one.get(name, 0)) for name in found}
                elif "shared" in one:
                    share(ledger, one["shared"], one["kind"], _file(one, "file"))
                    found["shared"] += 1
                elif "edit" in one:
                    numbers[one["edit"]] = _take_edit(ledger, one, numbers, shift)
                    found["edits"] += 1
                else:
                    row = (one["at"], one["who"], one["action"], numbers[one["of"]], one["note"])
                    question = "INSERT INTO events (at, who, action, edit, note) VALUES (?, ?, ?, ?, ?)"
                    ledger.base.execute(question, row)
                    found["events"] += 1
            except (*NO_LINE, sqlite3.IntegrityError) as error:
                raise FormatError(f"this is no line of a ledger ({error!r}).", at, "Export it again.") from error
        _stand_over(ledger, last)
        seal(ledger.base)
        if found != told:
            counted = ", ".join(f"{found[name]} of {told[name]} {name}" for name in told) or "there is nothing in it"
            raise FormatError(f"it is not whole: {counted}.", where, "Export it again.")
        ledger.state()  # which has to come together
    return len(numbers)


def _checked(lines: Iterable[str], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line stands and what it says, if that is what was written there.

    Raises:
        FormatError: it is not, or the first is not that of a ledger.
    """
    digest, has_digests = "", False
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    for count, (number, line) in enumerate(numbered):
        at = f"{where}, line {number}"
        try:
            one = dict(json.loads(line))
            given = one.pop("digest", None)
            digest = _digest(digest, one)
        except NO_LINE as error:
            raise FormatError(f"this is no line of a ledger ({error!r}).", at, "Export it again.") from error
        if not count:
            _check_format(one, at)
            has_digests = one["version"] >= 3 or given is not None  # the version may be what has changed
        if has_digests and given != digest:
            what = "this is not what was written here: the line has changed, or one before it is missing."
            raise FormatError(what, at, "Export it again.")
        yield at, one


def _file(one: dict[str, Any], part: str) -> bytes:
    raw = base64.b64decode(one[part], validate=True)
    sha256 = hashlib.sha256(raw).hexdigest()
    if one.get("sha256", {}).get(part, sha256) != sha256:
        raise ValueError(f"the file `{part}` has changed")
    return raw


def _stand_over(ledger: Ledger, last: int) -> None:
    """Let edits after one take the place of all up to it that are of their facts, and of all that these stand over.

    Of one fact are edits of the same prompt, or about the same subject in much the same words.

    In force or not: what is not in force may be, once something is taken back.
    """
    pairs = "SELECT new.edit, old.edit FROM asks AS new JOIN asks AS old USING (prompt) WHERE old.edit <= ?1"
    ledger.base.execute(f"INSERT OR IGNORE INTO supersedes {pairs} AND new.edit > ?1", (last,))
    requests = {entry.id: entry.requests for entry in ledger.entries()}
    facts = same_facts(requests, {number for number in requests if number > last})
    olds = [(new, old) for new, old in facts if old <= last]
    ledger.base.executemany("INSERT OR IGNORE INTO supersedes VALUES (?, ?)", olds)
    reached = """
        WITH RECURSIVE reached (edit, old) AS (
            SELECT edit, old FROM supersedes WHERE edit > ?
            UNION SELECT reached.edit, further.old FROM reached JOIN supersedes AS further ON further.edit = reached.old
        )
    """
    ledger.base.execute(f"{reached} INSERT OR IGNORE INTO supersedes SELECT edit, old FROM reached", (last,))


def _check_format(one: dict[str, Any], at: str) -> None:
    if one.get("format") != FORMAT or one.get("version") not in READABLE:
        raise FormatError("this is no exported ledger of this version.", at, f"Its `format` should be {FORMAT!r}.")


def _check_model(one: dict[str, Any], ledger: Ledger, at: str) -> None:
    if one.get("fingerprint") != ledger.fingerprint:
        raise FingerprintMismatchError(
            f"it is of a model {one.get('fingerprint')}, the ledger of one {ledger.fingerprint}.",
            at,
            "Take it into a ledger of the same model.",
        )


def _take_edit(ledger: Ledger, one: dict[str, Any], numbers: dict[int, int], shift: int) -> int:
    files = []
    for part in TENSORS:
        raw = _file(one, part)
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
