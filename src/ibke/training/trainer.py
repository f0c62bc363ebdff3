"""The training loop: cached episodes in, an editor's folder out; killed at any moment, it can go on exactly."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ibke.batch import Batch
from ibke.editors.ibke.address import Addresser
from ibke.editors.ibke.bottleneck import Bottleneck
from ibke.editors.ibke.objective import BetaSchedule
from ibke.editors.ibke.shipped import load_editor, save_editor
from ibke.editors.key_statistics import lines_of, pair_batches, text_batches
from ibke.errors import TrainingError
from ibke.evaluation.machine import peak_memory_mb
from ibke.frames import encode_pair
from ibke.models import LanguageModel, load_model
from ibke.modules import in_out, target_modules
from ibke.neurons import Site
from ibke.partial import PartialModel
from ibke.training.building import Builder, build
from ibke.training.cache import EpisodeCache
from ibke.training.checkpoint import load_checkpoint, save_checkpoint, write_json
from ibke.training.episodes import Episode
from ibke.training.mixture import Source, Split, mixture
from ibke.training.settings import TrainSettings
from ibke.training.statistics import LayerStatistics, layer_statistics
from ibke.training.step import terms
from ibke.training.validation import validate

OnProgress = Callable[[dict[str, Any]], None]
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
        TrainingError: modules were named, but none in that layer.
    """
    names = target_modules(lm, lm.architecture, [layer])
    if not names:
        raise TrainingError(
            f"none of the named modules is in layer {layer}.",
            "modules",
            "Set `layer` (and `relay_layer`, or 0 for no relay) to those of the modules to edit.",
        )
    return Ground(lm, PartialModel(lm.model, lm.architecture.layers, layer), Site.find(lm.model, names[0]))


def prepare_ground(settings: TrainSettings) -> Ground:
    """Load the base and split it at the edited layer.

    Raises:
        TrainingError: modules were named, but none in the edited layer or in the relay's.
        ModuleNotEditableError: the model has no such layer.
    """
    lm = load_model(settings.model, dtype=settings.dtype, modules=settings.modules or None)
    if settings.config.relay_layer:
        ground_at(lm, settings.config.relay_layer)  # said now if it cannot be, not after an hour of caching
    return ground_at(lm, settings.config.layer)


def draw_episodes(settings: TrainSettings) -> tuple[list[Episode], list[Episode]]:
    """Training and validation episodes.

    Raises:
        TrainingError: too little usable data.
    """
    sources = [Source.parse(text) for text in settings.data]
    split = Split(settings.hold_out_relations, settings.exclude)
    everything = mixture(sources, settings.seed, settings.episodes + settings.validation, split)
    if len(everything) <= settings.validation:
        raise TrainingError(
            f"{len(everything)} usable requests are not more than the {settings.validation} kept for validation.",
            ", ".join(settings.data),
            "Add data (facts of relations without wordings do not count), or lower `validation`.",
        )
    return everything[settings.validation :], everything[: settings.validation]


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


def prepare_episodes(
    settings: TrainSettings,
    ground: Ground,
    statistics: LayerStatistics,
    drawn: Sequence[list[Episode]],
    report: OnProgress,
) -> list[EpisodeCache]:
    """Episodes with everything cached that never changes, training first, then validation."""
    config, lm = settings.config, ground.lm
    addresser = Addresser(
        ground.part,
        ground.site.entrance,
        lm.tokenizer,
        statistics.spectrum,
        statistics.common,
        config.threshold * statistics.constant_D.cpu(),
        gamma=config.gamma,
        ridge=config.ridge,
        alike=config.alike,
    )
    threshold = config.threshold if config.keys == "address" else None
    shut_D = None if threshold is None else threshold * statistics.constant_D.cpu()
    builder = Builder(lm.model, lm.tokenizer, ground.part, ground.site, addresser, shut_D)
    caches = []
    for name, episodes in zip(("episodes", "validation"), drawn, strict=True):
        # The folder's name tells what is in it, so another seed, model or layer never reads stale shards.
        identity = (LAYOUT, lm.fingerprint, config.layer, addresser.identity, threshold, settings.text, episodes)
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        folder = Path(settings.cache or settings.out) / f"{name}-{digest}"
        started = time.monotonic()

        def tell(done: int, total: int, name: str = name, started: float = started) -> None:
            spent = time.monotonic() - started
            left = spent / done * (total - done)
            report({"stage": f"caching {name}", "done": done, "total": total, "seconds_left": left})

        build(builder, episodes, folder, tell, whole=name == "validation")
        caches.append(EpisodeCache(folder))
    return caches


def start_network(
    settings: TrainSettings, ground: Ground, statistics: LayerStatistics, episodes: EpisodeCache
) -> Bottleneck:
    """A network whose linear maps come from the layer's statistics and from training edits."""
    if settings.start:
        return started_from(Path(settings.start), settings, ground)
    torch.manual_seed(settings.seed)
    network = Bottleneck(settings.config, ground.site.out, in_out(ground.site.modules[ground.site.out])[1])
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


class Trainer:
    """One run: optimiser, averaged weights, schedule, validation, checkpoints.

    Args:
        settings: what to do.
        ground: the frozen base.
        network: the network to train.
        report: called with progress.
    """

    def __init__(self, settings: TrainSettings, ground: Ground, network: Bottleneck, report: OnProgress):
        self.settings, self.ground, self.network, self.report = settings, ground, network, report
        self.averaged = copy.deepcopy(network).requires_grad_(False)
        scalars = network.scalars()
        weights = [item for item in network.parameters() if not any(item is scalar for scalar in scalars)]
        groups = [
            {"params": weights, "weight_decay": settings.weight_decay, "scale": 1.0},
            {"params": scalars, "weight_decay": 0.0, "scale": SCALAR_STEP},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        config = settings.config
        self.beta = BetaSchedule(config.beta_schedule, config.beta, settings.steps // 10, config.target_rate)
        self.generator = torch.Generator(device=ground.lm.device).manual_seed(settings.seed)
        self.step, self.best, self.bad, self.seconds, self.rate = 0, -1.0, 0, 0.0, config.target_rate
        self.out = Path(settings.out)

    @property
    def checkpoint(self) -> Path:
        """Where the run goes on from."""
        return self.out / "checkpoint.safetensors"

    def resume(self) -> None:
        """Go on from the last checkpoint; from there on every number is the one an unbroken run would have had."""
        state = load_checkpoint(self.checkpoint, self.network, self.averaged, self.optimizer)
        self.generator.set_state(state.pop("generator"))
        self.step, self.best, self.bad = state["step"], state["best"], state["bad"]
        self.seconds, self.rate, self.beta.beta = state["seconds"], state["rate"], state["beta"]
        lines = (self.out / "log.jsonl").read_text().splitlines() if (self.out / "log.jsonl").exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        (self.out / "log.jsonl").write_text("".join(line + "\n" for line in kept))

    def save(self) -> None:
        """Write the checkpoint."""
        state: dict[str, Any] = {"step": self.step, "best": self.best, "bad": self.bad, "seconds": self.seconds}
        state |= {"rate": self.rate, "beta": self.beta.beta, "generator": self.generator.get_state()}
        save_checkpoint(self.checkpoint, self.network, self.averaged, self.optimizer, state)

    def run(self, episodes: EpisodeCache, validation: EpisodeCache) -> None:
        """Train to the last step, or until validation stops improving."""
        settings, began = self.settings, time.monotonic() - self.seconds
        while self.step < settings.steps and self.bad < settings.patience:
            record = self._step(episodes)
            self.step += 1
            self.seconds = time.monotonic() - began
            if self.step % 10 == 0:
                self._tell(record)
            if self.step % settings.validate_every == 0 or self.step == settings.steps:
                self._validate(validation)
                self.save()

    def _step(self, episodes: EpisodeCache) -> dict[str, float]:
        settings, config = self.settings, self.settings.config
        chosen = batch_of(self.step, settings.batch, len(episodes), settings.seed)
        generator = self.generator if config.noise else None
        batch = episodes.batch(chosen).to(self.ground.lm.device)
        found = terms(self.network, self.ground.part, self.ground.site, batch, generator)
        beta = self.beta.at(self.step, self.rate)
        loss = found.loss(config.lambda_il, beta)
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * settings.learning_rate * schedule(self.step, settings.warmup, settings.steps)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
        if not torch.isfinite(norm):
            raise TrainingError("the gradient is not finite.", f"step {self.step}", "Lower the learning rate.")
        self.optimizer.step()
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for kept, new in zip(self.averaged.parameters(), self.network.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        self.rate = 0.9 * self.rate + 0.1 * found.rate.item()
        return {
            "sg_nats": found.generality.item(),
            "reliability_nats": found.reliability.item(),
            "il_nats": found.independence.item(),
            "il_reverse_nats": found.independence_reverse.item(),
            "rate_nats": found.rate.item(),
            "beta": beta,
            "gradient_norm": norm.item(),
        }

    def _tell(self, record: dict[str, float]) -> None:
        settings = self.settings
        pace = self.seconds / self.step
        entry: dict[str, Any] = {"stage": "training", "step": self.step, "done": self.step, "total": settings.steps}
        entry |= record | {"edits_per_second": settings.batch / pace, "seconds": self.seconds}
        entry["peak_memory_mb"] = peak_memory_mb()
        self._log(entry)
        self.report(entry | {"seconds_left": pace * (settings.steps - self.step)})

    def _validate(self, validation: EpisodeCache) -> None:
        scores = validate(self.averaged, self.ground.part, self.ground.site, validation)
        score = (scores["reliability"] + scores["generality"] + scores["locality"]) / 3
        entry = {"stage": "validation", "step": self.step, "score": score, **scores}
        self._log(entry)
        self.report(entry)
        self.bad = 0 if score > self.best else self.bad + 1
        if score > self.best:
            self.best = score
            # Where the run happened to lie is nobody's business but its own.
            kept = {name: value for name, value in self.settings.to_dict().items() if name not in ("out", "cache")}
            about = {"training": kept, "step": self.step, "validation": scores}
            save_editor(self.out / "editor", self.averaged, self.ground.lm, about)

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


def check_same(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """A run goes on under the settings it began with; only its threads and its length may differ.

    Raises:
        TrainingError: another setting differs; names it.
    """
    plain = json.loads(json.dumps(now))
    for name in sorted(set(before) & set(plain)):
        if name not in ("threads", "steps") and before[name] != plain[name]:
            raise TrainingError(
                f"`{name}` was {before[name]!r} when this run began and is {plain[name]!r} now.",
                str(where),
                "Resume with the old setting, or train into another folder.",
            )


def train(settings: TrainSettings, on_progress: OnProgress | None = None, resume: bool = False) -> Path:
    """Train an editor; returns the folder of the best one.

    Raises:
        TrainingError: nothing to resume, or settings that do not fit the run found there.
    """
    report = on_progress or (lambda _: None)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    known = out / "settings.json"
    if resume and not known.exists():
        raise TrainingError("there is no run to resume.", str(out), "Leave out --resume to start one.")
    if not resume and (out / "checkpoint.safetensors").exists():
        raise TrainingError("a run is here already.", str(out), "Add --resume to go on, or choose another folder.")
    if resume:
        check_same(json.loads(known.read_text(encoding="utf-8")), settings.to_dict(), known)
    write_json(known, settings.to_dict())
    if settings.threads:
        torch.set_num_threads(settings.threads)
    ground = prepare_ground(settings)
    drawn = draw_episodes(settings)
    statistics = take_statistics(settings, ground, drawn[0])
    episodes, validation = prepare_episodes(settings, ground, statistics, drawn, report)
    network = start_network(settings, ground, statistics, episodes)
    ground_relay(network, settings, ground.lm, drawn[0])
    trainer = Trainer(settings, ground, network, report)
    if resume and trainer.checkpoint.exists():
        trainer.resume()
    else:  # killed before its first checkpoint, a run starts over, and so does its log
        (out / "log.jsonl").unlink(missing_ok=True)
    trainer.run(episodes, validation)
    return out / "editor"
