"""Edits made and kept in a ledger, each checked before it is written down."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import count

from ibke.edit import Edit
from ibke.editors.base import Editor
from ibke.errors import LedgerMovedError
from ibke.evaluation.generate import MAX_NEW_TOKENS, Together, generate
from ibke.evaluation.metrics import says
from ibke.frames import encode_pair
from ibke.ledger.conflicts import alike, superseded
from ibke.ledger.guard import Guard, Verdict
from ibke.ledger.ledger import Ledger
from ibke.models import LanguageModel
from ibke.request import EditRequest, refuse_contradictions
from ibke.session import refuse_merged, set_aside

ATTEMPTS = 3  # of writing what was checked, before others have to wait


@dataclass(frozen=True)
class Kept:
    """What became of one request.

    Args:
        request: what was asked for.
        number: of the edit in the ledger; None where it was refused, the model says so already, or it was overtaken.
        edit: how it was made; None where the model says so already, or it was overtaken.
        supersedes: edits it takes the place of.
        verdict: what the guard found; None where nobody asked.
        seconds: wall-clock time of all of it; of several at once each one's share.
        overtaken: whether a later request of the same call is about the same fact and holds instead.
    """

    request: EditRequest
    number: int | None = None
    edit: Edit | None = None
    supersedes: tuple[int, ...] = ()
    verdict: Verdict | None = None
    seconds: float = 0.0
    overtaken: bool = False

    @property
    def already(self) -> bool:
        """Whether there was nothing to correct."""
        return self.edit is None and not self.overtaken


@dataclass(frozen=True)
class _Made:
    """An edit that is to be kept, and the row of its request."""

    row: int
    request: EditRequest
    edit: Edit
    note: str
    who: str | None

    @property
    def place(self) -> int:
        """What it goes by until it has a number, which are positive."""
        return -1 - self.row


class Keeper:
    """Makes edits on the pristine model, so that each is the same whatever else is in force, and keeps them.

    Args:
        lm: the pristine model.
        ledger: where they are kept.
        editor: the method.
        guard: decides which are; None keeps all.
    """

    def __init__(self, lm: LanguageModel, ledger: Ledger, editor: Editor, guard: Guard | None = None):
        self.lm, self.ledger, self.editor, self.guard, self.mark = lm, ledger, editor, guard, editor.mark
        self._edits: dict[int, Edit] = {}
        self._state: tuple[tuple[int, ...], Edit | None] = ((), None)

    def state(self) -> Edit | None:
        """All edits in force as one; read again only where somebody has written to the ledger.

        Raises:
            LedgerError: a file is missing or has changed.
        """
        numbers = tuple(self.ledger.active())
        if numbers != self._state[0] or numbers != tuple(self._edits):
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
        return self.add_all([request], who=who, notes=[note], force=force)[0]

    def add_all(
        self,
        requests: Sequence[EditRequest],
        *,
        who: str | None = None,
        notes: Sequence[str] = (),
        force: bool = False,
    ) -> list[Kept]:
        """Make several edits in batches and check them together; where that breaks a limit, half of them at a time.

        So a harmful one costs some more checks, and those it came with are kept all the same. Of two of one fact in
        other words the later one is in force.

        Args:
            requests: what the model shall say.
            who: asks for it.
            notes: one a request, or none.
            force: edit even where the model says so already.

        Raises:
            IBKEError: a request cannot be used, two contradict each other, or the ledger cannot be read or written.
        """
        refuse_merged(self.lm, "ledger")
        with set_aside(self.lm):
            return self._add_all(requests, list(notes) or [""] * len(requests), who, force)

    def _add_all(
        self, requests: Sequence[EditRequest], notes: Sequence[str], who: str | None, force: bool
    ) -> list[Kept]:
        began = time.perf_counter()
        self.editor.pairs(requests)  # refuses what cannot be edited before anything is made
        refuse_contradictions(requests)
        said = [False] * len(requests) if force else self._say(requests, self.state())
        todo = [row for row, already in enumerate(said) if not already]
        made = self.editor.edit_each([requests[row] for row in todo]) if todo else []
        found: dict[int, Kept] = {}
        self._keep(
            [_Made(row, requests[row], edit, notes[row], who) for row, edit in zip(todo, made, strict=True)], found
        )
        # What the model said may be what an earlier request of these has changed since.
        while unsaid := self._unsaid([row for row in range(len(requests)) if row not in found], requests, found):
            made = self.editor.edit_each([requests[row] for row in unsaid])
            late = [_Made(row, requests[row], edit, notes[row], who) for row, edit in zip(unsaid, made, strict=True)]
            for one in late:
                if self._overtaken(one, found):
                    found[one.row] = Kept(one.request, overtaken=True)
                else:
                    self._keep([one], found)
        seconds = (time.perf_counter() - began) / len(requests)
        return [replace(found.get(row, Kept(request)), seconds=seconds) for row, request in enumerate(requests)]

    def _unsaid(self, rows: Sequence[int], requests: Sequence[EditRequest], found: Mapping[int, Kept]) -> list[int]:
        """Of some rows whose targets came before, those where they come no more, if anything was kept since."""
        if not rows or not any(kept.number for kept in found.values()):
            return []
        said = self._say([requests[row] for row in rows], self.state())
        return [row for row, still in zip(rows, said, strict=True) if not still]

    def _overtaken(self, one: _Made, found: Mapping[int, Kept]) -> bool:
        """Whether a later request of the same call is about the same fact."""
        rows = {kept.number: row for row, kept in found.items()}
        old = superseded(self.lm, self._edits, one.edit, one.request)
        return any(rows.get(number, -1) > one.row for number in old)

    def _keep(self, made: Sequence[_Made], found: dict[int, Kept]) -> None:
        """Check some edits together and write down those that may be kept; ``found`` takes what became of each."""
        for attempt in count(1):
            made = [one for one in made if one.row not in found]
            if attempt > ATTEMPTS and len(made) > 1:
                for one in made:
                    self._keep([one], found)
                return
            # Whoever was overtaken again and again has the others wait, for no longer than one edit takes.
            locked = self.ledger.writing() if attempt > ATTEMPTS else nullcontext()
            # If somebody else was quicker, what is left is checked beside what they wrote.
            with suppress(LedgerMovedError), locked:
                self._keep_once(made, found)
                return

    def _keep_once(self, made: Sequence[_Made], found: dict[int, Kept]) -> None:
        if not made:
            return
        parent, before = self.ledger.head(), self.state()
        old = self._superseded(made)
        gone = {number for numbers in old.values() for number in numbers}
        # Of two in this group about the same fact only the later is in force; the earlier may be, once that is taken
        # back, so it is checked as well.
        standing = [one for one in made if one.place not in gone]
        if self.guard and len(standing) < len(made):
            for part in ([one for one in made if one.place in gone], standing):
                self._keep(part, found)
            return
        after = self._with(before, [one.edit for one in standing], gone)
        verdicts: dict[int, Verdict] = {}
        if self.guard:
            earlier = self._nearest(standing, gone, self.guard.limits.edits)
            own, effects = self.guard.check(before, after, [one.request for one in standing], earlier)
            missed = [one for one, verdict in zip(standing, own, strict=True) if not verdict.passed]
            if len(made) > 1 and (missed or not effects.passed):
                # Those that do not come, each by itself; of the others half at a time.
                rest = [one for one in made if one not in missed]
                half = len(rest) if effects.passed else (len(rest) + 1) // 2
                for part in (rest[:half], rest[half:], *([one] for one in missed)):
                    self._keep(part, found)
                return
            verdicts = {one.row: verdict + effects for one, verdict in zip(standing, own, strict=True)}
            if not all(verdict.passed for verdict in verdicts.values()):
                one = made[0]
                numbers = tuple(number for number in old[one.row] if number > 0)
                found[one.row] = Kept(one.request, None, one.edit, numbers, verdicts[one.row])
                return
        self._write(made, old, verdicts, found, parent)
        self._state = (tuple(self._edits), after)
        if self.guard:
            self.guard.keep(after)

    def _with(self, before: Edit | None, new: Sequence[Edit], gone: set[int]) -> Edit:
        """What is in force with some new edits and without some old ones."""
        if before is None or any(number > 0 for number in gone):
            return Edit.join([edit for number, edit in self._edits.items() if number not in gone] + list(new))
        return Edit.join([before, *new])  # what have met are not compared again

    def _write(
        self,
        made: Sequence[_Made],
        old: Mapping[int, Sequence[int]],
        verdicts: Mapping[int, Verdict],
        found: dict[int, Kept],
        parent: int,
    ) -> None:
        """Write down what was checked together, all or none."""
        numbers: dict[int, int] = {}
        edits, kept = dict(self._edits), dict[int, Kept]()
        with self.ledger.writing():
            for one in made:
                supersedes = [numbers.get(number, number) for number in old[one.row]]
                verdict = verdicts.get(one.row)
                number = self.ledger.commit(
                    one.edit,
                    scores=verdict.scores if verdict else {},
                    supersedes=supersedes,
                    editor=self.mark,
                    who=one.who,
                    note=one.note,
                    parent=parent,
                )
                numbers[one.place], parent = number, parent + 1  # its own event
                edits = {n: edit for n, edit in edits.items() if n not in supersedes} | {number: one.edit}
                kept[one.row] = Kept(one.request, number, one.edit, tuple(supersedes), verdict)
        self._edits = edits
        found.update(kept)

    def _superseded(self, made: Sequence[_Made]) -> dict[int, list[int]]:
        """By row, what each edit takes the place of: edits of the ledger by number, those before it here by place."""
        known, old = dict(self._edits), {}
        for one in made:
            old[one.row] = superseded(self.lm, known, one.edit, one.request)
            known = {number: kept for number, kept in known.items() if number not in old[one.row]}
            known[one.place] = one.edit
        return old

    def _nearest(self, made: Sequence[_Made], gone: set[int], most: int) -> list[EditRequest]:
        """Requests of the edits that stay in force which come nearest to some new ones, or else of the latest."""
        kept = {number: edit for number, edit in self._edits.items() if number not in gone}
        likeness: dict[int, float] = {}
        for one in made if len(kept) > most else ():  # else all of them are asked
            for number, value in alike(kept, one.edit).items():
                likeness[number] = max(value, likeness.get(number, 0.0))
        order = sorted(kept, key=lambda number: (likeness.get(number, 0.0), number), reverse=True)
        return [request for number in order[:most] for request in kept[number].requests][:most]

    def _say(self, requests: Sequence[EditRequest], state: Edit | None) -> list[bool]:
        """Of each request whether its prompt and the wordings given with it get the target as it is."""
        texts = [[request.prompt, *request.rephrase_prompts] for request in requests]
        ids = [encode_pair(text, "-", "bare", self.lm.tokenizer).prompt for some in texts for text in some]
        # An answer that is the target ends soon after as many tokens; in quotes or other spelling it may take more.
        targets = self.lm.tokenizer([request.target_new for request in requests], add_special_tokens=False).input_ids
        most = min(MAX_NEW_TOKENS, 2 * max(map(len, targets)) + 8)
        said = iter(generate(self.lm, ids, Together((state,)) if state else None, max_new_tokens=most))
        found = []
        for request, some in zip(requests, texts, strict=True):
            answers = [next(said).text for _ in some]
            found.append(all(says(answer, request.target_new) for answer in answers))
        return found
