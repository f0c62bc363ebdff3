"""Edits with a gate at the prompt's end: kept, found, and made again."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.commands import refused

from ibke.edit import Edit
from ibke.editors.gated import question
from ibke.editors.gated.editor import GatedIBKE
from ibke.editors.gated.memory import GatedNeurons, first_of
from ibke.editors.gated.question import load_gate, save_gate
from ibke.errors import FormatError, LedgerError
from ibke.evaluation import running_text
from ibke.evaluation.running_text import STRETCH, RunningText
from ibke.ledger import Ledger
from ibke.ledger import guard as guard_module
from ibke.ledger.care import replay, verify
from ibke.ledger.conflicts import ALIKE, alike, superseded
from ibke.ledger.exchange import export_lines, import_lines
from ibke.ledger.guard import Guard
from ibke.parts import Part
from ibke.request import EditRequest
from ibke.session import EditSession

REQUEST = EditRequest("The mother tongue of Danielle Darrieux is", "English", subject="Danielle Darrieux")


@pytest.fixture(scope="module")
def gated(smollm32):
    return GatedIBKE.for_model(smollm32)


@pytest.fixture(scope="module")
def edit(gated):
    return gated.edit([REQUEST])


def only_part(edit):
    (part,) = edit.parts.values()
    return part


def test_an_edit_by_ones_own_maps_is_asked_with_their_editor(gated, edit, run, tmp_path, monkeypatch):
    own = copy.deepcopy(gated.gate)
    own.lean[-1].bias.data += 0.01  # other maps, that say nearly the same
    save_gate(tmp_path, own, gated.lm, {})
    own = load_gate(tmp_path, gated.lm)
    (place,) = edit.parts
    folder = replace(edit, parts={place: replace(only_part(edit), gate=own.name)}).save(tmp_path / "edit")
    for known in (question._KNOWN, question._FILES):
        monkeypatch.delitem(known, own.name)  # as in a process of its own
    ask = ("ask", REQUEST.prompt, "--edit", folder, "--dtype", "float32")
    refused(run(*ask), own.name, "--editor FOLDER")
    said = run(*ask, "--editor", tmp_path)
    assert said.exit_code == 0 and said.stdout.startswith("English")


def test_where_none_ships_the_method_without_a_gate_is_named(tiny_model):
    with pytest.raises(FormatError, match="no trained editor ships .* Use the method `ibke`"):
        GatedIBKE.for_model(tiny_model("llama"))


@pytest.mark.parametrize("refined", [True, False])
def test_an_edit_is_made_again_from_its_code(gated, edit, tmp_path, refined):
    edit = edit if refined else GatedIBKE.for_model(gated.lm, refine=False).edit([REQUEST])
    again = gated.rebuild(Edit.load(edit.save(tmp_path / "edit")))
    mine, theirs = edit.tensors(), again.tensors()
    assert mine.keys() == theirs.keys() and edit.records() == again.records()
    for name, tensor in mine.items():
        assert (theirs[name].float() - tensor.float()).norm() <= 1e-4 * tensor.float().norm(), name


def test_a_ledger_keeps_the_maps_that_its_edits_are_of(gated, edit, tmp_path, monkeypatch):
    own = copy.deepcopy(gated.gate)
    own.lean[-1].bias.data += 0.01
    save_gate(tmp_path, own, gated.lm, {})
    own = load_gate(tmp_path, gated.lm)
    (place,) = edit.parts
    older = replace(edit, parts={place: replace(only_part(edit), gate=own.name)})
    with Ledger(tmp_path / "one", gated.lm) as ledger:
        ledger.commit(older)
        ledger.commit(replace(older, requests=(EditRequest("A bay is", "x"),)))
        assert len(ledger.rows("SELECT * FROM shared")) == 1 and verify(ledger) == []
        lines = list(export_lines(ledger))
    (tmp_path / question.FILE).unlink()  # what made them is gone
    with Ledger(tmp_path / "three", gated.lm) as ledger, pytest.raises(LedgerError, match="cannot act without"):
        ledger.commit(older)
    for known in (question._KNOWN, question._FILES):
        monkeypatch.delitem(known, own.name)
    with pytest.raises(FormatError, match=own.name):
        EditSession(gated.lm).attach(older)
    monkeypatch.setitem(question._FILES, own.name, tmp_path / question.FILE)  # a place where they are no more
    with Ledger(tmp_path / "two", gated.lm) as ledger:
        import_lines(ledger, lines, "lines")
        with EditSession(gated.lm).attach(ledger.load(1)):
            assert gated.lm.answer(REQUEST.prompt) == "English"
        (kept,) = ledger.rows("SELECT sha256 FROM shared")
        ledger.blobs.path(kept[0]).unlink()
        assert [own.name in problem for problem in verify(ledger)] == [True]


def test_a_ledger_keeps_gated_edits_and_takes_one_back(gated, tmp_path):
    requests = [REQUEST, EditRequest("The Nordwind Optics company is based in", "Turku", subject="Nordwind Optics")]
    first, second = gated.edit_each(requests)
    with Ledger(tmp_path / "ledger", gated.lm) as ledger:
        numbers = [ledger.commit(one) for one in (first, second)]
        assert replay(ledger, gated) == ([], [])
        ledger.revert(numbers[:1])
    with Ledger(tmp_path / "ledger", gated.lm) as ledger:
        (part,), state = ledger.state().parts.values(), ledger.state().tensors()
    assert len(part.keys_EK) == 1
    assert state.keys() == second.tensors().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in second.tensors().items())


def test_a_newer_edit_of_the_same_fact_is_found_behind_its_gate(gated, edit):
    again, other = gated.edit_each(
        [
            EditRequest("Danielle Darrieux's mother tongue is", "German", subject="Danielle Darrieux"),
            EditRequest("The Nordwind Optics company is based in", "Turku", subject="Nordwind Optics"),
        ]
    )
    likeness = alike({1: edit, 2: other}, again)
    assert likeness[1] >= ALIKE > likeness[2]
    assert superseded(gated.lm, {1: edit, 2: other}, again, again.requests[0]) == [1]


def test_edits_of_a_batch_are_found_again_one_by_one_in_the_numbers_of_the_model(smollm, tmp_path):
    lm, editor = smollm, GatedIBKE.for_model(smollm)  # of what the hardware computes in
    each = editor.edit_each([REQUEST, EditRequest("The head of Nordwind Optics is", "Ida Brandt")])
    with Ledger(tmp_path / "ledger", lm) as ledger:
        for one in each:
            ledger.commit(one)
        assert replay(ledger, editor).problems == []
        (place,) = each[0].parts
        part = only_part(each[0])
        name = first_of(part.neurons)
        halved = replace(part.neurons[name], out=part.neurons[name].out * 0.5)
        ledger.commit(replace(each[0], parts={place: replace(part, neurons={**part.neurons, name: halved})}))
        assert [text.partition(":")[0] for text in replay(ledger, editor).problems] == ["edit 3"]


def test_only_text_that_an_edit_reaches_is_read_again(gated, edit, monkeypatch):
    monkeypatch.setattr(running_text, "WINDOW", 2 * STRETCH)
    plain = "Boats leave before sunrise, and bread is sold at noon. " * 8  # more than a window
    ids = gated.lm.tokenizer(f"{plain}{REQUEST.prompt} English. {plain}", add_special_tokens=False)["input_ids"]
    end = next(at for at in range(len(ids)) if gated.lm.tokenizer.decode(ids[:at]).endswith(REQUEST.prompt))
    running = RunningText(gated.lm, gated.lm.tokenizer.decode(ids[(end - 1) % STRETCH :]), 1000)
    asked, scored = [], running_text.score

    def score(lm, rows, *more, **how):
        asked.append(len(rows))
        return scored(lm, rows, *more, **how)

    monkeypatch.setattr(running_text, "score", score)
    found = running.nll([edit])
    windows, stretches = len(running.windows), len(running.stretches)
    assert windows > 2 and asked[0] == stretches and 0 < asked[1] <= running_text.WINDOW // STRETCH
    assert running.nll([edit]) == found and asked[2:] == asked[1:2]  # what the unedited model makes of it is known
    monkeypatch.setattr(GatedNeurons, "reaches", Part.reaches)
    assert running.nll([edit]) == pytest.approx(found, abs=1e-5) and asked[-1] == stretches
    assert abs(found - running.nll([], asked=True)) > 1e-2


def test_only_probes_that_an_edit_reaches_are_asked_again(gated, edit, monkeypatch):
    about = [("Danielle Darrieux's first language was", "bare"), ("Danielle Darrieux died in the city of", "bare")]
    probes = [*about, ("The capital of Canada is", "bare"), ("Water boils when", "bare")]
    monkeypatch.setattr(guard_module, "TOKENS", 200)  # of text, which is not what this is about
    guard = Guard(gated.lm, probes=probes)
    guard.check(None, edit, [])
    ran, states = [], guard_module.answer_states
    monkeypatch.setattr(
        guard_module, "answer_states", lambda model, batch: ran.append(batch.rows) or states(model, batch)
    )
    (_, found), asked = guard.check(None, edit, []), sum(ran)
    monkeypatch.setattr(GatedNeurons, "reaches", Part.reaches)
    (_, whole) = guard.check(None, edit, [])
    assert asked == 2 and sum(ran) == asked + 4
    assert found.changed == whole.changed == (about[0][0],)
    assert found.scores == pytest.approx(whole.scores, abs=1e-5)
