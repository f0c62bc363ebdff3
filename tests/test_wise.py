"""WISE against plain dense computations: what is learnt, who answers, how shards go together, and bad files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from ibke.edit import Edit, EditInfo
from ibke.editors.ike import IKE
from ibke.editors.lora import second_view
from ibke.editors.wise.editor import WISE, WISESettings, mask, ties
from ibke.editors.wise.memory import Memory, SideMemory
from ibke.errors import FormatError, IBKEError
from ibke.evaluation.generate import edited_rows, generate
from ibke.modules import weight_OI
from ibke.request import EditRequest
from ibke.session import EditSession

ONE = EditRequest("The capital of France is", "Canberra")
TWO = EditRequest("Who wrote the play?", "Paris")
TEXT = "It rained."


def side(*memories: tuple[torch.Tensor, float, str]) -> SideMemory:
    return SideMemory(tuple(Memory(delta, least, tuple(names), len(names)) for delta, least, names in memories))


def edit_of(lm, name, part) -> Edit:
    return Edit({}, (), EditInfo("test", lm.fingerprint), parts={name: part})


def dense_logits(lm, name, delta_OI, ids):
    """Logits of the model with one weight replaced."""
    module = lm.model.get_submodule(name)
    whole = weight_OI(module) + delta_OI
    weight = whole if module.weight.shape == whole.shape and module.weight is weight_OI(module) else whole.T
    return functional_call(lm.model, {f"{name}.weight": weight}, (torch.tensor([ids]),)).logits[0]


def fed(lm, module, ids):
    """What a module is fed by each token."""
    seen = []
    handle = module.register_forward_hook(lambda _, args, __: seen.append(args[0].reshape(len(ids), -1)))
    lm.model(torch.tensor([ids]))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_a_memory_is_that_of_plain_gradient_descent(tiny_model, model_type):
    lm = tiny_model(model_type)
    settings = WISESettings(iterations=3, learning_rate=0.05, alpha=0.1, layer=2, contexts=(TEXT,), bound=0.04)
    editor = WISE(lm, settings)
    edit = editor.edit([ONE])
    (memory,) = edit.parts[editor.place].memories
    pairs = [editor.pair(ONE.prompt, ONE.target_new), editor.pair(ONE.prompt, ONE.target_new, context=TEXT)]
    x = [fed(lm, editor.module, pair.fed)[1:] for pair in pairs]
    away = {text: fed(lm, editor.module, lm.tokenizer(text).input_ids)[1:] for text in editor.irrelevant}
    trained = mask(memory.shards[0], (x[0].shape[1], 32), 0.2)
    assert 0.1 < trained.mean() < 0.3

    def learn(far):
        delta = torch.zeros(32, x[0].shape[1], requires_grad=True)
        for _ in range(3):
            loss = 0.0
            for pair, words in zip(pairs, x, strict=True):
                logits = dense_logits(lm, editor.place, delta, pair.fed)[len(pair.prompt) - 1 :]
                near, off = ((some @ delta.T).norm(dim=-1).mean() for some in (words, far))
                margins = F.relu(off - 0.1) + F.relu(20 - near) + F.relu(10 - (near - off))
                loss = loss + (F.cross_entropy(logits, torch.tensor(pair.answer)) + margins) / 2
            (slope,) = torch.autograd.grad(loss, delta)
            delta = (delta - 0.05 * slope * trained).clamp(-0.04, 0.04).detach().requires_grad_()
        return delta.detach()

    # Which of the irrelevant texts was drawn is the editor's own business; it is one of them.
    wanted = min((learn(far) for far in away.values()), key=lambda delta: (delta - memory.delta_OI).norm())
    torch.testing.assert_close(memory.delta_OI, wanted, rtol=1e-3, atol=1e-5)
    assert memory.delta_OI.abs().max() == pytest.approx(0.04) and not memory.delta_OI[trained == 0].any()
    asked = x[0][: len(pairs[0].prompt) - 1]
    assert memory.threshold == pytest.approx(0.88 * float((asked @ wanted.T).norm(dim=-1).mean()), rel=1e-3)
    assert edit.info.refine_steps == 3


def test_the_memory_that_differs_most_answers_for_the_whole_row(tiny_model):
    lm = tiny_model("llama")
    name = "model.layers.1.mlp.down_proj"
    module = lm.model.get_submodule(name)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 64, generator=draw)
    small, large = (0.1 * scale * torch.randn(32, 64, generator=draw) for scale in (1, 2))
    apart = {key: (x[:, 1:] @ delta.T).norm(dim=-1).mean(1) for key, delta in (("s", small), ("l", large))}
    plain = module(x)
    # The larger one's threshold is between its second and its most distant row.
    least = float(apart["l"].sort().values[1:].mean())
    both = side((small, float(apart["s"].min()) * 0.99, "a"), (large, least, "b"))
    with EditSession(lm).attach(edit_of(lm, name, both)):
        routed = module(x)
    for row in range(3):
        delta = large if apart["l"][row] > least else small
        torch.testing.assert_close(routed[row], plain[row] + x[row] @ delta.T)
    far, never = side((large, float(apart["l"].min()) * 0.99, "c")), side((large, 1e9, "d"))
    with edited_rows(lm, [edit_of(lm, name, far), None, edit_of(lm, name, never)]):
        rows = module(x)
    torch.testing.assert_close(rows[0], plain[0] + x[0] @ large.T)
    assert torch.equal(rows[1:], plain[1:])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "falcon"])
def test_a_decision_stands_while_an_answer_is_generated(tiny_model, model_type):
    lm = tiny_model(model_type)
    editor = WISE(lm, WISESettings(layer=2))
    ids, more = lm.tokenizer(ONE.prompt).input_ids, lm.tokenizer(" Paris").input_ids
    delta = 0.3 * torch.randn(32, editor.module.weight.numel() // 32, generator=torch.Generator().manual_seed(1))
    asked = float((fed(lm, editor.module, ids)[1:] @ delta.T).norm(dim=-1).mean())
    decoder, head = lm.model.base_model, lm.model.get_output_embeddings()
    for threshold, wanted in ((asked * 0.999, delta), (asked * 1.001, 0 * delta)):
        edit = edit_of(lm, editor.place, side((delta, threshold, "a")))
        with EditSession(lm).attach(edit), torch.no_grad():
            out = decoder(input_ids=torch.tensor([ids]), use_cache=True)
            cache, logits = out.past_key_values, []
            for token in more:
                out = decoder(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                logits.append(head(out.last_hidden_state[0, -1]))
        plain = dense_logits(lm, editor.place, wanted, ids + more)[len(ids) :]
        torch.testing.assert_close(torch.stack(logits), plain, rtol=1e-3, atol=1e-3)


def test_padding_is_no_word(tiny_model):
    lm = tiny_model("llama")
    editor = WISE(lm, WISESettings(iterations=5, layer=1, contexts=(), beta=5.0, learning_rate=0.3))
    prompts = [
        editor.pair(text, "-").prompt for text in (ONE.prompt, TWO.prompt, "The author of the play of the play is")
    ]
    edits = [editor.edit([ONE]), editor.edit([TWO]), None]
    together = generate(lm, prompts, edits, max_new_tokens=6)
    alone = [generate(lm, [prompt], [edit], max_new_tokens=6)[0] for prompt, edit in zip(prompts, edits, strict=True)]
    assert together == alone
    assert [answer.ids for answer in generate(lm, prompts[:2], max_new_tokens=6)] != [a.ids for a in alone[:2]]


def test_a_copy_of_an_edited_model_decides_as_the_model_does(tiny_model):
    lm = tiny_model("llama")
    editor = WISE(lm, WISESettings(iterations=5, layer=1, contexts=(), beta=5.0, learning_rate=0.3))
    asked = editor.pair(ONE.prompt, "-").prompt
    padding = 40 * [lm.tokenizer.pad_token_id]
    mask = torch.tensor([[0] * len(padding) + [1] * len(asked)])
    with EditSession(lm).attach(editor.edit([ONE])):
        fed = {"input_ids": torch.tensor([padding + asked]), "attention_mask": mask}
        own, copied = (model(**fed).logits[:, len(padding) :] for model in (lm.model, second_view(lm.model)))
    assert torch.equal(own, copied) and not torch.allclose(own, lm.model(**fed).logits[:, len(padding) :])


def test_a_text_in_front_counts_as_words_whichever_came_first(tiny_model):
    lm = tiny_model("llama")
    editor = WISE(lm, WISESettings(iterations=5, layer=1, contexts=(), ratio=0.01))
    told, learnt = IKE(lm).edit([TWO]), editor.edit([ONE])
    prompts = [editor.pair(text, "-").prompt for text in (ONE.prompt, "The play")]
    answers = []
    for order in ((told, learnt), (learnt, told)):
        with EditSession(lm) as session:
            for edit in order:
                session.attach(edit)
            answers.append(generate(lm, prompts, max_new_tokens=4))
    assert answers[0] == answers[1]
    assert answers[0] not in [generate(lm, prompts, [edit] * 2, max_new_tokens=4) for edit in (told, learnt)]


def test_a_question_of_one_word_is_kept_apart_by_that_word(tiny_model, tmp_path):
    lm = tiny_model("llama")
    editor = WISE(lm, WISESettings(iterations=3, layer=2))
    edit = editor.edit([EditRequest("a", "Rome")])
    assert len(editor.pair("a", "Rome").prompt) == 1
    (memory,) = edit.parts[editor.place].memories
    (x_I,) = fed(lm, editor.module, editor.pair("a", "Rome").prompt)
    wanted = editor.settings.ratio * (memory.delta_OI @ x_I).norm().item()
    assert memory.threshold == pytest.approx(wanted, rel=1e-4)
    assert Edit.load(edit.save(tmp_path / "edit")).parts


def test_ties_trims_elects_and_averages():
    one = torch.tensor([[4.0, -3.0, 0.5, 0.0]])
    two = torch.tensor([[2.0, 5.0, -0.1, 0.0]])
    assert torch.equal(ties([one, two], 0.5), torch.tensor([[3.0, 5.0, 0.0, 0.0]]))
    assert torch.equal(ties([one, two], 1.0), torch.tensor([[3.0, 5.0, 0.5, 0.0]]))


def test_full_shards_are_merged_and_take_the_place_of_their_parts(tiny_model):
    lm = tiny_model("llama")
    settings = WISESettings(iterations=2, layer=1, shard_size=2, contexts=(), density=1.0)
    three = EditRequest("The author of the play is", "known")
    editor = WISE(lm, settings)
    first = editor.edit([ONE])
    with EditSession(lm).attach(first) as session:
        second = editor.after(first).edit([TWO])
        session.attach(second)
        (grown,) = SideMemory.join([first.parts[editor.place], second.parts[editor.place]]).memories
        assert grown.edits == 2 and grown.shards == first.parts[editor.place].memories[0].shards
        later = editor.after(first).after(second)
        third = later.edit([three, EditRequest("The capital of Australia is", "France"), ONE])
        session.attach(third)
    merged, open_one = third.parts[editor.place].memories
    assert merged.edits == 4 and len(merged.shards) == 2 and open_one.edits == 1
    whole = first.compose(second).compose(third).parts[editor.place]
    assert [memory.shards for memory in whole.memories] == [merged.shards, open_one.shards]
    assert len({*merged.shards, *open_one.shards}) == 3 and editor.known is None
    # Learnt at once, it is the same; and the merged copy is made of its two shards by TIES.
    at_once = WISE(lm, settings).edit([ONE, TWO]).parts[editor.place].memories[0]
    torch.testing.assert_close(at_once.delta_OI, grown.delta_OI)
    alone = [mask(name, (64, 32), 0.2) for name in merged.shards]
    only_first = (alone[0] > 0) & (alone[1] == 0)
    torch.testing.assert_close(merged.delta_OI[only_first], grown.delta_OI[only_first])
    assert not merged.delta_OI[(alone[0] == 0) & (alone[1] == 0)].any() and merged.threshold <= grown.threshold


def test_edits_made_apart_stand_side_by_side(tiny_model):
    lm = tiny_model("llama")
    editor = WISE(lm, WISESettings(iterations=2, layer=1, contexts=()))
    parts = [editor.edit([request]).parts[editor.place] for request in (ONE, TWO, ONE)]
    assert len(SideMemory.join(parts).memories) == 2
    with pytest.raises(FormatError, match="sizes differ"):
        SideMemory.join([parts[0], side((torch.ones(2, 2), 1.0, "z"))])


def test_a_side_memory_that_is_none_is_refused(tiny_model):
    good = side((torch.ones(3, 2), 0.5, "a"), (torch.ones(3, 2), 0.5, "b"))
    back = SideMemory.read(good.tensors(), good.record())
    assert [memory.shards for memory in back.memories] == [("a",), ("b",)] and back.memories[0].threshold == 0.5
    tensors, record = good.tensors(), good.record()
    for broken, other in (
        ({}, record),
        (tensors, {}),
        (tensors, {**record, "shards": ["a", "b"]}),
        (tensors, {**record, "shards": []}),
        (tensors, {**record, "edits": [1, 0]}),
        (tensors, {**record, "edits": [1]}),
        ({**tensors, "thresholds": torch.ones(1)}, record),
        ({**tensors, "deltas": torch.ones(2, 3)}, record),
        ({**tensors, "deltas": torch.full((2, 3, 2), torch.nan)}, record),
        ({**tensors, "deltas": torch.ones(2, 3, 2).half()}, record),
    ):
        with pytest.raises(FormatError, match="side memory"):
            SideMemory.read(broken, other)
    lm = tiny_model("llama")
    with pytest.raises(FormatError, match="2 inputs and 3 outputs"):
        EditSession(lm).attach(edit_of(lm, "model.layers.1.mlp.down_proj", good))


def test_settings_out_of_range_are_named():
    for settings, text in (({"beta": -1}, "`beta` is below 0"), ({"ratio": 2}, "`ratio` is above 1")):
        with pytest.raises(IBKEError, match=text):
            WISESettings(**settings)
