"""Running text: how little a model expects each of its tokens.

Text is read in windows, each a prompt of one token and all that follows it. An edit that is decided on where a question
ends would then be decided on at that one token and be silent ever after. Text can be cut off anywhere and given to a
model to go on with, so for such edits each stretch of a window is what follows a prompt of all the words before it: the
same tokens are judged, each at most ``STRETCH`` tokens after a decision.
"""

from __future__ import annotations

from collections.abc import Sequence

from ibke.batch import Pair
from ibke.edit import Edit
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
    """

    def __init__(self, lm: LanguageModel, text: str, tokens: int):
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
        windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        self.lm, self.windows = lm, [_cut(window, 1, len(window)) for window in windows if len(window) > 1]
        self.stretches = [
            _cut(window, start, start + STRETCH) for window in windows for start in range(1, len(window), STRETCH)
        ]

    def nll(self, edits: Sequence[Edit], asked: bool | None = None, *, batch_size: int = BATCH_SIZE) -> float:
        """Mean negative log-likelihood of its tokens (nats) with some edits in force together; NaN without tokens.

        Args:
            edits: what is in force.
            asked: whether stretches are read, at four to five times the work; None where an edit depends on it.
            batch_size: rows per pass.
        """
        some = self.stretches if (depends_on_prompt(edits) if asked is None else asked) else self.windows
        read = score(self.lm, some, Together(tuple(edits)) if edits else None, batch_size=batch_size)
        count = sum(len(one.nll) for one in read)
        return sum(sum(one.nll) for one in read) / count if count else float("nan")


def depends_on_prompt(edits: Sequence[Edit]) -> bool:
    """Whether what one of some edits does to a text depends on where its prompt ends."""
    return any(part.told for edit in edits for part in edit.parts.values())


def _cut(ids: list[int], start: int, stop: int) -> Pair:
    return Pair(ids[:start], ids[start:stop], (0, 1))
