"""Edits kept in groups, beside what others keep, and what is written down of them."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from keeping import LOOSE, PROBES, said
from random_editor import Careless, RandomEditor, random_edit

from ibke.editors.fine_tuning import BoundedFineTuning, FineTuning
from ibke.errors import RequestError
from ibke.fingerprint import mark
from ibke.ledger import Ledger
from ibke.ledger.guard import Guard, Limits
from ibke.ledger.keeper import ATTEMPTS, Keeper
from ibke.models import LanguageModel
from ibke.request import EditRequest, refuse_contradictions
from ibke.rows import continuations
from ibke.session import EditSession


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make_tiny("llama")


def test_of_a_group_only_what_does_harm_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    texts = ["The harbour", "Boats leave", "The market", "Snow is", "A loaf of"]
    spoken = [EditRequest(text, said(lm, text) or "-") for text in texts]
    spoken[2] = EditRequest(texts[2], "much")
    with Ledger(tmp_path, lm) as ledger:
        guard = Guard(lm, Limits(kl_nats=1e-6), PROBES)
        kept = Keeper(lm, ledger, Careless(lm), guard).add_all(spoken, force=True, notes=list("abcde"))
        assert [one.number is None for one in kept] == [False, False, True, False, False]
        assert any("KL" in broken for broken in kept[2].verdict.broken)
        assert ledger.active() == [1, 2, 3, 4]
        assert [event.note for event in ledger.events()] == ["a", "b", "d", "e"]
        assert Keeper(lm, ledger, Careless(lm), guard).add_all(spoken[:2])[0].already


def test_the_ledger_says_which_editor_it_was(lm: LanguageModel, tmp_path: Path) -> None:
    request = EditRequest("The harbour", said(lm, "The harbour"))
    with Ledger(tmp_path, lm) as ledger:
        editor = FineTuning.for_model(lm, epochs=1)
        Keeper(lm, ledger, editor).add(request, force=True)
        assert [entry.editor for entry in ledger.entries()] == [editor.mark]
    others = FineTuning.for_model(lm, epochs=2), BoundedFineTuning.for_model(lm, epochs=1)
    assert FineTuning.for_model(lm, epochs=1).mark == editor.mark != others[0].mark != others[1].mark != editor.mark
    weights = {"w": torch.ones(2, 3)}
    reshaped, renamed = {"w": torch.ones(3, 2)}, {"v": weights["w"]}
    assert len({mark("", weights), mark("x", weights), mark("", reshaped), mark("", renamed)}) == 4


def test_somebody_else_may_write_meanwhile(lm: LanguageModel, tmp_path: Path) -> None:
    checks = []

    class Slow(Guard):
        def check(self, before, after, *rest):
            checks.append(before)
            if len(checks) == 1:
                with Ledger(tmp_path, lm) as other:
                    other.commit(random_edit(lm, 1, seed=5, scale=0.0), note="theirs")
            return super().check(before, after, *rest)

    request = EditRequest("The harbour", said(lm, "The harbour"))
    with Ledger(tmp_path, lm) as ledger:
        kept = Keeper(lm, ledger, Careless(lm), Slow(lm, LOOSE, PROBES)).add(request, force=True)
        assert (kept.number, ledger.active()) == (2, [1, 2])
        assert checks[0] is None and checks[1] is not None  # checked again beside theirs


def test_whoever_is_overtaken_again_and_again_has_the_others_wait(lm: LanguageModel, tmp_path: Path) -> None:
    checks = []

    class Overtaken(Guard):
        def check(self, before, after, *rest):
            checks.append(before)
            if len(checks) <= ATTEMPTS:
                with Ledger(tmp_path, lm) as other:
                    other.commit(random_edit(lm, 1, seed=len(checks), scale=0.0))
            else:
                other = sqlite3.connect(tmp_path / "ledger.sqlite", timeout=0.0, isolation_level=None)
                with pytest.raises(sqlite3.OperationalError, match="locked"):
                    other.execute("BEGIN IMMEDIATE")
                other.close()
            return super().check(before, after, *rest)

    request = EditRequest("The harbour", said(lm, "The harbour"))
    with Ledger(tmp_path, lm) as ledger:
        kept = Keeper(lm, ledger, Careless(lm), Overtaken(lm, LOOSE, PROBES)).add(request, force=True)
        assert kept.number == ATTEMPTS + 1 and len(checks) == ATTEMPTS + 1
        assert ledger.commit(random_edit(lm, 1, seed=9, scale=0.0)) == ATTEMPTS + 2  # the lock is gone


def test_what_is_superseded_at_once_is_checked_too(lm: LanguageModel, tmp_path: Path) -> None:
    same = [EditRequest("The harbour", "much"), EditRequest("The harbour!", said(lm, "The harbour!") or "-")]
    with Ledger(tmp_path, lm) as ledger:
        guard = Guard(lm, Limits(kl_nats=1e-6), PROBES)
        first, second = Keeper(lm, ledger, Careless(lm), guard).add_all(same, force=True)
        assert first.number is None and any("KL" in broken for broken in first.verdict.broken)
        assert (second.number, second.supersedes, ledger.active()) == (1, (), [1])


def test_what_is_attached_is_no_part_of_what_is_measured(lm: LanguageModel, tmp_path: Path) -> None:
    probes = [("The lighthouse keeper wrote", "bare"), ("Seven bridges", "bare")]
    loud = random_edit(lm, 1, seed=3, scale=1.0)
    with EditSession(lm).attach(loud), Ledger(tmp_path, lm) as ledger:
        guard = Guard(lm, LOOSE, probes)
        kept = Keeper(lm, ledger, Careless(lm), guard).add(EditRequest("The harbour", "much"), force=True)
    expected = continuations(lm.model, lm.tokenizer, [pair.prompt for pair in guard.pairs])
    assert [pair.answer for pair in guard.pairs] == expected
    alone = Careless(lm).edit([EditRequest("The harbour", "much")])
    found = guard.check(None, alone, [])[1].scores["kl_nats"]
    assert kept.verdict is not None and kept.verdict.scores["kl_nats"] == pytest.approx(found) and found > 0


def test_of_two_in_a_group_the_later_is_in_force(lm: LanguageModel, tmp_path: Path) -> None:
    same = [EditRequest("The harbour", "one"), EditRequest("Boats leave", "x"), EditRequest("The harbour!", "two")]
    with Ledger(tmp_path, lm) as ledger:
        kept = Keeper(lm, ledger, Careless(lm)).add_all(same)
        assert [one.number for one in kept] == [1, 2, 3] and kept[2].supersedes == (1,)
        assert ledger.active() == [2, 3]
        with pytest.raises(RequestError, match="requests 1 and 2 say different things, 'one' and 'two'"):
            Keeper(lm, ledger, Careless(lm)).add_all([same[0], EditRequest(" the  harbour", "two")])
        refuse_contradictions([same[0], EditRequest("The harbour", "One.")])
        assert ledger.active() == [2, 3]


class Loud(RandomEditor):
    """Whose edits change every answer."""

    def edit(self, requests):
        made = random_edit(self.lm, 1, seed=1, scale=1.0)
        return replace(made, requests=tuple(requests))


@pytest.mark.parametrize("together", [False, True])
def test_what_an_earlier_request_of_a_group_takes_away_is_made(lm: LanguageModel, tmp_path: Path, together) -> None:
    right = EditRequest("The harbour lies!", said(lm, "The harbour lies!"))  # so far
    changed = said(lm, "The harbour lies", Loud(lm).edit([EditRequest("The harbour lies", "x")]))
    requests = [EditRequest("The harbour lies", changed), right]
    with Ledger(tmp_path, lm) as ledger:
        keeper = Keeper(lm, ledger, Loud(lm))
        kept = keeper.add_all(requests) if together else [keeper.add(request) for request in requests]
        assert [one.number for one in kept] == [1, 2] and ledger.active() == [2]
        assert kept[1].supersedes == (1,)


def test_what_a_later_request_of_a_group_takes_away_stays_away(lm: LanguageModel, tmp_path: Path) -> None:
    right = EditRequest("The harbour lies!", said(lm, "The harbour lies!"))
    changed = said(lm, "The harbour lies", Loud(lm).edit([EditRequest("The harbour lies", "x")]))
    with Ledger(tmp_path, lm) as ledger:
        kept = Keeper(lm, ledger, Loud(lm)).add_all([right, EditRequest("The harbour lies", changed)])
        assert [one.number for one in kept] == [None, 1] and ledger.active() == [1]
        assert [(one.already, one.overtaken) for one in kept] == [(False, True), (False, False)]


def test_a_group_is_written_down_as_a_whole(lm: LanguageModel, tmp_path: Path, monkeypatch) -> None:
    with Ledger(tmp_path, lm) as ledger:
        keeper, commit = Keeper(lm, ledger, Careless(lm)), ledger.commit

        def broken(edit, **how):
            if edit.requests[0].prompt == "Boats leave":
                raise KeyboardInterrupt
            return commit(edit, **how)

        monkeypatch.setattr(ledger, "commit", broken)
        group = [EditRequest("The harbour", "one"), EditRequest("Boats leave", "x")]
        with pytest.raises(KeyboardInterrupt):
            keeper.add_all(group)
        assert (ledger.head(), ledger.active(), keeper.state()) == (0, [], None)
        monkeypatch.undo()
        assert [one.number for one in keeper.add_all(group)] == [1, 2]
