"""A ledger taken into another: what is in force then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_tiny
from random_editor import random_edit

from ibke.edit import Edit
from ibke.errors import LedgerError
from ibke.ledger import Ledger
from ibke.ledger.care import verify
from ibke.ledger.exchange import export_lines, import_lines
from ibke.models import LanguageModel
from ibke.request import EditRequest


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make_tiny("llama")


@pytest.fixture(scope="module")
def edits(lm: LanguageModel) -> list[Edit]:
    return [random_edit(lm, 1, seed=seed, scale=0.5, layers=[1]) for seed in range(6)]


@pytest.fixture
def ledger(lm: LanguageModel, tmp_path: Path):
    with Ledger(tmp_path / "ledger", lm) as opened:
        yield opened


def about(edit: Edit, prompt: str, target: str = "x") -> Edit:
    """An edit that says what it is for."""
    return replace(edit, requests=(EditRequest(prompt, target),))


def test_no_two_edits_of_one_prompt_come_into_force(
    ledger: Ledger, edits: list[Edit], lm: LanguageModel, tmp_path: Path
) -> None:
    first, second, other = (
        about(edits[0], "The harbour is"),
        about(edits[1], "the  harbour is"),
        about(edits[2], "A bay is"),
    )
    for edit in (first, other):
        ledger.commit(edit)
    ledger.revert([1])
    ledger.commit(second)
    before = list(ledger.events())
    with pytest.raises(LedgerError, match="edits 1 and 3 would be in force for the same prompt"):
        ledger.restore([1])
    assert list(ledger.events()) == before and ledger.active() == [2, 3]
    ledger.revert([3])
    ledger.restore([1])
    assert ledger.active() == [1, 2]
    lines = list(export_lines(ledger))
    with Ledger(tmp_path / "copy", lm) as copy:
        copy.commit(second)
        import_lines(copy, lines, "lines")
        assert copy.active() == [2, 3]  # what was here of the same prompt gives way
        import_lines(copy, lines, "lines")
        assert copy.active() == [5, 6] and verify(copy) == []


def test_what_was_taken_in_stands_over_what_was_there_whatever_is_taken_back(
    ledger: Ledger, edits: list[Edit], lm: LanguageModel, tmp_path: Path
) -> None:
    bays = [about(edit, "The bay is") for edit in edits]
    ledger.commit(bays[0])
    ledger.commit(bays[1], supersedes=[1])
    lines = list(export_lines(ledger))
    with Ledger(tmp_path / "one", lm) as here:
        here.commit(bays[2])
        import_lines(here, lines, "lines")
        here.revert([3])
        assert here.active() == [2]  # and not the first one too
        here.revert([2])
        assert here.active() == [1]
    with Ledger(tmp_path / "two", lm) as there:
        there.commit(bays[3])
        import_lines(ledger, export_lines(there), "lines")
    assert ledger.active() == [3]
    ledger.revert([2])
    assert ledger.active() == [3]
    ledger.revert([3])
    assert ledger.active() == [1]


def test_what_goes_out_is_of_one_moment(ledger: Ledger, edits: list[Edit], lm: LanguageModel, tmp_path: Path) -> None:
    for edit in edits[:3]:
        ledger.commit(edit)
    lines = export_lines(ledger)
    begun = [next(lines), next(lines)]
    with Ledger(ledger.folder, lm) as other:
        other.commit(edits[3])
    with Ledger(tmp_path / "copy", lm) as copy:
        assert import_lines(copy, [*begun, *lines], "lines") == 3 and copy.active() == [1, 2, 3]
    assert ledger.active() == [1, 2, 3, 4]
