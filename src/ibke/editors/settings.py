"""Checks that settings of several methods have in common."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from ibke.errors import IBKEError


def refuse_below(settings: Any, least: float, *names: str) -> None:
    """Refuse settings below a number, or not finite.

    Raises:
        IBKEError: one is.
    """
    refuse_not_finite(settings, *names)
    for name in names:
        if getattr(settings, name) < least:
            raise IBKEError(f"`{name}` is below {least:g}.", "settings", _left_out(settings, name))


def refuse_not_positive(settings: Any, *names: str, infinite: bool = False) -> None:
    """Refuse settings that are not above zero, or not finite.

    Args:
        settings: what has them.
        names: which.
        infinite: let infinity pass, for what may be without bound.

    Raises:
        IBKEError: one is not.
    """
    for name in names:
        if not (infinite and getattr(settings, name) == math.inf):
            refuse_not_finite(settings, name)
        if getattr(settings, name) <= 0:
            raise IBKEError(f"`{name}` is not positive.", "settings", _left_out(settings, name))


def refuse_not_finite(settings: Any, *names: str) -> None:
    """Refuse settings that are infinite or no number; all that there are where none is named.

    A comparison lets not-a-number pass, and JSON knows neither.

    Raises:
        IBKEError: one is.
    """
    for name in names or [item.name for item in fields(settings)]:
        value = getattr(settings, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise IBKEError(f"`{name}` is {value:g}, no finite number.", "settings", _left_out(settings, name))


def _left_out(settings: Any, name: str) -> str:
    return f"It is {getattr(type(settings), name):g} if left out."
