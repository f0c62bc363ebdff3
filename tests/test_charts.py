"""Plots of a bench: what is drawn and what is only written."""

from __future__ import annotations

import json

from ibke.bench.charts import Dot, costs
from ibke.files import to_json


def test_what_is_no_number_is_null_and_draws_nothing() -> None:
    assert json.loads(to_json({"a": float("nan"), "b": [1.0, float("inf")]})) == {"a": None, "b": [1.0, None]}
    drawn = costs("x", [Dot("broken", float("inf"), text="inf"), Dot("whole", 2.0, text="2")])
    assert drawn.count("<circle") == 1 and "nan" not in drawn


def test_a_cost_of_nothing_is_written_though_no_logarithm_is_drawn() -> None:
    drawn = costs("x", [Dot("free", 0.0, text="0", bold=True), Dot("dear", 2.0, text="2"), Dot("unknown", None)])
    assert "free: 0<" in drawn and "dear: 2<" in drawn and "unknown: nothing measured<" in drawn
    assert drawn.count("<circle") == 1 and 'class="row bold"' in drawn
    assert "free: 0<" in costs("x", [Dot("free", 0.0, text="0")])
