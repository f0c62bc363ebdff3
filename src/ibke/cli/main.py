"""The ``ibke`` command, put together."""

from __future__ import annotations

import os
from typing import Annotated

import typer

import ibke
from ibke.cli.ask import ask
from ibke.cli.bench import bench
from ibke.cli.console import Commands
from ibke.cli.data import app as data_app
from ibke.cli.demo import demo
from ibke.cli.edit import edit
from ibke.cli.eval import evaluate
from ibke.cli.ledger import diff, export, gc, import_, log, restore, revert, show, verify
from ibke.cli.ls import ls
from ibke.cli.train import train

# GNU OpenMP's threads wait for each other in a loop. Beside another busy process that keeps the very thread they wait
# for from running, and a pass takes ten times as long; after so many rounds (some microseconds) they give way instead.
# It is read when torch is loaded, which no import above does.
SPINS = "10000"

app = typer.Typer(
    name="ibke",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(edit)
app.command()(ask)
app.command()(train)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(ls)
for command in (log, show, revert, restore, diff, verify, gc, export):
    app.command(rich_help_panel="Ledger")(command)
app.command("import", rich_help_panel="Ledger")(import_)
app.add_typer(data_app, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ibke {ibke.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Correct facts in a language model without retraining it, in seconds, and undo it to the last bit.

    Exit codes: 0 done, 1 not achieved (the target is not generated, a method failed, `verify` found a fault), 2 could
    not be done (wrong input, a file, the network), 3 refused by a guard.

    Every command takes --json: one JSON document on standard output, everything for people on standard error
    (`ibke eval --json` is followed by a file, or by - for standard output; `ibke export` writes JSON Lines anyway).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
