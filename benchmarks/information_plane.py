"""The information plane of the shipped editor: its rate against what it buys, over β and over its training.

    python benchmarks/information_plane.py

Draws docs/information-plane.svg from benchmarks/results/bottleneck.json and from the training log beside the weights.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from ibke.editors.ibke.shipped import SHIPPED

SWEEP = Path("benchmarks/results/bottleneck.json")
LOG = SHIPPED / "smollm2-135m/training-log.jsonl"
PICTURE = Path("docs/information-plane.svg")
COLOURS = {"reliability": "tab:gray", "generality": "tab:blue", "locality": "tab:orange"}


def main() -> None:
    """Draw the three panels."""
    sweep = json.loads(SWEEP.read_text())["points"]
    log = [json.loads(line) for line in LOG.read_text().splitlines()]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    over_beta(axes[0], sweep)
    over_checkpoints(axes[1], [row for row in log if row["stage"] == "validation"])
    over_batches(axes[2], [row for row in log if row["stage"] == "training"])
    for axis in axes:
        axis.set_xlabel("rate (nats per edit)")
    figure.savefig(PICTURE, metadata={"Date": None})


def over_beta(axis: Any, points: dict[str, dict[str, float]]) -> None:
    """Editors trained on under another β, on held-out episodes."""
    swept = {float(name.removeprefix("beta-")): found for name, found in points.items() if name.startswith("beta-")}
    line = [found for beta, found in sorted(swept.items()) if beta]
    for key, colour in COLOURS.items():
        axis.plot([found["rate_nats"] for found in line], [found[key] for found in line], "o-", color=colour, label=key)
        axis.plot(swept[0.0]["rate_nats"], swept[0.0][key], "x", color=colour)
    for beta, found in swept.items():
        label = f"β = {beta:g}" if beta else "noise without KL"
        place = (found["rate_nats"], found["reliability"])
        axis.annotate(label, place, (0, 7), textcoords="offset points", fontsize=7, rotation=60)
    axis.set(xscale="log", ylim=(0, 0.8), title="over β", ylabel="share of prompts answered as they should be")
    axis.legend(frameon=False, loc="lower right")


def over_checkpoints(axis: Any, checkpoints: list[dict[str, float]]) -> None:
    """The shipped run's checkpoints, on the same episodes."""
    for key, colour in COLOURS.items():
        rates, shares = ([row[name] for row in checkpoints] for name in ("rate_nats", key))
        axis.plot(rates, shares, "o-", color=colour, label=key)
    for row in (checkpoints[0], checkpoints[1], checkpoints[-1]):
        place = (row["rate_nats"], row["reliability"])
        axis.annotate(f"step {row['step']}", place, (0, 7), textcoords="offset points", fontsize=7, rotation=60)
    axis.set(ylim=(0, 0.8), title="over checkpoints", ylabel="share of prompts answered as they should be")
    axis.legend(frameon=False, loc="lower left")


def over_batches(axis: Any, rows: list[dict[str, float]]) -> None:
    """Losses of the shipped run's training batches; later steps are darker."""
    rates, steps = [row["rate_nats"] for row in rows], [row["step"] for row in rows]
    losses = (("sg_nats", "SG: other wordings not answered", "o"), ("il_nats", "IL: out of scope", "^"))
    for key, label, mark in losses:
        nats = [row[key] for row in rows]
        dots = axis.scatter(rates, nats, c=steps, cmap="viridis_r", s=12, marker=mark, label=label)
    axis.figure.colorbar(dots, ax=axis, label="step")
    axis.set(yscale="log", title="over training batches", ylabel="loss (nats)")
    axis.legend(frameon=False)


if __name__ == "__main__":
    main()
