"""The three terms of the objective for a whole batch of independent single edits in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ibke.editors.ibke.bottleneck import Bottleneck
from ibke.neurons import Site
from ibke.partial import PartialModel
from ibke.rows import EDIT, INSIDE, OUTSIDE, run_rows
from ibke.training.cache import EpisodeBatch


@dataclass
class Terms:
    """The objective's terms in nats: per prompt (answers and continuations summed over tokens), R per edit.

    ``reliability`` is the NLL of the answer at the edit prompt, ``generality`` at the other prompts in scope.
    ``independence`` is KL(edited‖base) and ``independence_reverse`` KL(base‖edited) out of scope.
    """

    reliability: Tensor
    generality: Tensor
    independence: Tensor
    independence_reverse: Tensor
    rate: Tensor

    def loss(self, lambda_il: float, beta: float) -> Tensor:
        """L = SG + λ_IL · IL + β · R (arXiv 2512.16227).

        SG is generality plus half of reliability, which refining can mend later; IL is the mean of both directions.
        """
        sufficiency = 0.5 * self.reliability + self.generality
        independence = 0.5 * (self.independence + self.independence_reverse)
        return sufficiency + lambda_il * independence + beta * self.rate


def terms(
    network: Bottleneck,
    part: PartialModel,
    site: Site,
    episodes: EpisodeBatch,
    generator: torch.Generator | None,
) -> Terms:
    """All terms for one batch; z is sampled when a generator is given, its mean otherwise."""
    code = network.encode(episodes.written)
    z = code.sample(generator) if generator is not None else code.mean
    rows = run_rows(part, site, network.decode(z, code.written, site), episodes.groups)
    return Terms(
        _mean(rows.nll_R[rows.kind_R == EDIT]),
        _mean(rows.nll_R[rows.kind_R == INSIDE]),
        _mean(rows.backward_R[rows.kind_R == OUTSIDE]),
        _mean(rows.forward_R[rows.kind_R == OUTSIDE]),
        network.rate(code).mean(),
    )


def _mean(values_R: Tensor) -> Tensor:
    """Zero where no row of a batch is of that kind."""
    return values_R.sum() / max(1, len(values_R))
