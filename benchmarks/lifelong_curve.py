"""Streams of many edits as a picture: what is still answered, by how many edits came and by when each was made.

    python benchmarks/lifelong_curve.py

Draws docs/lifelong.svg from benchmarks/results/lifelong.
"""

import json
from pathlib import Path
from typing import Any

from lifelong import RESULTS  # the script beside this one
from matplotlib import pyplot
from matplotlib.ticker import ScalarFormatter

PICTURE = Path("docs/lifelong.svg")
COLOURS = {"reliability": "tab:gray", "generality": "tab:blue", "locality": "tab:orange"}
MARKS = "o^sDvP*X"


def main() -> None:
    """Draw the three panels, a mark for each stream."""
    streams = {path.stem: json.loads(path.read_text())["rows"] for path in sorted(RESULTS.glob("*.json"))}
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for mark, (name, rows) in zip(MARKS, streams.items(), strict=False):
        over_edits(axes[0], rows, mark)
        axes[1].plot(
            [row["edits"] for row in rows],
            [100 * (row["perplexity_ratio"] - 1) for row in rows],
            f"{mark}-",
            color="tab:red",
            label=title(name),
        )
        by_age(axes[2], rows[-1], mark)
    axes[0].set(ylim=(0, 1), xlabel="edits made", ylabel="share of prompts answered as they should be")
    axes[1].set(xlabel="edits made", ylabel="perplexity of running text, more (%)")
    axes[1].set_yscale("symlog", linthresh=10)  # others lose a thousand times as much
    axes[1].yaxis.set_major_formatter(ScalarFormatter())
    axes[2].set(ylim=(0, 1), xlabel="made so many edits ago", ylabel="at the end")
    axes[0].legend(frameon=False, loc="center left")
    axes[1].legend(frameon=False, loc="upper left", fontsize=8)
    figure.savefig(PICTURE, metadata={"Date": None})


def title(name: str) -> str:
    """A stream's name for people."""
    stream, method, *how = name.split(".")
    order = how[-1].removeprefix("order-")
    more = [*(["first guesses"] if "steps=0" in how else []), *([f"order {order}"] if order != "0" else [])]
    return ", ".join([stream, method, *more])


def over_edits(axis: Any, rows: list[dict[str, Any]], mark: str) -> None:
    """Scores of all edits so far; named once."""
    for key, colour in COLOURS.items():
        label = key if not any(line.get_label() == key for line in axis.lines) else None
        axis.plot([row["edits"] for row in rows], [row[key] for row in rows], f"{mark}-", color=colour, label=label)


def by_age(axis: Any, row: dict[str, Any], mark: str) -> None:
    """Scores of the last row by the block in which edits came."""
    for key, colour in COLOURS.items():
        known = [block for block in row["by_block"] if key in block]
        ages = [row["edits"] - (block["from"] + block["to"]) / 2 for block in known]
        axis.plot(ages, [block[key] for block in known], f"{mark}-", color=colour)


if __name__ == "__main__":
    main()
