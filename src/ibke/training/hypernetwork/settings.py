"""Everything `ibke train --method mend` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ibke.editors.hypernetwork.network import HypernetworkConfig
from ibke.editors.mend import MENDConfig
from ibke.errors import TrainingError
from ibke.training.settings import RunSettings


@dataclass(frozen=True)
class HypernetworkSettings(RunSettings):
    """Settings of one training run of a hypernetwork.

    Args:
        out: empty is a folder of the model and the method in the cache folder, where editors are looked for.
        batch: edits made together: of one step, and of one turn where a step has several. Published: 1 with gradients
            of ten steps added up (MEND), 512 (MALMEN).
        minutes: wall-clock budget of the run, caching included; 0 is none. About what IBKE's shipped weights took.
        learning_rate: of Adam. Published: 1e-6 for up to 100,000 steps (MEND), 1e-5 (MALMEN, RLEdit).
        scalar_step: how much larger the steps of logarithms of sizes are.
        config: of the method.
    """

    everywhere: ClassVar[bool] = True

    method: str = "mend"
    validation: int = 96
    steps: int = 100_000
    batch: int = 16
    learning_rate: float = 1e-5
    warmup: int = 20
    weight_decay: float = 0.0
    validate_every: int = 100
    patience: int = 10
    minutes: float = 59.0
    scalar_step: float = 3000.0
    config: HypernetworkConfig = field(default_factory=MENDConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minutes < 0:
            raise TrainingError("`minutes` is below 0.", "training settings", "Leave it out, or give 0 for no limit.")
