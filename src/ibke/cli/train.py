"""``ibke train``: an editor for a model, from data."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ibke.cli.console import JSON, Bars, Device, Dtype, Method, ModelChoice, ModelName, Modules
from ibke.cli.output import print_json, screen
from ibke.cli.settings import Settings, parse
from ibke.errors import IBKEError

if TYPE_CHECKING:
    from ibke.editors.base import Editor


def train(
    data: Annotated[
        list[str],
        typer.Option(
            help="A source, with its share if need be: facts, pararel, lre, entityquestions, csv:FILE, "
            "counterfact:FILE, zsre:FILE, knowedit:FILE or jsonl:FILE, as in facts=2. Repeat."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run: checkpoints, log, and the finished editor. Needed for ibke; for mend, malmen and "
            "rledit a folder of the cache, where --method finds them, if left out."
        ),
    ] = None,
    model: ModelName = ModelChoice.name,
    method: Method = "ibke",
    resume: Annotated[bool, typer.Option("--resume", help="Go on exactly where the run in --out stopped.")] = False,
    seed: Annotated[int | None, typer.Option(help="Decides data, order, noise and initial weights.")] = None,
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Training edits, all sources together; 5000 if left out.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Most optimiser steps; for ibke 2500 if left out.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Edits a step; 16 if left out.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of the cosine schedule; for ibke 1e-3 if left out.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="CPU threads; 0 leaves it to PyTorch.")] = None,
    module: Modules = None,
    device: Device = ModelChoice.device,
    dtype: Dtype = ModelChoice.dtype,
    settings: Settings = None,
    as_json: JSON = False,
) -> None:
    """Train an editor for a model.

    The run can be killed at any time and goes on with --resume.
    """
    given: dict[str, Any] = {"model": model, "data": tuple(data), "out": str(out or ""), "method": method}
    given |= {"seed": seed, "episodes": episodes, "steps": steps, "batch": batch, "threads": threads, "dtype": dtype}
    given |= {"learning_rate": learning_rate, "device": device, "modules": tuple(module or ()) or None}
    with Bars() as tick:
        tick("Loading", 0, None)
        trainer, wanted = _wanted(given, settings or [])
        last: dict[str, Any] = {}
        folder = trainer.train(wanted, on_progress=partial(_report, tick, last), resume=resume)
    if not as_json:
        screen().print(f"The editor is in {folder}. Use it:  {_use(method)} --editor {folder} …", soft_wrap=True)
    else:
        print_json({"editor": str(folder), "settings": wanted.to_dict(), "last": last})


def _report(tick: Bars, last: dict[str, Any], state: dict[str, Any]) -> None:
    """Show how far a run is; ``last`` takes what is known of it."""
    last.update(state)
    if "done" in state:
        stage, left = state["stage"].capitalize(), state.get("seconds_left")
        tick(stage, state["done"], state["total"], _figures(last), left)


def _figures(state: dict[str, Any]) -> str:
    """What the method is worth so far (nats), its pace, and its score."""
    parts = []
    if "figures" in state:
        parts += [state["figures"], f"{state['edits_per_second']:.0f} edits/s"]
    if "score" in state:
        parts.append(f"score {state['score']:.3f}")
    return " · ".join(parts)


def _use(method: str) -> str:
    return "ibke edit" if method == "ibke" else f"ibke edit --method {method}"


def _wanted(given: dict[str, Any], settings: list[str]) -> tuple[Any, Any]:
    """The module that trains, and its settings.

    Args:
        given: by options; None where one was left out.
        settings: others, as NAME=VALUE.

    Raises:
        IBKEError: no such method, a setting that it has not or that has an option, or a value that cannot be.
    """
    kind, trainer = _trainer(given["method"])
    chosen, config = _overrides(settings, kind, trainer)
    if clash := next((name for name in chosen if given.get(name) is not None), None):
        raise IBKEError(f"`{clash}` is given by an option already.", "--set", "Give it once.")
    options = {name: value for name, value in given.items() if value is not None}
    return trainer, trainer.Settings(**{**options, **chosen, "config": config})


def _trainer(method: str) -> tuple[type[Editor], Any]:
    """A method and the module that trains it.

    Raises:
        IBKEError: no such method, or one without weights.
    """
    from ibke.editors.base import METHODS, method_class

    kind = method_class(method)
    if not kind.trained_by:
        trained = ", ".join(name for name in METHODS if method_class(name).trained_by)
        raise IBKEError(f"the method {method!r} has nothing to train.", "--method", f"Those that have: {trained}.")
    return kind, import_module(kind.trained_by)


def _overrides(settings: list[str], kind: type[Editor], trainer: Any) -> tuple[dict[str, Any], Any]:
    """Settings given as NAME=VALUE: those of the run, and the configuration of what is trained.

    Raises:
        IBKEError: an unknown name, with the nearest one, or a value of the wrong kind.
    """
    assert kind.Config is not None
    of_run, of_editor = parse(settings, trainer.Settings, kind.Config)
    return of_run, kind.Config(**of_editor)
