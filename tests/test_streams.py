"""Edits that come one after another: where a stream ends, and on which model each is made."""

from dataclasses import replace

import pytest
import torch
from tests.conftest import make_tiny
from tests.test_ibke import APART, REQUESTS, make_editor
from tests.test_session import hooks, logits, make_edit

from ibke.edit import Edit
from ibke.editors.ibke.editor import IBKEEditor
from ibke.editors.ibke.refine import RefineSettings
from ibke.errors import FormatError, IBKEError, RequestError
from ibke.evaluation.sequence import InSequence
from ibke.request import EditRequest
from ibke.session import EditSession, set_aside

FACTS = [
    EditRequest(text.format(name), target, subject=name)
    for text, facts in list(APART.items())[:2]
    for name, target in facts.items()
]


def tensors(edit: Edit) -> dict[str, torch.Tensor]:
    """All that an edit adds to the model, by name."""
    return {f"{name}.{part}": kept for name, some in edit.neurons.items() for part, kept in some.tensors().items()}


def relative(one: Edit, other: Edit) -> float:
    """The largest distance between two edits' tensors, relative to their size."""
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).norm() / theirs[name].norm()) for name in mine)


def streamed(editor, groups):
    """Where a stream of groups ends."""
    with InSequence(editor.lm) as edits:
        for group in groups:
            edits.add(editor.edit(group))
        return edits.whole


def test_a_stream_ends_where_one_joint_edit_does(smollm32):
    # The first guess of the code alone: what is refined again, because it does not hold beside others, is another edit.
    editor = IBKEEditor.for_model(smollm32, refine=False)
    joint = editor.edit(FACTS)
    one_by_one = streamed(editor, [[fact] for fact in FACTS])
    assert relative(one_by_one, joint) < 1e-5
    assert relative(streamed(editor, [FACTS[:3], FACTS[3:8], FACTS[8:]]), joint) < 1e-5
    # Without regard to each other's keys they would stand side by side as they were made.
    apart = [editor.edit([fact]) for fact in FACTS]
    ((name, whole),) = one_by_one.neurons.items()
    side_by_side = torch.cat([edit.neurons[name].gate for edit in apart])
    assert float((side_by_side - whole.gate).norm() / whole.gate.norm()) > 1e-3


def test_an_edit_is_made_on_the_pristine_model_or_on_the_live_one():
    editor = make_editor()
    live = make_editor(refine=RefineSettings(steps=6, learning_rate=0.3, base="live"))
    first, alone = editor.edit(REQUESTS[:1]), editor.edit(REQUESTS[1:])
    for made_by, same in ((editor, True), (live, False)):
        # Its edit changes every token, so that it is felt whatever the second request says.
        with EditSession(made_by.lm).attach(make_edit(made_by.lm, scale=0.1)).attach(first) as session:
            beside = made_by.edit(REQUESTS[1:])
            assert len(session.attached) == 2
        assert all(torch.equal(kept, tensors(alone)[name]) for name, kept in tensors(beside).items()) == same


def test_what_is_set_aside_comes_back_also_after_an_error():
    lm = make_tiny("llama")
    base = logits(lm)
    with EditSession(lm).attach(make_edit(lm)) as session, EditSession(lm).attach(make_edit(lm, seed=1)):
        both = logits(lm)
        with set_aside(lm):
            assert torch.equal(logits(lm), base) and lm.sessions == []
            with set_aside(lm), EditSession(lm).attach(make_edit(lm, seed=2)):
                assert not torch.equal(logits(lm), base)
            assert torch.equal(logits(lm), base)  # the inner one put nothing back that it had not taken off
        assert torch.equal(logits(lm), both)
        with pytest.raises(ZeroDivisionError), set_aside(lm):
            raise ZeroDivisionError
        assert torch.equal(logits(lm), both) and len(session.attached) == 1
    assert torch.equal(logits(lm), base) and lm.sessions == [] and hooks(lm) == 0


def test_what_cannot_be_attached_leaves_all_as_it_was(monkeypatch):
    editor = make_editor()
    lm = editor.lm
    first, second = editor.edit(REQUESTS[:1]), editor.edit(REQUESTS[1:])
    other = make_editor(threshold=0.3).edit(REQUESTS[1:])
    with EditSession(lm).attach(first) as session:
        one = logits(lm)
        with pytest.raises(FormatError, match="different thresholds"):
            session.attach(other)
        assert torch.equal(logits(lm), one) and session.attached == (first,)
        with monkeypatch.context() as broken:
            broken.setattr("ibke.session.attach_parts", lambda *_: 1 / 0 if len(session.attached) > 1 else [])
            with pytest.raises(ZeroDivisionError):
                session.attach(second)
        assert torch.equal(logits(lm), one) and session.attached == (first,)
        both = logits(session.attach(second).lm)
        assert torch.equal(logits(session.detach(second).lm), one) and not torch.equal(both, one)


def test_neurons_are_not_merged_beside_a_riding_update():
    editor = make_editor()
    edit = editor.edit(REQUESTS[:1])
    assert set(edit.neurons) & set(make_edit(editor.lm).factors)
    with EditSession(editor.lm).attach(make_edit(editor.lm)) as session:
        before = logits(editor.lm)
        with pytest.raises(IBKEError, match="another edit rides"):
            session.merge(edit)
        assert torch.equal(logits(editor.lm), before)


def test_another_base_is_refused():
    with pytest.raises(IBKEError, match="made on 'frozen'"):
        RefineSettings(base="frozen")


def test_two_targets_for_one_prompt_are_refused():
    other = replace(REQUESTS[0], target_new="Oslo")
    with pytest.raises(RequestError, match="'Rome' and 'Oslo'"):
        make_editor().edit([*REQUESTS, other])
