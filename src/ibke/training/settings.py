"""Everything `ibke train` can be told."""

from __future__ import annotations

import shlex
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, ClassVar

from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.settings import refuse_not_finite
from ibke.errors import TrainingError

OPTIONS = ("seed", "episodes", "steps", "batch", "learning_rate", "threads", "dtype")  # of the command, by their names


@dataclass(frozen=True)
class RunSettings:
    """Settings of one training run, of whichever method.

    Args:
        model: bundled name, folder, .gguf file or hub id.
        data: sources with their shares, e.g. ``facts=2``, ``counterfact:train.json``; see ``ibke.data.mixture``.
        out: folder of the run; checkpoints, log and the finished editor are written there.
        method: the method trained.
        seed: decides data, order, noise and initial weights.
        episodes: training edits, all sources together.
        validation: edits held out of training, all sources together.
        steps: optimiser steps.
        batch: independent edits per step.
        learning_rate: peak of the schedule.
        warmup: steps of linear warm-up.
        weight_decay: of AdamW.
        clip: largest gradient norm.
        ema: decay of the averaged weights that are validated and shipped.
        validate_every: steps between validations and checkpoints.
        patience: validations without a better score before training stops early.
        threads: CPU threads; 0 leaves PyTorch's choice.
        device: of the frozen base and the network; ``auto`` takes the GPU if there is one.
        dtype: of the frozen base; ``auto`` takes bfloat16 where the hardware has it.
        hold_out_relations: share of relations kept out of training altogether (the hard split).
        exclude: request files whose subjects and prompts are kept out of training, as ``format:path``.
        modules: full dotted names of the modules to edit, for an architecture that is not in the table; the layers
            of the configuration then choose among them.
        cache: folder for what never changes while training, shared by runs; empty keeps it in ``out``.
    """

    everywhere: ClassVar[bool] = False
    """Whether edits move answers to any prompt, so that all kinds of prompts out of scope are trained on."""

    model: str
    data: tuple[str, ...]
    out: str = ""
    method: str = "ibke"
    seed: int = 0
    episodes: int = 5000
    validation: int = 256
    steps: int = 2500
    batch: int = 16
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.995
    validate_every: int = 250
    patience: int = 6
    threads: int = 0
    device: str = "auto"
    dtype: str = "auto"
    hold_out_relations: float = 0.2
    exclude: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    cache: str = ""

    def __post_init__(self) -> None:
        refuse_not_finite(self)
        for name in ("episodes", "validation", "steps", "batch", "validate_every", "patience"):
            if getattr(self, name) < 1:
                raise TrainingError(f"`{name}` must be at least 1.", "training settings", "Give a larger number.")
        if not self.data:
            raise TrainingError("no data named.", "training settings", "Name at least one source, e.g. --data facts.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return asdict(self)

    def command(self) -> str:
        """The `ibke train` that has these settings; where it writes is left open, and on what device it runs."""
        words = ["ibke", "train", "--model", self.model, *(word for one in self.data for word in ("--data", one))]
        words += ["--out", "FOLDER", *(("--method", self.method) if self.method != "ibke" else ())]
        words += [word for name in self.modules for word in ("--module", name)]
        told = {"model", "data", "out", "method", "modules", "cache", "device"}
        values = {item.name: getattr(self, item.name) for item in _changed(self) if item.name not in told}
        config = values.pop("config", None)
        values |= {item.name: getattr(config, item.name) for item in _changed(config)} if config else {}
        for name, value in values.items():
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            words += [f"--{name.replace('_', '-')}", str(text)] if name in OPTIONS else ["--set", f"{name}={text}"]
        return shlex.join(words)


def _changed(settings: Any) -> list[Field[Any]]:
    """Fields of a dataclass that are not at their default."""
    found = []
    for item in fields(settings):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if getattr(settings, item.name) != default:
            found.append(item)
    return found


@dataclass(frozen=True)
class TrainSettings(RunSettings):
    """Settings of one training run of IBKE.

    Args:
        text: file of running text for the generic keys C₀, beside our own short one and training prompts.
        words: file of running text; of its words, and of those of ``text``, the editor keeps those that come nearest to
            opening training edits; empty keeps a sample.
        start: folder of a trained editor to go on from, e.g. for a sweep of beta; empty starts from spectra.
        config: the editor's own settings.
    """

    text: str = ""
    words: str = ""
    start: str = ""
    config: IBKEConfig = field(default_factory=IBKEConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out:
            raise TrainingError("no folder named for the run.", "--out", "Name one.")
