"""MEND: the answer's gradient, made better by a network that was trained for it.

Mitchell et al., "Fast Model Editing at Scale", ICLR 2022, arXiv 2110.11309, algorithm 1. The gradient of a linear
module's weight is a sum of outer products over tokens, Σ g_t k_tᵀ. All tokens with a gradient are taken, normalised and
transformed as in :mod:`ibke.editors.hypernetwork.network`, and

    ΔW = −α Σ_t g̃_t k̃_tᵀ

with a learned α for each module. It is trained on single edits, for

    L = c_e · NLL(o in scope) + KL(base‖edited out of scope),      c_e = 0.1.

Statistics are taken in training and stay as they are when editing. Several requests are one sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ibke.editors.hypernetwork.editor import HypernetworkEditor
from ibke.editors.hypernetwork.network import Hypernetwork, HypernetworkConfig, RowFactors
from ibke.editors.hypernetwork.tokens import Tokens
from ibke.editors.ultraedit import input_projections
from ibke.errors import IBKEError
from ibke.models import LanguageModel
from ibke.modules import by_depth, target_modules


@dataclass(frozen=True)
class MENDConfig(HypernetworkConfig):
    """Settings of MEND's training, as published: rank 1920, two blocks, α from 1e-4, c_e = 0.1."""

    step_size: float = 1e-4
    generality_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns != 1:
            raise IBKEError("MEND is trained on single edits, not on `turns`.", "settings", "Leave it out.")


class MENDNetwork(Hypernetwork):
    """MEND's update."""

    film_first: ClassVar[bool] = True
    answers_only: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    goes_on: ClassVar[bool] = False

    def write(self, tokens: Tokens, keys_NI: Tensor, grads_NO: Tensor, place: int) -> RowFactors:
        """ΔW = −α Σ g̃ k̃ᵀ."""
        del tokens
        return keys_NI, -self.log_step[place].exp() * grads_NO


class MEND(HypernetworkEditor):
    """A trained network transforms the answer's gradient in the last layers (MEND)."""

    name: ClassVar[str] = "mend"
    Config: ClassVar[type[HypernetworkConfig]] = MENDConfig
    Network: ClassVar[type[Hypernetwork]] = MENDNetwork

    @classmethod
    def targets(cls, lm: LanguageModel, config: HypernetworkConfig) -> list[str]:
        """All projections of the MLPs in the last three layers of GPT-J's 28, as deep in this model."""
        layers = config.layers or by_depth(lm, (25, 27), of=28)
        outs = target_modules(lm, lm.architecture, layers)
        return list(lm.architecture.modules) or [*input_projections(lm, layers, layers), *outs]
