"""Teacher-forced scores: what a model predicts at each token of a given answer.

They flatter an edit, since every token is predicted after the right ones, and stand beside generated answers only so
that published numbers can be compared.

Shape suffixes: N answer positions of all rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ibke.batch import Pair, collate
from ibke.evaluation.generate import BATCH_SIZE, InForce, in_force, plan
from ibke.models import LanguageModel
from ibke.modules import finished_logits
from ibke.partial import answer_states

# Positions whose logits are held at once; a vocabulary of 256k makes 256 of them a quarter of a gigabyte.
POSITIONS = 256
MOST = 100.0  # nats per token that are told apart: a model that needs more, or says not-a-number, is broken


@dataclass(frozen=True)
class Forced:
    """A model's predictions along a given answer.

    Args:
        predicted: the likeliest token at each of the answer's positions.
        nll: the answer's negative log-likelihood by token (nats).
    """

    predicted: tuple[int, ...]
    nll: tuple[float, ...]


@torch.inference_mode()
def score(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    edits: InForce = None,
    *,
    batch_size: int = BATCH_SIZE,
) -> list[Forced]:
    """Predictions along each pair's answer, under an edit of its own or those of all rows, where there are any."""
    scores: dict[int, Forced] = {}
    with in_force(lm, edits) as on_rows:
        for rows in plan([len(pair) for pair in pairs], batch_size):
            batch = collate([pairs[row] for row in rows], lm.tokenizer.pad_token_id, lm.device)
            with on_rows(rows):
                states_ND = answer_states(lm.model, batch)
            predicted, nll = [], []
            for part in _parts(len(states_ND)):
                logp_NV = _log_probs(lm, states_ND[part])
                predicted += logp_NV.argmax(-1).tolist()
                nll += _bounded(-logp_NV.gather(1, batch.labels_N[part, None])[:, 0]).tolist()
            for row in rows:
                size = len(pairs[row].answer)
                scores[row] = Forced(tuple(predicted[:size]), tuple(nll[:size]))
                del predicted[:size], nll[:size]
    return [scores[row] for row in range(len(pairs))]


@dataclass(frozen=True)
class Moved:
    """How far an edit moves the next-token distributions along an answer.

    Args:
        forward: KL(base‖edited), mean over the answer's positions (nats per token).
        backward: KL(edited‖base), the same.
        same: whether the answer's tokens are the edited model's likeliest, so that it would give that answer too.
    """

    forward: float
    backward: float
    same: bool


@torch.inference_mode()
def divergence(
    lm: LanguageModel, pairs: Sequence[Pair], edits: InForce, *, batch_size: int = BATCH_SIZE
) -> list[Moved]:
    """How far edits move each pair's distributions, under an edit of its own or those of all rows."""
    found: dict[int, Moved] = {}
    for rows in plan([len(pair) for pair in pairs], batch_size):
        batch = collate([pairs[row] for row in rows], lm.tokenizer.pad_token_id, lm.device)
        base_ND = answer_states(lm.model, batch)
        with in_force(lm, edits) as on_rows, on_rows(rows):
            edited_ND = answer_states(lm.model, batch)
        parts = []
        for part in _parts(len(base_ND)):
            base_NV, edited_NV = _log_probs(lm, base_ND[part]), _log_probs(lm, edited_ND[part])
            gap_NV = base_NV - edited_NV
            kl = [(base_NV.exp() * gap_NV).sum(-1), -(edited_NV.exp() * gap_NV).sum(-1)]
            kl = [_bounded(part_N) for part_N in kl]
            parts.append(torch.stack([*kl, (edited_NV.argmax(-1) != batch.labels_N[part]).float()]))
        forward_N, backward_N, other_N = torch.cat(parts, dim=1)
        counts = batch.per_row(torch.ones_like(forward_N))
        means = (batch.per_row(forward_N) / counts, batch.per_row(backward_N) / counts, batch.per_row(other_N) == 0)
        for row, *one in zip(rows, *(mean.tolist() for mean in means), strict=True):
            found[row] = Moved(*one)
    return [found[row] for row in range(len(pairs))]


def _log_probs(lm: LanguageModel, states_ND: Tensor) -> Tensor:
    return finished_logits(lm.model, lm.model.get_output_embeddings()(states_ND)).log_softmax(-1)


def _bounded(nats_N: Tensor) -> Tensor:
    return nats_N.nan_to_num(nan=MOST).clamp_max(MOST)


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + POSITIONS) for start in range(0, count, POSITIONS))
