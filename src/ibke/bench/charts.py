"""Plots as inline SVG: dots with intervals, and lines. Colours come from the page, so they follow its light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, LABEL, RIGHT, ROW, TOP, FOOT = 460, 118, 56, 26, 10, 26
LINE_HEIGHT = 230
COLOURS = 8  # of the page's palette


@dataclass(frozen=True)
class Dot:
    """A mean on a line of its own; an interval where there is one.

    Args:
        label: what it is of.
        mean: None draws no dot.
        low: end of the interval.
        high: end of the interval.
        text: the mean as it is written.
        bold: whether it stands out.
    """

    label: str
    mean: float | None
    low: float | None = None
    high: float | None = None
    text: str = ""
    bold: bool = False


def bars(title: str, dots: Sequence[Dot], mark: float | None = None) -> str:
    """Shares from 0 to 1 as bars with their intervals.

    Args:
        title: for those who cannot see it.
        dots: from top to bottom.
        mark: where to draw a line across all, as for the unedited model.
    """
    axis = _Axis(0.0, 1.0)
    body = [axis.grid([0, 0.25, 0.5, 0.75, 1], len(dots))]
    for row, dot in enumerate(dots):
        if dot.mean is not None:
            width = axis(dot.mean) - axis(0)
            body.append(
                f'<rect class="bar{_bold(dot)}" x="{axis(0):.1f}" y="{_y(row) - 7}" width="{width:.1f}" height="14"/>'
            )
        body.append(_interval(axis, row, dot, with_dot=False))
    if mark is not None:
        body.append(
            f'<line class="mark" x1="{axis(mark):.1f}" x2="{axis(mark):.1f}" y1="{TOP}" y2="{_y(len(dots)) - 13}"/>'
        )
    return _svg(title, body, len(dots))


def differences(title: str, dots: Sequence[Dot]) -> str:
    """Differences as dots with their intervals, around a line at zero."""
    ends = [abs(end) for dot in dots for end in (dot.mean, dot.low, dot.high) if end is not None]
    reach = next((step for step in (0.1, 0.25, 0.5) if max(ends, default=0.0) <= step), 1.0)
    axis = _Axis(-reach, reach)
    body = [axis.grid([-reach, -reach / 2, 0, reach / 2, reach], len(dots), sign=True)]
    body.append(f'<line class="zero" x1="{axis(0):.1f}" x2="{axis(0):.1f}" y1="{TOP}" y2="{_y(len(dots)) - 13}"/>')
    body += [_interval(axis, row, dot) for row, dot in enumerate(dots)]
    return _svg(title, body, len(dots))


def costs(title: str, dots: Sequence[Dot]) -> str:
    """Quantities as dots on a logarithmic axis; what has no place on it, as 0, is still written."""
    dots = [dot if dot.mean and 0 < dot.mean < math.inf else replace(dot, mean=None) for dot in dots]
    known = [dot.mean for dot in dots if dot.mean is not None] or [1.0]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    axis = _Axis(10.0**low, 10.0 ** max(high, low + 1), log=True)
    step = math.ceil((max(high, low + 1) - low) / 5)
    body = [axis.grid([10.0**power for power in range(low, max(high, low + 1) + 1, step)], len(dots))]
    body += [_interval(axis, row, dot) for row, dot in enumerate(dots)]
    return _svg(title, body, len(dots))


def lines(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Shares from 0 to 1 over a number, a curve a label, with the labels below."""
    right = max((x for points in curves.values() for x, _ in points), default=1.0) or 1.0
    bottom, height = LINE_HEIGHT - 30, LINE_HEIGHT - 44

    def place(x: float, y: float) -> tuple[float, float]:
        return 40 + x / right * (WIDTH - 60), bottom - y * height

    body = []
    for share in (0, 0.5, 1):
        x, y = place(0, share)
        body.append(f'<line class="grid" x1="{x}" x2="{WIDTH - 20}" y1="{y}" y2="{y}"/>')
        body.append(f'<text class="tick" x="34" y="{y + 4}" text-anchor="end">{share:g}</text>')
    for x in (0.0, right / 2, right):
        body.append(
            f'<text class="tick" x="{place(x, 0)[0]:.1f}" y="{bottom + 18}" text-anchor="middle">{x:.0f}</text>'
        )
    for index, (label, points) in enumerate(curves.items()):
        spots = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        body.append(f'<g class="curve c{index % COLOURS}"><title>{escape(label)}</title><polyline points="{path}"/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in spots] + ["</g>"]
    keys = "".join(f'<span class="key c{i % COLOURS}">{escape(label)}</span>' for i, label in enumerate(curves))
    return _frame(title, body, LINE_HEIGHT) + f'<p class="keys">{keys}</p>'


class _Axis:
    """Places values from left to right."""

    def __init__(self, low: float, high: float, log: bool = False):
        self.scale = math.log10 if log else float
        self.low, self.high = self.scale(low), self.scale(high)

    def __call__(self, value: float) -> float:
        share = (self.scale(value) - self.low) / (self.high - self.low)
        return LABEL + min(max(share, 0.0), 1.0) * (WIDTH - LABEL - RIGHT)

    def grid(self, ticks: Sequence[float], rows: int, sign: bool = False) -> str:
        """Lines at some values, named below."""
        foot, parts = _y(rows) - 13, []
        for value in ticks:
            x, name = self(value), f"{value:+g}" if sign and value else _short(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{foot}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{foot + 16}" text-anchor="middle">{name}</text>')
        return "".join(parts)


def _interval(axis: _Axis, row: int, dot: Dot, with_dot: bool = True) -> str:
    y, said = _y(row), escape(f"{dot.label}: {dot.text or 'nothing measured'}")
    parts = [f'<g class="row{_bold(dot)}"><title>{said}</title>']
    parts.append(f'<text class="name" x="{LABEL - 8}" y="{y + 4}" text-anchor="end">{escape(_cut(dot.label))}</text>')
    if dot.mean is not None:
        if dot.low is not None and dot.high is not None:
            parts.append(
                f'<line class="interval" x1="{axis(dot.low):.1f}" x2="{axis(dot.high):.1f}" y1="{y}" y2="{y}"/>'
            )
        if with_dot:
            parts.append(f'<circle class="dot" cx="{axis(dot.mean):.1f}" cy="{y}" r="4"/>')
    parts.append(
        f'<text class="value" x="{WIDTH - RIGHT + 8}" y="{y + 4}">{escape(dot.text.split(" (")[0] or "–")}</text>'
    )
    return "".join(parts) + "</g>"


def _svg(title: str, body: Sequence[str], rows: int) -> str:
    return _frame(title, body, _y(rows) - 13 + FOOT)


def _frame(title: str, body: Sequence[str], height: int) -> str:
    name = escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{"".join(body)}</svg>'


def _y(row: int) -> int:
    return TOP + ROW * row + ROW // 2


def _bold(dot: Dot) -> str:
    return " bold" if dot.bold else ""


def _short(value: float) -> str:
    """A number in few characters: 250, 0.5, 10k, 1M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _cut(label: str) -> str:
    return label if len(label) <= 16 else label[:15] + "…"
