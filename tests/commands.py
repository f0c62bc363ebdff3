"""Running the command line in tests."""

from __future__ import annotations

from collections.abc import Callable

from typer.testing import Result

PROMPT, OLD, NEW = "The capital of Turkey is", "Istanbul", "Ankara"

Run = Callable[..., Result]


def refused(result: Result, *parts: str) -> None:
    """Exit code 2, nothing on standard output, and one message that holds these words."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("Error: ") == 1
    for part in parts:
        assert part in result.stderr
