"""Checks that settings of several methods have in common."""

from __future__ import annotations

from typing import Any

from ibke.errors import IBKEError


def refuse_below(settings: Any, least: float, *names: str) -> None:
    """Refuse settings below a number.

    Raises:
        IBKEError: one is.
    """
    for name in names:
        if getattr(settings, name) < least:
            raise IBKEError(f"`{name}` is below {least:g}.", "settings", _left_out(settings, name))


def refuse_not_positive(settings: Any, *names: str) -> None:
    """Refuse settings that are not above zero.

    Raises:
        IBKEError: one is not.
    """
    for name in names:
        if getattr(settings, name) <= 0:
            raise IBKEError(f"`{name}` is not positive.", "settings", _left_out(settings, name))


def _left_out(settings: Any, name: str) -> str:
    return f"It is {getattr(type(settings), name):g} if left out."
