"""Training of hypernetworks: cached rows in, an editor's folder out; killed at any moment, it can go on exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ibke.editors.base import method_class
from ibke.editors.hypernetwork.editor import HypernetworkEditor
from ibke.editors.hypernetwork.network import Hypernetwork
from ibke.editors.hypernetwork.storage import run_folder
from ibke.errors import TrainingError
from ibke.models import LanguageModel, load_model
from ibke.rows import EDIT, INSIDE, OUTSIDE
from ibke.training.building import RowBuilder
from ibke.training.cache import RowCache
from ibke.training.clock import Clock
from ibke.training.hypernetwork.lessons import Lessons
from ibke.training.hypernetwork.settings import HypernetworkSettings
from ibke.training.run import (
    OnProgress,
    Run,
    batch_of,
    begun,
    cached_shards,
    draw_episodes,
    open_run,
)

Settings = HypernetworkSettings
LAYOUT = 1  # of cached shards; a new one makes old caches unseen, never misread
SCORES = {EDIT: "reliability", INSIDE: "generality", OUTSIDE: "locality"}


class HypernetworkTrainer(Run):
    """One run of a hypernetwork.

    Args:
        settings: what to do.
        editor: the method, with the network to train.
        caches: training episodes, and validation's.
        seconds: spent already.
        report: called with progress.
    """

    network: Hypernetwork
    averaged: Hypernetwork
    shown = {"reliability_nats": "edit", "generality_nats": "wordings", "locality_nats": "KL"}

    def __init__(
        self,
        settings: HypernetworkSettings,
        editor: HypernetworkEditor,
        caches: Sequence[RowCache],
        seconds: float,
        report: OnProgress,
    ):
        super().__init__(settings, editor.network, editor.network.scalars(), settings.scalar_step, report, seconds)
        self.editor, self.warmup, self.minutes = editor, settings.warmup, settings.minutes
        self.lessons, self.validation = (Lessons(editor, cache) for cache in caches)

    @property
    def edits_per_step(self) -> int:
        """Of all turns."""
        return self.settings.batch * self.network.config.turns

    @property
    def seconds_left(self) -> float:
        """Until the last step, or until the budget is spent."""
        left = super().seconds_left
        return min(left, max(0.0, 60 * self.minutes - self.seconds)) if self.minutes else left

    def over(self) -> bool:
        """Whether there is no step left to take, or no time; one step is always taken."""
        spent = bool(self.minutes and self.step and self.seconds >= 60 * self.minutes)
        return spent or super().over()

    def take_step(self) -> dict[str, float]:
        """One optimiser step over all turns."""
        count = len(self.lessons.episodes)
        turns = self._turns(batch_of(self.step, self.edits_per_step, count, self.settings.seed))
        record: dict[str, float] = {}
        # Papers keep the learning rate; a budget of time also has no known end to anneal to.
        pace = min(1.0, (self.step + 1) / max(1, self.warmup))
        norm = self.descend(lambda: record.update(self.lessons.learn(self.network, turns)), pace)
        return record | {"gradient_norm": norm}

    def scores(self) -> dict[str, float]:
        """Share of prompts answered exactly as they should be, under edits made as in training."""
        right: dict[int, list[float]] = {kind: [] for kind in SCORES}
        everything = range(len(self.validation.episodes))
        for begin in range(0, len(everything), self.edits_per_step):
            chosen = everything[begin : begin + self.edits_per_step]
            for kind, some in self.validation.examine(self.averaged, self._turns(chosen)).items():
                right[kind] += some
        return {name: sum(right[kind]) / max(1, len(right[kind])) for kind, name in SCORES.items()}

    def keep(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the averaged weights."""
        type(self.editor)(self.editor.lm, self.averaged).save(folder, about)

    def _turns(self, chosen: Sequence[int]) -> list[Sequence[int]]:
        size = self.settings.batch
        return [chosen[begin : begin + size] for begin in range(0, len(chosen), size)]


def train(settings: HypernetworkSettings, on_progress: OnProgress | None = None, resume: bool = False) -> Path:
    """Train a hypernetwork; returns the folder of the best one.

    Raises:
        TrainingError: nothing to resume, settings that do not fit the run found there, or not a method trained here.
    """
    lm = load_model(settings.model, device=settings.device, dtype=settings.dtype, modules=settings.modules or None)
    return train_for(lm, settings, on_progress, resume)


def train_for(
    lm: LanguageModel, settings: HypernetworkSettings, on_progress: OnProgress | None = None, resume: bool = False
) -> Path:
    """The same for a model that is loaded already."""
    clock = Clock()
    report = on_progress or (lambda _: None)
    kind = method_class(settings.method)
    if not issubclass(kind, HypernetworkEditor) or not isinstance(settings.config, kind.Config):
        raise TrainingError(
            "it is no hypernetwork, or `config` is another method's.",
            settings.method,
            "Name one, with its own configuration.",
        )
    settings = replace(settings, out=settings.out or str(run_folder(lm, settings.method)))
    open_run(settings, resume)
    editor = kind(lm, kind.untrained(lm, settings.config, settings.seed))
    drawn = draw_episodes(settings)
    builder = RowBuilder(lm.model, lm.tokenizer, editor.part)
    identity = ("rows", LAYOUT, lm.fingerprint, str(lm.dtype), editor.part.first)
    with begun(settings):
        folders = cached_shards(settings, builder, drawn, identity, report, clock.found)
        caches = [RowCache(folder) for folder in folders]
        trainer = HypernetworkTrainer(settings, editor, caches, clock.seconds, report)
        trainer.start(resume)
        return trainer.run()
