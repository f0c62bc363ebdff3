"""Semi-amortised inference: where the first guess does not yet answer the target, move the code itself.

The encoder's code is where Adam starts; decoder and aggregation stay fixed, so everything still flows through Z. The
objective is the training one on the edit at hand: NLL of the target in several frames, KL(base‖edited) on
probes, and the code's own rate.

Shape suffixes: B edits, Z code, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ibke.editors.ibke.bottleneck import Bottleneck, Code
from ibke.editors.ibke.relay import Listening, relay_rate
from ibke.editors.settings import refuse_below, refuse_not_finite, refuse_not_positive
from ibke.errors import IBKEError
from ibke.gates import Told
from ibke.neurons import Neurons, Site
from ibke.partial import PartialModel
from ibke.rows import OUTSIDE, RowGroup, RowTerms, merge, run_rows

Base = Literal["pristine", "live"]

RELAY_MOST = 8  # steps of the relay
FEW_ROWS = 64  # up to here reading the weights costs more than computing on padding


@dataclass(frozen=True)
class RefineSettings:
    """How far and how the code may move.

    Args:
        steps: most Adam steps of the first write (J); 0 shows the bare network. The relay takes up to RELAY_MOST more.
        learning_rate: of Adam, in code units (the code is whitened, so 1 is one standard deviation).
        lambda_il: weight of KL(base‖edited) on the prompts watched.
        beta: weight of the code's rate.
        extra: steps taken after the target is first generated, for margin.
        relay_steps: fewest steps in which the relay is found, else as many as the first write took; 0 for no relay.
        relay_learning_rate: of Adam for the relay at first, in units of its code.
        base: the model that an edit is made on where others are attached already: ``pristine`` without them, so that
            it is what it would be alone, and in the end the order of edits does not matter; or ``live`` with them.
    """

    steps: int = 40
    learning_rate: float = 0.3
    lambda_il: float = 0.1
    beta: float = 1e-3
    extra: int = 0
    relay_steps: int = 2
    relay_learning_rate: float = 2.0
    base: Base = "pristine"

    def __post_init__(self) -> None:
        if self.base not in get_args(Base):
            raise IBKEError(f"an edit cannot be made on {self.base!r}.", "base", "Choose pristine or live.")
        refuse_not_finite(self)
        refuse_below(self, 0, "steps", "lambda_il", "beta", "extra", "relay_steps")
        refuse_not_positive(self, "learning_rate", "relay_learning_rate")


@dataclass
class Refined:
    """What refining led to, by edit (B).

    ``z_BZ`` is the best code found, ``steps_B`` the Adam steps taken, ``achieved_B`` whether the target is generated
    in every frame asked, ``nll_B`` the target's NLL there (nats, mean over frames). Of the relay, where there is one,
    ``relay_BD`` is its part of the code, ``listens_BD`` its address and ``told_B`` what that was found from.
    """

    z_BZ: Tensor
    steps_B: Tensor
    achieved_B: Tensor
    nll_B: Tensor
    relay_BD: Tensor | None = None
    listens_BD: Tensor | None = None
    told_B: tuple[Told, ...] = ()


@dataclass
class _Write:
    """One of the two writes while its part of the code moves.

    ``run`` gives rows under a code, ``rate`` each edit's nats (B); ``learning_rate`` and ``eps`` are those of Adam.
    """

    run: Callable[[Tensor, Sequence[RowGroup]], RowTerms]
    rate: Callable[[Tensor], Tensor]
    learning_rate: float
    eps: float
    decay: float = 1.0
    whole_steps: bool = False


class Refiner:
    """Moves codes for one model.

    Args:
        network: the trained bottleneck.
        part: the base, split at the first edited layer.
        site: the edited MLP.
        settings: how far and how.
        listening: the relay, if there is one.
    """

    def __init__(
        self,
        network: Bottleneck,
        part: PartialModel,
        site: Site,
        settings: RefineSettings,
        listening: Listening | None = None,
    ):
        self.network, self.part, self.site = network, part, site
        self.settings, self.listening = settings, listening

    def refine(self, code: Code, targets: Sequence[RowGroup], watch: Callable[[], Sequence[RowGroup]]) -> Refined:
        """Check every edit's target and move the codes of those that do not come; then move the relay's.

        Args:
            code: the encoder's codes.
            targets: rows in scope, owned by edit index.
            watch: gives rows out of scope, owned by edit index; called only if a code has to move.
        """
        settings = self.settings
        watched = cache(watch)
        write = _Write(
            lambda z, groups: run_rows(self.part, self.site, self._neurons(z, code), groups),
            lambda z: self.network.rate(Code(z, code.log_variance, code.written)),
            settings.learning_rate,
            # Directions whose gradient is little more than rounding would else move as far as those that matter.
            eps=1e-3,
        )
        most_B = torch.full((len(code.mean),), settings.steps, device=code.mean.device)
        first = self._descend(code.mean, write, targets, watched, most_B, settings.extra)
        if self.listening is None or not settings.relay_steps or not settings.steps:
            return first
        return self._relayed(self.listening, first, code, targets, watched)

    def _relayed(
        self,
        listening: Listening,
        first: Refined,
        code: Code,
        targets: Sequence[RowGroup],
        watch: Callable[[], Sequence[RowGroup]],
    ) -> Refined:
        """Find what the relay writes, the first write being as it is."""
        settings, relay = self.settings, listening.relay
        with torch.no_grad():
            neurons = self._neurons(first.z_BZ, code)
        onward, told_B = listening.told(self.part, self.site, neurons, targets, len(first.z_BZ))
        address_BD = relay.addresses(told_B)

        def run(z_BD: Tensor, groups: Sequence[RowGroup]) -> RowTerms:
            return run_rows(listening.part, listening.site, relay.decode(z_BD, address_BD, listening.site), groups)

        def watched() -> list[RowGroup]:
            rows = watch()
            return listening.heard(self.part, self.site, neurons, rows)[0] if rows else []

        # Every step at its full length, however small the gradient has become: what the request has plenty of, other
        # wordings of it are short of.
        write = _Write(run, relay_rate, settings.relay_learning_rate, eps=1.0, decay=0.8, whole_steps=True)
        start_BD = torch.zeros_like(address_BD)
        # An edit that was hard to make needs more of the relay too.
        wanted_B = first.steps_B.clamp(settings.relay_steps, max(settings.relay_steps, RELAY_MOST))
        found = self._descend(start_BD, write, onward, watched, wanted_B, extra=None)
        steps_B = first.steps_B + found.steps_B
        both = replace(found, z_BZ=first.z_BZ, steps_B=steps_B)
        return replace(both, relay_BD=found.z_BZ, listens_BD=address_BD, told_B=told_B)

    def _descend(
        self,
        start: Tensor,
        write: _Write,
        targets: Sequence[RowGroup],
        watch: Callable[[], Sequence[RowGroup]],
        most_B: Tensor,
        extra: int | None,
    ) -> Refined:
        """At most so many Adam steps on one write's code, ``extra`` ones once the target comes; None takes them all."""
        count = len(start)
        z = start.detach().clone().requires_grad_()
        # The first look is the first step's forward pass too, so an edit that comes at once costs no second one.
        steps = int(most_B.max())
        with torch.set_grad_enabled(steps > 0):
            total_B, nll_B, achieved_B = self._objective(z, write, targets, count)
        none = torch.zeros(count, dtype=torch.long, device=z.device)
        best = Refined(z.detach().clone(), none.clone(), achieved_B, nll_B)
        open_B = ~achieved_B | (extra is None)
        if not open_B.any() or steps == 0:
            return best
        everything, watched = list(targets), watch()
        if watched:
            total_B = total_B + self.settings.lambda_il * self._divergence(write.run(z, watched), count)
            everything += watched
        if sum(group.batch.rows for group in everything) <= FEW_ROWS:
            everything = [merge(everything)]
        adam = torch.optim.Adam([z], lr=write.learning_rate, betas=(0.9, 0.9), eps=write.eps)
        spare_B = most_B if extra is None else none + extra
        for step in range(1, steps + 1):
            adam.param_groups[0]["lr"] = write.learning_rate * write.decay ** (step - 1)
            adam.zero_grad()
            total_B[open_B].sum().backward()
            if write.whole_steps and z.grad is not None:
                z.grad /= z.grad.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-20)
            adam.step()
            with torch.set_grad_enabled(step < steps):
                total_B, nll_B, achieved_B = self._objective(z, write, self._owned(everything, open_B), count)
            self._accept(best, z, nll_B, achieved_B, open_B, step)
            spare_B = spare_B - (best.achieved_B & open_B).long()
            open_B = open_B & ~(best.achieved_B & (spare_B < 0)) & (step < most_B)
            if not open_B.any():
                break
        return best

    def _objective(
        self, z: Tensor, write: _Write, groups: Sequence[RowGroup], count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The objective, the targets' NLL and whether they come, by edit (``count``)."""
        rows = write.run(z, groups)
        nll_B, achieved_B = self._judge(rows, count)
        total_B = nll_B + self.settings.lambda_il * self._divergence(rows, count) + self.settings.beta * write.rate(z)
        return total_B, nll_B.detach(), achieved_B

    def _divergence(self, rows: RowTerms, count: int) -> Tensor:
        """KL(base‖edited) on what is watched (nats, mean over its rows)."""
        outside = rows.kind_R == OUTSIDE
        return mean_by_owner(rows.forward_R[outside], rows.owner_R[outside], count)

    def _neurons(self, z: Tensor, code: Code) -> Neurons:
        """The first write's neurons of every edit."""
        return self.network.decode(z, code.written, self.site)

    def _judge(self, rows: RowTerms, count: int) -> tuple[Tensor, Tensor]:
        inside = rows.kind_R != OUTSIDE
        owner_R = rows.owner_R[inside]
        nll_B = mean_by_owner(rows.nll_R[inside], owner_R, count)
        right_B = mean_by_owner(rows.right_R[inside].float(), owner_R, count)
        return nll_B, right_B == 1.0

    def _owned(self, groups: Sequence[RowGroup], open_B: Tensor) -> list[RowGroup]:
        """Only the rows of edits that are still open; finished edits cost nothing more."""
        if bool(open_B.all()):
            return list(groups)
        kept = []
        for group in groups:
            rows_R = open_B[group.owner_R]
            if rows_R.any():
                kept.append(group.select(rows_R))
        return kept

    def _accept(self, best: Refined, z: Tensor, nll_B: Tensor, achieved_B: Tensor, open_B: Tensor, step: int) -> None:
        # A step counts only if it lowers the target's NLL; writing on regardless diverged outside the training data. A
        # mean over frames and wordings may fall though one of them is lost: what comes is not given up for it.
        better_B = open_B & (nll_B.detach() < best.nll_B) & (achieved_B | ~best.achieved_B)
        best.z_BZ[better_B] = z.detach()[better_B]
        best.nll_B[better_B] = nll_B.detach()[better_B]
        best.achieved_B[better_B] = achieved_B[better_B]
        best.steps_B[open_B] = step


def mean_by_owner(values_R: Tensor, owner_R: Tensor, count: int) -> Tensor:
    """The mean of values over each edit's rows (B); 0 for an edit that has none."""
    zeros = torch.zeros(count, dtype=values_R.dtype, device=values_R.device)
    number = zeros.index_add(0, owner_R, torch.ones_like(values_R)).clamp_min(1.0)
    return zeros.index_add(0, owner_R, values_R) / number
