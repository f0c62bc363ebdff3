"""Semi-amortised inference: where the first guess does not yet answer the target, move the code itself.

The encoder's code is where Adam starts; decoder and aggregation stay fixed, so everything still flows through Z. The
objective is the training one on the edit at hand: NLL of the target in several frames, KL(base‖edited) on
probes, and the code's own rate.

Shape suffixes: B edits, Z code, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ibke.editors.ibke.bottleneck import Bottleneck, Code, Written
from ibke.neurons import Site
from ibke.partial import PartialModel
from ibke.rows import OUTSIDE, RowGroup, RowTerms, merge, run_rows

FEW_ROWS = 64  # up to here reading the weights costs more than computing on padding


@dataclass(frozen=True)
class RefineSettings:
    """How far and how the code may move.

    Args:
        steps: most Adam steps (J); 0 shows the bare network.
        learning_rate: of Adam, in code units (the code is whitened, so 1 is one standard deviation).
        lambda_il: weight of KL(base‖edited) on the prompts watched.
        beta: weight of the code's rate.
        extra: steps taken after the target is first generated, for margin.
    """

    steps: int = 40
    learning_rate: float = 0.3
    lambda_il: float = 0.1
    beta: float = 1e-3
    extra: int = 2


@dataclass
class Refined:
    """What refining led to, by edit (B).

    ``z_BZ`` is the best code found, ``steps_B`` the Adam steps taken, ``achieved_B`` whether the target is generated
    in every frame asked, ``nll_B`` the target's NLL there (nats, mean over frames).
    """

    z_BZ: Tensor
    steps_B: Tensor
    achieved_B: Tensor
    nll_B: Tensor


class Refiner:
    """Moves codes for one model.

    Args:
        network: the trained bottleneck.
        part: the base, split at the first edited layer.
        site: the edited MLP.
        settings: how far and how.
        joint: all edits are one update, solved together, instead of one each.
    """

    def __init__(
        self,
        network: Bottleneck,
        part: PartialModel,
        site: Site,
        settings: RefineSettings,
        joint: bool = False,
    ):
        self.network, self.part, self.site = network, part, site
        self.settings, self.joint = settings, joint

    def refine(self, code: Code, targets: Sequence[RowGroup], watch: Callable[[], Sequence[RowGroup]]) -> Refined:
        """Check every edit's target and move the codes of those that do not come.

        Args:
            code: the encoder's codes.
            targets: rows in scope, owned by edit index.
            watch: gives rows out of scope, owned by edit index; called only if a code has to move.
        """
        # Edits solved together are one update: its NLL falls or rises, and its targets come, as a whole.
        count, steps = 1 if self.joint else code.mean.shape[0], self.settings.steps
        z = code.mean.detach().clone().requires_grad_()
        # The first look is the first step's forward pass too, so an edit that comes at once costs no second one.
        with torch.set_grad_enabled(steps > 0):
            total_B, nll_B, achieved_B = self._objective(z, code, targets, count)
        none = torch.zeros(count, dtype=torch.long, device=z.device)
        best = Refined(z.detach().clone(), none.clone(), achieved_B, nll_B)
        open_B = ~achieved_B
        if not open_B.any() or steps == 0:
            return best
        everything, watched = list(targets), watch()
        if watched:
            total_B = total_B + self.settings.lambda_il * self._divergence(self._run(z, code.written, watched), count)
            everything += watched
        if sum(group.batch.rows for group in everything) <= FEW_ROWS:
            everything = [merge(everything)]
        # Directions whose gradient is little more than rounding would else move as far as those that matter.
        adam = torch.optim.Adam([z], lr=self.settings.learning_rate, betas=(0.9, 0.9), eps=1e-3)
        spare_B = none + self.settings.extra
        for step in range(1, steps + 1):
            adam.zero_grad()
            total_B[open_B].sum().backward()
            adam.step()
            with torch.set_grad_enabled(step < steps):
                total_B, nll_B, achieved_B = self._objective(z, code, _owned(everything, open_B), count)
            self._accept(best, z, nll_B, achieved_B, open_B, step)
            spare_B -= (best.achieved_B & open_B).long()
            open_B = open_B & ~(best.achieved_B & (spare_B < 0))
            if not open_B.any():
                break
        return best

    def _objective(
        self, z: Tensor, code: Code, groups: Sequence[RowGroup], count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The objective, the targets' NLL and whether they come, by edit (``count``)."""
        rows = self._run(z, code.written, groups)
        nll_B, achieved_B = self._judge(rows, count)
        rate_B = self.network.rate(Code(z, code.log_variance, code.written))
        rate_B = rate_B.sum(0, keepdim=True) if self.joint else rate_B
        total_B = nll_B + self.settings.lambda_il * self._divergence(rows, count) + self.settings.beta * rate_B
        return total_B, nll_B.detach(), achieved_B

    def _divergence(self, rows: RowTerms, count: int) -> Tensor:
        """KL(base‖edited) on what is watched (nats, mean over its rows)."""
        outside = rows.kind_R == OUTSIDE
        return _mean_by_owner(rows.forward_R[outside], rows.owner_R[outside], count)

    def _run(self, z: Tensor, written: Written, groups: Sequence[RowGroup]) -> RowTerms:
        return run_rows(self.part, self.site, self.network.decode(z, written, self.site, joint=self.joint), groups)

    def _judge(self, rows: RowTerms, count: int) -> tuple[Tensor, Tensor]:
        inside = rows.kind_R != OUTSIDE
        nll_B = _mean_by_owner(rows.nll_R[inside], rows.owner_R[inside], count)
        right_B = _mean_by_owner(rows.right_R[inside].float(), rows.owner_R[inside], count)
        return nll_B, right_B == 1.0

    def _accept(self, best: Refined, z: Tensor, nll_B: Tensor, achieved_B: Tensor, open_B: Tensor, step: int) -> None:
        # A step counts only if it lowers the target's NLL; writing on regardless diverged outside the training data.
        better_B = open_B & (nll_B.detach() < best.nll_B)
        moved_B = better_B.expand(len(z))
        best.z_BZ[moved_B] = z.detach()[moved_B]
        best.nll_B[better_B] = nll_B.detach()[better_B]
        best.achieved_B[better_B] = achieved_B[better_B]
        best.steps_B[open_B] = step


def _mean_by_owner(values_R: Tensor, owner_R: Tensor, count: int) -> Tensor:
    zeros = torch.zeros(count, dtype=values_R.dtype, device=values_R.device)
    number = zeros.index_add(0, owner_R, torch.ones_like(values_R)).clamp_min(1.0)
    return zeros.index_add(0, owner_R, values_R) / number


def _owned(groups: Sequence[RowGroup], open_B: Tensor) -> list[RowGroup]:
    """Only the rows of edits that are still open; finished edits cost nothing more."""
    if bool(open_B.all()):
        return list(groups)
    kept = []
    for group in groups:
        rows_R = open_B[group.owner_R]
        if rows_R.any():
            kept.append(group.select(rows_R))
    return kept
