"""``ibke train``: an editor for a model, from data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ibke.cli.console import JSON, Bars, Dtype, ModelChoice, ModelName
from ibke.cli.output import print_json, screen
from ibke.cli.settings import Settings, parse

if TYPE_CHECKING:
    from ibke.editors.ibke.config import IBKEConfig


def train(
    data: Annotated[
        list[str],
        typer.Option(
            help="A source, with its share if need be: facts, pararel, lre, entityquestions, csv:FILE, "
            "counterfact:FILE, zsre:FILE, knowedit:FILE or jsonl:FILE, as in facts=2. Repeat."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoints, log, and the finished editor.")],
    model: ModelName = ModelChoice.name,
    resume: Annotated[bool, typer.Option("--resume", help="Go on exactly where the run in --out stopped.")] = False,
    seed: Annotated[int | None, typer.Option(help="Decides data, order, noise and initial weights.")] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Training edits, all sources together.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Edits a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the cosine schedule.")] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="CPU threads; 0 leaves it to PyTorch.")] = None,
    dtype: Dtype = ModelChoice.dtype,
    settings: Settings = None,
    as_json: JSON = False,
) -> None:
    """Train an editor for a model.

    The run can be killed at any time and goes on with --resume.
    """
    given: dict[str, Any] = {"seed": seed, "episodes": episodes, "steps": steps, "batch": batch, "threads": threads}
    given |= {"learning_rate": learning_rate, "dtype": dtype}
    options = {name: value for name, value in given.items() if value is not None}
    with Bars() as tick:
        tick("Loading", 0, None)
        from ibke.training.settings import TrainSettings
        from ibke.training.trainer import train as run

        chosen, config = _overrides(settings or [])
        wanted = TrainSettings(model, tuple(data), str(out), config=config, **{**options, **chosen})
        last: dict[str, Any] = {}

        def report(state: dict[str, Any]) -> None:
            last.update(state)
            if "done" in state:
                tick(
                    state["stage"].capitalize(),
                    state["done"],
                    state["total"],
                    _figures(last),
                    state.get("seconds_left"),
                )

        folder = run(wanted, on_progress=report, resume=resume)
    if not as_json:
        screen().print(f"The editor is in {folder}. Use it:  ibke edit --editor {folder} …", soft_wrap=True)
    else:
        print_json({"editor": str(folder), "settings": wanted.to_dict(), "last": last})


def _figures(state: dict[str, Any]) -> str:
    """Rate, sufficiency and independence in nats, and the pace."""
    parts = []
    if "rate_nats" in state:
        parts.append(f"R {state['rate_nats']:.0f} SG {state['sg_nats']:.2f} IL {state['il_nats']:.2f} nats")
        parts.append(f"{state['edits_per_second']:.0f} edits/s")
    if "score" in state:
        parts.append(f"score {state['score']:.3f}")
    return " · ".join(parts)


def _overrides(settings: list[str]) -> tuple[dict[str, Any], IBKEConfig]:
    """Settings given as NAME=VALUE: those of the run, and the editor's own.

    Raises:
        IBKEError: an unknown name, with the nearest one, or a value of the wrong kind.
    """
    from ibke.editors.ibke.config import IBKEConfig
    from ibke.training.settings import TrainSettings

    of_run, of_editor = parse(settings, TrainSettings, IBKEConfig)
    return of_run, IBKEConfig(**of_editor)
