"""``ibke eval``: how well a method edits, on a file of requests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table
from rich.text import Text

from ibke.cli.console import (
    AbilityFiles,
    Bars,
    Device,
    Dtype,
    EditorPath,
    LMEval,
    Looks,
    Method,
    ModelChoice,
    ModelName,
    Modules,
    NoRefine,
    Questions,
    RunningText,
    beside,
    load_for_editing,
)
from ibke.cli.output import check_writable, number, print_json, screen, write_json
from ibke.cli.settings import Settings
from ibke.data.readers import READERS, Skipped, account, count_reasons, read
from ibke.errors import IBKEError, RequestError
from ibke.files import find_file

if TYPE_CHECKING:
    from rich.console import Console

    from ibke.editors.base import Editor
    from ibke.evaluation.protocols import Protocol
    from ibke.evaluation.side_effects import Beside
    from ibke.models import LanguageModel
    from ibke.request import EditRequest

SHOWN = 3  # unusable records named on the screen


def evaluate(
    data: Annotated[Path, typer.Option(help="File of edit requests or of a benchmark, or a folder of such files.")],
    format: Annotated[str, typer.Option(help=f"{', '.join(READERS)} (`ibke ls formats`).")] = "jsonl",
    protocol: Annotated[
        str, typer.Option(help="single: each edit alone; batch: a group at once, then off; sequential: all stay.")
    ] = "single",
    group: Annotated[
        int | None,
        typer.Option(min=1, help="Requests edited together: needed for batch, 1 for sequential if left out."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Draw at most so many edits.")] = None,
    seed: Annotated[int, typer.Option(help="Decides which, and a random order.")] = 0,
    order: Annotated[str, typer.Option(help="In which order edits are made: file or random.")] = "file",
    frames: Annotated[str, typer.Option(help="How prompts are asked, by commas: bare, question, chat.")] = "bare",
    edit_frame: Annotated[str, typer.Option(help="How edits are worded for the editor: bare or question.")] = "bare",
    text: RunningText = "",
    abilities: AbilityFiles = None,
    questions: Questions = 50,
    looks: Looks = 8,
    lm_eval: LMEval = "",
    model: ModelName = ModelChoice.name,
    method: Method = "ibke",
    editor: EditorPath = None,
    no_refine: NoRefine = False,
    settings: Settings = None,
    module: Modules = None,
    device: Device = ModelChoice.device,
    dtype: Dtype = "float32",  # in bfloat16 rounding alone changes long answers, and locality would measure that
    out: Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write the report; - prints it.")] = None,
) -> None:
    """Measure reliability, generality and locality of a method, beside those of the unedited model.

    Answers are generated greedily; teacher-forced figures are shown for comparison with published ones.
    """
    console = screen(out == "-")
    if out and out != "-":
        check_writable(Path(out))
    asked, skipped = _read(data, format, console)
    from ibke.evaluation.protocols import Protocol, sample

    how = Protocol.parse(protocol if group is None else f"{protocol}:{group}")
    chosen = sample(asked, limit, seed, cast(Any, order))
    besides = beside(text, abilities, questions, looks, lm_eval)
    choice = ModelChoice(model, device, dtype, tuple(module or ()))
    lm, editing = load_for_editing(choice, method, editor, not no_refine, settings or ())
    config: dict[str, Any] = {"data": data.name, "format": format, "limit": limit, "seed": seed, "order": order}
    config |= {"refine": not no_refine, "editor": editor, "settings": settings or []}
    config |= account(skipped)
    asking = {"frames": [name.strip() for name in frames.split(",")], "edit_frame": edit_frame, "config": config}
    report = _measure(lm, editing, chosen, how, besides, asking)
    try:
        _hand_over(report, out, console)  # first of all: nothing that goes wrong with a screen loses it
    finally:
        _show(report, console)


def _measure(
    lm: LanguageModel,
    editor: Editor,
    requests: list[EditRequest],
    protocol: Protocol,
    besides: Beside | None,
    asking: dict[str, Any],
) -> dict[str, Any]:
    """The report, with bars while it is made."""
    from ibke.evaluation import protocols
    from ibke.evaluation.baseline import Baseline
    from ibke.evaluation.side_effects import Battery

    baseline = Baseline.in_cache(lm)
    with Bars() as tick:
        if besides:
            tick("Unedited model", 0, None)
        battery = Battery.of(lm, besides, baseline) if besides else None

        def progress(what: str, done: int, total: int) -> None:
            tick(what.capitalize(), done, total)

        asking |= {"battery": battery, "baseline": baseline, "progress": progress}
        return protocols.evaluate(lm, editor, requests, protocol, **asking)


def _hand_over(report: dict[str, Any], out: str | None, console: Console) -> None:
    if out == "-":
        print_json(report)
    elif out:
        try:
            write_json(report, Path(out))
        except IBKEError:
            print_json(report)  # there may be hours in it
            raise
        console.print(f"Report: {out}", markup=False, soft_wrap=True)


def _read(data: Path, format: str, console: Console) -> tuple[list[EditRequest], list[Skipped]]:
    skipped: list[Skipped] = []
    requests = list(read(find_file(str(data)), format, skipped))
    _name_skipped(skipped, console)
    if not requests:
        raise RequestError("there is no request in it.", str(data), "Give a file that holds some.")
    return requests, skipped


def _name_skipped(skipped: list[Skipped], console: Console) -> None:
    if skipped:
        console.print(f"{len(skipped)} records, or parts of them, cannot be used:", style="yellow")
        for reason, count in count_reasons(skipped).items():
            console.print(f"  {count} × {reason}", style="yellow", markup=False)
        for fault in skipped[:SHOWN]:
            console.print(f"  {fault.where}: {fault.why}", style="yellow", markup=False)


def _show(report: dict[str, Any], console: Console) -> None:
    config = report["config"]
    most = "at most " if report["groups"] > math.ceil(report["n"] / report["group"]) else ""
    how = "" if report["protocol"] == "single" else f", {report['protocol']}, {most}{report['group']} at a time"
    title = f"{config['method']} on {report['n']} edits of {Path(config['data']).name}{how}"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for block in ("generated", "teacher-forced"):
        table.add_column(block, justify="right")
        table.add_column("unedited", justify="right", style="dim")
    for name in ("reliability", "generality", "locality"):
        cells: list[str | Text] = []
        for block in ("generation", "teacher_forced"):
            cells += [_metric(report["metrics"][block][name]), number(report["base"][block][name]["mean"])]
        table.add_row(name, *cells)
    console.print(table)
    for age in report["by_age"] if len(report["by_age"]) > 1 else ():
        said = ", ".join(f"{name} {number(age[name]['mean'])}" for name in ("reliability", "generality", "locality"))
        console.print(f"{age['age_from']} to {age['age_to']} edits later: {said}", style="dim", markup=False)
    if report["superseded"]:
        what = f"{report['superseded']} edits are not scored: later ones of the same prompt took their place"
        console.print(what, style="dim", markup=False)
    if report["unreachable"]:
        most = f"longer than {config['max_new_tokens']} tokens or of several lines"
        console.print(f"{report['unreachable']} targets are {most}: no answer can be one", style="yellow", markup=False)
    if report["not_made"]:
        what = f"{report['not_made']} edits could not be made and count as nothing done: {report['not_made_why']}"
        console.print(what, style="yellow", markup=False)
    if effects := report.get("side_effects"):
        console.print(_side_effects(effects), style="dim", markup=False)
    rate = report["rate_nats"]
    parts = [f"{report['seconds_per_edit']:.2f} s an edit", *([f"{rate:.0f} nats an edit"] if rate is not None else [])]
    parts += [f"{number(report['steps']['mean'], 1)} refining steps", f"{report['peak_memory_mb']:.0f} MB at most"]
    console.print(Text(" · ".join(parts), style="cyan"))


def _side_effects(found: dict[str, Any]) -> str:
    parts = []
    if found["perplexity"]["base"] is not None:
        parts.append(
            f"perplexity {found['perplexity']['base']:.2f} × {number(found['perplexity']['ratio']['mean'], 4)}"
        )
    for name, suite in found["abilities"].items():
        parts.append(f"{name} {suite['base']:.3f} → {number(suite['edited']['mean'], 3)}")
    parts.append(f"‖ΔW‖/‖W‖ {number(found['relative_norm']['mean'], 4)}, drift {number(found['drift']['mean'], 4)}")
    return f"Side effects ({found['n']} looked at): " + ", ".join(parts)


def _metric(metric: dict[str, float | None]) -> Text:
    text = Text(number(metric["mean"]), style="bold")
    if metric["low"] is not None:
        text.append(f" ({number(metric['low'])}–{number(metric['high'])})", style="not bold dim")
    return text
