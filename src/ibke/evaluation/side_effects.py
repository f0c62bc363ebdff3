"""What an edit does to the rest of a model: its text, its abilities, its weights.

Shape suffixes: O d_out, I d_in, K leading directions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ibke.batch import Pair
from ibke.data.abilities import OWN, Choice, read_abilities
from ibke.edit import Edit
from ibke.errors import RequestError
from ibke.evaluation.baseline import Baseline
from ibke.evaluation.generate import Together, in_force
from ibke.evaluation.harness import Harness
from ibke.evaluation.metrics import average, proportion
from ibke.evaluation.running_text import RunningText
from ibke.evaluation.scoring import MOST, score
from ibke.files import find_file
from ibke.models import LanguageModel
from ibke.modules import resolve, weight_OI
from ibke.session import set_aside

LEADING = 8  # singular vectors whose drift is measured


@dataclass(frozen=True)
class Beside:
    """What is put to models beside the requests' own questions, by the files it is in.

    Args:
        text: running text; empty for none. Relative paths are looked for in the data folder too.
        abilities: files of questions, or ``own`` for those that come with the package.
        questions: how many of each are drawn.
        looks: how many edits are looked at where each is alone on the model.
        harness: folder of lm-eval's task files; empty for none.
    """

    text: str = ""
    abilities: tuple[str, ...] = ()
    questions: int = 50
    looks: int = 8
    harness: str = ""

    def read(self) -> tuple[str | None, dict[str, list[Choice]]]:
        """The text, and the questions by file.

        Raises:
            RequestError: the text cannot be read, or two files of questions would go by one name.
            FormatError: a file of questions cannot.
        """
        place = find_file(self.text)
        try:
            running = place.read_text(encoding="utf-8") if self.text else None
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"it cannot be read ({error}).", str(place), "Give a text file in UTF-8.") from None
        suites: dict[str, Path] = {}
        for path in (OWN if name == OWN.stem else find_file(name) for name in self.abilities):
            if (other := suites.setdefault(path.stem, path)) != path:
                raise RequestError(f"it goes by the same name as {other}.", str(path), "Rename one of the files.")
        return running, {name: read_abilities(path, self.questions) for name, path in suites.items()}


@dataclass(frozen=True)
class Condition:
    """How a model is.

    Args:
        nll: of the text (nats per token); its exponential is the perplexity.
        chosen: by suite, the choice it makes at each question; −1 where none has a likelihood.
        abilities: by suite, whether each question is answered right.
        tasks: lm-eval's metrics, by ``task/metric``.
    """

    nll: float | None
    chosen: Mapping[str, tuple[int, ...]]
    abilities: Mapping[str, tuple[bool, ...]]
    tasks: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Battery:
    """Texts and questions put to the unedited model once, and to edited ones.

    Args:
        lm: the model.
        text: running text; its beginning is read, in windows of 256 tokens.
        tokens: how much of it.
        suites: questions by suite.
        edits: how many edits are looked at where each is alone on the model.
        batch_size: rows per pass.
        baseline: where the unedited model's condition may be known from.
        harness: tasks of lm-eval.

    Raises:
        RequestError: neither text nor questions, or a text of less than two tokens.
    """

    lm: LanguageModel
    text: str | None = None
    tokens: int = 2048
    suites: Mapping[str, Sequence[Choice]] = field(default_factory=dict)
    edits: int = 8
    batch_size: int = 16
    baseline: Baseline | None = None
    harness: Harness | None = None

    def __post_init__(self) -> None:
        if self.text is None and not self.suites and not self.harness:
            raise RequestError("there is neither text nor a question.", "side effects", "Name a file of either.")
        self._text = RunningText(self.lm, self.text or "", self.tokens, self.baseline)
        if self.text is not None and not self._text.windows:
            raise RequestError("the text has less than two tokens.", "side effects", "Give a longer one.")
        self._asked = {name: [self._pairs(choice) for choice in choices] for name, choices in self.suites.items()}
        self.found: list[dict[str, Any]] = []
        # By suite, for each look: of each question whether it is right, and whether the choice is the unedited model's.
        self._right: dict[str, list[Sequence[bool]]] = {name: [] for name in self.suites}
        self._kept: dict[str, list[Sequence[bool]]] = {name: [] for name in self.suites}
        self.seconds = 0.0
        if self.harness:  # a task can be wrong in any way, which is better known before edits are made
            self.base  # noqa: B018

    @classmethod
    def of(cls, lm: LanguageModel, beside: Beside, baseline: Baseline | None = None) -> Battery:
        """The battery that some files make.

        Raises:
            IBKEError: one cannot be read, or there is none.
        """
        text, suites = beside.read()
        harness = Harness(lm, find_file(beside.harness), beside.questions) if beside.harness else None
        return cls(lm, text, suites=suites, edits=beside.looks, baseline=baseline, harness=harness)

    @cached_property
    def base(self) -> Condition:
        """The unedited model's condition, whatever is attached; taken when it is first wanted.

        Taken before any edit is made it would be part of the memory that editing is said to need.
        """
        with set_aside(self.lm):
            return self._unedited()

    def _unedited(self) -> Condition:
        questions = {
            name: [([asdict(pair) for pair in pairs], choice.right) for pairs, choice in zip(asked, suite, strict=True)]
            for (name, asked), suite in zip(self._asked.items(), self.suites.values(), strict=True)
        }
        identity = [self.batch_size, [asdict(pair) for pair in self._text.windows], questions]
        # What a task of lm-eval asks is in files that may change.
        known = Baseline(self.lm) if self.harness or not self.baseline else self.baseline
        if kept := known.recall(identity):
            return Condition(**kept)
        found = self.condition(())
        known.keep(identity, asdict(found))
        return found

    def condition(self, edits: Sequence[Edit]) -> Condition:
        """How the model is with some edits in force together."""
        began = time.perf_counter()
        force = Together(tuple(edits)) if edits else None
        chosen, abilities = {}, {}
        for name, asked in self._asked.items():
            rows = [pair for pairs in asked for pair in pairs]
            said = iter(score(self.lm, rows, force, batch_size=self.batch_size))
            chosen[name] = tuple(_least([sum(next(said).nll) for _ in pairs]) for pairs in asked)
            rights = [choice.right for choice in self.suites[name]]
            abilities[name] = tuple(mine == right for mine, right in zip(chosen[name], rights, strict=True))
        nll = self._text.nll(edits, batch_size=self.batch_size) if self._text.windows else None
        tasks = {}
        if self.harness:
            with in_force(self.lm, force):
                tasks = self.harness.scores()
        self.seconds += time.perf_counter() - began
        return Condition(nll, chosen, abilities, tasks)

    def note(self, edits: Sequence[Edit]) -> None:
        """Look at the model with some edits in force together, beside the unedited one."""
        row: dict[str, Any] = {**update_size(self.lm, edits)}
        self.found.append(row)
        try:
            now = self.condition(edits)
        except RequestError:  # what an edit puts in front of a question leaves it no room in the window
            return
        if now.nll is not None and self.base.nll is not None:
            row["perplexity_ratio"] = _ratio(now.nll - self.base.nll)
        row["tasks"] = dict(now.tasks)
        row["abilities"] = {name: fmean(right) for name, right in now.abilities.items()}
        row["kept"] = {}
        for name, before in self.base.chosen.items():
            same = [mine == own for mine, own in zip(now.chosen[name], before, strict=True)]
            row["kept"][name] = fmean(same)
            self._right[name].append(now.abilities[name])
            self._kept[name].append(same)

    def report(self) -> dict[str, Any]:
        """Means over what was looked at (``n``) or could be asked (``asked``), each with its 95 % interval.

        Those of questions are intervals over questions, each the mean of its looks; ``change`` is paired with the
        unedited model's answer to the same question.
        """

        def mean(values: Sequence[float]) -> dict[str, float | None]:
            return asdict(average(values))

        base, asked = self.base, [row for row in self.found if "kept" in row]
        ratios = [row["perplexity_ratio"] for row in asked if "perplexity_ratio" in row]
        return {
            "n": len(self.found),
            "asked": len(asked),
            "text_tokens": sum(len(pair.answer) for pair in self._text.windows),
            "perplexity": {
                "base": None if base.nll is None else math.exp(base.nll),
                "ratio": mean(ratios),
                "each": ratios,
            },
            "abilities": {
                name: {
                    "n": len(right),
                    "base": fmean(right),
                    "edited": asdict(proportion(_by_question(self._right[name]))),
                    "change": mean(_gains(_by_question(self._right[name]), right)),
                    "kept": asdict(proportion(_by_question(self._kept[name]))),
                }
                for name, right in base.abilities.items()
            },
            "tasks": {
                name: {"base": value, "edited": mean([row["tasks"][name] for row in asked])}
                for name, value in base.tasks.items()
            },
            "relative_norm": mean([row["relative_norm"] for row in self.found]),
            "drift": mean([row["drift"] for row in self.found]),
            "seconds": self.seconds,
        }

    def _pairs(self, choice: Choice) -> list[Pair]:
        prompt = self.lm.tokenizer(choice.prompt)["input_ids"]
        answers = [self.lm.tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in choice.choices]
        # A passage that is too long loses its beginning, as is the custom: the question stands at the end.
        if window := self.lm.window:
            prompt = prompt[-(window - max(map(len, answers))) :]
        return [Pair(prompt, answer, (0, len(prompt))) for answer in answers]


def _by_question(looks: Sequence[Sequence[bool]]) -> list[float]:
    return [fmean(looked) for looked in zip(*looks, strict=True)]


def _gains(now: Sequence[float], before: Sequence[bool]) -> list[float]:
    """Nothing where no look could be taken."""
    return [mine - own for mine, own in zip(now, before, strict=True)] if now else []


def _ratio(nats: float) -> float:
    return math.exp(MOST if math.isnan(nats) else min(nats, MOST))  # beyond which exp soon overflows


def _least(nats: Sequence[float]) -> int:
    """Index of the least; a broken model's NaN is never that."""
    return min((i for i, value in enumerate(nats) if value == value), key=nats.__getitem__, default=-1)


@torch.no_grad()
def update_size(lm: LanguageModel, edits: Sequence[Edit]) -> dict[str, float]:
    """How much edits that are in force together change the weights, mean over the modules they touch.

    Returns:
        ``relative_norm``, ‖ΔW‖/‖W‖ (Frobenius; neurons count by the columns they add to the output projection), and
        ``drift``, 1 − the mean cosine² between the spaces of the eight leading left singular vectors before and after
        (ratio 0–1; 0: they span the same space). Both are 0 for edits that change no weight.
    """
    names = list(dict.fromkeys(name for edit in edits for name in (*edit.factors, *edit.neurons)))
    modules, ratios, drifts = resolve(lm.model, names), [], []
    for name in names:
        before_OI = weight_OI(modules[name]).double().cpu()
        deltas = [edit.delta(name).double() for edit in edits if name in edit.factors]
        added = [edit.neurons[name].out.double().T for edit in edits if name in edit.neurons]
        change_OI = sum(deltas, torch.zeros_like(before_OI))
        after_OI = torch.cat([before_OI + change_OI, *added], dim=1)
        square = change_OI.square().sum() + sum(column.square().sum() for column in added)
        ratios.append(float(square.sqrt() / before_OI.norm()))
        if not torch.isfinite(after_OI @ after_OI.T).all():  # of the space that was there nothing is left
            drifts.append(1.0)
            continue
        cosines_KK = _leading(before_OI).T @ _leading(after_OI)
        drifts.append(1.0 - float(cosines_KK.square().sum()) / len(cosines_KK))
    return {"relative_norm": fmean(ratios) if ratios else 0.0, "drift": max(0.0, fmean(drifts)) if drifts else 0.0}


def _leading(weight_OI: Tensor) -> Tensor:
    """The leading left singular vectors (O × K)."""
    return torch.linalg.eigh(weight_OI @ weight_OI.T).eigenvectors[:, -LEADING:]
