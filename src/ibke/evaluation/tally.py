"""Scores gathered over edits and frames, and the blocks of a report made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal

from ibke.evaluation.metrics import average, proportion
from ibke.evaluation.questions import Scores
from ibke.files import digest
from ibke.frames import Frame
from ibke.request import EditRequest

State = Literal["base", "edited"]

NATS = ("kl_nats", "nll_nats")
CORE = ("reliability", "generality", "locality", "locality_accuracy")
ASPECTS = ("reliability", "generality", "locality")
EXTRAS = ("contains", "nll_nats", "sequence_accuracy", "new_over_old", "locality_detail", "families")


class Tally:
    """Scores by state, frame, block, name and edit."""

    def __init__(self) -> None:
        self.scores: dict[tuple[State, str, str], dict[int, list[tuple[Frame, float]]]]
        self.scores = defaultdict(lambda: defaultdict(list))

    def add(self, state: State, frame: Frame, edit: int, scores: Scores) -> None:
        """Take in what one question of an edit scored."""
        for (block, name), value in scores.items():
            self.scores[state, block, name][edit].append((frame, value))

    def per_edit(self, state: State, block: str, name: str, frame: Frame | None = None) -> dict[int, float]:
        """By edit, the mean over its questions in one frame or in all; edits without any are left out."""
        by_edit = self.scores.get((state, block, name), {}).items()
        values = {edit: [value for asked, value in found if frame in (None, asked)] for edit, found in by_edit}
        return {edit: fmean(found) for edit, found in values.items() if found}

    def metric(self, state: State, block: str, name: str, frame: Frame | None = None) -> dict[str, float | None]:
        """Mean over edits of the mean over an edit's questions, in one frame or in all."""
        values = list(self.per_edit(state, block, name, frame).values())
        return asdict((average if block in NATS else proportion)(values))

    def block(self, state: State, block: str, frame: Frame | None = None) -> dict[str, Any]:
        """All metrics of a block that were measured."""
        names = sorted({name for s, b, name in self.scores if (s, b) == (state, block)})
        return {name: self.metric(state, block, name, frame) for name in names}

    def core(self, state: State, frame: Frame | None = None) -> dict[str, Any]:
        """The two blocks that every report has, complete even where nothing was measured."""
        blocks = ("generation", "teacher_forced")
        return {block: {name: self.metric(state, block, name, frame) for name in CORE} for block in blocks}

    def extras(self, states: Sequence[State]) -> dict[str, Any]:
        """Everything else, by block and state."""
        rest: dict[str, Any] = {block: {state: self.block(state, block) for state in states} for block in EXTRAS}
        blocks = ("generation", "teacher_forced", "contains")
        rest["portability"] = {s: {block: self.metric(s, block, "portability") for block in blocks} for s in states}
        return rest

    def by_age(self, ages: Mapping[int, int], most: int) -> list[dict[str, Any]]:
        """Generated metrics of edits of like age, the youngest first.

        Args:
            ages: of each edit that counts, how many were made later.
            most: the most parts to make; edits of one age stay together.
        """
        values = {name: self.per_edit("edited", "generation", name) for name in ASPECTS}
        known = sorted(set(ages.values()))
        bounds = [known[len(known) * part // min(most, len(known))] for part in range(min(most, len(known)))]
        found = []
        for first, end in zip(bounds, [*bounds[1:], known[-1] + 1], strict=True):
            edits = [edit for edit, age in ages.items() if first <= age < end]
            row = {"age_from": first, "age_to": max(ages[edit] for edit in edits), "n": len(edits)}
            metrics = {n: asdict(proportion([v[edit] for edit in edits if edit in v])) for n, v in values.items()}
            found.append(row | metrics)
        return found

    def each(self, requests: Sequence[EditRequest]) -> dict[str, Any]:
        """The metrics edit by edit, None where nothing was asked, and by which name to know an edit again."""
        parts: dict[str, Any] = {"edits": [digest(request.to_dict()) for request in requests]}
        for block in ("generation", "teacher_forced"):
            values = {name: self.per_edit("edited", block, name) for name in (*ASPECTS, "portability")}
            parts[block] = {n: [_short(v.get(edit)) for edit in range(len(requests))] for n, v in values.items()}
        return parts


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
