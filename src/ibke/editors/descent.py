"""Gradient descent on the requests' own answers, which fine-tuning and LoRA have in common.

The loss of a batch is the mean over its requests of the mean over an answer's tokens, end token included,

    L = 1/B Σ_b 1/T_b Σ_t −log p(o_bt given q_b, o_b<t)          (nats a token),

as in LocFT-BF (Yang et al. 2026, "Fine-tuning Done Right in Model Editing"). Only the layers from the first trained one
on are run: the states entering it are a function of what is frozen.

Shape suffixes: R rows (requests), T tokens, D width of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ibke.batch import Batch, Pair, by_length, collate
from ibke.edit import EditInfo
from ibke.editors.settings import refuse_below, refuse_not_positive
from ibke.errors import CaptureError
from ibke.models import LanguageModel
from ibke.partial import PartialModel


@dataclass(frozen=True)
class DescentSettings:
    """How far and how Adam goes.

    Args:
        learning_rate: of Adam. Published, LocFT-BF and FT-L: 5e-4; LocFT-BF on a whole layer of Mistral: 5e-5.
        epochs: most passes over the requests. Published, LocFT-BF and FT-L: 25.
        batch_size: requests a step. Published, LocFT-BF: 100, with thousands of requests.
        stop_loss: a batch whose loss (nats a token) is below it takes no step, and an epoch without a step is the last.
            Published, LocFT-BF and FT-L: 1e-2.
        stop_at_answer: a batch takes no step either once greedy decoding gives every target in it. Published: never.
        seed: of the order of the requests, drawn anew in each epoch, and of what else is drawn.
    """

    learning_rate: float = 5e-4
    epochs: int = 25
    batch_size: int = 100
    stop_loss: float = 1e-2
    stop_at_answer: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_not_positive(self, "learning_rate")
        refuse_below(self, 1, "epochs", "batch_size")
        refuse_below(self, 0, "stop_loss")


@dataclass(frozen=True)
class Descent:
    """What came of it.

    Args:
        steps: gradient steps taken.
        nll_before: NLL of the targets before, in nats, mean over the requests.
        nll_after: the same after.
        achieved: whether greedy decoding gives every target.
    """

    steps: int
    nll_before: float
    nll_after: float
    achieved: bool

    def info(self, method: str, lm: LanguageModel, seconds: float) -> EditInfo:
        """How an edit found by this descent was made, and in how many seconds altogether."""
        return EditInfo(
            method,
            lm.fingerprint,
            lm.name,
            refine_steps=self.steps,
            achieved=self.achieved,
            seconds=seconds,
            nll_before=self.nll_before,
            nll_after=self.nll_after,
        )


class Lessons:
    """Tokenised requests and the states that enter the first trained layer.

    Args:
        part: the model, split at the first trained layer.
        pairs: prompts and targets.
        pad_id: token to pad with.
    """

    def __init__(self, part: PartialModel, pairs: Sequence[Pair], pad_id: int):
        self.part, self.pairs, self.pad_id = part, pairs, pad_id
        self.hidden: list[Tensor] = [torch.empty(0)] * len(pairs)
        for rows in by_length([len(pair) for pair in pairs]):
            hidden_RTD = part.prefix(self._collate(rows))
            for row, states_TD in zip(rows, hidden_RTD, strict=True):
                self.hidden[row] = states_TD[: len(pairs[row])]

    def __len__(self) -> int:
        return len(self.pairs)

    def learn(
        self, parameters: Sequence[Tensor], settings: DescentSettings, constrain: Callable[[], None] | None = None
    ) -> Descent:
        """Move parameters of the trained layers down the loss, with Adam.

        Args:
            parameters: what is trained; already in force on the model.
            settings: how far and how.
            constrain: called after each step, to bring the parameters back to where they may be.

        Raises:
            CaptureError: the loss is not finite.
        """
        before, _ = self.judge()
        adam = torch.optim.Adam(parameters, lr=settings.learning_rate)
        generator = torch.Generator().manual_seed(settings.seed)
        steps = 0
        for _ in range(settings.epochs):
            steps_before = steps
            order = torch.randperm(len(self), generator=generator).tolist()
            for begin in range(0, len(order), settings.batch_size):
                adam.zero_grad()
                loss, answered = self._backward(order[begin : begin + settings.batch_size])
                if loss < settings.stop_loss or (settings.stop_at_answer and answered):
                    continue
                adam.step()
                if constrain:
                    constrain()
                steps += 1
            if steps == steps_before:
                break
        after, achieved = self.judge()
        return Descent(steps, before, after, achieved)

    @torch.no_grad()
    def judge(self) -> tuple[float, bool]:
        """NLL of the targets as they are now (nats, mean over the requests), and whether all are generated."""
        scored = [
            batch.score(self.part.suffix(hidden_RTD, batch)) for hidden_RTD, batch in self._groups(range(len(self)))
        ]
        nll_R, right_R = (torch.cat(values) for values in zip(*scored, strict=True))
        return float(nll_R.mean()), bool(right_R.all())

    def _backward(self, rows: Sequence[int]) -> tuple[float, bool]:
        """Add the gradient of a batch's loss; returns the loss (nats a token) and whether all targets come."""
        total, answered = 0.0, True
        for hidden_RTD, batch in self._groups(rows):
            with torch.enable_grad():
                nll_R, right_R = batch.score(self.part.suffix(hidden_RTD, batch))
                loss = (nll_R / batch.predicts_RT.sum(1)).sum() / len(rows)
            loss.backward()
            total, answered = total + loss.item(), answered and bool(right_R.all())
            if not math.isfinite(total):
                raise CaptureError(
                    "the loss is not finite.", "descent", "Lower the learning rate, or load the model in float32."
                )
        return total, answered

    def _groups(self, rows: Sequence[int]) -> Iterator[tuple[Tensor, Batch]]:
        """Rows of like length together, so that little is computed on padding."""
        for places in by_length([len(self.pairs[row]) for row in rows]):
            chosen = [rows[place] for place in places]
            yield pad_sequence([self.hidden[row] for row in chosen], batch_first=True), self._collate(chosen)

    def _collate(self, rows: Sequence[int]) -> Batch:
        return collate([self.pairs[row] for row in rows], self.pad_id, self.part.model.device)
