"""Where the package keeps files of its own and looks for the user's, and how it writes them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO


def cache_folder() -> Path:
    """Where models and statistics are kept: ``IBKE_CACHE``, else ``XDG_CACHE_HOME/ibke``, else ``~/.cache/ibke``."""
    if folder := os.environ.get("IBKE_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ibke"


def data_folder() -> Path:
    """Where data sets are kept: ``IBKE_DATA``, else ``data`` in the cache folder."""
    folder = os.environ.get("IBKE_DATA")
    return Path(folder).expanduser() if folder else cache_folder() / "data"


def is_there(path: Path) -> bool:
    """Whether something is there, as far as we may see."""
    try:
        return path.exists()
    except OSError:  # in a folder that is closed to us, say
        return False


def is_special(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder: a pipe, say, which can be read only once."""
    return is_there(path) and not (path.is_file() or path.is_dir())


def find_file(path: str) -> Path:
    """A file named as it is, or relative to :func:`data_folder`; it need not exist."""
    place = Path(path).expanduser()
    return place if is_there(place) else data_folder() / place


def new_beside(path: Path) -> BinaryIO:
    """A new file in the folder of another, under a name of its own, that whoever may read such files may read.

    Raises:
        OSError: it cannot be made.
    """
    return (path.parent / f".{path.name}-{secrets.token_hex(4)}").open("xb")


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file in one step: whoever looks sees the old one or the new one, also after an interruption.

    A link is followed, and what is no file (a pipe, ``/dev/stdout``) is written to as it is.

    Args:
        path: its folder is there.
        data: all of it, or piece by piece.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path, pieces = path.resolve(), (data,) if isinstance(data, bytes) else data
    if is_special(path):
        with path.open("wb") as special:
            special.writelines(pieces)
        return
    with new_beside(path) as file:
        temporary = Path(file.name)
        try:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Have the system write down which files are in a folder, so that new ones are found after a power cut."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for a JSON-ready value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def to_json(value: Any, ascii_only: bool = False, depth: int = 0) -> str:
    """A JSON text for people: a member a line, and lists of numbers or texts on one line.

    JSON knows no infinity and no not-a-number; both are null.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    inner, outer = "\n" + "  " * (depth + 1), "\n" + "  " * depth
    if isinstance(value, dict) and value:
        members = (
            f"{json.dumps(str(key), ensure_ascii=ascii_only)}: {to_json(member, ascii_only, depth + 1)}"
            for key, member in value.items()
        )
        return "{" + inner + f",{inner}".join(members) + outer + "}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value):
        return "[" + inner + f",{inner}".join(to_json(item, ascii_only, depth + 1) for item in value) + outer + "]"
    if isinstance(value, list | tuple):
        value = [None if isinstance(item, float) and not math.isfinite(item) else item for item in value]
    return json.dumps(value, ensure_ascii=ascii_only)
