from __future__ import annotations

import hashlib

import pytest
import torch
from tests.random_editor import random_edit

import ibke.session
from ibke.edit import Edit, EditInfo
from ibke.errors import FingerprintMismatchError, FormatError, IBKEError, ModuleNotEditableError
from ibke.modules import ARCHITECTURES, in_out, resolve, target_modules
from ibke.parts import all_or_none
from ibke.session import EditSession

PROMPT = "The capital of Australia is"


def make_edit(lm, layers=(1, 2), seed=0, scale=0.05, rank=3, kind="mlp_out") -> Edit:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in resolve(lm.model, target_modules(lm, lm.architecture, layers, kind)).items():
        d_in, d_out = in_out(module)
        a_RI, b_OR = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        factors[name] = (a_RI * scale, b_OR * scale)
    return Edit(factors, (), EditInfo("test", lm.fingerprint))


def logits(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(**lm.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)).logits


def state_hash(lm) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(lm.model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hooks(lm) -> int:
    return sum(len(module._forward_hooks) for module in lm.model.modules())


@pytest.mark.parametrize("kind", ["mlp_out", "mlp_in", "attn_out"])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_attach_and_merge_agree_and_leave_no_trace(tiny_model, model_type, kind):
    lm = tiny_model(model_type)
    edit = make_edit(lm, kind=kind)
    base, state = logits(lm), state_hash(lm)
    with EditSession(lm).attach(edit):
        attached = logits(lm)
        assert state_hash(lm) == state
    assert torch.equal(logits(lm), base)
    with EditSession(lm) as session:
        merged = logits(session.merge(edit).lm)
        assert state_hash(lm) != state
    assert torch.equal(logits(lm), base)
    assert state_hash(lm) == state
    assert hooks(lm) == 0
    assert (attached - base).abs().max() > 1e-3
    torch.testing.assert_close(attached, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fixture", ["smollm", "smollm32"])
def test_real_model_is_restored_to_the_bit(request, fixture):
    lm = request.getfixturevalue(fixture)
    edit = make_edit(lm, layers=range(20, 25), scale=0.1)
    base, state = logits(lm), state_hash(lm)
    with EditSession(lm).attach(edit):
        assert not torch.equal(logits(lm), base)
    with pytest.raises(ZeroDivisionError), EditSession(lm).attach(edit).merge(make_edit(lm, seed=1)):
        assert not torch.equal(logits(lm), base)
        _ = 1 / 0
    assert torch.equal(logits(lm), base)
    assert state_hash(lm) == state
    assert hooks(lm) == 0


def test_real_model_attach_is_merge(smollm32):
    edit = make_edit(smollm32, layers=range(20, 25), scale=0.1)
    with EditSession(smollm32).attach(edit):
        attached = logits(smollm32)
    with EditSession(smollm32).merge(edit):
        merged = logits(smollm32)
    torch.testing.assert_close(attached, merged, rtol=1e-3, atol=1e-3)


def test_several_edits_at_once_are_their_composition(tiny_model):
    lm = tiny_model("llama")
    one, two = make_edit(lm), make_edit(lm, layers=(2, 3), seed=1, rank=5)
    base = logits(lm)
    with EditSession(lm).attach(one.compose(two)):
        composed = logits(lm)
    session = EditSession(lm).attach(one).attach(two)
    assert session.attached == (one, two)
    torch.testing.assert_close(logits(lm), composed)
    session.detach(one)
    assert session.attached == (two,)
    with_two = logits(lm)
    session.detach()
    assert torch.equal(logits(lm), base)
    with EditSession(lm).attach(two):
        assert torch.equal(logits(lm), with_two)


def test_edits_merged_one_after_another_are_rounded_once(tiny_model):
    lm = tiny_model("llama")
    lm.model.to(torch.bfloat16)
    name = "model.layers.1.mlp.down_proj"
    module = lm.model.get_submodule(name)
    before = module.weight.clone()
    edits = [random_edit(lm, 1, seed=seed, scale=2e-3, layers=[1]) for seed in range(60)]
    wanted = sum((edit.delta(name) for edit in edits), before.float()).bfloat16()
    with EditSession(lm) as session:
        for edit in edits:
            session.merge(edit)
        assert (module.weight != wanted).float().mean() < 0.01  # sums in another order
        assert (wanted != before).float().mean() > 0.5
    assert torch.equal(module.weight, before)


def test_attach_on_top_of_a_merge(tiny_model):
    lm = tiny_model("gpt2")
    one, two = make_edit(lm), make_edit(lm, seed=1)
    state = state_hash(lm)
    with EditSession(lm).merge(one) as session:
        session.merge(two)
        both = logits(lm)
    with EditSession(lm).merge(one).attach(two) as session:
        torch.testing.assert_close(logits(lm), both, rtol=1e-4, atol=1e-4)
        assert (session.merged, session.attached) == ((one,), (two,))
    assert state_hash(lm) == state


def test_failed_merge_changes_nothing(tiny_model, monkeypatch):
    lm = tiny_model("llama")
    session = EditSession(lm).merge(make_edit(lm))
    state, real = state_hash(lm), ibke.session.add_delta_
    calls = []

    def fail_on_second(module, delta):
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError
        real(module, delta)

    monkeypatch.setattr(ibke.session, "add_delta_", fail_on_second)
    with pytest.raises(MemoryError):
        session.merge(make_edit(lm, seed=1))
    assert state_hash(lm) == state
    assert len(session.merged) == 1


def test_edit_of_another_model_is_refused(tiny_model):
    lm, other = tiny_model("llama"), tiny_model("llama", seed=1)
    state = state_hash(lm)
    for put in (EditSession(lm).attach, EditSession(lm).merge):
        with pytest.raises(FingerprintMismatchError) as caught:
            put(make_edit(other))
        assert lm.fingerprint in str(caught.value)
        assert other.fingerprint in str(caught.value)
    assert state_hash(lm) == state
    assert hooks(lm) == 0


def test_edit_that_does_not_fit_is_refused_before_anything_changes(tiny_model):
    lm = tiny_model("llama")
    state = state_hash(lm)
    good = make_edit(lm).factors
    wrong_shape = Edit(
        {**good, "model.layers.3.mlp.down_proj": (torch.ones(1, 3), torch.ones(32, 1))},
        (),
        EditInfo("x", lm.fingerprint),
    )
    wrong_name = Edit(
        {**good, "model.layers.3.mlp.down": (torch.ones(1, 64), torch.ones(32, 1))}, (), EditInfo("x", lm.fingerprint)
    )
    for put in (EditSession(lm).attach, EditSession(lm).merge):
        with pytest.raises(FormatError, match="32 × 3, the module 32 × 64"):
            put(wrong_shape)
        with pytest.raises(ModuleNotEditableError, match=r"down_proj'\?"):
            put(wrong_name)
    assert state_hash(lm) == state
    assert hooks(lm) == 0


def test_shared_weight_can_be_attached_to_but_not_merged(tiny_model):
    lm = tiny_model("llama", tie_word_embeddings=True)
    vocabulary = lm.model.config.vocab_size
    edit = Edit({"lm_head": (torch.ones(1, 32), torch.ones(vocabulary, 1))}, (), EditInfo("x", lm.fingerprint))
    base = logits(lm)
    with pytest.raises(ModuleNotEditableError, match=r"shared with model\.embed_tokens\.weight"):
        EditSession(lm).merge(edit)
    with EditSession(lm).attach(edit):
        assert not torch.equal(logits(lm), base)


def test_attaching_twice_and_detaching_what_is_not_there(tiny_model):
    lm = tiny_model("opt")
    edit = make_edit(lm)
    session = EditSession(lm).attach(edit)
    with pytest.raises(IBKEError, match="attached already"):
        session.attach(edit)
    session.detach(edit)
    with pytest.raises(IBKEError, match="not attached"):
        session.detach(edit)
    assert hooks(lm) == 0


def test_an_edit_is_in_force_once(tiny_model):
    lm = tiny_model("llama")
    edit, base = make_edit(lm), logits(lm)
    with EditSession(lm).attach(edit) as session:
        with pytest.raises(IBKEError, match="attached already"):
            session.merge(edit)
        session.detach(edit).merge(edit)
        for again in (session.merge, session.attach):
            with pytest.raises(IBKEError, match="merged already"):
                again(edit)
        assert session.merged == (edit,)
    assert torch.equal(logits(lm), base)


def test_of_hooks_that_cannot_all_be_put_on_none_stays(tiny_model):
    layer = tiny_model("llama").model.get_decoder().layers[0]

    def hooks():
        yield layer.register_forward_pre_hook(lambda *_: None)
        yield layer.register_forward_hook(lambda *_: None)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        all_or_none(hooks())
    assert not layer._forward_pre_hooks and not layer._forward_hooks
