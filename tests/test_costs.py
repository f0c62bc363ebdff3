"""What making edits took, and those that could not be made: the same for every method."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from random_editor import REQUESTS, RandomEditor, random_edit
from tests.test_protocols import MANY

from ibke.edit import Edit
from ibke.editors.base import Editor
from ibke.errors import CaptureError, FormatError, ModuleNotEditableError, RequestError, SettingError
from ibke.evaluation.protocols import Protocol, evaluate
from ibke.models import LanguageModel
from ibke.request import EditRequest


class Faltering(RandomEditor):
    """Cannot make the edit of some requests, or learn from it."""

    def __init__(self, lm: LanguageModel, falters: dict[str, Exception], after: bool = False):
        super().__init__(lm, 0.3)
        self.falters, self.late, self.following = falters, after, 0

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        made = super().edit(requests)
        for request in requests:
            if request.prompt in self.falters and not self.late:
                raise self.falters[request.prompt]
        return replace(made, requests=tuple(requests))

    def after(self, edit: Edit) -> Editor:
        for request in edit.requests:
            if request.prompt in self.falters:
                raise self.falters[request.prompt]
        self.following += 1
        return self


def _not_finite(lm: LanguageModel) -> Exception:
    edit = random_edit(lm, 1, 0)
    try:
        Edit({name: (a * float("nan"), b) for name, (a, b) in edit.factors.items()}, (), edit.info)
    except FormatError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("protocol", ["single", "batch:2", "sequential:1", "sequential:2"])
def test_an_edit_that_cannot_be_made_counts_as_nothing_done(
    tiny_model: Callable[..., LanguageModel], protocol: str, late: bool
) -> None:
    lm, how = tiny_model("llama"), Protocol.parse(protocol)
    if late and how.regime != "sequential":
        return
    singular = torch.linalg.LinAlgError("the matrix is singular")
    broken = {0: CaptureError("the loss is not finite.", "here"), 2: singular, 5: _not_finite(lm)}
    editor = Faltering(lm, {MANY[index].prompt: error for index, error in broken.items()}, late)
    report = evaluate(lm, editor, MANY, how, batch_size=4)
    lost = {index for group in how.groups(MANY) for index in group if any(bad in group for bad in broken)}
    assert report["n"] == len(MANY) and report["not_made"] == len(lost)
    assert report["not_made_why"] == "here: the loss is not finite."
    scores = report["scores"]["generation"]
    assert len(scores["locality"]) == len(MANY) and None not in scores["locality"]
    if how.regime != "sequential":  # where nothing else is in force, it is the unedited model
        assert all(scores["locality"][index] == 1.0 for index in lost)
    # The figures of edits are of those that were made; the time of a failure was spent all the same.
    assert report["steps"]["p95"] and report["bytes_per_edit"] and report["seconds_per_edit"] > 0
    assert not any(module._forward_hooks for module in lm.model.modules())
    ages = {row["age_from"]: row["n"] for row in report["by_age"]}
    assert sum(ages.values()) == len(MANY)
    if protocol == "sequential:1":
        # Made are 1, 3, 4 and 6: what is not made makes no other older.
        assert ages == {0: 1, 1: 2, 2: 1, 3: 2, 4: 1}
    if protocol == "sequential:2":
        assert ages == {0: 1, 1: 6}
    if how.regime == "sequential":
        assert editor.following == sum(group.start not in lost for group in how.groups(MANY))


def test_what_falls_out_of_a_sequence_is_not_in_force(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    error = CaptureError("the loss is not finite.")
    for late in (False, True):
        editor = Faltering(lm, {request.prompt: error for request in MANY}, late)
        report = evaluate(lm, editor, MANY, Protocol("sequential", 1))
        assert report["not_made"] == len(MANY) and report["metrics"] == report["base"]
        assert report["bytes_per_edit"] is None and report["steps"]["mean"] is None
        assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize(
    "error",
    [
        RequestError("no target."),
        SettingError("no such text."),
        ModuleNotEditableError("no such layer."),
        ValueError("a fault of the code"),
    ],
)
def test_what_is_wrong_for_every_edit_is_no_edit_not_made(
    tiny_model: Callable[..., LanguageModel], error: Exception
) -> None:
    lm = tiny_model("llama")
    for protocol in ("single", "batch:3", "sequential"):
        with pytest.raises(type(error), match=str(error)):
            evaluate(lm, Faltering(lm, {MANY[3].prompt: error}), MANY, Protocol.parse(protocol))


class Hungry(RandomEditor):
    """Needs so many MB for a moment while it makes an edit, and keeps some after the first."""

    def __init__(self, lm: LanguageModel, needs: int, keeps: int = 0):
        super().__init__(lm)
        self.needs, self.keeps, self.kept = needs, keeps, torch.empty(0)

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        if not len(self.kept):
            self.kept = torch.ones(self.keeps * 250_000)
        blocks = [torch.ones(25_000) for _ in range(10 * self.needs)]  # small ones, which the C library keeps
        assert all(block[0] for block in blocks)
        return super().edit(requests)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a peak anew")
def test_memory_of_an_edit_is_what_it_needs_above_what_was_held(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    held = torch.ones(50_000_000)  # 200 MB that no method asked for
    few, many = (evaluate(lm, Hungry(lm, needs, 200), REQUESTS) for needs in (20, 120))
    assert float(held[0]) == 1.0
    # Neither what was held before nor what the first edit keeps counts, and what others freed before counts again.
    assert few["memory_per_edit_mb"] == pytest.approx(20, abs=10)
    assert many["memory_per_edit_mb"] == pytest.approx(120, abs=10)
    assert few["memory_mb"]["p95"] > 200 and few["memory_mb"]["median"] == few["memory_per_edit_mb"]
    # Counting anew loses no peak of the process.
    assert many["peak_memory_mb"] >= many["peak_memory_editing_mb"] >= few["peak_memory_mb"] > 400
