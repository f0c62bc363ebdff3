"""One pass of a whole batch of independent single edits: the three terms of the objective, or the scores.

Shape suffixes: R rows, N answer positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibke.editors.ibke.bottleneck import Bottleneck, Written
from ibke.editors.ibke.objective import answer_nll, binned_kl
from ibke.partial import PartialModel, row_updates
from ibke.training.cache import EDIT, INSIDE, OUTSIDE, EpisodeBatch, RowGroup


@dataclass
class Terms:
    """The objective's terms, means over the batch's edits, in nats per edit.

    ``reliability`` is the NLL of the answer at the edit prompt, ``generality`` at the other prompts in scope; together
    they are SG. ``independence`` is KL(edited‖base) and ``independence_reverse`` KL(base‖edited) out of scope.
    """

    reliability: Tensor
    generality: Tensor
    independence: Tensor
    independence_reverse: Tensor
    rate: Tensor

    def loss(self, lambda_il: float, beta: float) -> Tensor:
        """L = SG + λ_IL · IL + β · R, with SG the mean over all prompts in scope and IL symmetric."""
        sufficiency = 0.5 * self.reliability + self.generality
        independence = 0.5 * (self.independence + self.independence_reverse)
        return sufficiency + lambda_il * independence + beta * self.rate


def written(episodes: EpisodeBatch) -> Written:
    """The written tokens of a batch of episodes."""
    return Written(episodes.keys_LBTI, episodes.grads_LBTO, episodes.role_BT, episodes.mask_BT)


def edited_logits(
    part: PartialModel, modules: Mapping[str, nn.Module], factors: Mapping[str, tuple[Tensor, Tensor]], group: RowGroup
) -> Tensor:
    """Logits at every answer position, each row under its own episode's edit (N × V)."""
    rows = {name: (a[group.owner_R], b[group.owner_R]) for name, (a, b) in factors.items()}
    with row_updates(modules, rows):
        return part.suffix(group.hidden_RTD, group.batch)


def terms(
    network: Bottleneck,
    part: PartialModel,
    modules: Mapping[str, nn.Module],
    episodes: EpisodeBatch,
    generator: torch.Generator | None,
) -> Terms:
    """All terms for one batch; z is sampled when a generator is given, its mean otherwise."""
    code = network.encode(written(episodes))
    factors = network.decode(code.sample(generator) if generator is not None else code.mean, code.written)
    rows = [_row_terms(edited_logits(part, modules, factors, group), group) for group in episodes.groups]
    kind_R = torch.cat([group.kind_R for group in episodes.groups])
    nll_R, forward_R, backward_R = (torch.cat(values) for values in zip(*rows, strict=True))
    return Terms(
        nll_R[kind_R == EDIT].mean(),
        nll_R[kind_R == INSIDE].mean(),
        backward_R[kind_R == OUTSIDE].mean(),
        forward_R[kind_R == OUTSIDE].mean(),
        network.rate(code).mean(),
    )


def _row_terms(logits_NV: Tensor, group: RowGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: NLL of the answer (in scope), KL(base‖edited) and KL(edited‖base) (out of scope)."""
    batch, outside_N = group.batch, group.kind_R[group.batch.row_N] == OUTSIDE
    values_N = answer_nll(logits_NV[~outside_N], batch.labels_N[~outside_N])
    nll_R = _per_row(values_N, batch.row_N[~outside_N], batch.rows)
    forward_N, backward_N = binned_kl(logits_NV[outside_N], group.base_tokens_NP, group.base_log_probs_NP)
    row_N = batch.row_N[outside_N]
    return nll_R, _per_row(forward_N, row_N, batch.rows), _per_row(backward_N, row_N, batch.rows)


def _per_row(values_N: Tensor, row_N: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, dtype=values_N.dtype).index_add(0, row_N, values_N)


@dataclass
class Score:
    """Whether one prompt is answered exactly as it should be."""

    kind: int
    owner: int
    right: bool


@torch.no_grad()
def scores(
    part: PartialModel,
    modules: Mapping[str, nn.Module],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    episodes: EpisodeBatch,
) -> list[Score]:
    """Whether greedy generation gives exactly the answer (in scope) or the base's answer (out of scope), by row.

    Greedy decoding reproduces a given answer if and only if every token of it is the most likely one after those before
    it, so one pass over the answer decides what generation would do.
    """
    found = []
    for group in episodes.groups:
        logits_NV = edited_logits(part, modules, factors, group)
        wrong_N = (logits_NV.argmax(-1) != group.batch.labels_N).float()
        right_R = _per_row(wrong_N, group.batch.row_N, group.batch.rows) == 0
        items = zip(group.kind_R.tolist(), group.owner_R.tolist(), right_R.tolist(), strict=True)
        found += [Score(kind, owner, right) for kind, owner, right in items]
    return found
