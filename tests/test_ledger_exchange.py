"""A ledger taken into another: what is in force then."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from random_editor import random_edit

from ibke.edit import Edit, EditInfo
from ibke.errors import FormatError, LedgerError
from ibke.gates import Gate, Told, gate_rows
from ibke.ledger import Ledger
from ibke.ledger.care import verify
from ibke.ledger.exchange import export_lines, import_lines
from ibke.models import LanguageModel
from ibke.neurons import Neurons
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
    with pytest.raises(LedgerError, match="edit 3 of the same fact is newer than edit 1"):
        ledger.restore([1])
    assert list(ledger.events()) == before and ledger.active() == [2, 3]
    ledger.revert([3])
    ledger.restore([1])
    assert ledger.active() == [1, 2]
    lines = list(export_lines(ledger))
    with Ledger(tmp_path / "copy", lm) as copy:
        copy.commit(second)
        first = {name: value for name, value in json.loads(lines[0]).items() if name not in ("shared", "digest")}
        import_lines(copy, [json.dumps({**first, "version": 1}), *lines[1:]], "lines")
        assert copy.active() == [2, 3]  # what was here of the same prompt gives way
        import_lines(copy, lines, "lines")
        assert copy.active() == [5, 6] and verify(copy) == []


def test_whatever_is_taken_back_no_two_of_one_prompt_are_in_force(ledger: Ledger, edits: list[Edit]) -> None:
    one, other = "The capital of Turkey is", "What is the capital of Turkey?"
    ledger.commit(about(edits[0], one))
    ledger.commit(about(edits[1], other), supersedes=[1])
    ledger.commit(about(edits[2], one))  # nobody has found out that it is the second's fact
    assert ledger.active() == [2, 3]
    ledger.revert([2])
    assert ledger.active() == [3]
    ledger.revert([3])
    assert ledger.active() == [1]


def test_a_restored_edit_does_not_stand_beside_one_of_the_same_fact(ledger: Ledger, edits: list[Edit]) -> None:
    def turkey(edit: Edit, prompt: str, target: str) -> Edit:
        return replace(edit, requests=(EditRequest(prompt, target, "Turkey"),))

    ledger.commit(turkey(edits[0], "The capital of Turkey is", "Izmir"))
    ledger.revert([1])
    ledger.commit(turkey(edits[1], "What is the capital of Turkey?", "Ankara"))
    ledger.commit(turkey(edits[2], "The president of Turkey is", "Bob"))
    with pytest.raises(LedgerError, match="edits 1 and 2 would be in force for the same fact"):
        ledger.restore([1])
    assert ledger.active() == [2, 3]
    ledger.revert([2])
    ledger.restore([1])
    assert ledger.active() == [1, 3]


def neurons(lm: LanguageModel, seed: int, prompt: str, threshold: float) -> Edit:
    """An edit whose gates open from a threshold on; such of different thresholds cannot be in force together."""
    keys_TD = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
    gate, constant_D = Gate(threshold, 200.0, 6.0), torch.linspace(0.5, 1.5, 32)
    told = Told(keys_TD[:2], keys_TD[2:], keys_TD * 0.1, torch.zeros(2, dtype=torch.long), gate)
    rows_2D = gate_rows(told.addresses(constant_D), constant_D, gate)[0]
    some = Neurons(rows_2D, constant_D.expand(2, -1).clone(), torch.ones(2, 32) * 0.01, told)
    info = EditInfo("ibke", lm.fingerprint)
    return Edit({}, (EditRequest(prompt, "x"),), info, {"model.layers.1.mlp.down_proj": some})


def test_what_does_not_go_together_does_not_come_in(ledger: Ledger, lm: LanguageModel, tmp_path: Path) -> None:
    ledger.commit(neurons(lm, 1, "The capital of Turkey is", 0.4))
    with Ledger(tmp_path / "other", lm) as other:
        other.commit(neurons(lm, 2, "The king of Spain is", 0.5))
        lines = list(export_lines(other))
    with pytest.raises(FormatError, match="different thresholds"):
        import_lines(ledger, lines, "lines")
    assert (ledger.head(), ledger.active()) == (1, [1])
    ledger.revert([1])
    import_lines(ledger, lines, "lines")
    with pytest.raises(LedgerError, match="different thresholds"):
        ledger.restore([1])
    assert ledger.active() == [2] and verify(ledger) == []


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


def test_what_was_taken_in_stands_over_what_the_edits_of_its_prompt_stood_over(
    ledger: Ledger, edits: list[Edit], lm: LanguageModel, tmp_path: Path
) -> None:
    one, other, third = "The capital of Turkey is", "What is the capital of Turkey?", "Turkey's capital is"
    ledger.commit(about(edits[0], one))
    ledger.commit(about(edits[1], other), supersedes=[1])
    with Ledger(tmp_path / "there", lm) as there:
        there.commit(about(edits[2], other))
        there.commit(about(edits[3], third), supersedes=[1])
        import_lines(ledger, export_lines(there), "lines")
    assert ledger.active() == [4] and ledger.entry(4).supersedes == (1, 2, 3)
    ledger.revert([2])
    assert ledger.active() == [4]
    ledger.revert([4])
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
