"""Scores gathered over edits and frames, and the blocks of a report made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal

from ibke.evaluation.metrics import average, proportion
from ibke.evaluation.questions import Scores
from ibke.frames import Frame

State = Literal["base", "edited"]

NATS = ("kl_nats", "nll_nats")
CORE = ("reliability", "generality", "locality", "locality_accuracy")
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

    def metric(self, state: State, block: str, name: str, frame: Frame | None = None) -> dict[str, float | None]:
        """Mean over edits of the mean over an edit's questions, in one frame or in all."""
        by_edit = self.scores.get((state, block, name), {}).values()
        values = [[value for asked, value in edit if frame in (None, asked)] for edit in by_edit]
        return asdict((average if block in NATS else proportion)([fmean(edit) for edit in values if edit]))

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
