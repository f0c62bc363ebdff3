"""Settings of all methods: what is no finite number is refused before anything is made of it."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest

from ibke.editors.base import METHODS, method_class
from ibke.editors.fine_tuning import FineTuningSettings
from ibke.editors.rome import ROMESettings
from ibke.editors.wise.editor import WISESettings
from ibke.errors import IBKEError

KINDS = {
    kind
    for method in METHODS
    for kind in (method_class(method).Settings, method_class(method).Config)
    if kind is not None
}
UNBOUNDED = ("bound", "clamp")  # nothing is cut off at infinity


def numbers(kind: type[Any]) -> list[str]:
    return [item.name for item in fields(kind) if isinstance(item.default, float)]


@pytest.mark.parametrize("kind", sorted(KINDS, key=lambda kind: kind.__name__))
def test_no_method_takes_what_is_no_finite_number(kind: type[Any]) -> None:
    for name in numbers(kind):
        for value in (math.nan, math.inf, -math.inf):
            if (name, value) in ((free, math.inf) for free in UNBOUNDED):
                continue
            with pytest.raises(IBKEError, match=f"`{name}` is"):
                kind(**{name: value})


def test_what_is_cut_off_nowhere_may_be_infinite() -> None:
    assert FineTuningSettings(bound=math.inf) == FineTuningSettings()
    assert WISESettings(bound=math.inf).bound == ROMESettings(clamp=math.inf).clamp == math.inf
