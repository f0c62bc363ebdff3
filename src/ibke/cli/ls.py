"""``ibke ls``: the models, methods, data sets and data formats known by name."""

from __future__ import annotations

import inspect
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table

from ibke.cli.console import JSON, Bars
from ibke.cli.output import print_json, screen
from ibke.files import cache_folder, data_folder


class Kind(StrEnum):
    """What can be listed."""

    models = "models"
    methods = "methods"
    data = "data"
    formats = "formats"


def ls(kind: Annotated[Kind, typer.Argument(help="What to list.")], as_json: JSON = False) -> None:
    """List models, methods, data sets or data formats known by name."""
    listings = {Kind.models: _models, Kind.methods: _methods, Kind.data: _data, Kind.formats: _formats}
    rows, footer = listings[kind]()
    if as_json:
        print_json(rows)
        return
    _print(rows, footer)
    if kind == Kind.data:
        _print(*_formats())


def _print(rows: list[dict[str, Any]], footer: str) -> None:
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    shown = [name for name in rows[0] if name != "folder"]
    for name in shown:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in shown))
    console = screen()
    console.print(table)
    console.print(footer, style="dim", markup=False, soft_wrap=True)


Listing = tuple[list[dict[str, Any]], str]
"""Rows, and a line below them."""


def _models() -> Listing:
    from ibke.bundled import BUNDLED, MANIFEST

    root = cache_folder()
    rows = [
        {
            "name": name,
            "file": spec.gguf,
            "download_mb": spec.wheel_bytes / 1e6,
            "here": (root / name / MANIFEST).is_file(),
            "folder": str(root / name),
        }
        for name, spec in BUNDLED.items()
    ]
    return rows, f"Kept in {root}. A folder, a .gguf file or a hub id is loaded as well."


def _methods() -> Listing:
    from ibke.editors.base import METHODS, method_class

    with Bars() as tick:
        tick("Loading methods", 0, None)
        # The first line of a class's docstring says what it does.
        rows = [{"name": name, "what": (inspect.getdoc(method_class(name)) or "").split("\n")[0]} for name in METHODS]
    return rows, "Choose one with --method."


def _data() -> Listing:
    from ibke.data.fetch import load_sources

    root = data_folder()
    rows = [
        {
            "name": source.name,
            "what": source.title,
            "mb": source.bytes / 1e6,
            "licence": source.licence,
            "format": source.format or "",
            "here": not source.missing(root),
            "folder": str(root / source.folder),
        }
        for source in load_sources().values()
    ]
    return rows, f"Kept in {root}. Fetch one with `ibke data fetch NAME`."


def _formats() -> Listing:
    from ibke.data.readers import titles

    rows = [{"format": name, "what": title} for name, title in titles().items()]
    return rows, "Choose one with `ibke eval --format`. Files in these formats are read from anywhere."


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
