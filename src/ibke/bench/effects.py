"""What edits did besides what they were made for, in a summary: side effects, and answers by family of the question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

Document = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]


def _looked(report: Document) -> Document:
    return report.get("side_effects") or {}


def _abilities(report: Document, change: Callable[[Document], float | None]) -> float | None:
    return mean_known(change(suite) for suite in _looked(report).get("abilities", {}).values())


def _gain(asked: Document) -> float | None:
    return None if asked["edited"]["mean"] is None else asked["edited"]["mean"] - asked["base"]


def _perplexity(report: Document) -> float | None:
    ratio = _looked(report).get("perplexity", {}).get("ratio", {}).get("mean")
    return None if ratio is None else ratio - 1


def _tasks(report: Document) -> float | None:
    """Of shares only: a perplexity's change is no share of anything."""
    tasks = _looked(report).get("tasks", {})
    return mean_known(_gain(task) for name, task in tasks.items() if name.partition("/")[2].startswith(SHARES))


# By name: its title, and where it is in a report.
EFFECTS: dict[str, tuple[str, Callable[[Document], float | None]]] = {
    "kl_nats": ("KL, nats/token", lambda report: report["kl_nats"].get("base_edited", {}).get("mean")),
    "relative_norm": ("‖ΔW‖/‖W‖", lambda report: _looked(report).get("relative_norm", {}).get("mean")),
    "drift": ("drift", lambda report: _looked(report).get("drift", {}).get("mean")),
    "perplexity_change": ("perplexity, change", _perplexity),
    "abilities_change": ("abilities, change", lambda report: _abilities(report, _gain)),
    "choices_kept": ("choices kept", lambda report: _abilities(report, lambda suite: suite["kept"]["mean"])),
    "tasks_change": ("lm-eval, change", _tasks),
}
RELATIVE = ("perplexity_change",)
POINTS = ("abilities_change", "tasks_change")
SHARES = ("acc", "exact_match", "f1")  # lm-eval's names of metrics between 0 and 1


def effects(reports: Sequence[Document]) -> dict[str, float | None]:
    """Each side effect, mean over the reports that have it."""
    return {name: mean_known(pick(report) for report in reports) for name, (_, pick) in EFFECTS.items()}


def families(reports: Sequence[Document]) -> dict[str, dict[str, float | None]]:
    """By family of locality and portability prompts, what the edited and the unedited model reach."""
    names = dict.fromkeys(name for report in reports for name in report["families"]["edited"])
    return {
        name: {
            state: mean_known(report["families"][state].get(name, {}).get("mean") for report in reports)
            for state in ("edited", "base")
        }
        for name in names
    }


def mean_known(values: Iterable[float | None]) -> float | None:
    """The mean of what is there; None where nothing is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def effects_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Head and lines: a line a method, a column a side effect that any of them has."""
    names = [name for name in EFFECTS if any(row["effects"][name] is not None for row in rows)]
    lines = [[row["method"], *(effect(name, row["effects"][name]) for name in names)] for row in rows]
    return ["method", *(EFFECTS[name][0] for name in names)], lines


def families_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Head and lines: a line a method, and one of the unedited model, a column a family."""
    names = list(dict.fromkeys(name for row in rows for name in row["families"]))
    base = {name: row["families"][name]["base"] for row in rows for name in row["families"]}
    states = [(row["method"], {name: found["edited"] for name, found in row["families"].items()}) for row in rows]
    lines = [[label, *(_number(found.get(name), ".3f") for name in names)] for label, found in states]
    unedited = ["unedited", *(_number(base[name], ".3f") for name in names)]
    return ["method", *(name.replace("_", " ") for name in names)], [*lines, unedited] if names else []


def effect(name: str, value: float | None) -> str:
    """One of them as it is written: changes with their sign, of a quantity in percent and of a share in points."""
    if name in (*RELATIVE, *POINTS):
        return "–" if value is None else f"{100 * value:+.2f} {'%' if name in RELATIVE else 'points'}"
    return _number(value, ".3f" if name in ("drift", "choices_kept") else ".3g")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
