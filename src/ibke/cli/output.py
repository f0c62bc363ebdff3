"""Where a command's results go: tables for people, or one JSON document."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ibke.errors import IBKEError
from ibke.files import is_special, is_there, to_json, write_atomically

WIDTH = 110  # columns where there is no terminal


def screen(as_json: bool = False) -> Console:
    """The console for people: standard output, or standard error where JSON takes its place.

    Letters that a terminal does not have come out as question marks there.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    console = Console(stderr=as_json, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    return console


def print_json(document: Any) -> None:
    """Print one JSON document on standard output."""
    typer.echo(_dump(document))


def write_json(document: Any, path: Path) -> None:
    """Write a JSON document in one step.

    Raises:
        IBKEError: it cannot be written.
    """
    try:
        write_atomically(path, f"{_dump(document)}\n".encode())
    except OSError as error:
        raise IBKEError(f"it cannot be written ({error.strerror}).", str(path), "Choose another file.") from None


def check_writable(path: Path) -> None:
    """Refuse a result file that could not be written, before anything is computed.

    Raises:
        IBKEError: its folder does not exist or is closed to us, or the file is a folder.
    """
    place = path.resolve()
    folder = place.parent
    if is_special(place):
        fine = os.access(place, os.W_OK)
    else:
        there = is_there(folder) and folder.is_dir() and os.access(folder, os.W_OK)
        fine = there and not (is_there(place) and place.is_dir())
    if not fine:
        raise IBKEError("it cannot be written.", str(path), "Name a file in a folder that exists.")


def shorten(text: str, size: int) -> str:
    """A text cut at a word to at most ``size`` characters, for display."""
    if len(text) <= size:
        return text
    cut = text[: size - 1]
    return (cut.rsplit(" ", 1)[0] if " " in cut[size // 2 :] else cut).rstrip(" ,;:.") + "…"


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def _dump(document: Any) -> str:
    # Escaped where the terminal or pipe could not take the letters.
    plain = (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8"
    return to_json(document, ascii_only=plain)
