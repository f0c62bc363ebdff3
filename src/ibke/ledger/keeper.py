"""Edits made and kept in a ledger, one after another, each checked before it is written down."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ibke.edit import Edit
from ibke.editors.base import Editor
from ibke.evaluation.generate import Together, generate
from ibke.evaluation.metrics import exact_match
from ibke.frames import encode_pair
from ibke.ledger.conflicts import superseded
from ibke.ledger.guard import Guard, Verdict
from ibke.ledger.ledger import Ledger
from ibke.models import LanguageModel
from ibke.request import EditRequest


@dataclass(frozen=True)
class Kept:
    """What became of one request.

    Args:
        request: what was asked for.
        number: of the edit in the ledger; None where it was refused, or the model says so already.
        edit: how it was made; None where the model says so already.
        supersedes: edits it takes the place of.
        verdict: what the guard found; None where nobody asked.
        seconds: wall-clock time of all of it.
    """

    request: EditRequest
    number: int | None
    edit: Edit | None
    supersedes: tuple[int, ...] = ()
    verdict: Verdict | None = None
    seconds: float = 0.0

    @property
    def already(self) -> bool:
        """Whether there was nothing to correct."""
        return self.edit is None


class Keeper:
    """Makes edits on the pristine model, so that each is the same whatever else is in force, and keeps them.

    Args:
        lm: the pristine model.
        ledger: where they are kept.
        editor: the method.
        guard: decides which are; None keeps all.
        editor_mark: what the ledger shall say of the editor.
    """

    def __init__(
        self, lm: LanguageModel, ledger: Ledger, editor: Editor, guard: Guard | None = None, editor_mark: str = ""
    ):
        self.lm, self.ledger, self.editor, self.guard, self.editor_mark = lm, ledger, editor, guard, editor_mark
        self._edits: dict[int, Edit] = {}
        self._state: tuple[tuple[int, ...], Edit | None] = ((), None)

    def state(self) -> Edit | None:
        """All edits in force as one; read again only where somebody has written to the ledger.

        Raises:
            LedgerError: a file is missing or has changed.
        """
        numbers = tuple(self.ledger.active())
        if numbers != self._state[0]:
            self._edits = {n: self._edits[n] if n in self._edits else self.ledger.load(n) for n in numbers}
            self._state = (numbers, Edit.join(list(self._edits.values())) if numbers else None)
        return self._state[1]

    def add(self, request: EditRequest, *, who: str | None = None, note: str = "", force: bool = False) -> Kept:
        """Make one edit, check it beside the others, and write it down; or leave everything as it was.

        Args:
            request: what the model shall say.
            who: asks for it.
            note: in their own words.
            force: edit even where the model says so already.

        Raises:
            IBKEError: the request cannot be used, or the ledger cannot be read or written.
        """
        began = time.perf_counter()
        parent, before = self.ledger.head(), self.state()
        if not force and self._says(request, before):
            return Kept(request, None, None, seconds=time.perf_counter() - began)
        edit = self.editor.edit([request])
        old = superseded(self.lm, self._edits, edit, request)
        others = [kept for number, kept in self._edits.items() if number not in old]
        after = Edit.join([*others, edit])
        verdict = self.guard.check(before, after, request) if self.guard else None
        if verdict and not verdict.passed:
            return Kept(request, None, edit, tuple(old), verdict, time.perf_counter() - began)
        number = self.ledger.commit(
            edit,
            scores=verdict.scores if verdict else {},
            supersedes=old,
            editor=self.editor_mark,
            who=who,
            note=note,
            parent=parent,
        )
        self._edits = {n: kept for n, kept in self._edits.items() if n not in old} | {number: edit}
        self._state = (tuple(self._edits), after)
        if self.guard:
            self.guard.keep(after)
        return Kept(request, number, edit, tuple(old), verdict, time.perf_counter() - began)

    def _says(self, request: EditRequest, state: Edit | None) -> bool:
        ids = [encode_pair(request.prompt, "-", "bare", self.lm.tokenizer).prompt]
        (said,) = generate(self.lm, ids, Together((state,)) if state else None)
        return bool(exact_match(said.text, request.target_new))
