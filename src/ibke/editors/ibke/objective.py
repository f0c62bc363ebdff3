"""L = SG + λ_IL · IL + β · R, every term in nats per edit (arXiv 2512.16227).

Shape suffixes: B edits, R rows, N answer positions, P leading tokens of the base.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def answer_nll(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Negative log-likelihood of each answer token in nats (N)."""
    return F.cross_entropy(logits_NV, labels_N, reduction="none")


def binned_kl(logits_NV: Tensor, tokens_NP: Tensor, base_log_probs_NP: Tensor) -> tuple[Tensor, Tensor]:
    """KL(base‖edited) and KL(edited‖base) over the base's leading tokens and one bin for all others (N, nats).

    Merging outcomes can only lower a divergence, so both are lower bounds, tight where the base is confident.
    """
    total_N1 = logits_NV.logsumexp(-1, keepdim=True)
    edited_NP = logits_NV.gather(1, tokens_NP) - total_N1
    base, edited = _with_rest(base_log_probs_NP), _with_rest(edited_NP)
    return (base.exp() * (base - edited)).sum(-1), (edited.exp() * (edited - base)).sum(-1)


def _with_rest(log_probs_NP: Tensor) -> Tensor:
    mass = log_probs_NP.exp().sum(-1, keepdim=True)
    return torch.cat([log_probs_NP, (1.0 - mass).clamp_min(1e-5).log()], dim=-1)


class BetaSchedule:
    """β over training: fixed, annealed from zero, or steered to a target rate.

    Args:
        kind: ``fixed``, ``anneal`` or ``target``.
        beta: its value, or where steering starts.
        warmup: steps over which ``anneal`` rises linearly.
        target: nats per edit wanted under ``target``.
    """

    def __init__(self, kind: str, beta: float, warmup: int, target: float):
        self.kind, self.beta, self.warmup, self.target = kind, beta, max(1, warmup), target

    def at(self, step: int, rate: float) -> float:
        """β for this step, given the rate just measured (nats per edit)."""
        if self.kind == "target":
            # Dual ascent on the constraint rate ≤ target, in log β so that it stays positive.
            self.beta *= 1.0 + 0.02 * max(-1.0, min(1.0, rate / self.target - 1.0))
            return self.beta
        return self.beta * min(1.0, step / self.warmup) if self.kind == "anneal" else self.beta
