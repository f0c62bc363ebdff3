"""``ibke bench``: many methods on the same edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ibke.cli.console import (
    DONE,
    JSON,
    NOT_ACHIEVED,
    AbilityFiles,
    Bars,
    Device,
    Dtype,
    LMEval,
    Looks,
    ModelChoice,
    ModelName,
    Modules,
    Questions,
    RunningText,
    beside,
)
from ibke.cli.output import number, print_json, screen
from ibke.cli.settings import parse
from ibke.data.readers import READERS, STRICT, read
from ibke.errors import IBKEError, RequestError
from ibke.files import find_file

if TYPE_CHECKING:
    from rich.console import Console

    from ibke.bench.plan import Contender, DataSet, Plan


def bench(
    methods: Annotated[str, typer.Option(help="By commas; LABEL=METHOD lets one method run under several settings.")],
    data: Annotated[list[str], typer.Option(metavar="NAME=FILE:FORMAT", help="What is edited. Repeat.")],
    out: Annotated[Path, typer.Option(help="Folder of results; what is finished there is not run again.")],
    protocols: Annotated[
        str, typer.Option(help="By commas: single, batch:100, sequential:100; with /500, on so many edits.")
    ] = "single",
    limit: Annotated[int | None, typer.Option(min=1, help="Draw at most so many edits for each cell.")] = None,
    seeds: Annotated[
        str, typer.Option(help="By commas; each decides which edits are drawn, and their order.")
    ] = "0,1,2",
    against: Annotated[
        str | None, typer.Option(help="Whom the others are compared with; the first if left out.")
    ] = None,
    frames: Annotated[str, typer.Option(help="How prompts are asked, by commas: bare, question, chat.")] = "bare",
    edit_frame: Annotated[str, typer.Option(help="How edits are worded for the editor: bare or question.")] = "bare",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="LABEL.NAME=VALUE", help="A method's setting; LABEL@PROTOCOL.NAME=VALUE under one. Repeat."
        ),
    ] = None,
    editor: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=FOLDER", help="A method's trained editor. Repeat.")
    ] = None,
    only_finished: Annotated[
        bool, typer.Option("--finished", help="Sum up what is finished, and run nothing.")
    ] = False,
    text: RunningText = "",
    abilities: AbilityFiles = None,
    questions: Questions = 50,
    looks: Looks = 8,
    lm_eval: LMEval = "",
    model: ModelName = ModelChoice.name,
    module: Modules = None,
    device: Device = ModelChoice.device,
    dtype: Dtype = "float32",
    as_json: JSON = False,
) -> None:
    """Compare methods: a JSON file for each cell, and a summary as Markdown, CSV and one HTML page.

    A cell is one method on one data set under one protocol with one seed, in a process of its own. Run the same
    command again to go on after an interruption. A method that fails is written down as failed, the others go on, and
    the exit code is 1.
    """
    from ibke.bench.plan import Conditions, DataSet, Plan, Stage

    given = (model, device, dtype, tuple(module or ()), tuple(_split(frames)), edit_frame)
    stages = [Stage.parse(text, limit) for text in _split(protocols)]
    plan = Plan(
        list(_contenders(_split(methods), settings or (), editor or (), [str(stage.protocol) for stage in stages])),
        [DataSet.parse(text) for text in data],
        stages,
        [_seed(text) for text in _split(seeds)],
        Conditions(*given, beside(text, abilities, questions, looks, lm_eval)),
    )
    _check(plan, against)
    _measure(plan, out, against, as_json, only_finished)


def _measure(plan: Plan, out: Path, against: str | None, as_json: bool, only_finished: bool) -> None:
    """Run what is missing, unless only what is finished counts; sum up, and show it."""
    from ibke.bench.report import write
    from ibke.bench.run import finished, run
    from ibke.bench.summary import summarise

    with Bars() as tick:
        documents = finished(plan, out) if only_finished else run(plan, out, tick)
    if not any(documents):
        raise IBKEError("no cell of this bench is finished.", str(out), "Run it without --finished.")
    summary = summarise(plan, documents, against)
    files = write(summary, out)
    console = screen(as_json)
    _show(summary, console)
    for file in files:
        console.print(str(file), markup=False, soft_wrap=True)
    if as_json:
        print_json(summary)
    raise typer.Exit(NOT_ACHIEVED if summary["failed"] else DONE)


def _contenders(
    names: Sequence[str], settings: Sequence[str], editors: Sequence[str], protocols: Sequence[str]
) -> Iterator[Contender]:
    """The methods with what was set of each.

    Raises:
        IBKEError: an unknown method, a setting or value it has not, or a setting of a method, or under a protocol,
            that does not run.
    """
    from ibke.bench.plan import Contender

    labels = [name.partition("=")[0].strip() for name in names]
    spelt = {protocol: [protocol, *(["sequential"] if protocol == "sequential:1" else [])] for protocol in protocols}
    places = {label: {one: [f"{label}@{name}" for name in spelt[one]] for one in protocols} for label in labels}
    everywhere = [place for some in places.values() for names in some.values() for place in names]
    given, folders = (
        _by_label(settings, ".", [*labels, *everywhere], "--set"),
        _by_label(editors, "=", labels, "--editor"),
    )
    for label, name in zip(labels, names, strict=True):
        method = name.partition("=")[2].strip() or label
        always = given[label]
        under = {
            protocol: _settings(method, [*always, *own])
            for protocol, some in places[label].items()
            if (own := [text for place in some for text in given[place]])
        }
        yield Contender(label, method, _settings(method, always), next(reversed(folders[label]), None), under)


def _settings(method: str, texts: Sequence[str]) -> dict[str, Any]:
    """A method's settings.

    Raises:
        IBKEError: an unknown method, or a setting or value that it has not.
    """
    from ibke.editors.base import METHODS, method_class

    if method in METHODS and not texts:
        return {}
    kind = method_class(method)
    if not kind.Settings:
        raise IBKEError(f"the method {method!r} has no settings.", "--set", "Leave it out.")
    (found,) = parse(texts, kind.Settings)
    kind.Settings(**found)  # refuses a value that it cannot have
    return found


def _by_label(texts: Sequence[str], mark: str, labels: Sequence[str], option: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {label: [] for label in labels}
    for text in texts:
        # Longest first: a label may hold the mark.
        owner = next((name for name in sorted(labels, key=len, reverse=True) if text.startswith(name + mark)), None)
        if owner is None:
            raise IBKEError(
                f"{text!r} belongs to no method of this bench.", option, f"Begin with one of {', '.join(labels)}."
            )
        found[owner].append(text.removeprefix(owner + mark))
    return found


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise IBKEError(f"{text!r} is no seed.", "--seeds", "Give whole numbers by commas.")
    return int(text)


def _check(plan: Plan, against: str | None) -> None:
    """Refuse what would fail in every cell, before the first is run.

    Raises:
        IBKEError: a data set cannot be read, a model's name is misspelt, a trained editor is not there, a frame,
            wording, device or dtype is unknown, or nobody to compare with.
    """
    from ibke.evaluation.protocols import EditFrame
    from ibke.frames import FRAMES
    from ibke.models import place_and_dtype

    labels, wordings = [contender.label for contender in plan.contenders], EditFrame.__args__  # type: ignore[attr-defined]
    if against not in (None, *labels):
        raise IBKEError(f"{against!r} is not among the methods.", "--against", f"Choose from {', '.join(labels)}.")
    if wrong := next((frame for frame in plan.conditions.frames or ("",) if frame not in FRAMES), None):
        raise RequestError(f"unknown frame {wrong!r}.", "--frames", f"Choose from {', '.join(FRAMES)}.")
    if plan.conditions.edit_frame not in wordings:
        raise RequestError(
            f"unknown wording {plan.conditions.edit_frame!r}.", "--edit-frame", "Choose bare or question."
        )
    ModelChoice(plan.conditions.model).check_name()
    place_and_dtype(plan.conditions.device, plan.conditions.dtype)
    for contender in plan.contenders:
        _check_editor(contender)
    for data in plan.data:
        _check_data(data)


def _check_data(data: DataSet) -> None:
    """Read a data set, to its end where one faulty line would fail every cell.

    Raises:
        RequestError: it cannot be read, or holds nothing.
    """
    requests = read(find_file(data.path), data.format, [])
    if next(requests, None) is None:
        raise RequestError("there is no request in it.", data.path, f"Known formats: {', '.join(READERS)}.")
    for _ in requests if data.format in STRICT else ():
        pass


def _check_editor(contender: Contender) -> None:
    from ibke.editors.base import method_class

    if contender.editor is None:
        return
    where = f"--editor {contender.label}={contender.editor}"
    if not method_class(contender.method).Config:
        raise IBKEError(f"the method {contender.method!r} has no trained weights.", where, "Leave it out.")
    if not Path(contender.editor).is_dir():
        raise IBKEError("there is no such folder.", where, "Name the folder of a trained editor.")


def _show(summary: dict[str, Any], console: Console) -> None:
    from ibke.bench.summary import left_out

    table = Table(title=f"Generated answers, {summary['cells']} cells", title_justify="left")
    columns = ("", "method", "n", "score", "rel.", "gen.", "loc.", f"score − {summary['against']}", "s/edit")
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "method") else "right", no_wrap=True)
    place = ""
    for row in summary["rows"]:
        here, place_before = f"{row['data']}, {row['protocol']}", place
        place = here
        generated, minus = row["generation"], row["minus"]["score"]
        table.add_row(
            here if here != place_before else "",
            row["method"],
            str(row["n"]),
            *(number(generated[name]["mean"]) for name in ("score", "reliability", "generality", "locality")),
            "–" if minus["mean"] is None else f"{minus['mean']:+.2f} ({minus['low']:+.2f} to {minus['high']:+.2f})",
            number(row["seconds_per_edit"]),
        )
    console.print(table)
    for line in left_out(summary):
        console.print(line, style="yellow", markup=False, soft_wrap=True)
    for one in summary["failed"]:
        console.print(f"Failed: {one['cell']}: {one['why']}", style="red", markup=False, soft_wrap=True)
