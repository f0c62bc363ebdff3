"""Every edit ever made of a model, what it changed, and how to take it back.

A ledger is a folder: a database of requests, edits and what was done with them, and beside it their tensors, in files
named by their content. What is in force is a function of all that was written down up to an event:

    standing(e)   the last of e's own events is a commit or a restore
    active        every standing edit that no standing edit supersedes

so a revert is one more line, and whatever it superseded is in force again. An edit supersedes all earlier ones of its
prompt, in force or not, so that no two of one prompt ever are.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor

from ibke.edit import Edit
from ibke.edit_folder import to_bytes
from ibke.errors import FingerprintMismatchError, FormatError, LedgerError, LedgerMovedError
from ibke.evaluation.metrics import signed
from ibke.files import is_there
from ibke.ledger.blobs import Blobs
from ibke.ledger.conflicts import same_facts
from ibke.ledger.records import Entry, Event, asked, now, user
from ibke.ledger.schema import advice, connect, note_prompts, seal, written
from ibke.ledger.shared import offer_shared, share_needs
from ibke.models import LanguageModel
from ibke.request import EditRequest

DATABASE, TENSORS = "ledger.sqlite", "tensors"
LATENT = "latent/"


class Ledger:
    """An open ledger; a context manager closes it.

    Args:
        folder: where it is; made if it is not there and a model is given.
        lm: the model it must be of; None takes it as it is, to read it or to take edits back.

    Raises:
        LedgerError: it cannot be opened or made, is no ledger, or there is none.
        FingerprintMismatchError: it is another model's.
    """

    def __init__(self, folder: str | Path, lm: LanguageModel | None = None):
        self.folder = Path(folder)
        self.blobs = Blobs(self.folder / TENSORS)
        if lm is None and not is_there(self.folder / DATABASE):
            raise LedgerError("there is no ledger here.", str(self.folder), "Begin one with `ibke edit --ledger`.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(
                f"it cannot be made ({error.strerror}).", str(self.folder), "Choose another folder."
            ) from error
        self.base = connect(self.folder / DATABASE)
        if lm is not None and not self.rows("SELECT name FROM about"):
            with self.writing():
                question = "INSERT OR IGNORE INTO about VALUES ('fingerprint', ?), ('model', ?)"
                self.base.execute(question, (lm.fingerprint, lm.name))
        offer_shared(self)
        about = {row["name"]: row["value"] for row in self.rows("SELECT name, value FROM about")}
        self.model, self.fingerprint = about.get("model", ""), about.get("fingerprint", "")
        if lm is not None and self.fingerprint != lm.fingerprint:
            self.close()
            raise FingerprintMismatchError(
                f"it is of {self.model} with fingerprint {self.fingerprint}, the model at hand has {lm.fingerprint}.",
                str(self.folder),
                "Use the model it was begun with, or another folder.",
            )

    def close(self) -> None:
        """Let go of the files."""
        self.base.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def head(self) -> int:
        """The last event; 0 before the first."""
        return int(self.rows("SELECT coalesce(max(id), 0) FROM events")[0][0])

    def active(self, at: int | None = None) -> list[int]:
        """Edits in force after an event (the last if left out, none after 0), in the order in which they were made.

        Raises:
            LedgerError: there is no such event.
        """
        until = self.head() if at is None else at
        if not 0 <= until <= self.head():
            raise LedgerError(f"there is no event {until}.", str(self.folder), f"The last is {self.head()}.")
        rows = self.rows(
            f"""
            WITH standing AS ({_STANDING})
            SELECT edit FROM standing WHERE edit NOT IN (
                SELECT old FROM supersedes WHERE edit IN (SELECT edit FROM standing)
            ) ORDER BY edit
            """,
            until,
        )
        return [row[0] for row in rows]

    def commit(
        self,
        edit: Edit,
        *,
        scores: dict[str, Any] | None = None,
        supersedes: Sequence[int] = (),
        editor: str = "",
        who: str | None = None,
        note: str = "",
        parent: int | None = None,
    ) -> int:
        """Write an edit down and put it in force; it is on the disk when this returns its number.

        Args:
            edit: what was made, by itself, of the pristine model.
            scores: JSON-ready, what was found when it was made.
            supersedes: edits it takes the place of, beside those of its prompt; those that these had taken the place
                of are left out too.
            editor: fingerprint of the editor.
            who: does it; the user of this process if left out.
            note: in the writer's own words.
            parent: the event after which the edit was checked; None takes what is there.

        Raises:
            FingerprintMismatchError: the edit is of another model.
            LedgerError: there is no room, or no such edit to supersede.
            LedgerMovedError: somebody has written to it since ``parent``.
        """
        if edit.info.fingerprint != self.fingerprint:
            raise FingerprintMismatchError(
                f"the edit is of a model {edit.info.fingerprint}, the ledger of one {self.fingerprint}.",
                str(self.folder),
                "Make the edit again for this model.",
            )
        record, tensors = edit.pack()
        code = {name: tensor for name, tensor in tensors.items() if name.startswith(LATENT)}
        files = [self._keep(code), self._keep({name: some for name, some in tensors.items() if name not in code})]
        with self.writing():
            head = self.head()
            if parent not in (None, head):
                raise LedgerMovedError(
                    f"somebody wrote to it meanwhile (event {head}, expected {parent}).", str(self.folder), "Try again."
                )
            prompts = [signed(request.prompt) for request in edit.requests]
            old = self._superseded([*supersedes, *(number for prompt in prompts for number in self.asking(prompt))])
            self.base.executemany("INSERT OR IGNORE INTO blobs VALUES (?, ?)", files)
            share_needs(self, edit)
            row = (now(), who or user(), edit.info.method, editor, head, _json(record), _json(scores or {}))
            number = self.base.execute(
                "INSERT INTO edits (at, who, method, editor, parent, record, scores, latent, factors) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, files[0][0], files[1][0]),
            ).lastrowid
            assert number is not None
            self.base.executemany("INSERT INTO supersedes VALUES (?, ?)", [(number, one) for one in old])
            note_prompts(self.base, number, record)
            self._event("commit", number, row[1], note)
            seal(self.base)
        return number

    def asking(self, prompt: str) -> list[int]:
        """All edits ever made of a prompt, in the form of :func:`signed`."""
        return [row[0] for row in self.rows("SELECT edit FROM asks WHERE prompt = ? ORDER BY edit", prompt)]

    def revert(self, edits: Sequence[int], who: str | None = None, note: str = "") -> None:
        """Take edits back, all or none; what they had taken the place of is in force again.

        Raises:
            LedgerError: one does not exist, or is taken back already, or what would be in force again does not go
                with the others.
        """
        with self.writing():
            before = set(self.active())
            self._change("revert", edits, who, note)
            if set(self.active()) - before:
                self._come_together()

    def revert_all(self, who: str | None = None, note: str = "") -> None:
        """Take back every edit that stands, superseded ones too, so that none is in force."""
        with self.writing():
            self.revert([row[0] for row in self.rows(f"{_STANDING} ORDER BY edit", self.head())], who, note)

    def restore(self, edits: Sequence[int], who: str | None = None, note: str = "") -> None:
        """Put edits that were taken back in force again, all or none.

        Raises:
            LedgerError: one does not exist or was not taken back, or another one in force is of the same prompt, or of
                the same subject in much the same words.
        """
        with self.writing():
            self._change("restore", edits, who, note)
            active = self.active()
            for number in edits:
                if number not in active and not set(self._after(number)) & set(edits):
                    newer = " and ".join(map(str, self._after(number)))
                    what = f"edit {newer} of the same fact is newer than edit {number}, which would not be in force."
                    raise LedgerError(what, str(self.folder), f"Take edit {newer} back first, with `ibke revert`.")
            self._refuse_same_fact(set(edits) & set(active), active)
            self._come_together()

    def _come_together(self) -> None:
        try:
            self.state()
        except FormatError as error:
            what = f"what would be in force does not go together: {error.what}"
            raise LedgerError(what, str(self.folder), "Name more edits at once, or take others back first.") from error

    def _after(self, number: int) -> list[int]:
        """Standing edits that supersede one."""
        question = f"SELECT edit FROM supersedes WHERE old = ? AND edit IN ({_STANDING}) ORDER BY edit"
        return [row[0] for row in self.rows(question, number, self.head())]

    def _refuse_same_fact(self, restored: set[int], active: Sequence[int]) -> None:
        requests = {number: self.entry(number).requests for number in active} if restored else {}
        for number, other in same_facts(requests, restored):
            what = f"edits {number} and {other} would be in force for the same fact."
            raise LedgerError(what, str(self.folder), "Take the other back first, with `ibke revert`.")

    def entry(self, number: int) -> Entry:
        """What was written down of an edit.

        Raises:
            LedgerError: there is no such edit.
        """
        return self._entry(self._row(number))

    def entries(self) -> Iterator[Entry]:
        """All edits ever made, oldest first."""
        return (self._entry(row) for row in self.rows(f"{_ENTRIES} ORDER BY edits.id"))

    def made(self) -> Iterator[tuple[EditRequest, str]]:
        """What each edit was first asked for, and the note it was made with, oldest first and one at a time."""
        made = "edits JOIN events ON edit = edits.id WHERE action = 'commit' ORDER BY edit"
        try:
            for row in self.base.execute(f"SELECT edit, record, note FROM {made}"):
                where = f"edit {row['edit']} of {self.folder}"
                for one in asked(written(row, "record", where)["requests"][:1], where):
                    yield one, row["note"]
        except sqlite3.DatabaseError as error:
            raise self._failed(error) from error

    def events(self) -> Iterator[Event]:
        """All that was ever done, oldest first."""
        return (Event(*row) for row in self.rows("SELECT id, at, who, action, edit, note FROM events ORDER BY id"))

    def standing(self, number: int) -> bool:
        """Whether an edit has not been taken back; superseded ones stand too.

        Raises:
            LedgerError: there is no such edit.
        """
        self._row(number)
        (last,) = self.rows("SELECT action FROM events WHERE edit = ? ORDER BY id DESC LIMIT 1", number)
        return last["action"] != "revert"

    def load(self, number: int) -> Edit:
        """An edit, bit for bit as it was made.

        Raises:
            LedgerError: there is no such edit, or a file of it is missing or has changed.
        """
        row = self._row(number)
        tensors: dict[str, Tensor] = {}
        for sha256 in (row["latent"], row["factors"]):
            try:
                tensors |= parse_tensors(self.blobs.read(sha256))
            except SafetensorError as error:
                where = str(self.blobs.path(sha256))
                raise LedgerError(f"these are no tensors ({error}).", where, "Restore it from a copy.") from error
        where = f"edit {number} of {self.folder}"
        try:
            return Edit.unpack(written(row, "record", where), tensors, where)
        except FormatError as error:
            raise LedgerError(error.what, where, "Restore the ledger from a copy.") from error

    def state(self, at: int | None = None) -> Edit | None:
        """All edits in force after an event as one; None where there are none.

        It depends on which edits these are and on nothing else, so what was made and taken back leaves no trace.

        Raises:
            LedgerError: a file is missing or has changed.
        """
        edits = [self.load(number) for number in self.active(at)]
        return Edit.join(edits) if edits else None

    def diff(self, first: int, second: int) -> tuple[list[int], list[int]]:
        """Edits in force after the first event and not after the second, and the other way about."""
        before, after = set(self.active(first)), set(self.active(second))
        return sorted(before - after), sorted(after - before)

    def _keep(self, tensors: dict[str, Tensor]) -> tuple[str, int]:
        raw = to_bytes(tensors)
        return self.blobs.write(raw), len(raw)

    def _superseded(self, numbers: Sequence[int]) -> list[int]:
        """Some edits and all that these have superseded."""
        found: set[int] = set()
        for number in numbers:
            self._row(number)
            rows = self.rows("SELECT old FROM supersedes WHERE edit = ?", number)
            found |= {number, *(row[0] for row in rows)}
        return sorted(found)

    def _change(self, action: str, numbers: Sequence[int], who: str | None, note: str) -> None:
        with self.writing():
            for number in dict.fromkeys(numbers):
                if self.standing(number) == (action == "restore"):
                    state = "was not taken back" if action == "restore" else "is taken back already"
                    raise LedgerError(f"edit {number} {state}.", str(self.folder), "See `ibke log`.")
                self._event(action, number, who or user(), note)
            seal(self.base)

    def _event(self, action: str, number: int, who: str, note: str) -> None:
        row = (now(), who, action, number, note)
        self.base.execute("INSERT INTO events (at, who, action, edit, note) VALUES (?, ?, ?, ?, ?)", row)

    def _row(self, number: int) -> sqlite3.Row:
        found = self.rows(f"{_ENTRIES} WHERE edits.id = ?", number) if number in _NUMBERS else []
        if not found:
            raise LedgerError(f"there is no edit {number}.", str(self.folder), "See `ibke log`.")
        return found[0]

    def _entry(self, row: sqlite3.Row) -> Entry:
        old = self.rows("SELECT old FROM supersedes WHERE edit = ? ORDER BY old", row["id"])
        head = (row["id"], row["at"], row["who"], row["method"], row["editor"], row["parent"])
        where = f"edit {row['id']} of {self.folder}"
        texts = (written(row, "record", where), written(row, "scores", where))
        return Entry(*head, *texts, tuple(one[0] for one in old), row["latent_bytes"], row["factors_bytes"])

    def rows(self, question: str, *given: Any) -> list[sqlite3.Row]:
        """What the database answers to a question.

        Raises:
            LedgerError: it cannot be read.
        """
        try:
            return self.base.execute(question, given).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._failed(error) from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Everything as it is at the first question, whatever others write meanwhile."""
        self.rows("BEGIN")
        try:
            yield
        finally:
            if self.base.in_transaction:  # a disk that fails has ended it
                self.rows("COMMIT")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """All or nothing; one writer at a time, the others wait. Inside another one it is a part of that."""
        if self.base.in_transaction:
            yield
            return
        try:
            self.base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.base.execute("COMMIT")
            except BaseException:
                if self.base.in_transaction:
                    self.base.execute("ROLLBACK")
                raise
        except sqlite3.DatabaseError as error:
            raise self._failed(error) from error

    def _failed(self, error: sqlite3.DatabaseError) -> LedgerError:
        return LedgerError(f"the database says: {error}.", str(self.folder / DATABASE), advice(error))


_NUMBERS = range(1, 2**63)  # that a database knows
_STANDING = """
    SELECT edit FROM events WHERE id IN (SELECT max(id) FROM events WHERE id <= ? GROUP BY edit) AND action <> 'revert'
"""
_ENTRIES = """
    SELECT edits.*, a.bytes AS latent_bytes, b.bytes AS factors_bytes FROM edits
    JOIN blobs AS a ON a.sha256 = edits.latent JOIN blobs AS b ON b.sha256 = edits.factors
"""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
