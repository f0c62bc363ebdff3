"""Fine-tuning and LoRA against plain dense computations on tiny random models; UltraEdit where it shares a check."""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import make_tiny

from ibke.editors import descent
from ibke.editors.base import method_class
from ibke.editors.descent import DescentSettings
from ibke.editors.fine_tuning import BoundedFineTuning, FineTuning, FineTuningSettings
from ibke.editors.lora import LoRA, LoRASettings, second_view
from ibke.editors.ultraedit import UltraEdit, UltraEditSettings
from ibke.errors import CaptureError, IBKEError, MissingPackageError, ModuleNotEditableError, RequestError
from ibke.fingerprint import fingerprint
from ibke.frames import encode_pair
from ibke.modules import weight_OI
from ibke.request import EditRequest
from ibke.session import EditSession

FACTS = [
    EditRequest("The capital of France is", "Rome"),
    EditRequest("Who?", "B"),
    EditRequest("The author of the play", "is known"),
]
ARCHITECTURES = ["llama", "gpt2", "opt"]
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="PEFT is not installed: pip install 'ibke[peft]'"
)
WITHOUT_PEFT = ["ft", "ft-l", "ultraedit"]
METHODS = [*WITHOUT_PEFT, pytest.param("lora", marks=needs_peft)]


def dense_loss(model, lm, requests=FACTS):
    """The loss from whole rows of the whole model, one by one: mean over requests of the mean over answer tokens."""
    losses = []
    for request in requests:
        pair = encode_pair(request.prompt, request.target_new, "bare", lm.tokenizer)
        ids = torch.tensor([pair.prompt + pair.answer])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(pair.prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits.float(), torch.tensor(pair.answer)))
    return torch.stack(losses).mean()


def dense_adam(lm, name, steps, rate, bound=math.inf, requests=FACTS):
    """The update of one dense weight, by Adam as Kingma and Ba write it."""
    model = copy.deepcopy(lm.model)
    module = model.get_submodule(name)
    weight = module.weight.requires_grad_(True)
    start, mean, square = weight.detach().clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, steps + 1):
        (grad,) = torch.autograd.grad(dense_loss(model, lm, requests), weight)
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad.square()
        with torch.no_grad():
            weight -= rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            weight.copy_(weight.clamp(start - bound, start + bound))
    whole, base = weight_OI(module).detach(), weight_OI(lm.model.get_submodule(name))
    return whole, whole - base


def untouched(lm):
    """What must be the same after an edit."""
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.model.modules()]
    grads = [parameter.requires_grad for parameter in lm.model.parameters()]
    names = [name for name, _ in lm.model.named_modules()]
    weights = [tensor.clone() for tensor in lm.model.state_dict().values()]
    return fingerprint(lm.model), hooks, grads, names, weights, sorted(vars(lm.model))


def same(before, after):
    return before[:4] == after[:4] and all(map(torch.equal, before[4], after[4])) and before[5] == after[5]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("steps", [1, 3])
def test_fine_tuning_is_adam_on_the_dense_weight(architecture, steps):
    lm = make_tiny(architecture)
    editor = FineTuning(lm, FineTuningSettings(learning_rate=1e-2, epochs=steps, layer=2))
    edit = editor.edit(FACTS)
    (name,) = edit.factors
    assert ".2." in name and edit.info.refine_steps == steps
    whole, delta = dense_adam(lm, name, steps, 1e-2)
    # Adam divides by the gradient's own size, so where it is next to nothing rounding decides.
    assert (edit.delta(name) - delta).norm() < 2e-3 * delta.norm()
    assert ((edit.delta(name) - delta).abs() < 1e-5).float().mean() > 0.97
    assert (weight_OI(lm.model.get_submodule(name)) + edit.delta(name) - whole).norm() < 1e-4 * whole.norm()


def test_no_truncated_decomposition_of_an_adam_update_is_smaller():
    lm = make_tiny("llama")
    edit = FineTuning(lm, FineTuningSettings(epochs=5)).edit(FACTS[:1])
    (name,) = edit.factors
    delta = edit.delta(name)
    values = torch.linalg.svdvals(delta.double())
    assert int((values > torch.finfo(torch.float32).eps * values[0]).sum()) == min(delta.shape)


def test_the_edited_model_is_the_tuned_model():
    lm = make_tiny("llama")
    edit = FineTuning(lm, FineTuningSettings(learning_rate=1e-2, epochs=3)).edit(FACTS)
    (name,) = edit.factors
    tuned = copy.deepcopy(lm.model)
    with torch.no_grad():
        tuned.get_submodule(name).weight += edit.delta(name)
    ids = lm.tokenizer(FACTS[0].prompt, return_tensors="pt").input_ids
    with EditSession(lm).attach(edit):
        torch.testing.assert_close(lm.model(ids).logits, tuned(ids).logits, rtol=1e-5, atol=1e-5)
    with EditSession(lm).merge(edit):
        assert torch.equal(lm.model.get_submodule(name).weight, tuned.get_submodule(name).weight)


def test_bounded_fine_tuning_stays_in_the_ball():
    lm = make_tiny("llama")
    settings = BoundedFineTuning.Settings(learning_rate=1e-2, epochs=4, bound=0.015)
    edit = BoundedFineTuning(lm, settings).edit(FACTS)
    (name,) = edit.factors
    delta = edit.delta(name)
    assert delta.abs().max() == torch.tensor(0.015)
    _, wanted = dense_adam(lm, name, 4, 1e-2, bound=0.015)
    assert ((delta - wanted).abs() < 1e-4).float().mean() > 0.97


def test_an_epoch_of_batches_takes_a_step_each_and_groups_change_nothing(monkeypatch):
    lm = make_tiny("llama")
    whole = FineTuning(lm, FineTuningSettings(epochs=2, batch_size=2)).edit(FACTS)
    assert whole.info.refine_steps == 4
    monkeypatch.setattr("ibke.batch.READ_TOKENS", 0)  # every length on its own
    apart = FineTuning(lm, FineTuningSettings(epochs=2, batch_size=2)).edit(FACTS)
    (name,) = whole.factors
    assert (whole.delta(name) - apart.delta(name)).norm() < 2e-3 * whole.delta(name).norm()


def test_training_stops_where_it_is_told():
    lm = make_tiny("llama")
    rate = {"learning_rate": 2e-2, "epochs": 200, "stop_loss": 0.9}
    by_loss = FineTuning(lm, FineTuningSettings(**rate)).edit(FACTS[:1])
    by_answer = FineTuning(lm, FineTuningSettings(**rate, stop_at_answer=True)).edit(FACTS[:1])
    assert by_answer.info.refine_steps < by_loss.info.refine_steps < 200
    for edit in (by_loss, by_answer):
        assert edit.info.achieved is True
        assert edit.info.nll_after < edit.info.nll_before
    pair = encode_pair(FACTS[0].prompt, FACTS[0].target_new, "bare", lm.tokenizer)
    assert by_loss.info.nll_after < 0.9 * len(pair.answer)
    with EditSession(lm).attach(by_answer):
        made = lm.model.generate(torch.tensor([pair.prompt]), max_new_tokens=len(pair.answer), do_sample=False)
    assert made[0, len(pair.prompt) :].tolist() == pair.answer


def test_reported_nll_is_that_of_the_whole_model():
    lm = make_tiny("llama")
    edit = FineTuning(lm, FineTuningSettings(epochs=2)).edit(FACTS[:1])
    tokens = len(encode_pair(FACTS[0].prompt, FACTS[0].target_new, "bare", lm.tokenizer).answer)
    assert edit.info.nll_before == pytest.approx(tokens * dense_loss(lm.model, lm, FACTS[:1]).item(), rel=1e-4)
    with EditSession(lm).attach(edit):
        assert edit.info.nll_after == pytest.approx(tokens * dense_loss(lm.model, lm, FACTS[:1]).item(), rel=1e-4)


def test_methods_without_memory_stay_as_they_are():
    editor = FineTuning(make_tiny("llama"), FineTuningSettings(epochs=1))
    assert editor.after(editor.edit(FACTS[:1])) is editor


def quick(name, lm):
    kind = method_class(name)
    return kind.for_model(lm, **kind.quick)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_untouched(name, architecture):
    lm = make_tiny(architecture)
    before, state = untouched(lm), torch.random.get_rng_state()
    one = quick(name, lm).edit(FACTS)
    assert same(before, untouched(lm))
    assert torch.equal(torch.random.get_rng_state(), state)
    two = quick(name, lm).edit(FACTS)
    assert all(torch.equal(two.tensors()[key], tensor) for key, tensor in one.tensors().items())
    assert one.info.nll_before > 0 and one.info.seconds > 0


@pytest.mark.parametrize("name", ["ft", "ft-l", pytest.param("lora", marks=needs_peft)])
def test_the_model_is_untouched_after_an_exception(name, monkeypatch):
    lm = make_tiny("llama")
    editor, before = quick(name, lm), untouched(lm)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(descent.Lessons, "_backward", fail)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(FACTS)
    assert same(before, untouched(lm))


def test_a_second_view_shares_weights_and_hooks_but_no_module():
    lm = make_tiny("gpt2")
    ids = lm.tokenizer(FACTS[0].prompt, return_tensors="pt").input_ids
    with EditSession(lm).attach(FineTuning(lm, FineTuningSettings(epochs=2)).edit(FACTS)):
        view = second_view(lm.model)
        assert torch.equal(view(ids).logits, lm.model(ids).logits)
    shared = {id(tensor) for tensor in (*lm.model.parameters(), *lm.model.buffers())}
    assert {id(tensor) for tensor in (*view.parameters(), *view.buffers())} == shared
    assert not {id(module) for module in view.modules()} & {id(module) for module in lm.model.modules()}


@needs_peft
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_factors_are_the_peft_model(architecture, monkeypatch):
    lm = make_tiny(architecture)
    editor = LoRA(lm, LoRASettings(epochs=3, learning_rate=1e-2))
    kept = []
    adapted = LoRA._adapted

    def keep(self, model):
        kept.append(adapted(self, model))
        return kept[-1]

    monkeypatch.setattr(LoRA, "_adapted", keep)
    edit = editor.edit(FACTS)
    ids = lm.tokenizer(FACTS[0].prompt, return_tensors="pt").input_ids
    base = lm.model(ids).logits
    with EditSession(lm).attach(edit), torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, kept[0].get_base_model()(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(lm.model(ids).logits, base)
    assert edit.rank == 8 and set(edit.factors) == set(editor.modules)
    assert edit.info.refine_steps == 3 and edit.info.nll_after < edit.info.nll_before


@needs_peft
def test_one_lora_step_is_adam_on_the_factors():
    lm = make_tiny("llama")
    edit = LoRA(lm, LoRASettings(epochs=1, learning_rate=1e-2, targets=("down_proj",), layers=(3,))).edit(FACTS)
    ((name, (a, b)),) = edit.factors.items()
    # B is zero at first, so A has no gradient yet and the first step moves B alone, by the rate, against the gradient.
    weight = lm.model.get_submodule(name).weight.requires_grad_(True)
    (grad,) = torch.autograd.grad(dense_loss(lm.model, lm), weight)
    towards = (4.0 * grad @ a.T).sign()
    assert ((b / 4.0 + 1e-2 * towards).abs() < 1e-4).float().mean() > 0.97


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'ibke\[peft\]'"):
        method_class("lora").for_model(make_tiny("llama"))


@needs_peft
def test_lora_names_modules_it_cannot_find():
    with pytest.raises(ModuleNotEditableError, match="called w_proj"):
        LoRA(make_tiny("llama"), LoRASettings(targets=("w_proj",)))


@pytest.mark.parametrize("name", METHODS)
def test_bad_requests(name):
    editor = quick(name, make_tiny("llama"))
    with pytest.raises(RequestError, match="no request"):
        editor.edit([])
    with pytest.raises(RequestError, match="window"):
        editor.edit([EditRequest("word " * 200, "x")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: DescentSettings(learning_rate=0), "`learning_rate` is not positive"),
        (lambda: DescentSettings(epochs=0), "`epochs` is below 1"),
        (lambda: FineTuning(make_tiny("llama"), FineTuningSettings(layer=9)), "layer 9 does not exist"),
        (lambda: FineTuningSettings(bound=-1), "`bound` is not positive"),
        (lambda: FineTuningSettings(bound=math.nan), "`bound` is nan, no finite number"),
        (lambda: FineTuningSettings(stop_loss=math.inf), "`stop_loss` is inf, no finite number"),
        (lambda: LoRASettings(alpha=math.inf), "`alpha` is inf, no finite number"),
        (lambda: LoRASettings(rank=0), "`rank` is below 1"),
        (lambda: UltraEditSettings(learning_rate=-1), "`learning_rate` is not positive"),
        (lambda: UltraEdit(make_tiny("llama"), UltraEditSettings(gate_layers=(9,))), "layer 9 does not exist"),
        (lambda: FineTuning.for_model(make_tiny("llama"), speed=3), "no setting 'speed'.*Known: .*layer"),
        (lambda: FineTuning.for_model(make_tiny("llama"), "runs/ft"), "ft: it has no trained weights.*'runs/ft'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(IBKEError, match=message):
        settings()


def test_a_loss_that_is_not_finite_is_an_error():
    lm = make_tiny("llama")
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(CaptureError, match="not finite"):
        FineTuning(lm).edit(FACTS)


def test_named_modules_are_trained_and_must_lie_in_layers():
    lm = make_tiny("llama")
    names = ("model.layers.1.mlp.up_proj", "model.layers.3.self_attn.o_proj")
    lm.architecture = type(lm.architecture)("llama", "model.layers", modules=names)
    assert set(FineTuning(lm, FineTuningSettings(epochs=1)).edit(FACTS).factors) == set(names)
    assert set(UltraEdit(lm).edit(FACTS).factors) == set(names)
    lm.architecture = type(lm.architecture)("llama", "model.layers", modules=("lm_head",))
    with pytest.raises(ModuleNotEditableError, match="in no layer"):
        FineTuning(lm)
