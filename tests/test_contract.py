"""What every registered method must keep to; a new method is found here through the registry."""

import pytest
import torch
from tests.hypernetworks import briefly_trained

from ibke.edit import Edit
from ibke.editors.base import METHODS, method_class
from ibke.editors.hypernetwork.editor import HypernetworkEditor
from ibke.errors import IBKEError, MissingPackageError, RequestError, TrainingError
from ibke.evaluation.generate import generate
from ibke.fingerprint import fingerprint
from ibke.request import EditRequest
from ibke.session import EditSession

FACTS = [
    EditRequest("The mother tongue of Danielle Darrieux is", "English", subject="Danielle Darrieux"),
    EditRequest("Who is the head coach of the Lisbon Lynx?", "Marta Figueira", subject="Lisbon Lynx"),
    EditRequest("The headquarters of Nordwind Optics is in", "Turku", subject="Nordwind Optics"),
]


@pytest.fixture(scope="module", params=sorted(METHODS))
def editor(request, smollm32, tmp_path_factory):
    kind = method_class(request.param)
    path = None  # of what ships
    if issubclass(kind, HypernetworkEditor):
        path = briefly_trained(kind, smollm32, tmp_path_factory.mktemp("trained") / kind.name)
    try:
        return kind.for_model(smollm32, path, **kind.quick)
    except (MissingPackageError, TrainingError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def edit(editor):
    """Of the first fact."""
    return editor.edit(FACTS[:1])


@pytest.fixture(scope="module")
def each(editor):
    """Of all facts, made in one batch."""
    return editor.edit_each(FACTS)


def logits(lm, text="The capital of France is"):
    return lm.model(**lm.tokenizer(text, return_tensors="pt")).logits


def content(edit):
    """All that an edit puts into a model: its tensors, and what its parts hold beside them."""
    return edit.tensors(), edit.records()


def same(one, two):
    (mine, more), (theirs, others) = content(one), content(two)
    return (
        mine.keys() == theirs.keys() and more == others and all(torch.equal(mine[name], theirs[name]) for name in mine)
    )


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_editing_leaves_the_model_alone(editor):
    before, mark, hung = logits(editor.lm), fingerprint(editor.lm.model), hooks(editor.lm.model)
    edit = editor.edit(FACTS[:1])
    assert any(content(edit)) and edit.info.method == editor.name
    assert torch.equal(logits(editor.lm), before)
    assert fingerprint(editor.lm.model) == mark
    assert hooks(editor.lm.model) == hung


def test_an_attached_edit_changes_the_model_and_detaches_to_the_bit(editor, edit):
    before = logits(editor.lm, FACTS[0].prompt)
    with EditSession(editor.lm).attach(edit):
        assert not torch.allclose(logits(editor.lm, FACTS[0].prompt), before)
    assert torch.equal(logits(editor.lm, FACTS[0].prompt), before)


def test_the_same_request_gives_the_same_bytes(editor, edit):
    assert same(editor.edit(FACTS[:1]), edit)


def test_a_saved_edit_is_the_same_edit(edit, tmp_path):
    back = Edit.load(edit.save(tmp_path / "edit"))
    assert back.requests == edit.requests
    assert same(back, edit)


def test_independent_edits_in_a_batch_are_those_made_alone(editor, edit, each):
    made_alone = [edit, *(editor.edit([request]) for request in FACTS[1:])]
    for request, together, alone in zip(FACTS, each, made_alone, strict=True):
        assert together.requests == (request,)
        assert together.info.achieved == alone.info.achieved
        assert together.records() == alone.records()
        for name, tensor in alone.tensors().items():
            mine = together.tensors()[name]
            close = (mine.double() - tensor.double()).norm() < 2e-4 * tensor.double().norm()
            assert close or torch.equal(mine, tensor), name


def test_what_acts_is_attached_and_never_merged(editor, edit):
    before = logits(editor.lm, FACTS[0].prompt)
    with EditSession(editor.lm) as session:
        if edit.parts:
            with pytest.raises(IBKEError, match="cannot be merged"):
                session.merge(edit)
            assert not session.merged and torch.equal(logits(editor.lm, FACTS[0].prompt), before)
        else:
            session.merge(edit)
            assert not torch.allclose(logits(editor.lm, FACTS[0].prompt), before)
    assert torch.equal(logits(editor.lm, FACTS[0].prompt), before)


def test_edits_in_one_batch_act_on_their_own_rows(editor, each):
    prompts = [editor.pair(request.prompt, "-").prompt for request in FACTS]
    edits = [*each[:2], None]
    together = generate(editor.lm, prompts, edits, max_new_tokens=4)
    for prompt, one, answer in zip(prompts, edits, together, strict=True):
        with EditSession(editor.lm) as session:
            if one:
                session.attach(one)
            assert generate(editor.lm, [prompt], max_new_tokens=4) == [answer]


def test_several_requests_make_one_edit(editor):
    several = editor.edit(FACTS)
    assert several.requests == tuple(FACTS)
    assert all(tensor.isfinite().all() for tensor in several.tensors().values())


def test_a_sequence_goes_on_and_leaves_the_first_editor_as_it_was(editor, edit):
    with EditSession(editor.lm).attach(edit) as session:
        second = editor.after(edit).edit(FACTS[1:2])
        assert second.requests == tuple(FACTS[1:2])
        before = logits(editor.lm, FACTS[1].prompt)
        session.attach(second)
        assert not torch.allclose(logits(editor.lm, FACTS[1].prompt), before)
    assert same(editor.edit(FACTS[:1]), edit)


def test_no_request_is_an_error(editor):
    with pytest.raises(RequestError, match="no request"):
        editor.edit([])


def test_a_prompt_beyond_the_window_is_named(editor):
    with pytest.raises(RequestError, match="window"):
        editor.edit([EditRequest("word " * 9000, "x")])
    for beside in ({"rephrase_prompts": ("word " * 9000,)}, {"locality": ("word " * 9000,)}):
        with pytest.raises(RequestError, match="window"):
            editor.edit([EditRequest("Canberra is", "x", **beside)])


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(IBKEError, match="Did you mean 'ibke'"):
        method_class("ibkee")
