"""The three terms of the objective for a whole batch of independent single edits in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibke.editors.ibke.bottleneck import Bottleneck, Written, answer_embedding
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


def written(episodes: EpisodeBatch, part: PartialModel) -> Written:
    """The written tokens of a batch of episodes."""
    owners, labels = [], []
    for group in episodes.groups:
        edit_N = (group.kind_R == EDIT)[group.batch.row_N]
        owners.append(group.owner_R[group.batch.row_N[edit_N]])
        labels.append(group.batch.labels_N[edit_N])
    count, embedding = len(episodes.mask_BT), part.model.get_input_embeddings()
    return Written(
        episodes.keys_LBTI,
        episodes.grads_LBTO,
        episodes.role_BT,
        episodes.mask_BT,
        episodes.contrast_LBSI,
        episodes.contrast_mask_BS,
        answer_embedding(embedding, torch.cat(labels), torch.cat(owners), count),
    )


def terms(
    network: Bottleneck,
    part: PartialModel,
    modules: Mapping[str, nn.Module],
    episodes: EpisodeBatch,
    generator: torch.Generator | None,
) -> Terms:
    """All terms for one batch; z is sampled when a generator is given, its mean otherwise."""
    code = network.encode(written(episodes, part))
    z = code.sample(generator) if generator is not None else code.mean
    rows = run_rows(part, modules, network.decode(z, code.written), episodes.groups)
    return Terms(
        rows.nll_R[rows.kind_R == EDIT].mean(),
        rows.nll_R[rows.kind_R == INSIDE].mean(),
        rows.backward_R[rows.kind_R == OUTSIDE].mean(),
        rows.forward_R[rows.kind_R == OUTSIDE].mean(),
        network.rate(code).mean(),
    )
