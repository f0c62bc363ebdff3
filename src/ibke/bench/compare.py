"""Means over edits with Wilson's intervals, and differences between methods on the same edits with bootstrap ones.

Of two methods, it is the differences edit by edit that are drawn with replacement, a thousand times and more, and the
interval holds the middle 95 % of their means: how hard an edit is falls out. An edit that several seeds drew counts
once, with its mean over them, so that it is not taken for several.

Shape suffixes: N edits, S draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from ibke.evaluation.metrics import proportion
from ibke.evaluation.tally import ASPECTS

DRAWS = 2000
SCORE = "score"
METRICS = (SCORE, *ASPECTS, "portability")


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` edits and its 95 % interval; all None where there are none."""

    n: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None


def mean(values: Mapping[str, float]) -> Interval:
    """Mean of shares by edit, with the interval that a report has too: a mean of 1 does not make it vanish."""
    found = proportion(list(values.values()))
    return Interval(len(values), found.mean, found.low, found.high)


def bootstrap(values: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean and percentile interval over resampled edits."""
    values_N = np.asarray(values, dtype=np.float64)
    if not len(values_N):
        return Interval(0)
    drawn_SN = np.random.default_rng(seed).integers(0, len(values_N), (draws, len(values_N)))
    low, high = np.percentile(values_N[drawn_SN].mean(axis=1), [2.5, 97.5])
    return Interval(len(values_N), float(values_N.mean()), float(low), float(high))


def paired(mine: Mapping[str, float], other: Mapping[str, float], draws: int = DRAWS, seed: int = 0) -> Interval:
    """How much more one method has than another, over the edits that both have."""
    return bootstrap([mine[edit] - other[edit] for edit in sorted(mine.keys() & other.keys())], draws, seed)


def by_edit(reports: Iterable[Mapping[str, Any]], block: str, metric: str) -> dict[str, float]:
    """A metric by edit, mean over the reports (of several seeds) in which the edit is.

    Args:
        reports: of one method, data set and protocol.
        block: ``generation`` or ``teacher_forced``.
        metric: one of a report's, or ``score``: the mean of the three, of edits that have them all.
    """
    found: dict[str, list[float]] = {}
    for report in reports:
        scores = report["scores"]
        nothing = [None] * len(scores["edits"])
        columns = [scores[block].get(name, nothing) for name in (ASPECTS if metric == SCORE else (metric,))]
        for edit, *values in zip(scores["edits"], *columns, strict=True):
            if None not in values:
                found.setdefault(edit, []).append(fmean(values))
    return {edit: fmean(values) for edit, values in found.items()}
