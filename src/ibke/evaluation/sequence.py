"""The edits of a sequence kept on the model as one: what they cost does not grow with their number.

Five hundred edits side by side are five hundred small products at each module, and attaching them for each pass takes
longer than the pass. As one edit their factors are one product, and where there are more of them than the module has
directions, their sum is smaller. Unlike edits folded into weights, a sum of its own rounds nothing to a weight's grid,
and taking it off restores every bit.

Shape suffixes: R rank, O d_out, I d_in.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ibke.edit import Edit, Factors, dense_factors
from ibke.models import LanguageModel
from ibke.session import EditSession


class InSequence:
    """Edits in force one after another.

    Args:
        lm: the model; leaving this as a context manager takes the edits off it.
    """

    def __init__(self, lm: LanguageModel):
        self.session = EditSession(lm)
        self.whole: Edit | None = None

    def add(self, edit: Edit) -> None:
        """Let one more edit be in force; if it cannot be, those before it stay.

        Raises:
            IBKEError: it does not fit the model, or those before it.
        """
        whole = edit if self.whole is None else summed(self.whole.compose(edit))
        before = self.whole
        try:
            self.back_to(whole)
        except BaseException:
            self.back_to(before)
            raise

    def back_to(self, whole: Edit | None) -> None:
        """Let what was in force at some time, by :attr:`whole` of then, be so again."""
        self.session.detach()
        if whole is not None:
            self.session.attach(whole)
        self.whole = whole

    def __enter__(self) -> InSequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.restore()


def summed(edit: Edit) -> Edit:
    """The same edit with every update of more than full rank as its sum and an identity."""
    return replace(edit, factors={name: _summed(*pair) for name, pair in edit.factors.items()})


def _summed(a_RI: Tensor, b_OR: Tensor) -> Factors:
    rank, d_in, d_out = len(a_RI), a_RI.shape[1], len(b_OR)
    return (a_RI, b_OR) if rank <= min(d_in, d_out) else dense_factors(b_OR @ a_RI)
