"""MEMIT: many facts at once, spread over the down-projections of several layers.

Meng, Sen Sharma, Andonian, Belinkov, Bau: Mass-Editing Memory in a Transformer, 2022 (arXiv 2210.07229), eq. 14 and
algorithm 1:

    ΔW = R Kᵀ (λ C₀ + K Kᵀ)⁻¹

with the keys K and residuals R of all requests (as columns), C₀ the second moment of generic keys and λ its weight; see
:mod:`~ibke.editors.locate` for K and R, and :mod:`~ibke.editors.aggregate` for the solve: a system of the number of
requests.

Shape suffixes: B requests, I d_in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ibke.editors.aggregate import regress
from ibke.editors.locate import LocateEditor, LocateSettings
from ibke.editors.settings import refuse_not_positive
from ibke.models import LanguageModel
from ibke.modules import by_depth


@dataclass(frozen=True)
class MEMITSettings(LocateSettings):
    """Settings of MEMIT.

    Args:
        layers: whose down-projections are changed, in ascending order; empty is as deep as layers 4 to 8 of Llama's 32.
            Published: 4 to 8 there, 3 to 8 of GPT-J's 28, 13 to 17 of GPT-2 XL's 48.
        moment_weight: λ in units of d_in, which is what kᵀ C₀⁻¹ k is on average. Published, as λ itself: 15,000, which
            is 1.05 with Llama-3-8B's 14,336 and 0.92 with GPT-J's 16,384; for GPT-2 XL 20,000, or 3.1.
        clamp: see :class:`~ibke.editors.value_optimisation.ValueSettings`.
    """

    layers: tuple[int, ...] = ()
    moment_weight: float = 1.0
    clamp: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_not_positive(self, "moment_weight")


class MEMITEditor(LocateEditor):
    """Rewrites MLPs' values at the subject's last token, spread over several layers (MEMIT).

    Args:
        lm: the pristine model.
        settings: of the method.
    """

    name: ClassVar[str] = "memit"
    Settings: ClassVar[type | None] = MEMITSettings

    def __init__(self, lm: LanguageModel, settings: MEMITSettings | None = None):
        settings = settings or MEMITSettings()
        super().__init__(lm, settings, settings.layers or by_depth(lm, (4, 8), of=32))
        self.weight = settings.moment_weight

    def addresses(self, name: str, keys_BI: Tensor) -> Tensor:
        """Kᵀ (λ C₀ + K Kᵀ)⁻¹, one row a key (B × I, float64)."""
        return regress(keys_BI, lambda rows: self.pull(name, rows) / (self.weight * keys_BI.shape[1]))
