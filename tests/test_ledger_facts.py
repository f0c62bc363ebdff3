"""What a ledger and its guard refuse: two answers to one fact, edits that do not go together, a changed model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_tiny
from keeping import LOOSE, PROBES
from random_editor import RandomEditor, random_edit
from test_ledger_exchange import neurons

from ibke.cli.keep import Keeping, numbered
from ibke.edit import Edit
from ibke.errors import IBKEError, LedgerError, RequestError
from ibke.evaluation.baseline import Baseline
from ibke.ledger import Ledger
from ibke.ledger.conflicts import same_facts
from ibke.ledger.exchange import export_lines, import_lines
from ibke.ledger.guard import Guard
from ibke.ledger.keeper import Keeper
from ibke.models import LanguageModel
from ibke.request import EditRequest
from ibke.session import EditSession


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make_tiny("llama")


@pytest.fixture
def ledger(lm: LanguageModel, tmp_path: Path):
    with Ledger(tmp_path / "ledger", lm) as opened:
        yield opened


def of(edit: Edit, prompt: str, subject: str) -> Edit:
    return replace(edit, requests=(EditRequest(prompt, "x", subject),))


def test_a_longer_name_of_the_same_subject_is_the_same_fact(ledger: Ledger, lm: LanguageModel) -> None:
    one, other = (random_edit(lm, 1, seed=seed, scale=0.5, layers=[1]) for seed in (1, 2))
    ledger.commit(of(one, "The CEO of Microsoft is", "Microsoft"))
    ledger.revert([1])
    ledger.commit(of(other, "The CEO of Microsoft Corporation is", "Microsoft Corporation"))
    with pytest.raises(LedgerError, match="edits 1 and 2 would be in force for the same fact"):
        ledger.restore([1])
    assert ledger.active() == [2]


def test_what_comes_in_takes_the_place_of_the_same_fact_in_other_words(
    ledger: Ledger, lm: LanguageModel, tmp_path: Path
) -> None:
    one, other, third = (random_edit(lm, 1, seed=seed, scale=0.5, layers=[1]) for seed in (1, 2, 3))
    ledger.commit(of(one, "The capital of Turkey is", "Turkey"))
    ledger.commit(of(third, "The currency of Turkey is", "Turkey"))
    with Ledger(tmp_path / "other", lm) as theirs:
        theirs.commit(of(other, "What is the capital of Turkey?", "Turkey"))
        lines = list(export_lines(theirs))
    assert import_lines(ledger, lines, "lines") == 1
    assert ledger.active() == [2, 3]


def test_of_many_requests_those_of_one_fact_are_found() -> None:
    named = [("Oslo", "mayor"), ("Oslo", "river"), ("Old Oslo", "mayor"), ("Bergen", "mayor")]
    asked = {number: [EditRequest(f"The {what} of {who} is", "x", who)] for number, (who, what) in enumerate(named)}
    assert list(same_facts(asked, {0})) == [(0, 2)]
    assert list(same_facts(asked, {1, 2})) == [(2, 0)]
    assert list(same_facts({7: [EditRequest("the  river", "y")], 9: [EditRequest("The river", "x")]}, {9})) == [(9, 7)]


def test_what_comes_back_has_to_go_with_the_others(ledger: Ledger, lm: LanguageModel) -> None:
    for seed, prompt, threshold in ((1, "The harbour is", 0.4), (2, "The harbour is", 0.5), (3, "A bay is", 0.5)):
        ledger.commit(neurons(lm, seed, prompt, threshold))
    with pytest.raises(LedgerError, match="does not go together"):
        ledger.revert([2])
    assert ledger.active() == [2, 3]
    ledger.revert([1, 2])
    assert ledger.active() == [3]


def test_numbers_no_edit_has(ledger: Ledger) -> None:
    for number in (0, -1, 1, 10**20):
        with pytest.raises(LedgerError, match=f"there is no edit {number}"):
            ledger.entry(number)


def test_notes_are_texts(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="half a character"):
        Keeping(tmp_path, note="caf\udcc3")
    odd = tmp_path / os.fsdecode(b"caf\xc3.jsonl")
    odd.write_text('{"prompt": "a", "target_new": "b"}\n')
    assert [note for _, note in numbered(odd)] == ["caf?.jsonl#1"]


def test_a_model_with_merged_edits_is_no_pristine_one(ledger: Ledger, lm: LanguageModel, tmp_path: Path) -> None:
    keeper = Keeper(lm, ledger, RandomEditor(lm), Guard(lm, LOOSE, PROBES))
    known = Baseline(lm, tmp_path / "answers")
    known.keep("asked", 1)
    with EditSession(lm).merge(random_edit(lm, 1, seed=3, scale=0.5, layers=[1])):
        with pytest.raises(IBKEError, match="merged into this model's weights"):
            keeper.add_all([EditRequest("The harbour is", "x")])
        with pytest.raises(IBKEError, match="merged into this model's weights"):
            Guard(lm, LOOSE, PROBES)
        known.keep("asked", 2)
        assert known.recall("asked") is None
    assert known.recall("asked") == 1
    assert not lm.merged and not ledger.active()
