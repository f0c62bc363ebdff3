"""What an edit does to the rest of a model: its text, its abilities, its weights.

Shape suffixes: O d_out, I d_in, K leading directions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ibke.batch import Pair
from ibke.data.abilities import Choice
from ibke.edit import Edit
from ibke.errors import RequestError
from ibke.evaluation.generate import Together
from ibke.evaluation.metrics import average
from ibke.evaluation.scoring import score
from ibke.models import LanguageModel
from ibke.modules import resolve, weight_OI

WINDOW = 256  # tokens of text read at once
LEADING = 8  # singular vectors whose drift is measured


@dataclass(frozen=True)
class Condition:
    """How a model is.

    Args:
        nll: of the text (nats per token); its exponential is the perplexity.
        abilities: by suite, whether each question is answered right.
    """

    nll: float | None
    abilities: Mapping[str, tuple[bool, ...]]


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

    Raises:
        RequestError: neither text nor questions, or a text of less than two tokens.
    """

    lm: LanguageModel
    text: str | None = None
    tokens: int = 2048
    suites: Mapping[str, Sequence[Choice]] = field(default_factory=dict)
    edits: int = 8
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.text is None and not self.suites:
            raise RequestError("there is neither text nor a question.", "side effects", "Name a file of either.")
        self._windows = self._text_windows()
        self._asked = {name: [self._pairs(choice) for choice in choices] for name, choices in self.suites.items()}
        self.found: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.base = self.condition(())

    def condition(self, edits: Sequence[Edit]) -> Condition:
        """How the model is with some edits in force together."""
        began = time.perf_counter()
        force = Together(tuple(edits)) if edits else None
        abilities = {}
        for name, asked in self._asked.items():
            rows = [pair for pairs in asked for pair in pairs]
            said = iter(score(self.lm, rows, force, batch_size=self.batch_size))
            likely = [[-sum(next(said).nll) for _ in pairs] for pairs in asked]
            rights = [choice.right for choice in self.suites[name]]
            chosen = [max(range(len(of)), key=of.__getitem__) for of in likely]
            abilities[name] = tuple(mine == right for mine, right in zip(chosen, rights, strict=True))
        nll = None
        if self._windows:
            read = score(self.lm, self._windows, force, batch_size=self.batch_size)
            nll = sum(sum(one.nll) for one in read) / sum(len(one.nll) for one in read)
        self.seconds += time.perf_counter() - began
        return Condition(nll, abilities)

    def note(self, edits: Sequence[Edit]) -> None:
        """Look at the model with some edits in force together, beside the unedited one."""
        now, size = self.condition(edits), update_size(self.lm, edits)
        row: dict[str, Any] = {**size}
        if now.nll is not None and self.base.nll is not None:
            row["perplexity_ratio"] = math.exp(now.nll - self.base.nll)
        row["abilities"] = {name: fmean(right) for name, right in now.abilities.items()}
        self.found.append(row)

    def report(self) -> dict[str, Any]:
        """Means over what was looked at (``n``), each with its 95 % interval."""

        def mean(values: Sequence[float]) -> dict[str, float | None]:
            return asdict(average(values))

        base = self.base
        return {
            "n": len(self.found),
            "text_tokens": sum(len(pair.answer) for pair in self._windows),
            "perplexity": {
                "base": None if base.nll is None else math.exp(base.nll),
                "ratio": mean([row["perplexity_ratio"] for row in self.found if "perplexity_ratio" in row]),
            },
            "abilities": {
                name: {
                    "n": len(right),
                    "base": fmean(right),
                    "edited": mean([row["abilities"][name] for row in self.found]),
                }
                for name, right in base.abilities.items()
            },
            "relative_norm": mean([row["relative_norm"] for row in self.found]),
            "drift": mean([row["drift"] for row in self.found]),
            "seconds": self.seconds,
        }

    def _text_windows(self) -> list[Pair]:
        if self.text is None:
            return []
        ids = self.lm.tokenizer(self.text, add_special_tokens=False)["input_ids"][: self.tokens]
        windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        pairs = [Pair(window[:1], window[1:], (0, 1)) for window in windows if len(window) > 1]
        if not pairs:
            raise RequestError("the text has less than two tokens.", "side effects", "Give a longer one.")
        return pairs

    def _pairs(self, choice: Choice) -> list[Pair]:
        prompt = self.lm.tokenizer(choice.prompt)["input_ids"]
        answers = [self.lm.tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in choice.choices]
        # A passage that is too long loses its beginning, as is the custom: the question stands at the end.
        if window := getattr(self.lm.model.config.get_text_config(), "max_position_embeddings", None):
            prompt = prompt[-(window - max(map(len, answers))) :]
        return [Pair(prompt, answer, (0, len(prompt))) for answer in answers]


@torch.no_grad()
def update_size(lm: LanguageModel, edits: Sequence[Edit]) -> dict[str, float]:
    """How much edits that are in force together change the weights, mean over the modules they touch.

    Returns:
        ``relative_norm``, ‖ΔW‖/‖W‖ (Frobenius; neurons count by the columns they add to the output projection), and
        ``drift``, 1 − the mean cosine² between the spaces of the eight leading left singular vectors before and after
        (ratio 0–1; 0: they span the same space).
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
        cosines_KK = _leading(before_OI).T @ _leading(after_OI)
        drifts.append(1.0 - float(cosines_KK.square().sum()) / len(cosines_KK))
    return {"relative_norm": fmean(ratios) if ratios else 0.0, "drift": max(0.0, fmean(drifts)) if drifts else 0.0}


def _leading(weight_OI: Tensor) -> Tensor:
    """The leading left singular vectors (O × K)."""
    return torch.linalg.eigh(weight_OI @ weight_OI.T).eigenvectors[:, -LEADING:]
