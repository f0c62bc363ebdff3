"""Write the tables of docs/results.md from the JSON files under benchmarks/results.

    python benchmarks/report.py

Everything between a pair of markers is replaced; the words around them are ours and stay.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from costs import COSTS
from rivals import CANDIDATES, PUBLISHED, TRAINED, TUNED, trained
from single_edits import VARIANTS

from ibke.editors.ibke.shipped import SHIPPED
from ibke.files import write_atomically

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/results.md")
TRAINING = SHIPPED / "smollm2-135m/training-log.jsonl"
TITLES = {"counterfact": "CounterFact", "zsre": "zsRE", "knowedit": "KnowEdit"}
PROTOCOLS = ("single", "batch:100", "sequential:1")
ANCHORED = ("counterfact", "single")
ANCHORS = {
    "ft-l": ("42 to 50", 0.87, 0.19, 0.59),
    "grace": ("42 to 50", 1.00, 0.06, 1.00),
    "ike": ("42 to 50", 0.98, 0.33, 0.38),
    "rome": ("9", 1.00, 0.22, 0.85),
    "lora": ("5", 1.00, 1.00, 0.00),
}
"""By method, what EasyEdit's own code reaches on this model and CounterFact: edits, teacher-forced reliability,
generality and locality."""


def cell(metric: dict) -> str:
    """A mean with its 95 % interval."""
    if metric["mean"] is None:
        return "–"
    return f"{metric['mean']:.3f} ({metric['low']:.2f}–{metric['high']:.2f})"


def where(reports: Iterable[dict], *more: str) -> list[str]:
    """On what machines, of what type of numbers and with what seeds some reports were made; a line below a table."""
    found: dict[str, None] = {}
    for one in reports:
        machine, how = one["machine"], one.get("config", one)
        seed = how.get("seed", how.get("order"))
        said = f"{machine['cpu']}, {machine['threads']} thread(s), {how.get('dtype', 'bfloat16')}, seed {seed}"
        found[f"{said}, torch {machine['torch']}, transformers {machine['transformers']}"] = None
    return ["", "; ".join([*found, *more]) + "."]


def single() -> str:
    """Single edits: one row a cell and frame."""
    lines = [
        "| cell | asked | editor | n | generated: reliability | generality | locality "
        "| teacher-forced: rel. | gen. | loc. | nats/edit | s/edit | steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names, reports = ("reliability", "generality", "locality"), []
    for path in sorted((RESULTS / "single").glob("*.json")):
        report = json.loads(path.read_text())
        variant = max((one for one in VARIANTS if path.stem.endswith(f"-{one}")), key=len)
        name = path.stem.removesuffix(f"-{variant}")
        for frame, blocks in report["by_frame"].items():
            blocks = blocks.get("metrics", blocks)
            row = [name, frame, variant, str(report["n"])]
            row += [cell(blocks["generation"][key]) for key in names]
            row += [f"{blocks['teacher_forced'][key]['mean']:.3f}" for key in names]
            row += [f"{report['rate_nats']:.0f}", f"{report['seconds_per_edit']:.2f}", f"{report['steps']['mean']:.1f}"]
            lines.append("| " + " | ".join(row) + " |")
        reports.append(report)
    return "\n".join([*lines, *where(reports)])


def text() -> str:
    """Perplexity of running text under single edits."""
    lines = ["| edits of | method | mean ratio | unchanged to 1e-5 | largest |", "|---|---|---|---|---|"]
    reports = []
    for name, title in TITLES.items():
        for path in sorted((RESULTS / "text").glob(f"{name}*.json")):
            reports.append(json.loads(path.read_text()))
            found = reports[-1]["side_effects"]["perplexity"]
            ratio, each = found["ratio"], found["each"]
            mean = f"{ratio['mean']:.4f} ({ratio['low']:.4f}–{ratio['high']:.4f})"
            same = sum(abs(one - 1) < 1e-5 for one in each)
            method = reports[-1]["config"]["method"]
            lines.append(f"| {title} | {method} | {mean} | {same} of {len(each)} | {max(each):.3f} |")
    return "\n".join([*lines, *where(reports)])


def own(name: str) -> str:
    """Edits of a file of our own; with the families of its prompts out of scope, where it has several."""
    reports = [json.loads(path.read_text()) for path in sorted((RESULTS / name).glob("*.json"))]
    families = sorted({family for report in reports for family in report["families"]["edited"]})
    families = families if len(families) > 1 else []
    titles = [family.partition("/")[2] for family in families]
    lines = [f"| {' | '.join(['method', 'n', 'reliability', 'generality', 'locality', *titles])} |"]
    lines.append("|---" * (5 + len(families)) + "|")
    for report in reports:
        found = [report["metrics"]["generation"][metric] for metric in ("reliability", "generality", "locality")]
        found += [report["families"]["edited"][family] for family in families]
        lines.append(f"| {' | '.join([report['config']['method'], str(report['n']), *map(cell, found)])} |")
    return "\n".join([*lines, *where(reports)])


def speed() -> str:
    """Seconds and ratios to one forward and backward pass."""
    path = RESULTS / "speed.json"
    if not path.exists():
        return "Not measured yet."
    report = json.loads(path.read_text())
    lines = [
        f"n = {report['n']}, one pass {report['unit_seconds'] * 1000:.0f} ms, {report['machine']['cpu']}, "
        f"{report['machine']['threads']} thread(s). Command: `{report['command']}`.",
        "",
        "| what | seconds (median) | ratio (median) | ratio (95th percentile) |",
        "|---|---|---|---|",
    ]
    for key, title in (
        ("capture_to_edit", "capture to factors"),
        ("bare", "`edit` without refining"),
        ("refined", "`edit` with refining"),
        ("gated bare", "`ibke-gated` without refining"),
        ("gated", "`ibke-gated` with refining"),
    ):
        found = report[key]
        lines.append(
            f"| {title} | {found['seconds_median']:.2f} | {found['ratio_median']:.2f} | {found['ratio_p95']:.2f} |"
        )
    if many := report.get("together"):
        bare, refined, gated = many["bare"], many["refined"], many["gated"]
        lines += [
            "",
            f"{many['n']} edits by one call, beside passes of their prompts ({many['unit_seconds']:.3f} s each): "
            f"{bare['seconds']:.2f} s an edit without refining, {bare['rate']:.2f} of the passes' rate; "
            f"{refined['seconds']:.2f} s and {refined['rate']:.2f} with it; "
            f"`ibke-gated` {gated['seconds']:.2f} s and {gated['rate']:.2f}.",
        ]
    return "\n".join(lines)


def bottleneck() -> str:
    """Rate against quality over β, with the controls."""
    path = RESULTS / "bottleneck.json"
    if not path.exists():
        return "Not measured yet."
    report = json.loads(path.read_text())
    lines = [
        "| point | rate (nats/edit) | reliability | generality | locality |",
        "|---|---|---|---|---|",
    ]
    rows = {"shipped": report["shipped"], "shipped, codes swapped between edits": report["swapped"], **report["points"]}
    for name, found in rows.items():
        scores = " | ".join(f"{found[key]:.3f}" for key in ("reliability", "generality", "locality"))
        lines.append(f"| {name} | {found['rate_nats']:.0f} | {scores} |")
    return "\n".join([*lines, *where([report], f"command: `{report['command']}`")])


def checkpoints() -> str:
    """The shipped run's checkpoints on validation episodes."""
    lines = ["| step | rate (nats/edit) | reliability | generality | locality |", "|---|---|---|---|---|"]
    for line in TRAINING.read_text().splitlines():
        row = json.loads(line)
        if row["stage"] == "validation":
            scores = " | ".join(f"{row[key]:.3f}" for key in ("reliability", "generality", "locality"))
            lines.append(f"| {row['step']} | {row['rate_nats']:.0f} | {scores} |")
    return "\n".join(lines)


def rivals(protocol: str) -> str:
    """All methods under one protocol: generated answers, and what an edit costs and does besides."""
    path = RESULTS / "rivals/summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = [row for row in summary["rows"] if row["protocol"] == protocol]
    names = list(dict.fromkeys(row["data"] for row in rows))
    by_method: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["n"]:
            by_method.setdefault(row["method"], {})[row["data"]] = row
    if not by_method:
        return "Not measured yet."
    known = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    heads = [f"{TITLES[name]}: rel. | gen. | loc. | loc. (answer) | mean" for name in names]
    heads += ["KB/edit | perplexity moved by | choices kept"]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (5 * len(names) + 4) + "|"]
    for method, found in sorted(by_method.items(), key=lambda item: (-len(item[1]), -_score(item[1].values()))):
        named = f"{method} (not tuned)" if method in CANDIDATES and method not in known else method
        cells = [named] + [text for name in names for text in _quality(found.get(name))]
        some = list(found.values())
        effects = [row["effects"] for row in some]
        cells += [_mean([row["bytes_per_edit"] and row["bytes_per_edit"] / 1000 for row in some], ",.1f")]
        cells += [
            _mean([abs(each["perplexity_change"]) for each in effects if each["perplexity_change"] is not None], ".2%")
        ]
        cells += [_mean([each["choices_kept"] for each in effects], ".3f")]
        lines.append("| " + " | ".join(cells) + " |")
    for one in summary.get("failed", []):
        if one["file"].split(".")[1] == protocol.replace(":", "-"):
            lines.append(f"\nFailed: {one['cell']}: {one['why']}")
    base = [one for one in summary["base"] if one["protocol"] == protocol and one["answers"]]
    said = ", ".join(f"{one['answers']:.3f} ({TITLES[one['data']]})" for one in base)
    lines += ["", f"Share of locality prompts at which the unedited model says anything: {said}."]
    for one in summary.get("unlike", []):
        lines += [f"\n{TITLES[one['data']]}. {line}" for line in one["what"] if one["protocol"] == protocol]
    for row in rows:
        if row.get("not_made"):
            lines.append(
                f"\n{TITLES[row['data']]}. {row['method']} could not make {row['not_made']} of {row['n']} edits."
            )
    return "\n".join(lines)


def anchors() -> str:
    """Rivals beside what EasyEdit's code reaches on this model."""
    path = RESULTS / "rivals/summary.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    names = ("reliability", "generality", "locality")
    lines = [
        "| method | EasyEdit's code: n | rel. | gen. | loc. | ours: n | rel. | gen. | loc. |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, (edits, *scores) in ANCHORS.items():
        found = [row for row in rows if (row["method"], row["data"], row["protocol"]) == (method, *ANCHORED)]
        ours = [str(found[0]["n"]), *(cell(found[0]["teacher_forced"][name]) for name in names)] if found else ["–"] * 4
        lines.append("| " + " | ".join([method, edits, *(f"{score:.2f}" for score in scores), *ours]) + " |")
    return "\n".join(lines)


def _quality(row: dict | None) -> list[str]:
    """Rates of generated answers, with locality over the known answer's length, and the mean of the three."""
    if row is None:
        return ["–"] * 5
    means = [row["generation"][key]["mean"] for key in ("reliability", "generality", "locality", "score")]
    at_length = _mean([row.get("at_answer_length")], ".3f")
    return [*(f"{mean:.3f}" for mean in means[:3]), at_length, f"**{means[3]:.3f}**"]


def _score(rows: Iterable[dict]) -> float:
    return fmean(row["generation"]["score"]["mean"] for row in rows)


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):{form}}" if known else "–"


def costs() -> str:
    """What a single edit takes, all methods in one run."""
    if not COSTS.exists():
        return "Not measured yet."
    report = json.loads(COSTS.read_text())
    names, machine = list(report["pass"]), report["machine"]
    found = {method: some for method, some in report["methods"].items() if "left_out" not in some}
    passes = ", ".join(f"{TITLES[name]} {report['pass'][name] * 1000:.0f} ms" for name in names)
    lines = [
        f"Medians of {report['edits']} edits each, {machine['cpu']}, {machine['threads']} thread(s). "
        f"One forward and backward pass of a request takes {passes}.",
        "",
        "| method | " + " | ".join(f"{TITLES[name]}: s/edit | times IBKE's | passes" for name in names) + " |",
        "|---" * (3 * len(names) + 1) + "|",
    ]
    for method, some in sorted(found.items(), key=lambda item: item[1][names[0]]["median"]):
        cells = [method]
        for name in names:
            seconds = some[name]["median"]
            ratio = f"{seconds / found['ibke'][name]['median']:.1f}" if "ibke" in found else "–"
            cells += [f"{seconds:.2f}", ratio, f"{seconds / report['pass'][name]:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if left_out := {method: some for method, some in report["methods"].items() if method not in found}:
        why = "; ".join(f"{method}, {some['left_out'].rstrip('.')}" for method, some in left_out.items())
        lines += ["", f"Not timed: {why}."]
    return "\n".join(lines)


def lifelong() -> str:
    """Streams of many edits: what holds after the last of so many."""
    lines = [
        "| stream | method | at once | edits | asked | reliability | generality | locality | perplexity | choices kept "
        "| ‖ΔW‖/‖W‖ | s/edit |",
        "|---" * 12 + "|",
    ]
    reports = [json.loads(path.read_text()) for path in sorted((RESULTS / "lifelong").glob("*.json"))]
    for report in reports:
        how = report["config"]
        named = f"{' '.join([how['method'], *how['set']])}, {how.get('dtype', 'float32')}"
        for row in report["rows"]:
            scores = " | ".join(f"{row[name]:.3f}" for name in ("reliability", "generality", "locality"))
            lines.append(
                f"| {how['kind']}, order {how['order']} | {named} "
                f"| {how['group']} | {row['edits']} | {sum(block['n'] for block in row['by_block'])} | {scores} "
                f"| {round(100 * (row['perplexity_ratio'] - 1), 1) + 0.0:+.1f} % | {fmean(row['kept'].values()):.3f} "
                f"| {row['relative_norm']:.1f} | {row['seconds_per_edit']:.2f} |"
            )
    return "\n".join([*lines, *where(reports)])


def tuned() -> str:
    """Published settings, those tried and the best, or those that a method is trained with."""
    lines = [
        "| method | published | tuned for | on | best of those tried, or trained with | score | of our defaults |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, by_protocol in json.loads(TUNED.read_text()).items() if TUNED.exists() else ():
        for protocol, found in by_protocol.items():
            scores = {str(one["settings"]): one["score"] for one in found["tried"]}
            chosen = ", ".join(f"{name} {value}" for name, value in found["settings"].items()) or "our defaults"
            published = "updates as the network makes them" if method in TRAINED else PUBLISHED[method]
            lines.append(
                f"| {method} | {published} | {protocol} | {found['edits']} | {chosen} (of {len(scores)}) "
                f"| {max(scores.values()):.3f} | {scores.get('{}', float('nan')):.3f} |"
            )
    lines += [f"| {method} | {PUBLISHED[method]} | training | – | {trained(method)} | – | – |" for method in TRAINED]
    return "\n".join(lines)


def main() -> None:
    """Fill the page."""
    page = PAGE.read_text(encoding="utf-8")
    parts = {
        "single": single(),
        "text": text(),
        "alike": own("alike"),
        "everyday": own("everyday"),
        "mentions": own("mentions"),
        "speed": speed(),
        "bottleneck": bottleneck(),
        "checkpoints": checkpoints(),
    }
    parts |= {"costs": costs(), "lifelong": lifelong(), "tuned": tuned(), "anchors": anchors()}
    parts |= {f"rivals {protocol}": rivals(protocol) for protocol in PROTOCOLS}
    for name, table in parts.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        assert mark and end, f"{PAGE} has no place for {name!r}"
        page = f"{before}{mark}{table}\n{end}{after}"
    write_atomically(PAGE, page.encode())


if __name__ == "__main__":
    main()
