"""Benchmarks and tables of facts, fetched from their public homes; ``sources.json`` lists them."""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from ibke.errors import IBKEError
from ibke.files import new_beside

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much of it is done (bytes)."""

TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 16


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Args:
        path: where it lies below the source's folder, and below its base address.
        bytes: its size.
        sha256: its checksum; None where the public copy may be a newer edition.
    """

    path: str
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set with a public home.

    Args:
        name: what ``ibke data fetch`` calls it.
        title: what it is.
        licence: as stated at its home.
        home: a page for people.
        base: the address its files' paths are added to.
        folder: its folder below the data folder.
        files: its files.
        format: the reader of its files (see ``ibke.data.readers``); None for tables of facts.
    """

    name: str
    title: str
    licence: str
    home: str
    base: str
    folder: str
    files: tuple[SourceFile, ...]
    format: str | None = None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)

    def missing(self, root: Path) -> list[SourceFile]:
        """The files that do not lie below ``root``; what lies in their place with another content is not them."""
        return [file for file in self.files if not _fits(root / self.folder / file.path, file)]

    def to_fetch(self, root: Path) -> list[SourceFile]:
        """The files missing below ``root``, where their places are free.

        Raises:
            IBKEError: something else lies in the place of one.
        """
        wanted = self.missing(root)
        for file in wanted:
            if (place := root / self.folder / file.path).exists():
                raise IBKEError(
                    f"this is not the file that {self.name} has by this name, and is not overwritten.",
                    str(place),
                    "Move it away, or set IBKE_DATA to another folder.",
                )
        return wanted


def load_sources() -> dict[str, Source]:
    """All known sources, by name."""
    table = json.loads((resources.files("ibke.data") / "sources.json").read_text(encoding="utf-8"))
    for entry in table.values():
        entry["files"] = tuple(SourceFile(path, **file) for path, file in entry["files"].items())
    return {name: Source(name=name, **entry) for name, entry in table.items()}


def find_source(name: str) -> Source:
    """The source of a name.

    Raises:
        IBKEError: no such source; names the nearest one.
    """
    sources = load_sources()
    if name not in sources:
        near = difflib.get_close_matches(name, sources, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise IBKEError(f"there is no data set {name!r}.", "data", f"{hint}Known: {', '.join(sources)}.")
    return sources[name]


def fetch(source: Source, root: Path, progress: Progress | None = None) -> list[Path]:
    """Fetch the files of a source that are not there yet; each appears in one step when it is whole.

    Args:
        source: what to fetch.
        root: the data folder.
        progress: told how many bytes have come.

    Returns:
        The files fetched now.

    Raises:
        IBKEError: no network, an answer that is not the file, too little disk, a folder that cannot be written, or
            something else in a file's place.
    """
    wanted, fetched, before = source.to_fetch(root), [], 0
    total = sum(file.bytes for file in wanted)
    _check_room(root, total)

    def tick(count: int) -> None:
        if progress:
            progress(f"Fetching {source.name}", min(before + count, total), total)

    for file in wanted:
        target = root / source.folder / file.path
        _download(source.base + quote(file.path), target, file, tick)
        before += file.bytes
        fetched.append(target)
    return fetched


def _download(url: str, target: Path, file: SourceFile, tick: Callable[[int], None]) -> None:
    by_hand = f"Check the network, or save {url} as {target} by hand."
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_beside(target) as part:
            temporary = Path(part.name)
            try:
                digest, size = hashlib.sha256(), 0
                with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                    length = int(answer.headers.get("Content-Length") or 0)
                    while chunk := answer.read(CHUNK):
                        part.write(chunk)
                        digest.update(chunk)
                        size += len(chunk)
                        tick(size)
                _check(url, file, size, length, digest.hexdigest())
                part.close()
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except urllib.error.HTTPError as error:
        raise IBKEError(f"the server answered {error.code} {error.reason}.", url, by_hand) from None
    except urllib.error.URLError as error:
        raise IBKEError(f"it cannot be reached ({error.reason}).", url, by_hand) from None
    except (TimeoutError, ConnectionError, HTTPException, ssl.SSLError) as error:
        raise IBKEError(f"the connection broke ({error or type(error).__name__}).", url, by_hand) from None
    except OSError as error:
        raise IBKEError(
            f"it cannot be written ({error.strerror}).", str(target), "Make room, or set IBKE_DATA to another folder."
        ) from None


def _check(url: str, file: SourceFile, size: int, length: int, digest: str) -> None:
    if length and size != length:
        raise IBKEError(f"the connection broke after {size} of {length} bytes.", url, "Try again.")
    if file.sha256 and (size != file.bytes or digest != file.sha256):
        raise IBKEError(
            f"this is not the file expected: {size} bytes instead of {file.bytes}, or a SHA-256 of {digest}.",
            url,
            "Check what stands between you and its home; nothing was kept.",
        )


def _check_room(root: Path, needed: int) -> None:
    folder = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise IBKEError(
            f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free.",
            str(root),
            "Make room, or set IBKE_DATA to a folder on a larger disk.",
        )


def _fits(path: Path, file: SourceFile) -> bool:
    """Whether a file is the one listed; of one without a checksum any edition is, unless it is empty."""
    try:
        size = path.stat().st_size
        if file.sha256 is None:
            return size > 0
        with path.open("rb") as content:
            return size == file.bytes and hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
    except OSError:
        return False
