"""Files named by what is in them: written once, read only if they are still what their name says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from ibke.errors import LedgerError
from ibke.files import sync_folder, write_atomically

ENDING = ".safetensors"


class Blobs:
    """A folder of such files.

    Args:
        folder: it is made when the first is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, sha256: str) -> Path:
        """Where a file of that content is."""
        return self.folder / sha256[:2] / f"{sha256}{ENDING}"

    def write(self, raw: bytes) -> str:
        """Keep some bytes, on the disk when this returns; returns their SHA-256.

        Raises:
            LedgerError: there is no room, or it cannot be written.
        """
        sha256 = hashlib.sha256(raw).hexdigest()
        path = self.path(sha256)
        try:
            if self._there(path, sha256):
                return sha256
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, raw)
            for folder in (path.parent, self.folder):
                sync_folder(folder)
        except OSError as error:
            raise LedgerError(
                f"it cannot be written ({error.strerror or error}).", str(path), "Make room, and try again."
            ) from error
        return sha256

    def _there(self, path: Path, sha256: str) -> bool:
        """Whether a file holds what its name says; if so it is young again, so that nobody clears it away."""
        try:
            os.utime(path)
            return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        except FileNotFoundError:
            return False

    def read(self, sha256: str) -> bytes:
        """What was written.

        Raises:
            LedgerError: the file is missing, or has changed.
        """
        path = self.path(sha256)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise LedgerError(
                f"the file is missing or cannot be read ({error.strerror or error}).",
                str(path),
                "Restore it from a copy.",
            ) from error
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise LedgerError("the file has changed since it was written.", str(path), "Restore it from a copy.")
        return raw

    def __iter__(self) -> Iterator[Path]:
        """Every file there, those half written included."""
        return (path for path in self.folder.glob("*/*") if path.is_file())
