"""MALMEN: MEND for many facts at once, the updates of all tokens brought together by least squares.

Tan et al., "Massive Editing for Large Language Models via Meta Learning", ICLR 2024, arXiv 2311.04661, section 4.
At the tokens that predict an answer a module's key k and value gradient g are taken, for all requests together, and
transformed as in :mod:`ibke.editors.hypernetwork.network`. Each token asks for a shift of the module's output,

    v_i = −η (k_i · k̃_i) g̃_i,

and one update serves them all as well as it can,

    ΔWᵀ = (KᵀK + e^λ I)⁻¹ Kᵀ V,

with η and λ learned for each module. It is trained on batches of edits, for

    L = NLL(o in scope) + KL(base‖edited out of scope).

Statistics take in the keys and gradients of every batch, also when editing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ibke.editors.aggregate import regress
from ibke.editors.hypernetwork.editor import HypernetworkEditor
from ibke.editors.hypernetwork.network import Hypernetwork, HypernetworkConfig, RowFactors
from ibke.editors.hypernetwork.tokens import Tokens
from ibke.models import LanguageModel
from ibke.modules import by_depth, target_modules


@dataclass(frozen=True)
class MALMENConfig(HypernetworkConfig):
    """Settings of MALMEN's training, as published: rank 1920, two blocks, both weights 1.

    Only η does not begin at 1e-6, which is for models of 6 billion parameters.
    """

    step_size: float = 1e-4


class MALMENNetwork(Hypernetwork):
    """MALMEN's update."""

    film_first: ClassVar[bool] = False
    answers_only: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    goes_on: ClassVar[bool] = True

    def __init__(self, config: HypernetworkConfig, modules: Mapping[str, tuple[int, int]], seed: int = 0):
        super().__init__(config, modules, seed)
        self.log_ridge = nn.Parameter(torch.zeros(len(modules)))

    def scalars(self) -> list[nn.Parameter]:
        """Step sizes and ridges."""
        return [*super().scalars(), self.log_ridge]

    def write(self, tokens: Tokens, keys_NI: Tensor, grads_NO: Tensor, place: int) -> RowFactors:
        """ΔWᵀ = (KᵀK + e^λ I)⁻¹ Kᵀ V."""
        along_N1 = (tokens.keys_NI * keys_NI).sum(1, keepdim=True)
        values_NO = -self.log_step[place].exp() * along_N1 * grads_NO
        return ridge_rows(tokens.keys_NI, self.log_ridge[place].exp()), values_NO


def ridge_rows(keys_NI: Tensor, ridge: Tensor) -> Tensor:
    """(KᵀK + ridge I)⁻¹ Kᵀ as one row a key (N × I), through whichever system is smaller, in double precision."""
    precise_NI, ridge = keys_NI.double(), ridge.double()
    if len(keys_NI) <= keys_NI.shape[1]:
        return regress(precise_NI, lambda rows_NI: rows_NI / ridge).to(keys_NI)
    eye_II = torch.eye(keys_NI.shape[1], dtype=torch.float64, device=keys_NI.device)
    return torch.linalg.solve(precise_NI.T @ precise_NI + ridge * eye_II, precise_NI.T).T.to(keys_NI)


class MALMEN(HypernetworkEditor):
    """A trained network's updates for many facts at once, brought together by least squares (MALMEN)."""

    name: ClassVar[str] = "malmen"
    Config: ClassVar[type[HypernetworkConfig]] = MALMENConfig
    Network: ClassVar[type[Hypernetwork]] = MALMENNetwork

    @classmethod
    def targets(cls, lm: LanguageModel, config: HypernetworkConfig) -> list[str]:
        """Output projections of the last six layers of GPT-J's 28, as deep in this model."""
        return target_modules(lm, lm.architecture, config.layers or by_depth(lm, (22, 27), of=28))
