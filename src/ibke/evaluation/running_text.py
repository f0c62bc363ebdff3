"""Running text: how little a model expects each of its tokens.

Text is read in windows, each a prompt of one token and all that follows it. An edit that is decided on where a question
ends would then be decided on at that one token and be silent ever after. Text can be cut off anywhere and given to a
model to go on with, so for such edits each stretch of a window is what follows a prompt of all the words before it:
the same tokens are judged, each at most ``STRETCH`` tokens after a decision. Windows in which such edits have nothing
to say are not read again: what the unedited model makes of them is known.
"""

from __future__ import annotations

from collections.abc import Sequence

from ibke.batch import Pair, collate
from ibke.edit import Edit
from ibke.evaluation.baseline import Baseline
from ibke.evaluation.generate import BATCH_SIZE, Together
from ibke.evaluation.scoring import score
from ibke.models import LanguageModel

WINDOW = 256  # tokens read at once
STRETCH = 32  # tokens that are judged after one decision


class RunningText:
    """The beginning of a text, ready to be read.

    Args:
        lm: the model.
        text: the text; empty for none.
        tokens: how much of it is read at most.
        baseline: where it may be known from what the unedited model makes of it.
    """

    def __init__(self, lm: LanguageModel, text: str, tokens: int, baseline: Baseline | None = None):
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
        windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        windows = [window for window in windows if len(window) > 1]
        self.lm, self.windows = lm, [_cut(window, 1, len(window)) for window in windows]
        self.baseline = baseline or Baseline(lm)
        starts = [(n, start) for n, window in enumerate(windows) for start in range(1, len(window), STRETCH)]
        self.stretches = [_cut(windows[n], start, start + STRETCH) for n, start in starts]
        self._window_of = [n for n, _ in starts]  # of each stretch
        self._known: list[float] | None = None

    def nll(self, edits: Sequence[Edit], asked: bool | None = None, *, batch_size: int = BATCH_SIZE) -> float:
        """Mean negative log-likelihood of its tokens (nats) with some edits in force together; NaN without tokens.

        Args:
            edits: what is in force.
            asked: whether stretches are read, at four to five times the work; None where an edit depends on it.
            batch_size: rows per pass.
        """
        asked = depends_on_prompt(edits) if asked is None else asked
        rows = self.stretches if asked else self.windows
        chosen = list(range(len(rows)))
        if asked and not self.lm.sessions:  # what is attached already would be missing from what is known
            reached = self._reached(edits, batch_size)
            chosen = [row for row in chosen if reached[self._window_of[row]]]
        nll = [0.0] * len(rows) if len(chosen) == len(rows) else list(self._unedited(batch_size))
        read = score(self.lm, [rows[row] for row in chosen], _force(edits), batch_size=batch_size)
        for row, one in zip(chosen, read, strict=True):
            nll[row] = sum(one.nll)
        count = sum(len(row.answer) for row in rows)
        return sum(nll) / count if count else float("nan")

    def _unedited(self, batch_size: int) -> list[float]:
        """What the unedited model makes of each stretch (nats)."""
        identity = ["stretches", batch_size, [[row.prompt, row.answer] for row in self.stretches]]
        if self._known is None:
            self._known = self.baseline.recall(identity)
        if self._known is None:
            self._known = [sum(one.nll) for one in score(self.lm, self.stretches, batch_size=batch_size)]
            self.baseline.keep(identity, self._known)
        return self._known

    def _reached(self, edits: Sequence[Edit], batch_size: int) -> list[bool]:
        """In which windows some edits can change anything."""
        found: list[bool] = []
        for begin in range(0, len(self.windows), batch_size):
            some = self.windows[begin : begin + batch_size]
            batch = collate(some, self.lm.tokenizer.pad_token_id, self.lm.device)
            rows = [edit.reaches(self.lm, batch).tolist() for edit in edits]
            found += [any(some) for some in zip(*rows, strict=True)] or [False] * len(some)
        return found


def _force(edits: Sequence[Edit]) -> Together | None:
    return Together(tuple(edits)) if edits else None


def depends_on_prompt(edits: Sequence[Edit]) -> bool:
    """Whether what one of some edits does to a text depends on where its prompt ends."""
    return any(part.told for edit in edits for part in edit.parts.values())


def _cut(ids: list[int], start: int, stop: int) -> Pair:
    return Pair(ids[:start], ids[start:stop], (0, 1))
