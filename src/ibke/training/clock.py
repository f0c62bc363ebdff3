"""What a run spends before its first step, what it finds computed already included.

Whatever never changes while training is kept in files and shared by runs. A run that finds them would look cheaper than
the one that made them, so each file says what it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

Found = Callable[[Path], None]


class Clock:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._began, self._earlier = time.monotonic(), 0.0

    def found(self, path: Path) -> None:
        """Count a file that need not be computed as if it were."""
        with safe_open(path, framework="pt") as file:
            self._earlier += float((file.metadata() or {}).get("seconds", 0.0))

    @property
    def seconds(self) -> float:
        """Spent so far, now or by whoever made what was found."""
        return time.monotonic() - self._began + self._earlier


def since(began: float) -> dict[str, str]:
    """What a file says of what it took, for its metadata; ``began`` by :func:`time.monotonic`."""
    return {"seconds": f"{time.monotonic() - began:.3f}"}


def unnoticed(path: Path) -> None:
    """For whoever does not count."""
