"""How the weight β of the rate is set while training (arXiv 2512.16227: L = SG + λ_IL · IL + β · R, nats per edit)."""

from __future__ import annotations


class BetaSchedule:
    """β over training: fixed, annealed from zero, or steered to a target rate.

    Args:
        kind: ``fixed``, ``anneal`` or ``target``.
        beta: its value, or where steering starts.
        warmup: steps over which ``anneal`` rises linearly.
        target: nats per edit wanted under ``target``.
    """

    def __init__(self, kind: str, beta: float, warmup: int, target: float):
        # Steering multiplies, so it cannot leave zero.
        self.beta = max(beta, 1e-6) if kind == "target" else beta
        self.kind, self.warmup, self.target = kind, max(1, warmup), target

    def at(self, step: int, rate: float) -> float:
        """β for this step, given the rate just measured (nats per edit)."""
        if self.kind == "target":
            # β rises while the rate is above target and falls below it; multiplied, so that it stays positive.
            self.beta *= 1.0 + 0.02 * max(-1.0, min(1.0, rate / self.target - 1.0))
            return self.beta
        return self.beta * min(1.0, step / self.warmup) if self.kind == "anneal" else self.beta
