"""What training runs of all methods have in common: data, optimiser, validation, log, and checkpoints to go on from."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ibke.data.mixture import Source, Split
from ibke.errors import TrainingError
from ibke.evaluation.machine import peak_memory_mb
from ibke.files import write_atomically
from ibke.training.building import RowBuilder, build
from ibke.training.checkpoint import load_checkpoint, save_checkpoint, write_json
from ibke.training.clock import Found, unnoticed
from ibke.training.episodes import Episode
from ibke.training.mixture import mixture
from ibke.training.settings import RunSettings

OnProgress = Callable[[dict[str, Any]], None]
SETTINGS = "settings.json"


def draw_episodes(settings: RunSettings) -> tuple[list[Episode], list[Episode]]:
    """Training and validation episodes.

    Raises:
        TrainingError: too little usable data.
    """
    sources = [Source.parse(text) for text in settings.data]
    split = Split(settings.hold_out_relations, settings.exclude)
    count = settings.episodes + settings.validation
    everything = mixture(sources, settings.seed, count, split, everywhere=settings.everywhere)
    if len(everything) <= settings.validation:
        raise TrainingError(
            f"{len(everything)} usable requests are not more than the {settings.validation} kept for validation.",
            ", ".join(settings.data),
            "Add data (facts of relations without wordings do not count), or lower `validation`.",
        )
    return everything[settings.validation :], everything[: settings.validation]


def cached_shards(
    settings: RunSettings,
    builder: RowBuilder,
    drawn: Sequence[list[Episode]],
    identity: tuple[Any, ...],
    report: OnProgress,
    found: Found = unnoticed,
) -> list[Path]:
    """Folders with everything cached that never changes, of training episodes first, then of validation.

    Args:
        settings: of the run.
        builder: computes shards.
        drawn: the episodes.
        identity: all that decides what a shard holds beside its episodes.
        report: called with progress.
        found: told of each file that is there already.
    """
    folders = []
    for name, episodes in zip(("episodes", "validation"), drawn, strict=True):
        # The folder's name tells what is in it, so another seed, model or layer never reads stale shards.
        digest = hashlib.sha256(repr((*identity, episodes)).encode()).hexdigest()[:16]
        folder = Path(settings.cache or settings.out) / f"{name}-{digest}"
        started = time.monotonic()

        def tell(done: int, total: int, name: str = name, started: float = started) -> None:
            spent = time.monotonic() - started
            left = spent / done * (total - done)
            report({"stage": f"caching {name}", "done": done, "total": total, "seconds_left": left})

        build(builder, episodes, folder, tell, found, whole=name == "validation")
        folders.append(folder)
    return folders


class Run(ABC):
    """One run: optimiser, averaged weights, validation, log, checkpoints.

    ``shown`` names what the log says of a step that is worth a place on the screen (nats).

    Args:
        settings: what to do.
        network: the network to train.
        scalars: those of its parameters that are sizes (logarithms, gate biases); they are not decayed.
        scalar_step: how much larger their steps are than those of weights.
        report: called with progress.
        seconds: spent already, on what never changes.
    """

    shown: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        settings: RunSettings,
        network: nn.Module,
        scalars: Sequence[nn.Parameter],
        scalar_step: float,
        report: OnProgress,
        seconds: float = 0.0,
    ):
        self.settings, self.network, self.report = settings, network, report
        self.averaged = copy.deepcopy(network).requires_grad_(False)
        weights = [item for item in network.parameters() if not any(item is scalar for scalar in scalars)]
        groups = [
            {"params": weights, "weight_decay": settings.weight_decay, "scale": 1.0},
            {"params": list(scalars), "weight_decay": 0.0, "scale": scalar_step},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        self.step, self.best, self.bad = 0, -1.0, 0
        self.seconds = self.prepared = seconds  # spent in all, and before the first step
        self.out = Path(settings.out)

    @abstractmethod
    def take_step(self) -> dict[str, float]:
        """One optimiser step, by :meth:`descend`; returns what the log says of it."""

    @abstractmethod
    def scores(self) -> dict[str, float]:
        """Of the averaged weights on validation episodes; reliability, generality and locality are among them."""

    @abstractmethod
    def keep(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the averaged weights as an editor."""

    @property
    def edits_per_step(self) -> int:
        """How many edits a step learns from."""
        return self.settings.batch

    @property
    def checkpoint(self) -> Path:
        """Where the run goes on from."""
        return self.out / "checkpoint.safetensors"

    @property
    def pace(self) -> float:
        """Seconds a step."""
        return (self.seconds - self.prepared) / self.step

    @property
    def seconds_left(self) -> float:
        """At the pace so far."""
        return self.pace * (self.settings.steps - self.step)

    def state(self) -> dict[str, Any]:
        """Counters and random states of a checkpoint."""
        names = ("step", "best", "bad", "seconds", "prepared")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over counters and random states of a checkpoint."""
        self.step, self.best, self.bad = state["step"], state["best"], state["bad"]
        self.seconds, self.prepared = state["seconds"], state.get("prepared", 0.0)

    def start(self, resume: bool) -> None:
        """Begin, or go on from the last checkpoint; then every number is the one an unbroken run would have had.

        Killed before its first checkpoint, a run starts over, and so does its log.
        """
        log = self.out / "log.jsonl"
        if not resume or not self.checkpoint.exists():
            log.unlink(missing_ok=True)
            return
        self.restore(load_checkpoint(self.checkpoint, self.network, self.averaged, self.optimizer))
        # A line that a kill cut short is of a step after the checkpoint.
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        write_atomically(log, "".join(line + "\n" for line in kept).encode())

    def run(self) -> Path:
        """Train to the end, or until validation stops improving; returns the folder of the best editor."""
        settings, began = self.settings, time.monotonic() - self.seconds
        while not self.over():
            record = self.take_step()
            self.step += 1
            self.seconds = time.monotonic() - began
            if self.step % 10 == 0:
                self._tell(record)
            if self.step % settings.validate_every == 0 or self.over():
                self._validate()
                save_checkpoint(self.checkpoint, self.network, self.averaged, self.optimizer, self.state())
        return self.out / "editor"

    def over(self) -> bool:
        """Whether there is no step left to take."""
        return self.step >= self.settings.steps or self.bad >= self.settings.patience

    def descend(self, backward: Callable[[], None], pace: float) -> float:
        """One step of the optimiser and of the average; returns the gradient's norm.

        Args:
            backward: adds up the gradient.
            pace: of the learning rate's peak (ratio 0–1).

        Raises:
            TrainingError: the gradient is not finite.
        """
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * settings.learning_rate * pace
        self.optimizer.zero_grad()
        backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
        if not torch.isfinite(norm):
            raise TrainingError("the gradient is not finite.", f"step {self.step}", "Lower the learning rate.")
        self.optimizer.step()
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for kept, new in zip(self.averaged.parameters(), self.network.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
            for fixed, now in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
                fixed.copy_(now)
        return norm.item()

    def _tell(self, record: dict[str, float]) -> None:
        settings = self.settings
        entry: dict[str, Any] = {"stage": "training", "step": self.step, "done": self.step, "total": settings.steps}
        entry |= record | {"edits_per_second": self.edits_per_step / self.pace, "seconds": self.seconds}
        entry["peak_memory_mb"] = peak_memory_mb()
        self._log(entry)
        figures = " ".join(f"{label} {record[name]:.3g}" for name, label in self.shown.items()) + " nats"
        self.report(entry | {"seconds_left": self.seconds_left, "figures": figures})

    def _validate(self) -> None:
        scores = self.scores()
        score = (scores["reliability"] + scores["generality"] + scores["locality"]) / 3
        entry = {"stage": "validation", "step": self.step, "score": score, **scores}
        self._log(entry)
        self.report(entry)
        self.bad = 0 if score > self.best else self.bad + 1
        if score > self.best:
            self.best = score
            # Where the run happened to lie is nobody's business but its own.
            kept = {name: value for name, value in self.settings.to_dict().items() if name not in PLACES}
            about = {
                "command": self.settings.command(),
                "training": kept,
                "step": self.step,
                "seconds": self.seconds,
                "caching_seconds": self.prepared,  # of these
                "validation": scores,
            }
            self.keep(self.out / "editor", about)

    def _log(self, entry: dict[str, Any]) -> None:
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


def schedule(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then cosine down to 2 % of the peak (ratio 0–1)."""
    ramp = min(1.0, (step + 1) / max(1, warmup))
    return ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def batch_of(step: int, size: int, count: int, seed: int) -> list[int]:
    """The episodes of one step: consecutive slices of a fresh shuffle each epoch, computed from the step alone."""
    chosen: list[int] = []
    position = step * size
    while len(chosen) < size:
        epoch, offset = divmod(position + len(chosen), count)
        order = list(range(count))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        chosen += order[offset : offset + size - len(chosen)]
    return chosen


def open_run(settings: RunSettings, resume: bool) -> None:
    """See that a run may begin in its folder, or that the one there may go on; nothing is written.

    Raises:
        TrainingError: nothing to resume, a run or something else is here already, or settings that do not fit the run.
    """
    out = Path(settings.out)
    before = _settings_there(out)
    if resume and before is None:
        raise TrainingError("there is no run to resume.", str(out), "Leave out --resume to start one.")
    if not resume and (out / "checkpoint.safetensors").exists():
        raise TrainingError("a run is here already.", str(out), "Add --resume to go on, or choose another folder.")
    if resume and before is not None:
        check_same(before, settings.to_dict(), out / SETTINGS)
    if settings.threads:
        torch.set_num_threads(settings.threads)


@contextmanager
def begun(settings: RunSettings) -> Iterator[None]:
    """A run in its folder, which is made once model and data are known to be good.

    Raises:
        TrainingError: a file of it cannot be read or written, as on a full disk; what was written before is whole.
    """
    out = Path(settings.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SETTINGS, settings.to_dict())
        yield
    except OSError as error:
        todo = "Make room or choose another folder; a run that has a checkpoint goes on with --resume."
        raise TrainingError(f"a file cannot be read or written ({error}).", settings.out, todo) from None


def _settings_there(out: Path) -> dict[str, Any] | None:
    known = out / SETTINGS
    try:
        found = json.loads(known.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f"no run can be kept here ({error}).", str(known), "Choose another folder.") from None
    if not isinstance(found, dict) or not {"data", "episodes", "steps"} <= found.keys():
        raise TrainingError("these are not the settings of a run.", str(known), "Choose another folder.")
    return found


PLACES = ("out", "cache", "device")  # where a run lies and works
FREE = ("threads", "steps", "minutes", *PLACES)


def check_same(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """A run goes on under the settings it began with; its threads, its length and where it lies and works may differ.

    Raises:
        TrainingError: another setting differs; names it.
    """
    plain = json.loads(json.dumps(now))
    for name in sorted(set(before) & set(plain)):
        if name not in FREE and before[name] != plain[name]:
            raise TrainingError(
                f"`{name}` was {before[name]!r} when this run began and is {plain[name]!r} now.",
                str(where),
                "Resume with the old setting, or train into another folder.",
            )
