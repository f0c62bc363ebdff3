"""Training of IBKE: cached episodes in, an editor's folder out; killed at any moment, it can go on exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ibke.batch import Batch
from ibke.editors.ibke.address import Addresser
from ibke.editors.ibke.bottleneck import Bottleneck
from ibke.editors.ibke.contexts import About
from ibke.editors.ibke.keys import KEYS
from ibke.editors.ibke.objective import BetaSchedule
from ibke.editors.ibke.shipped import load_editor, save_editor
from ibke.editors.ibke.statistics import Common
from ibke.editors.key_statistics import lines_of, pair_batches, text_batches
from ibke.errors import TrainingError
from ibke.files import find_file
from ibke.frames import encode_pair
from ibke.models import LanguageModel, load_model
from ibke.modules import in_out
from ibke.neurons import Site
from ibke.partial import PartialModel
from ibke.training.building import Builder
from ibke.training.cache import EpisodeCache
from ibke.training.clock import Clock, Found, unnoticed
from ibke.training.episodes import Episode
from ibke.training.run import (
    OnProgress,
    Run,
    batch_of,
    begun,
    cached_shards,
    draw_episodes,
    open_run,
    schedule,
)
from ibke.training.settings import TrainSettings
from ibke.training.statistics import LayerStatistics, layer_statistics
from ibke.training.step import terms
from ibke.training.validation import validate
from ibke.training.words import useful_words

Settings = TrainSettings
LAYOUT = 6  # of cached shards; a new one makes old caches unseen, never misread
SCALAR_STEP = 20.0  # how much larger the steps of sizes (logarithms, gate biases) are than those of weights


@dataclass
class Ground:
    """The frozen base of a run and the MLP that is edited."""

    lm: LanguageModel
    part: PartialModel
    site: Site


def ground_at(lm: LanguageModel, layer: int) -> Ground:
    """A base split at a layer.

    Raises:
        ModuleNotEditableError: the model has no such layer, or modules were named but none in it.
    """
    site = Site.in_layer(lm, layer, "which `layer` or `relay_layer` says")
    return Ground(lm, PartialModel(lm.model, lm.architecture.layers, layer), site)


def prepare_ground(settings: TrainSettings) -> Ground:
    """Load the base and split it at the edited layer.

    Raises:
        ModuleNotEditableError: the model has no such layer, or modules were named but none in it.
        FormatError: the network's sizes do not suit the model.
    """
    lm = load_model(settings.model, device=settings.device, dtype=settings.dtype, modules=settings.modules or None)
    # What cannot be is said now, not after an hour of caching.
    if settings.config.relay_layer:
        ground_at(lm, settings.config.relay_layer)
    ground = ground_at(lm, settings.config.layer)
    empty_network(settings, ground)
    return ground


def empty_network(settings: TrainSettings, ground: Ground) -> Bottleneck:
    """A network of a run's sizes.

    Raises:
        FormatError: they do not suit the model.
    """
    return Bottleneck(settings.config, ground.site.out, in_out(ground.site.modules[ground.site.out])[1])


def take_statistics(settings: TrainSettings, ground: Ground, episodes: Sequence[Episode]) -> LayerStatistics:
    """What belongs to the edited layer alone, from running text and from the forms prompts are asked in."""
    lm = ground.lm

    def batches() -> Iterator[Batch]:
        for text in dict.fromkeys(("", settings.text)):  # our own is short and of many kinds, code and letters too
            yield from text_batches(lm.tokenizer, lines_of(text), 20_000, lm.device)
        asked = [item for episode in episodes[:256] for item in (episode.edit, *episode.inside, *episode.outside)]
        pairs = [encode_pair(item.prompt, item.target or "-", item.frame, lm.tokenizer) for item in asked]
        yield from pair_batches(pairs, lm.tokenizer, lm.device)

    return layer_statistics(ground.part, ground.site, batches())


def make_addresser(
    settings: TrainSettings,
    ground: Ground,
    statistics: LayerStatistics,
    kind: type[Addresser],
    common: Common,
) -> Addresser:
    """What makes the addresses of a run, told of some common words."""
    config = settings.config
    return kind(
        ground.part,
        ground.site.entrance,
        ground.lm.tokenizer,
        statistics.spectrum,
        common,
        config.threshold * statistics.constant_D.cpu(),
        gamma=config.gamma,
        ridge=config.ridge,
        alike=config.alike,
    )


def with_words(
    settings: TrainSettings,
    ground: Ground,
    statistics: LayerStatistics,
    episodes: Sequence[Episode],
    report: OnProgress,
    found: Found = unnoticed,
) -> LayerStatistics:
    """With the words that the editor keeps chosen by what they do to training edits, where a text is named."""
    if not settings.words:
        return statistics
    asked = [About(item.edit.prompt, item.about) for item in episodes]
    make = partial(make_addresser, settings, ground, statistics)
    folder = Path(settings.cache or settings.out)
    common = useful_words(make, statistics.seen, settings.words, asked, folder, report, found)
    return replace(statistics, common=common)


def prepare_episodes(
    settings: TrainSettings,
    ground: Ground,
    statistics: LayerStatistics,
    drawn: Sequence[list[Episode]],
    report: OnProgress,
    found: Found = unnoticed,
) -> list[EpisodeCache]:
    """Episodes with everything cached that never changes, training first, then validation."""
    config, lm = settings.config, ground.lm
    addresser = make_addresser(settings, ground, statistics, Addresser, statistics.common)
    shut_D = None if KEYS[config.keys].moving else config.threshold * statistics.constant_D.cpu()
    builder = Builder(lm.model, lm.tokenizer, ground.part, ground.site, addresser, shut_D)
    seen = (config.layer, config.keys, config.threshold, addresser.identity)
    texts = [name and find_file(name).read_bytes() for name in (settings.text, settings.words)]
    read = [text and hashlib.sha256(text).hexdigest() for text in texts]
    identity = (LAYOUT, lm.fingerprint, str(lm.dtype), *seen, *read)
    return [EpisodeCache(folder) for folder in cached_shards(settings, builder, drawn, identity, report, found)]


def start_network(
    settings: TrainSettings, ground: Ground, statistics: LayerStatistics, episodes: EpisodeCache
) -> Bottleneck:
    """A network whose linear maps come from the layer's statistics and from training edits."""
    if settings.start:
        started = started_from(Path(settings.start), settings, ground)
        if settings.words:
            started.know(statistics.common)
        return started
    torch.manual_seed(settings.seed)
    network = empty_network(settings, ground)
    network.ground(statistics.spectrum, statistics.constant_D, statistics.output_scale)
    network.know(statistics.common)
    network.initialise(*episodes.initial(4000))
    return network.to(ground.lm.device)


def ground_relay(network: Bottleneck, settings: TrainSettings, lm: LanguageModel, drawn: Sequence[Episode]) -> None:
    """Give the relay, if there is one, what belongs to its layer."""
    if network.relay is not None:
        found = take_statistics(settings, ground_at(lm, settings.config.relay_layer), drawn)
        network.relay.ground(found.spectrum, found.constant_D, found.output_scale)


def started_from(folder: Path, settings: TrainSettings, ground: Ground) -> Bottleneck:
    """The weights of a trained editor under this run's settings.

    Raises:
        TrainingError: the editor has other sizes.
    """
    trained, _ = load_editor(folder, ground.lm)
    network = Bottleneck(settings.config, ground.site.out, trained.d_out)
    try:
        network.load_state_dict(trained.state_dict())
    except RuntimeError:
        raise TrainingError(
            "the editor's sizes or prior are not those of this run.",
            str(folder),
            f"Use its settings: {trained.config.to_json()}",
        ) from None
    return network.to(ground.lm.device)


class Trainer(Run):
    """One run of IBKE.

    Args:
        settings: what to do.
        ground: the frozen base.
        network: the network to train.
        caches: training episodes, and validation's.
        report: called with progress.
        seconds: spent already.
    """

    network: Bottleneck
    averaged: Bottleneck
    shown = {"rate_nats": "R", "sg_nats": "SG", "il_nats": "IL"}

    def __init__(
        self,
        settings: TrainSettings,
        ground: Ground,
        network: Bottleneck,
        caches: Sequence[EpisodeCache],
        report: OnProgress,
        seconds: float = 0.0,
    ):
        super().__init__(settings, network, network.scalars(), SCALAR_STEP, report, seconds)
        self.config, self.ground = settings.config, ground
        self.episodes, self.validation = caches
        config = settings.config
        self.beta = BetaSchedule(config.beta_schedule, config.beta, settings.steps // 10, config.target_rate)
        self.generator = torch.Generator(device=ground.lm.device).manual_seed(settings.seed)
        self.rate = config.target_rate

    def state(self) -> dict[str, Any]:
        """Counters, β and the state of the noise."""
        return super().state() | {
            "rate": self.rate,
            "beta": self.beta.beta,
            "generator": self.generator.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take them over."""
        super().restore(state)
        self.generator.set_state(state["generator"])
        self.rate, self.beta.beta = state["rate"], state["beta"]

    def take_step(self) -> dict[str, float]:
        """One optimiser step; returns the terms of the objective (nats)."""
        settings, config = self.settings, self.config
        chosen = batch_of(self.step, settings.batch, len(self.episodes), settings.seed)
        generator = self.generator if config.noise else None
        batch = self.episodes.batch(chosen).to(self.ground.lm.device)
        found = terms(self.network, self.ground.part, self.ground.site, batch, generator)
        beta = self.beta.at(self.step, self.rate)
        loss = found.loss(config.lambda_il, beta)
        norm = self.descend(loss.backward, schedule(self.step, settings.warmup, settings.steps))
        self.rate = 0.9 * self.rate + 0.1 * found.rate.item()
        return {
            "sg_nats": found.generality.item(),
            "reliability_nats": found.reliability.item(),
            "il_nats": found.independence.item(),
            "il_reverse_nats": found.independence_reverse.item(),
            "rate_nats": found.rate.item(),
            "beta": beta,
            "gradient_norm": norm,
        }

    def scores(self) -> dict[str, float]:
        """Of the averaged weights, not refined."""
        return validate(self.averaged, self.ground.part, self.ground.site, self.validation)

    def keep(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the averaged weights."""
        save_editor(folder, self.averaged, self.ground.lm, about)


def train(settings: TrainSettings, on_progress: OnProgress | None = None, resume: bool = False) -> Path:
    """Train an editor; returns the folder of the best one.

    Raises:
        TrainingError: nothing to resume, settings that do not fit the run found there, or files that cannot be written.
    """
    report, clock = on_progress or (lambda _: None), Clock()
    open_run(settings, resume)
    ground = prepare_ground(settings)
    drawn = draw_episodes(settings)
    with begun(settings):
        taken = take_statistics(settings, ground, drawn[0])
        statistics = with_words(settings, ground, taken, drawn[0], report, clock.found)
        caches = prepare_episodes(settings, ground, statistics, drawn, report, clock.found)
        network = start_network(settings, ground, statistics, caches[0])
        ground_relay(network, settings, ground.lm, drawn[0])
        trainer = Trainer(settings, ground, network, caches, report, clock.seconds)
        trainer.start(resume)
        return trainer.run()
