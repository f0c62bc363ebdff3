"""What all commands share: exit codes, errors, options, and progress.

Nothing here or in any command's module may import torch or transformers before a command runs.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text
from typer.core import TyperGroup

from ibke.bundled import BUNDLED
from ibke.cli.settings import parse
from ibke.errors import IBKEError, ModelError

if TYPE_CHECKING:
    from ibke.editors.base import Editor
    from ibke.evaluation.side_effects import Beside
    from ibke.models import LanguageModel

DONE, NOT_ACHIEVED, WRONG_INPUT, REFUSED = 0, 1, 2, 3
# Seconds before the first line of progress, and between lines, where there is no terminal to draw a bar on.
FIRST_LINE, LINE_EVERY = 5.0, 30.0
WIDTH = 110  # widest bar, in columns


class Commands(TyperGroup):
    """A group that turns every error the package raises on purpose into one message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except IBKEError as error:
            show_error(error)
            raise typer.Exit(WRONG_INPUT) from None


def show_error(error: IBKEError) -> None:
    """One message on standard error: where, what, and what to do."""
    text = Text("Error: ", style="bold red")
    text.append(f"{error.where}: " if error.where else "", style="bold")
    text.append(error.what, style="red")
    text.append(f"\n{error.todo}" if error.todo else "")
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document; tables go to standard error.")]
ModelName = Annotated[
    str, typer.Option("--model", "-m", help="A known name (`ibke ls models`), a folder, a .gguf file or a hub id.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, or auto.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto.")]
Modules = Annotated[
    list[str] | None,
    typer.Option("--module", help="Dotted name of a module to edit, for an unknown architecture. Repeat."),
]
Method = Annotated[str, typer.Option("--method", help="The editing method (`ibke ls methods`).")]
EditorPath = Annotated[
    str | None, typer.Option("--editor", help="Folder of a trained editor; the shipped one if left out.")
]
RunningText = Annotated[str, typer.Option("--text", help="Running text, to measure perplexity after editing.")]
AbilityFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--abilities", help="BoolQ, sentence pairs or TruthfulQA, asked after editing; `own` is ours. Repeat."
    ),
]
LMEval = Annotated[
    str, typer.Option("--lm-eval", help="Folder of lm-evaluation-harness tasks (extra `lm-eval`), run after editing.")
]
Questions = Annotated[int, typer.Option("--questions", min=1, help="Draw so many questions of each such file or task.")]
Looks = Annotated[
    int,
    typer.Option(
        "--looks",
        min=1,
        help="Measure text and abilities after each of the first N edits; of a sequence once, at its end.",
    ),
]
NoRefine = Annotated[bool, typer.Option("--no-refine", help="Take the editor's first guess as it is.")]


@dataclass(frozen=True)
class ModelChoice:
    """Which model to load, and how."""

    name: str = "smollm2-135m"
    device: str = "auto"
    dtype: str = "auto"
    modules: tuple[str, ...] = ()

    def load(self) -> LanguageModel:
        """The model, with a bar while it is fetched and loaded.

        Raises:
            ModelError: it cannot be had.
        """
        with Bars() as tick:
            tick(f"Loading {self.name}", 0, None)
            self.check_name()
            # The hub's client warns of every retry; the error that comes in the end says it all.
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
            from ibke.models import load_model

            return load_model(
                self.name, device=self.device, dtype=self.dtype, modules=self.modules or None, progress=tick
            )

    def check_name(self) -> None:
        """Refuse what looks like a slip in a known name, instead of asking the hub for it.

        Raises:
            ModelError: it does.
        """
        if self.name in BUNDLED or "/" in self.name or Path(self.name).exists():
            return
        if near := difflib.get_close_matches(self.name.lower(), BUNDLED, n=1):
            raise ModelError(
                f"there is no model {self.name!r}.", "--model", f"Did you mean {near[0]!r}? See `ibke ls models`."
            )


def load_for_editing(
    choice: ModelChoice, method: str, path: str | None, refine: bool, settings: Sequence[str] = ()
) -> tuple[LanguageModel, Editor]:
    """A model and the editor of a method for it.

    Args:
        choice: the model.
        method: name of the method.
        path: folder of a trained editor.
        refine: whether the editor's first guess may be refined.
        settings: of the method, each as NAME=VALUE.

    Raises:
        IBKEError: no such method, one that does not refine was told not to, or a setting that the method has not.
        ModelError: the model cannot be had.
    """
    with Bars() as tick:
        tick(f"Loading the {method} editor", 0, None)
        from ibke.editors.base import method_class

        kind = method_class(method)
        if not refine and "refine" not in inspect.signature(kind).parameters:
            raise IBKEError(f"the method {method!r} has nothing to refine.", "--no-refine", "Leave it out.")
        given: dict[str, Any] = {}
        for some in parse(settings, *([kind.Settings] if kind.Settings else [])):
            given |= some
    lm = choice.load()
    with Bars() as tick:
        tick(f"Loading the {method} editor", 0, None)
        return lm, kind.for_model(lm, path=path, **({} if refine else {"refine": False}), **given)


def beside(text: str, abilities: Sequence[str] | None, questions: int, looks: int, harness: str = "") -> Beside | None:
    """What is put to models beside the requests' own questions, if anything.

    Raises:
        IBKEError: a file of it cannot be read.
    """
    from ibke.evaluation.side_effects import Beside

    if not text and not abilities and not harness:
        return None
    found = Beside(text, tuple(abilities or ()), questions, looks, harness)
    found.read()
    if harness:
        from ibke.evaluation.harness import tasks_in
        from ibke.files import find_file

        tasks_in(find_file(harness))
    return found


class _TimeLeft(TimeRemainingColumn):
    """The time left as the work itself tells it, or else as the bar's pace does."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        told = task.fields.get("seconds_left")
        if told is None:
            return super().render(task)
        return Text(str(timedelta(seconds=int(told))), style="progress.remaining")


class Bars:
    """Bars on standard error with the time left, gone when done; now and then a line where there is no terminal.

    As a context manager it yields itself, to be called with what is being done, and how much of how much of it is done
    (None where nobody knows).
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.console.width = min(self.console.width, WIDTH)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),  # takes what the others leave
            TaskProgressColumn(table_column=Column(no_wrap=True, min_width=4)),
            _TimeLeft(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[figures]}", markup=False, style="cyan"),
        )
        self.bars = Progress(
            *columns,
            console=self.console,
            transient=True,
            expand=True,
            redirect_stdout=False,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.due: dict[str, float] = {}  # when the next line is
        self.begun: dict[str, tuple[float, int]] = {}  # when each began, and how much was done then

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(
        self, what: str, done: int, total: int | None, figures: str = "", seconds_left: float | None = None
    ) -> None:
        """Move a bar, or start it."""
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total, figures=figures)
            self.due[what] = time.monotonic() + FIRST_LINE
            self.begun[what] = (time.monotonic(), done)
        self.bars.update(self.tasks[what], completed=done, total=total, figures=figures, seconds_left=seconds_left)
        if not self.console.is_terminal and time.monotonic() >= self.due[what]:
            self.due[what] = time.monotonic() + LINE_EVERY
            share = f" {done / total:.0%}" if done and total else ""
            told = self._left(what, done, total) if seconds_left is None else seconds_left
            left = "" if told is None else f" ({timedelta(seconds=int(told))} left)"
            self.console.print(f"{what} …{share} {figures}".rstrip() + left, markup=False, soft_wrap=True)

    def _left(self, what: str, done: int, total: int | None) -> float | None:
        """Seconds left at the pace so far; None as long as nobody knows."""
        began, before = self.begun[what]
        return (time.monotonic() - began) / (done - before) * (total - done) if total and done > before else None

    def print(self, console: Console, line: Any) -> None:
        """Print a line for people while bars are shown: above them where both are on a terminal."""
        (self.console if console.is_terminal and self.console.is_terminal else console).print(line)
