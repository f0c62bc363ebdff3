"""RLEdit: MALMEN trained on sequences, so that an edit does not undo those before it.

Li et al., "Reinforced Lifelong Editing for Language Models", ICML 2025, arXiv 2502.05759. The update is MALMEN's
(:mod:`ibke.editors.malmen`); what differs is what it is trained for. A step of training is a sequence: batches of edits
are made one after another, each at the model as the ones before have left it, and each is judged also by what it leaves
of those before,

    L = Σ_t { Σ_{j≤10} 0.95^j [ NLL(in scope of batch t−j) + 0.6 KL(out of scope of batch t−j) ] + 10⁻⁴ ‖ΔW_t‖² }.

The "reward" is −L, additive and differentiable, so the gradient is plain backpropagation, of each turn's loss into its
own update; one optimiser step follows a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ibke.editors.hypernetwork.network import HypernetworkConfig
from ibke.editors.malmen import MALMEN
from ibke.editors.ultraedit import input_projections
from ibke.models import LanguageModel
from ibke.modules import by_depth


@dataclass(frozen=True)
class RLEditConfig(HypernetworkConfig):
    """Settings of RLEdit's training, as published but for ``turns`` and where η begins.

    Published are one sequence of 400 turns and one optimiser step in all, and η from 1e-6 for 8 billion parameters.
    """

    step_size: float = 1e-4
    rank: int = 1024
    blocks: int = 4
    locality_weight: float = 0.6
    penalty: float = 1e-4
    turns: int = 4
    decay: float = 0.95
    depth: int = 10


class RLEdit(MALMEN):
    """MALMEN's update, trained on sequences of edits (RLEdit)."""

    name: ClassVar[str] = "rledit"
    Config: ClassVar[type[HypernetworkConfig]] = RLEditConfig

    @classmethod
    def targets(cls, lm: LanguageModel, config: HypernetworkConfig) -> list[str]:
        """Input projections of layers 22 to 30 of Llama-3-8B's 32, as deep in this model."""
        layers = config.layers or by_depth(lm, (22, 30), of=32)
        return list(lm.architecture.modules) or input_projections(lm, layers, layers)
