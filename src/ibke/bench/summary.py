"""The cells of a plan summed up: one row a method, data set and protocol, as data, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ibke.bench.alike import machine_name, unlike
from ibke.bench.compare import METRICS, Interval, by_edit, mean, paired
from ibke.bench.effects import EFFECTS, effects, effects_table, families, families_table, mean_known
from ibke.bench.plan import Cell, Plan
from ibke.evaluation.tally import ASPECTS

BLOCKS = ("generation", "teacher_forced")
COUNTS = ("not_made", "unreachable", "groups")
COSTS = {
    "seconds_per_edit": "s/edit",
    "bytes_per_edit": "bytes/edit",
    "shared_bytes": "bytes shared",
    "memory_per_edit_mb": "MB at once",  # of all edits of a group, where others are per edit
    "rate_nats": "nats/edit",
    "training_seconds": "s to train",
}
AT_ANSWER_LENGTH = "locality at answer length"  # the whole answer may run on, and one word at its end then counts

Document = Mapping[str, Any]


def summarise(plan: Plan, documents: Sequence[Document], against: str | None = None) -> dict[str, Any]:
    """Sum up a bench.

    Args:
        plan: what was measured.
        documents: of its cells, in the plan's order; an empty one where a cell has not been run.
        against: label of the method with which the others are compared; the plan's first if left out.

    Returns:
        A JSON-ready summary. ``rows`` has, for each data set, protocol and method, ``generation`` and
        ``teacher_forced`` with ``score`` (mean of the three), ``reliability``, ``generality``, ``locality`` and
        ``portability``, each mean, 95 % interval and number of edits; ``not_made``, how many edits could not be made
        and count as nothing done, with the first reason in ``not_made_why``; ``unreachable``, how many targets no
        answer can be; ``groups``, in how many groups of at most ``group`` they were made, and ``fewest_groups`` that
        would hold them; ``minus``, the generated ones less those of ``against`` on the same edits; the costs, locality
        ``at_answer_length`` and ``where_base_answers``, the ``effects`` and the answers by ``families``, means over
        seeds; ``by_age``, of the first seed; and ``files``, where all of it comes from.
        ``unlike`` says of each data set and protocol in what the cells compared differ: edits, editor, file, model,
        machine.
        ``base`` has reliability and generality of the unedited model, and at what share of locality prompts it
        answers anything; ``left_out`` what could not be used of each data set, by
        :func:`~ibke.data.readers.account`; ``failed`` the cells without a result.
    """
    against = against or plan.contenders[0].label
    named = list(zip(plan.cells, documents, strict=True))
    places = [(data.name, str(stage.protocol)) for data in plan.data for stage in plan.stages]
    rows, base, different = [], [], []
    for place in places:
        ran = [(c, doc) for c, doc in named if doc and (c.data.name, str(c.stage.protocol)) == place]
        here: dict[str, list[Document]] = {cell.contender.label: [] for cell, _ in ran}
        files: dict[str, list[str]] = {label: [] for label in here}
        for cell, document in ran:
            if "failed" not in document:
                here[cell.contender.label].append(document)
                files[cell.contender.label].append(cell.file)
        for label, reports in here.items():
            head = {"data": place[0], "protocol": place[1], "method": label}
            rows.append(head | _row(reports) | {"minus": _minus(reports, here.get(against, [])), "files": files[label]})
        everywhere = {cell.contender.label: _of_the_same(cell, named) for cell, _ in ran}
        if said := unlike(here, against, everywhere):
            different.append({"data": place[0], "protocol": place[1], "what": said})
        if some := next(filter(None, here.values()), None):
            base.append({"data": place[0], "protocol": place[1]} | _base(some))
    return {
        "against": against,
        "seeds": list(plan.seeds),
        "cells": sum(bool(document) for document in documents),
        "conditions": asdict(plan.conditions),
        "machines": _distinct(document["machine"] for _, document in named if "machine" in document),
        "rows": rows,
        "base": base,
        "unlike": different,
        "left_out": _left_out(named),
        "failed": [
            {"cell": cell.title, "file": cell.file, "why": document["failed"]}
            for cell, document in named
            if "failed" in document
        ],
    }


def _of_the_same(cell: Cell, named: Sequence[tuple[Cell, Document]]) -> list[Document]:
    """The reports of a cell's method under the same settings, whatever the data set and protocol."""
    return [doc for other, doc in named if other.contender == cell.contender and doc and "failed" not in doc]


def _distinct(machines: Iterable[Document]) -> list[Document]:
    found: list[Document] = []
    for machine in machines:
        if machine not in found:
            found.append(machine)
    return found


def _left_out(named: Sequence[tuple[Cell, Document]]) -> list[dict[str, Any]]:
    """What could not be used of each data set; its cells have all read the same file."""
    configs = {cell.data.name: document["config"] for cell, document in named if "config" in document}
    keys = ("skipped", "skipped_reasons", "skipped_records")
    return [
        {"data": data, **{key: config[key] for key in keys if key in config}}
        for data, config in configs.items()
        if config.get("skipped")
    ]


def _row(reports: Sequence[Document]) -> dict[str, Any]:
    """What one method reached and took."""
    row: dict[str, Any] = {"seeds": [report["config"]["seed"] for report in reports]}
    row["n"] = sum(report["n"] for report in reports)
    # Cells of before these were counted: they ended where an edit could not be made.
    row["not_made"] = sum(report.get("not_made", 0) for report in reports)
    row["not_made_why"] = next((report["not_made_why"] for report in reports if report.get("not_made")), None)
    row["unreachable"] = sum(report.get("unreachable", 0) for report in reports)
    fewest = [math.ceil(report["n"] / report["group"]) for report in reports]
    row |= {"group": max((report["group"] for report in reports), default=None), "fewest_groups": sum(fewest)}
    row["groups"] = sum(report.get("groups", least) for report, least in zip(reports, fewest, strict=True))
    for block in BLOCKS:
        row[block] = {name: asdict(mean(by_edit(reports, block, name))) for name in METRICS}
    row |= {name: mean_known(report.get(name) for report in reports) for name in COSTS}
    details = [report["locality_detail"]["edited"] for report in reports]
    for name in ("at_answer_length", "where_base_answers"):
        row[name] = mean_known(detail.get(name, {}).get("mean") for detail in details)
    row["marks"] = list(dict.fromkeys(report["config"].get("editor_mark") for report in reports))
    row |= {"effects": effects(reports), "families": families(reports)}
    return row | {"by_age": reports[0]["by_age"] if reports else []}


def _minus(reports: Sequence[Document], other: Sequence[Document]) -> dict[str, Any]:
    """How much more of the generated metrics a method has than the one it is compared with."""
    return {
        name: asdict(paired(by_edit(reports, "generation", name), by_edit(other, "generation", name)))
        for name in METRICS
    }


def _base(reports: Sequence[Document]) -> dict[str, float | None]:
    found = {
        name: mean_known(report["base"]["generation"][name]["mean"] for report in reports)
        for name in ("reliability", "generality")
    }
    detail = [report["locality_detail"]["edited"].get("base_answers", {}) for report in reports]
    return found | {"answers": mean_known(some.get("mean") for some in detail)}


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as a page of tables."""
    lines = ["# Bench", "", *(f"{line}  " for line in conditions(summary)), ""]
    for data, protocol, rows in by_place(summary):
        lines += [f"## {data}, {protocol}", ""]
        lines += _table(
            ["method", "n", *columns(rows, summary["against"])],
            [[row["method"], str(row["n"]), *cells(row, measured(rows))] for row in rows],
        )
        lines += [f"\n{line}" for line in remarks(summary, data, protocol, rows)]
        lines += ["", "Teacher-forced, to compare with published numbers:", ""]
        forced = [[row["method"], *(share(row["teacher_forced"][name]) for name in ASPECTS)] for row in rows]
        lines += [*_table(["method", *ASPECTS], forced), "", unedited(summary, data, protocol), ""]
        for title, (head, body) in (("Side effects", effects_table(rows)), ("By family", families_table(rows))):
            lines += [f"{title}:", "", *_table(head, body), ""] if len(head) > 1 else []
    if summary["failed"]:
        lines += ["## Failed", "", *(f"* {one['cell']}: {one['why']}" for one in summary["failed"]), ""]
    return "\n".join(lines)


def csv_text(summary: Mapping[str, Any]) -> str:
    """The summary as CSV, a metric a line; only metrics have an interval, and only generated ones a difference."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    head = ["data", "protocol", "method", "block", "metric", "n", "mean", "low", "high"]
    table.writerow([*head, "minus", "minus_n", "minus_mean", "minus_low", "minus_high", "files"])
    for row in summary["rows"]:
        nothing = [""] * 7  # neither interval nor difference
        start, files = [row["data"], row["protocol"], row["method"]], " ".join(row["files"])
        for block in BLOCKS:
            for name in METRICS:
                minus = row["minus"][name] if block == "generation" else asdict(Interval(0))
                found = [[metric[key] for key in ("mean", "low", "high")] for metric in (row[block][name], minus)]
                n = [row[block][name]["n"], minus["n"]]
                table.writerow([*start, block, name, n[0], *found[0], summary["against"], n[1], *found[1], files])
        detail = ["locality_detail", "at_answer_length", row["n"], row["at_answer_length"]]
        table.writerow([*start, *detail, *nothing, files])
        for name in COUNTS:
            table.writerow([*start, "count", name, row["n"], row[name], *nothing, files])
        for name in COSTS:
            table.writerow([*start, "cost", name, row["n"], row[name], *nothing, files])
        for name in EFFECTS:
            table.writerow([*start, "effect", name, row["n"], row["effects"][name], *nothing, files])
        for name, found in row["families"].items():
            table.writerow([*start, "family", name, row["n"], found["edited"], *nothing, files])
    return out.getvalue()


def conditions(summary: Mapping[str, Any]) -> list[str]:
    """Under which conditions the numbers hold, and how to read them; a sentence a line."""
    given, seeds = summary["conditions"], ", ".join(map(str, summary["seeds"]))
    machines = list(dict.fromkeys(machine_name(machine) for machine in summary["machines"]))
    mixed = " Seconds of different machines cannot be compared." if len(machines) > 1 else ""
    return [
        f"{given['model']} in {given['dtype']}, asked {', '.join(given['frames'])}; seeds {seeds}.",
        f"{'; '.join(machines) or 'Nothing was measured'}.{mixed}",
        "Metrics are of greedy answers unless they say teacher-forced; locality is agreement with the unedited model; "
        "score is the mean of reliability, generality and locality.",
        "Brackets hold 95 % intervals over edits: Wilson's, and for differences on the same edits the bootstrap's.",
        *left_out(summary),
    ]


def left_out(summary: Mapping[str, Any]) -> list[str]:
    """What of the data could not be used: why, and where the first of it stands; a sentence a data set."""
    lines = []
    for one in summary["left_out"]:
        reasons = [f"{count} × {why.rstrip('.')}" for why, count in one["skipped_reasons"].items()]
        first = [f"the first in {record['where']}" for record in one.get("skipped_records", ())[:1]]
        lines.append(f"Of {one['data']}, records or parts of them were left out: {'; '.join([*reasons, *first])}.")
    return lines


def remarks(summary: Mapping[str, Any], data: str, protocol: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to know of a data set's and protocol's rows; a sentence each."""
    differing = [
        line for one in summary["unlike"] if (one["data"], one["protocol"]) == (data, protocol) for line in one["what"]
    ]
    return [*differing, *_not_made(rows), *dict.fromkeys(line for row in rows for line in _of_requests(row))]


def _not_made(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of which methods edits could not be made; a sentence a method."""
    return [
        f"{row['method']} could not make {row['not_made']} of its {row['n']} edits, which count as nothing done; "
        f"the first: {row['not_made_why']}"
        for row in rows
        if row["not_made"]
    ]


def _of_requests(row: Mapping[str, Any]) -> list[str]:
    """What lies in the requests and not in the method that was given them; a sentence each."""
    said = []
    if row["groups"] > row["fewest_groups"]:
        said.append(
            f"{row['n']} edits were made in {row['groups']} groups of at most {row['group']}: requests that contradict "
            "each other are never in one."
        )
    if row["unreachable"]:
        said.append(
            f"{row['unreachable']} of {row['n']} targets are longer than an answer may be, or of several lines: no "
            "answer can be one."
        )
    return said


def by_place(summary: Mapping[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """The rows of each data set and protocol."""
    places = dict.fromkeys((row["data"], row["protocol"]) for row in summary["rows"])
    return [(*place, [row for row in summary["rows"] if (row["data"], row["protocol"]) == place]) for place in places]


def unedited(summary: Mapping[str, Any], data: str, protocol: str) -> str:
    """What the unedited model reaches, in a sentence."""
    found = (one for one in summary["base"] if (one["data"], one["protocol"]) == (data, protocol))
    for one in found:
        said = (f"{name} {number(one[name])}" for name in ("reliability", "generality"))
        silent = f" It says anything at {number(one['answers'])} of the locality prompts."
        return f"The unedited model: {', '.join(said)}, and locality 1 by definition.{silent}"
    return "Nothing was measured."


def share(metric: Mapping[str, Any], sign: bool = False) -> str:
    """A mean with its interval."""
    if metric["mean"] is None:
        return "–"
    form = "+.3f" if sign else ".3f"
    return f"{metric['mean']:{form}} ({metric['low']:{form[:-2]}2f} to {metric['high']:{form[:-2]}2f})"


def difference(metric: Mapping[str, Any]) -> str:
    """A paired difference with its interval, and over how many edits it is."""
    return f"{share(metric, sign=True)}, n {metric['n']}" if metric["n"] else "–"


def number(value: float | None) -> str:
    """Three significant digits, or all before the point."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that any of some rows has."""
    return [name for name in METRICS if any(row["generation"][name]["mean"] is not None for row in rows)]


def columns(rows: Sequence[Mapping[str, Any]], against: str) -> list[str]:
    """The titles of :func:`cells`."""
    return [*measured(rows), AT_ANSWER_LENGTH, f"score − {against}", *COSTS.values()]


def cells(row: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """A row's generated metrics, difference and costs as they are written."""
    generated = [share(row["generation"][name]) for name in metrics]
    generated.append("–" if row["at_answer_length"] is None else f"{row['at_answer_length']:.3f}")
    return [*generated, difference(row["minus"]["score"]), *(number(row[name]) for name in COSTS)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', '∣') for cell in line)} |" for line in lines]
