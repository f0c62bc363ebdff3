"""A context in front of a question is the same text fed whole."""

from __future__ import annotations

import pytest
import torch

from ibke.batch import Pair, collate
from ibke.context import PLACE, Context
from ibke.edit import Edit, EditInfo
from ibke.errors import FormatError, IBKEError, RequestError
from ibke.evaluation.generate import generate
from ibke.evaluation.scoring import score
from ibke.frames import FRAMES, encode_pair, opening
from ibke.modules import ARCHITECTURES
from ibke.session import EditSession

ONE, TWO = Context(("New Fact: The play is known.\n",), "Prompt: "), Context(("Paris.\n", "The author.\n"), "")
QUESTIONS = ("The capital of France is", "Who wrote the play?", "Australia")


def edit_of(lm, part: Context) -> Edit:
    return Edit({}, (), EditInfo("test", lm.fingerprint), parts={PLACE: part})


def whole(lm, ids: list[int], part: Context | None, frame: str) -> list[int]:
    """What the model is fed where the text is put in by hand."""
    text = lm.tokenizer(part.text, add_special_tokens=False).input_ids if part else []
    cut = len(opening(lm.tokenizer)[0]) if frame == "chat" else 0
    return ids[:cut] + text + ids[cut:]


def states(lm, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_attached_it_is_the_text_fed_whole(tiny_model, model_type, frame):
    lm = tiny_model(model_type)
    ids = encode_pair(QUESTIONS[0], "-", frame, lm.tokenizer).prompt
    before = states(lm, ids)
    with EditSession(lm).attach(edit_of(lm, ONE)):
        got = states(lm, ids)
    assert got.shape == before.shape
    fed = states(lm, whole(lm, ids, ONE, frame))
    torch.testing.assert_close(got[-3:], fed[-3:], rtol=1e-4, atol=1e-4)
    assert torch.equal(states(lm, ids), before)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "gemma3"])
def test_rows_of_a_batch_have_contexts_of_their_own(tiny_model, model_type, frame):
    lm = tiny_model(model_type)
    parts = [ONE, None, TWO]
    edits = [edit_of(lm, part) if part else None for part in parts]
    pairs = [encode_pair(question, "Paris.", frame, lm.tokenizer) for question in QUESTIONS]
    fed = [
        Pair(whole(lm, pair.prompt, part, frame), pair.answer, pair.span)
        for pair, part in zip(pairs, parts, strict=True)
    ]
    said = generate(lm, [pair.prompt for pair in pairs], edits, max_new_tokens=6)
    assert said == [generate(lm, [pair.prompt], max_new_tokens=6)[0] for pair in fed]
    for mine, theirs in zip(score(lm, pairs, edits), (score(lm, [pair])[0] for pair in fed), strict=True):
        assert mine.predicted == theirs.predicted
        assert mine.nll == pytest.approx(theirs.nll, abs=1e-4)


def test_generating_step_by_step_with_a_session_is_feeding_it_whole(tiny_model):
    lm = tiny_model("llama")
    ids = encode_pair(QUESTIONS[0], "-", "bare", lm.tokenizer).prompt
    with EditSession(lm).attach(edit_of(lm, TWO)):
        said = generate(lm, [ids], max_new_tokens=6)
        first = lm.model.model(torch.tensor([ids]), use_cache=True)
        again = lm.model.model(torch.tensor([[7]]), past_key_values=first.past_key_values, use_cache=True)
        last = lm.model.model(torch.tensor([[9]]), past_key_values=again.past_key_values, use_cache=True)
    assert said == generate(lm, [whole(lm, ids, TWO, "bare")], max_new_tokens=6)
    wanted = lm.model.model(torch.tensor([[*whole(lm, ids, TWO, "bare"), 7, 9]]))
    torch.testing.assert_close(last.last_hidden_state[0, -1], wanted.last_hidden_state[0, -1], rtol=1e-4, atol=1e-4)


def test_several_edits_stand_in_front_together(tiny_model):
    lm = tiny_model("llama")
    one, two = edit_of(lm, ONE), edit_of(lm, TWO)
    ids = encode_pair(QUESTIONS[0], "-", "bare", lm.tokenizer).prompt
    with EditSession(lm).attach(one).attach(two) as session:
        both = states(lm, ids)
        session.detach(one)
        alone = states(lm, ids)
    with EditSession(lm).attach(one.compose(two)):
        assert torch.equal(states(lm, ids), both)
    with EditSession(lm).attach(two):
        assert torch.equal(states(lm, ids), alone)
    assert one.compose(two).parts[PLACE].passages == ONE.passages + TWO.passages
    assert Context.join([ONE, TWO, ONE]).passages == TWO.passages + ONE.passages


def test_it_is_saved_and_read_and_never_merged(tiny_model, tmp_path):
    lm = tiny_model("llama")
    edit = edit_of(lm, ONE)
    assert Edit.load(edit.save(tmp_path / "edit")).parts == edit.parts
    assert edit.norm() == {}
    with pytest.raises(FormatError, match="changes no linear module"):
        edit.compress(1)
    with pytest.raises(IBKEError, match="cannot be merged"):
        EditSession(lm).merge(edit)


@pytest.mark.parametrize("record", [{}, {"passages": []}, {"passages": "x", "lead": ""}, {"passages": [1], "lead": ""}])
def test_a_record_that_is_none_is_refused(record):
    with pytest.raises(FormatError, match="no context"):
        Context.read({}, record)


def test_a_strange_place_and_a_full_window_are_named(tiny_model):
    lm = tiny_model("llama")
    strange = Edit({}, (), EditInfo("test", lm.fingerprint), parts={"model.layers.0": ONE})
    with pytest.raises(FormatError, match="in front of the question"):
        EditSession(lm).attach(strange)
    with EditSession(lm).attach(edit_of(lm, Context(("word " * 100,)))), pytest.raises(RequestError, match="window"):
        states(lm, [5, 6, 7])
    batch = collate([encode_pair("a", "b", "bare", lm.tokenizer)], lm.tokenizer.pad_token_id)
    assert lm.model(input_ids=batch.ids_RT).logits.isfinite().all()
