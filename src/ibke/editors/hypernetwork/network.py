"""The network behind MEND, MALMEN and RLEdit: a correction to normalised keys and gradients, one for each shape.

At a token, a module's key k and value gradient g are normalised by running mean and deviation, k̂ and ĝ, and go side
by side through blocks that leave them as they are at first:

    y ← y + film(relu(U V y + b))   or   y ← y + relu(film(U V y + b)),     V ~ N(0, 1),  U = 0,  b = 0,

where film scales and shifts by module (Mitchell et al., "Fast Model Editing at Scale", ICLR 2022, section 3.1; Tan et
al., "Massive Editing for Large Language Models via Meta Learning", ICLR 2024). What comes out are pseudo-keys k̃ and
pseudo-gradients g̃; what is made of them is the method's own. Modules of one shape share a network. Step sizes are
learned as logarithms, so that they stay positive and one learning rate suits every magnitude.

Shape suffixes: N tokens, I d_in, O d_out, F = I + O, M modules of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ibke.editors.hypernetwork.tokens import Tokens
from ibke.editors.row_statistics import PARTS, History, RowStatistics, joined
from ibke.editors.settings import refuse_below, refuse_not_positive

RowFactors = tuple[Tensor, Tensor]
"""An update as rows: A (N × I) and B (N × O), ΔW = Bᵀ A; a row belongs to a token."""


@dataclass(frozen=True)
class HypernetworkConfig:
    """What a hypernetwork is, and what it is trained for.

    Args:
        layers: which are changed; empty are those of the paper, as deep in this model.
        rank: of a block's U and V, at most the width of keys and gradients together.
        blocks: how many.
        step_size: where the learned step size starts.
        generality_weight: of the NLL at prompts in scope, nats a token.
        locality_weight: of KL(base‖edited) at prompts out of scope, nats a token.
        penalty: weight of ‖ΔW‖² of a turn.
        turns: edits of one training step are made one batch after another, in so many turns.
        decay: weight of a turn's edits in the loss after one more turn.
        depth: how many earlier turns the loss of a turn looks back at.
    """

    layers: tuple[int, ...] = ()
    rank: int = 1920
    blocks: int = 2
    step_size: float = 1e-6
    generality_weight: float = 1.0
    locality_weight: float = 1.0
    penalty: float = 0.0
    turns: int = 1
    decay: float = 1.0
    depth: int = 0

    def __post_init__(self) -> None:
        refuse_below(self, 1, "rank", "blocks", "turns")
        refuse_not_positive(self, "step_size", "generality_weight")
        refuse_below(self, 0, "locality_weight", "penalty", "decay", "depth")


class Block(nn.Module):
    """One residual block of low rank.

    Args:
        width: F.
        rank: of U V.
        modules: M.
        film_first: scale and shift before the relu (MEND) or after it (MALMEN).
        generator: draws V.
    """

    def __init__(self, width: int, rank: int, modules: int, film_first: bool, generator: torch.Generator):
        super().__init__()
        self.film_first, rank = film_first, min(rank, width)
        self.v_RF = nn.Parameter(torch.randn(rank, width, generator=generator))
        self.u_FR = nn.Parameter(torch.zeros(width, rank))
        self.bias_F = nn.Parameter(torch.zeros(width))
        self.scale_MF = nn.Parameter(torch.ones(modules, width))
        self.shift_MF = nn.Parameter(torch.zeros(modules, width))

    def forward(self, y_NF: Tensor, module_N: Tensor) -> Tensor:
        """What the block makes of some rows, each of one of the modules."""
        x_NF = y_NF @ self.v_RF.T @ self.u_FR.T + self.bias_F
        scale_NF, shift_NF = self.scale_MF[module_N], self.shift_MF[module_N]
        # Not relu, whose gradient at 0, where all begins, is 0.
        if self.film_first:
            return y_NF + (scale_NF * x_NF + shift_NF).clamp(min=0)
        return y_NF + scale_NF * x_NF.clamp(min=0) + shift_NF


class Transform(nn.Module):
    """The blocks for modules of one shape, and what is known of their keys and gradients.

    Args:
        d_in, d_out: the shape.
        modules: how many modules have it.
        config: sizes.
        film_first: see :class:`Block`.
        generator: draws the weights.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        modules: int,
        config: HypernetworkConfig,
        film_first: bool,
        generator: torch.Generator,
    ):
        super().__init__()
        self.d_in, width = d_in, d_in + d_out
        self.blocks = nn.ModuleList(
            Block(width, config.rank, modules, film_first, generator) for _ in range(config.blocks)
        )
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        for name in PARTS[1:]:
            self.register_buffer(name, torch.zeros(width, dtype=torch.float64))

    def forward(self, tokens: Sequence[Tokens], known: RowStatistics) -> list[tuple[Tensor, Tensor]]:
        """Pseudo-keys (N × I) and pseudo-gradients (N × O) of each module's tokens.

        All go through the blocks together, so that their weights are read once for all modules.
        """
        features_NF = torch.cat([torch.cat([some.keys_NI, some.grads_NO], dim=1) for some in tokens])
        counts = torch.tensor([len(some.keys_NI) for some in tokens], device=features_NF.device)
        module_N = torch.arange(len(tokens), device=features_NF.device).repeat_interleave(counts)
        y_NF = known.normalise(features_NF).to(features_NF)
        for block in self.blocks:
            y_NF = block(y_NF, module_N)
        return [(rows_NF[:, : self.d_in], rows_NF[:, self.d_in :]) for rows_NF in y_NF.split(counts.tolist())]


class Hypernetwork(nn.Module):
    """Networks and step sizes for all edited modules.

    Args:
        config: sizes.
        modules: d_in and d_out of each module, by name.
        seed: decides the initial weights.
    """

    film_first: ClassVar[bool]
    answers_only: ClassVar[bool]
    """Whether only tokens that predict the answer are taken, or all with a gradient."""
    joint: ClassVar[bool]
    """Whether the edits of a training step are made as one, or each on a model of its own."""
    goes_on: ClassVar[bool]
    """Whether statistics take in the keys and gradients of an edit also after training."""

    def __init__(self, config: HypernetworkConfig, modules: Mapping[str, tuple[int, int]], seed: int = 0):
        super().__init__()
        self.config, self.sizes = config, dict(modules)
        generator = torch.Generator().manual_seed(seed)
        self.shapes = {name: f"{d_in}x{d_out}" for name, (d_in, d_out) in modules.items()}
        self.names: dict[str, list[str]] = {}
        """Modules of each shape."""
        for name, shape in self.shapes.items():
            self.names.setdefault(shape, []).append(name)
        self.transforms = nn.ModuleDict(
            {
                shape: Transform(*modules[names[0]], len(names), config, self.film_first, generator)
                for shape, names in self.names.items()
            }
        )
        self.log_step = nn.Parameter(torch.full((len(modules),), math.log(config.step_size)))

    @property
    def statistics(self) -> History:
        """What training has seen, by shape."""
        return {
            shape: RowStatistics(*(getattr(transform, part).cpu() for part in PARTS))
            for shape, transform in self.transforms.items()
            if bool(getattr(transform, PARTS[0]) > 0)
        }

    def statistics_of(self, tokens: Mapping[str, Tokens]) -> History:
        """Of some tokens' keys and gradients side by side, by shape."""
        found: History = {}
        for name, some in tokens.items():
            rows_NF = torch.cat([some.keys_NI, some.grads_NO], dim=1)
            if len(rows_NF):
                found = joined(found, {self.shapes[name]: RowStatistics.of(rows_NF)})
        return found

    @torch.no_grad()
    def observe(self, tokens: Mapping[str, Tokens]) -> None:
        """Take tokens into the statistics."""
        for shape, some in joined(self.statistics, self.statistics_of(tokens)).items():
            for part in PARTS:
                getattr(self.transforms[shape], part).copy_(getattr(some, part))

    def scalars(self) -> list[nn.Parameter]:
        """Logarithms of sizes, which are learned in larger steps and are not decayed."""
        return [self.log_step]

    def forward(self, tokens: Mapping[str, Tokens], known: History) -> dict[str, RowFactors]:
        """The update of each module that has tokens with a gradient.

        Args:
            tokens: of all edits that are made together, by module name.
            known: statistics to normalise with, by shape.
        """
        pseudo: dict[str, tuple[Tensor, Tensor]] = {}
        for shape, names in self.names.items():
            found = self.transforms[shape]([tokens[name] for name in names], known[shape])
            pseudo.update(zip(names, found, strict=True))
        return {name: self.write(tokens[name], *pseudo[name], place) for place, name in enumerate(self.shapes)}

    def write(self, tokens: Tokens, keys_NI: Tensor, grads_NO: Tensor, place: int) -> RowFactors:
        """The update of one module.

        Args:
            tokens: keys and gradients as they are.
            keys_NI: k̃.
            grads_NO: g̃.
            place: which of all modules it is.
        """
        raise NotImplementedError
