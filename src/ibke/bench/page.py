"""The summary as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ibke.bench import charts
from ibke.bench.charts import Dot
from ibke.bench.compare import SCORE
from ibke.bench.effects import EFFECTS, POINTS, RELATIVE, effect, effects_table, families_table
from ibke.bench.summary import (
    by_place,
    cells,
    columns,
    conditions,
    difference,
    measured,
    number,
    remarks,
    share,
    unedited,
)
from ibke.evaluation.tally import ASPECTS

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #667085; --line: #d9dee7; --page: #fbfcfe; --card: #fff;
  --accent: #2f6df6; --other: #9db2d6; --c0: #2f6df6; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #0b7285;
  --c5: #c2255c; --c6: #8a6d00; --c7: #5f3dc4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf2; --dim: #98a2b3; --line: #313a49; --page: #10141b;
  --card: #171d27; --accent: #7aa5ff; --other: #48597a; --c0: #7aa5ff; --c1: #ff9f6b; --c2: #69db7c; --c3: #da9bf0;
  --c4: #66d9e8; --c5: #faa2c1; --c6: #ffe066; --c7: #b197fc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 2rem 1.2rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .4rem; } h2 { margin: 2.6rem 0 .6rem; font-size: 1.25rem; }
h3 { margin: 0 0 .3rem; font-size: .95rem; } p { margin: .2rem 0; } .dim, td.dim { color: var(--dim); }
.grid-of-charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1rem;
  margin: 1rem 0; }
figure { margin: 0; padding: .9rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font-size: 12px; }
svg .tick { fill: var(--dim); font-size: 10.5px; } svg .grid { stroke: var(--line); } svg .zero { stroke: var(--dim); }
svg .mark { stroke: var(--ink); stroke-dasharray: 3 3; } svg .bar { fill: var(--other); }
svg .bar.bold, svg .bold .dot { fill: var(--accent); } svg .dot { fill: var(--dim); }
svg .interval { stroke: var(--ink); stroke-width: 1.6; } svg .bold text { font-weight: 650; }
svg .curve polyline { fill: none; stroke-width: 2; stroke: currentColor; } svg .curve circle { fill: currentColor; }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1rem; } .key::before { content: "● "; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } details { margin: .6rem 0; } summary { cursor: pointer; }
code { font-size: .85em; overflow-wrap: anywhere; } .failed { color: var(--c1); }
""" + "\n".join(f".c{i} {{ color: var(--c{i}); }}" for i in range(charts.COLOURS))


def page(summary: Mapping[str, Any]) -> str:
    """The whole page."""
    body = ["<h1>Knowledge editing bench</h1>", *(f'<p class="dim">{escape(line)}</p>' for line in conditions(summary))]
    if summary["failed"]:
        items = "".join(f"<li>{escape(one['cell'])}: {escape(one['why'])}</li>" for one in summary["failed"])
        body.append(f'<h2>Failed</h2><ul class="failed">{items}</ul>')
    for data, protocol, rows in by_place(summary):
        body += _place(summary, data, protocol, rows)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}<title>Knowledge editing bench</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{chr(10).join(body)}\n</body>\n</html>\n"
    )


def _place(summary: Mapping[str, Any], data: str, protocol: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All there is of one data set and protocol."""
    against, metrics = summary["against"], measured(rows)
    base: Mapping[str, Any] = next(
        (one for one in summary["base"] if (one["data"], one["protocol"]) == (data, protocol)), {}
    )
    shown = [
        _figure(
            "Score: mean of the three" if name == SCORE else f"Generated {name}",
            charts.bars(name, [_dot(row, row["generation"][name], against) for row in rows], base.get(name)),
        )
        for name in metrics
    ]
    others = [row for row in rows if row["method"] != against]
    if others:
        shown += [
            _figure(
                f"{name.capitalize()} less that of {against}, same edits",
                charts.differences(name, [_dot(row, row["minus"][name], against, sign=True) for row in others]),
            )
            for name in metrics
        ]
    shown += [
        _figure(title, charts.costs(title, [_cost(row, name, against) for row in rows]))
        for name, title in {"seconds_per_edit": "Seconds per edit", "bytes_per_edit": "Bytes per edit"}.items()
    ]
    shown += [_figure(EFFECTS[name][0], chart) for name, chart in _effects(rows, against).items()]
    if protocol.startswith("sequential"):
        shown += [
            _figure(f"{name.capitalize()} by number of edits made later", _by_age(rows, name)) for name in ASPECTS
        ]
    return [
        f"<h2>{escape(data)}, {escape(protocol)}</h2>",
        f'<p class="dim">{escape(unedited(summary, data, protocol))} A dashed line marks it.</p>',
        *(f"<p>{escape(line)}</p>" for line in remarks(summary, data, protocol, rows)),
        f'<div class="grid-of-charts">{"".join(shown)}</div>',
        *_tables(against, rows),
    ]


def _figure(title: str, chart: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{chart}</figure>"


def _dot(row: Mapping[str, Any], metric: Mapping[str, Any], against: str, sign: bool = False) -> Dot:
    text = "" if metric["mean"] is None else difference(metric) if sign else share(metric)
    return Dot(row["method"], metric["mean"], metric["low"], metric["high"], text, row["method"] == against)


def _cost(row: Mapping[str, Any], name: str, against: str) -> Dot:
    text = "" if row[name] is None else number(row[name])
    return Dot(row["method"], row[name], text=text, bold=row["method"] == against)


def _by_age(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    curves = {
        row["method"]: [
            ((part["age_from"] + part["age_to"]) / 2, part[name]["mean"])
            for part in row["by_age"]
            if part[name]["mean"] is not None
        ]
        for row in rows
    }
    return charts.lines(f"{name} by age", curves)


def _effects(rows: Sequence[Mapping[str, Any]], against: str) -> dict[str, str]:
    """Plots of how far weights, perplexity and abilities moved, where that was measured."""
    plots = {"relative_norm": charts.costs} | dict.fromkeys((*RELATIVE, *POINTS), charts.differences)
    found = {}
    for name, plot in plots.items():
        values = [(row["method"], row["effects"][name]) for row in rows]
        if any(value is not None for _, value in values):
            dots = [Dot(m, v, text="" if v is None else effect(name, v), bold=m == against) for m, v in values]
            found[name] = plot(EFFECTS[name][0], dots)
    return found


def _tables(against: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The numbers, and the files they come from."""
    metrics = measured(rows)
    head = ["method", "n", *columns(rows, against), *(f"forced {name}" for name in ASPECTS)]
    lines = [
        [
            *(row["method"], str(row["n"]), *cells(row, metrics)),
            *(share(row["teacher_forced"][name]) for name in ASPECTS),
        ]
        for row in rows
    ]
    tables = {"Numbers": (head, lines), "Side effects": effects_table(rows), "By family": families_table(rows)}
    files = "<br>".join(f"<code>{escape(file)}</code>" for row in rows for file in row["files"])
    return [
        *(_details(title, *table) for title, table in tables.items() if len(table[0]) > 1),
        f"<details><summary>Files</summary>{files}</details>",
    ]


def _details(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    table = (
        f"<table><thead>{row(head, 'th')}</thead><tbody>{''.join(row(line, 'td') for line in lines)}</tbody></table>"
    )
    return f'<details open><summary>{escape(title)}</summary><div class="scroll">{table}</div></details>'
