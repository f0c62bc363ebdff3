"""The files of a summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibke.bench.page import page
from ibke.bench.summary import csv_text, markdown
from ibke.errors import FormatError
from ibke.files import to_json, write_atomically


def write(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``summary.json``, ``.md``, ``.csv`` and ``.html``, each in one step.

    Returns:
        the files.

    Raises:
        FormatError: one cannot be written.
    """
    texts = {
        "json": to_json(summary) + "\n",
        "md": markdown(summary),
        "csv": csv_text(summary),
        "html": page(summary),
    }
    files = []
    for ending, text in texts.items():
        path = folder / f"summary.{ending}"
        try:
            write_atomically(path, text.encode())
        except OSError as error:
            raise FormatError(f"it cannot be written ({error.strerror}).", str(path), "Make room for it.") from None
        files.append(path)
    return files
