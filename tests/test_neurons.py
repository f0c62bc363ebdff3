"""Neurons added by an edit: a step that opens at one address, in every architecture."""

import pytest
import torch
from tests.conftest import make_tiny
from transformers.activations import ACT2FN

from ibke.edit import Edit, EditInfo
from ibke.errors import FormatError, ModuleNotEditableError
from ibke.gates import Gate
from ibke.modules import ARCHITECTURES, in_out, parameters_of, target_modules
from ibke.neurons import Neurons, Site, row_neurons
from ibke.session import EditSession

EVERY = sorted(ARCHITECTURES)
GATE = Gate(threshold=0.5, sharpness=200.0, ramp=20.0)


def site_of(lm, layer=1):
    return Site.find(lm.model, target_modules(lm, lm.architecture, [layer])[0])


def mlp_of(site):
    """What the neurons write for some inputs, the output projection's bias left out."""
    name = site.out.rpartition(".")[0]
    parent = site.model.get_submodule(name)
    out = site.modules[site.out]
    if name.endswith("mlp"):
        run = parent
    else:  # OPT keeps both projections in the layer itself

        def run(x):
            return parent.fc2(parent.activation_fn(parent.fc1(x)))

    def call(x_TD):
        if "bloom" in type(site.model).__name__.lower():
            written = out(parent.gelu_impl(parent.dense_h_to_4h(x_TD)))
        else:
            written = run(x_TD)
        return written - (out.bias if out.bias is not None else 0.0)

    return call


def edit_at(site, count=1, seed=0):
    """Neurons that apply where coordinate 1 of an input is 1, coordinate 0 being 1 throughout; and what they write."""
    width = in_out(site.entrance)[0]
    generator = torch.Generator().manual_seed(seed)
    constant_D, address_BD = torch.zeros(width), torch.zeros(count, width)
    constant_D[0] = 1.0
    address_BD[:, 1] = 1.0
    values_BD = torch.randn(count, width, generator=generator)
    return site.neurons(address_BD, constant_D, values_BD, GATE), values_BD


def inputs_for(site):
    """Six inputs of an MLP, of which only the first is at the address of :func:`edit_at`."""
    x_TD = torch.randn(6, in_out(site.entrance)[0], generator=torch.Generator().manual_seed(1))
    x_TD[:, 0] = 1.0
    x_TD[1:, 1], x_TD[0, 1] = 0.0, 1.0
    return x_TD


@pytest.mark.parametrize("architecture", EVERY)
def test_a_value_is_written_at_its_address_and_nothing_elsewhere(architecture):
    site = site_of(make_tiny(architecture))
    x_TD, run = inputs_for(site), mlp_of(site)
    neurons, values_BD = edit_at(site)
    before_TD = run(x_TD[None])[0]
    with row_neurons({site.out: site}, {site.out: neurons}):
        after_TD = run(x_TD[None])[0]
    assert torch.equal(after_TD[1:], before_TD[1:])
    torch.testing.assert_close(after_TD[0], before_TD[0] + values_BD[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", EVERY)
def test_widened_weights_compute_what_neurons_beside_them_do(architecture):
    site = site_of(make_tiny(architecture))
    x_TD, run = inputs_for(site), mlp_of(site)
    neurons = edit_at(site)[0][0]
    # Gates half open too, so that an activation other than the MLP's own would show.
    neurons = Neurons(neurons.gate / 100, neurons.value, neurons.out)
    before_TD = run(x_TD[None])[0]
    handles = site.attach(neurons)
    beside_TD = run(x_TD[None])[0]
    for handle in handles:
        handle.remove()
    kept = {name: (parameters_of(module), in_out(module)) for name, module in site.modules.items()}
    site.widen_(neurons)
    within_TD = run(x_TD[None])[0]
    assert (within_TD - before_TD).abs().max() > 1e-2
    torch.testing.assert_close(within_TD, beside_TD, rtol=1e-4, atol=1e-4)
    for name, module in site.modules.items():
        assert parameters_of(module)[0] is not kept[name][0][0] and in_out(module) != kept[name][1]


@pytest.mark.parametrize("architecture", EVERY)
def test_a_session_attaches_merges_and_takes_back(architecture):
    lm = make_tiny(architecture)
    site = site_of(lm)
    # Open to anything, so that every token shows it.
    generator = torch.Generator().manual_seed(2)
    neurons = edit_at(site)[0][0].map(lambda tensor: torch.randn(tensor.shape, generator=generator))
    edit, twice = (Edit({}, (), EditInfo("x", lm.fingerprint), {site.out: some}) for some in (neurons, neurons))
    state = {name: (tensor.shape, tensor.clone()) for name, tensor in lm.model.state_dict().items()}
    base = logits(lm)
    with EditSession(lm).attach(edit) as session:
        attached = logits(lm)
        both = logits(session.attach(twice).lm)
        torch.testing.assert_close(logits(session.detach(twice).lm), attached, rtol=0, atol=0)
    assert torch.equal(logits(lm), base)
    with EditSession(lm).merge(edit) as session:
        torch.testing.assert_close(logits(lm), attached, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(session.merge(twice).lm), both, rtol=1e-4, atol=1e-4)
    with EditSession(lm).merge(edit).attach(twice):
        torch.testing.assert_close(logits(lm), both, rtol=1e-4, atol=1e-4)
    with EditSession(lm).attach(edit.compose(twice)):
        torch.testing.assert_close(logits(lm), both, rtol=1e-4, atol=1e-4)
    assert (attached - base).abs().max() > 1e-3 and (both - attached).abs().max() > 1e-3
    assert torch.equal(logits(lm), base)
    now = lm.model.state_dict()
    assert all(now[name].shape == shape and torch.equal(now[name], was) for name, (shape, was) in state.items())


def logits(lm):
    text = lm.tokenizer("The capital of Australia is", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return lm.model(**text).logits


def test_every_row_has_neurons_of_its_own():
    site = site_of(make_tiny("phi3"))
    x_TD, run = inputs_for(site), mlp_of(site)
    neurons, values_BD = edit_at(site, count=3)
    with row_neurons({site.out: site}, {site.out: neurons}):
        rows_RTD = run(x_TD.expand(3, -1, -1))
    base_TD = run(x_TD[None])[0]
    torch.testing.assert_close(rows_RTD[:, 0], base_TD[0] + values_BD, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rows_RTD[:, 1:], base_TD[1:].expand(3, -1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("alike", [True, False])
def test_only_open_neurons_are_computed_on_and_the_sum_is_that_of_all(architecture, alike):
    site = site_of(make_tiny(architecture))
    x_TD, run = inputs_for(site), mlp_of(site)
    generator = torch.Generator().manual_seed(3)
    # Some open, some shut far below, one that says something that is no number.
    gate_KD = torch.randn(9, x_TD.shape[1], generator=generator)
    gate_KD[3:8, 0] = -400.0
    out_KD = torch.randn(gate_KD.shape, generator=generator)
    value_KD = torch.randn(1 if alike else 9, x_TD.shape[1], generator=generator).expand(9, -1).contiguous()
    neurons = Neurons(gate_KD, value_KD if site.value else None, out_KD)
    hidden_TK = site.activation(x_TD @ gate_KD.T) * (x_TD @ value_KD.T if site.value else 1.0)
    expected_TD = run(x_TD[None])[0] + hidden_TK @ out_KD
    # What shut ones would write is not even looked at.
    out_KD[3:8] = torch.nan
    handles = site.attach(neurons)
    torch.testing.assert_close(run(x_TD[None])[0], expected_TD, rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()
    neurons.gate[8, 0] = torch.nan
    handles = site.attach(neurons)
    assert run(x_TD[None]).isnan().all()
    for handle in handles:
        handle.remove()


def test_neurons_that_do_not_fit_are_refused():
    lm = make_tiny("llama")
    site = site_of(lm)
    good = edit_at(site)[0][0]
    with pytest.raises(FormatError, match="do not fit"):
        Edit({}, (), EditInfo("x", "f"), {site.out: Neurons(good.gate, good.value, good.out[:1])})
    with pytest.raises(FormatError, match="not finite"):
        Edit({}, (), EditInfo("x", "f"), {site.out: Neurons(good.gate, good.value, good.out * torch.nan)})
    narrow = Neurons(*(tensor[:, :7] for tensor in (good.gate, good.value, good.out)))
    for bad, message in ((narrow, "7 × 7, the module 32 × 32"), (Neurons(good.gate, None, good.out), "gated")):
        edit = Edit({}, (), EditInfo("x", lm.fingerprint), {site.out: bad})
        for put in (EditSession(lm).attach, EditSession(lm).merge):
            with pytest.raises(FormatError, match=message):
                put(edit)


@pytest.mark.parametrize("architecture", EVERY)
def test_every_architectures_mlp_is_found(architecture):
    site = site_of(make_tiny(architecture))
    glu = architecture in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "phi3", "smollm3")
    assert (site.value is not None) == glu
    assert site.out in site.modules and site.gate.name in site.modules


@pytest.mark.parametrize("module", ["mlp.up_proj", "self_attn.o_proj"])
def test_a_module_that_closes_no_mlp_is_named(module):
    lm = make_tiny("llama")
    with pytest.raises(ModuleNotEditableError, match="closes no MLP"):
        Site.find(lm.model, f"model.layers.1.{module}")


def test_an_activation_that_is_no_step_far_out_is_refused(tiny_model):
    lm = tiny_model("llama")
    lm.model.get_submodule("model.layers.1.mlp").act_fn = ACT2FN["relu2"]
    with pytest.raises(ModuleNotEditableError, match="2500 at 50"):
        Site.find(lm.model, "model.layers.1.mlp.down_proj")
