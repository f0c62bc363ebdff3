"""Neurons taken over by an edit: a step that opens at one address, in every architecture."""

import pytest
import torch
from tests.conftest import make_tiny

from ibke.errors import ModuleNotEditableError
from ibke.modules import ARCHITECTURES, in_out, target_modules, weight_OI
from ibke.neurons import Gate, Site, choose, least_used
from ibke.partial import row_updates

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


@pytest.mark.parametrize("architecture", EVERY)
def test_a_value_is_written_at_its_address_and_nowhere_else(architecture):
    lm = make_tiny(architecture)
    site = site_of(lm)
    neurons, width = in_out(site.modules[site.out])
    generator = torch.Generator().manual_seed(0)
    # Inputs with a constant coordinate; the edit applies at the first, the others are at right angles to its address.
    x_TD = torch.randn(6, width, generator=generator)
    x_TD[:, 0] = 1.0
    x_TD[1:, 1], x_TD[0, 1] = 0.0, 1.0
    constant_D, address_BD = torch.zeros(width), torch.zeros(1, width)
    constant_D[0], address_BD[0, 1] = 1.0, 1.0
    values_BD, mine_BK = torch.randn(1, width, generator=generator), torch.tensor([[3, neurons - 2]])
    factors = site.factors(address_BD, constant_D, values_BD, mine_BK, GATE)
    run = mlp_of(site)
    before_TD = run(x_TD[None])[0]
    out_DI = weight_OI(site.modules[site.out]).clone()
    hidden: list[torch.Tensor] = []
    handle = site.modules[site.out].register_forward_pre_hook(lambda _, args: hidden.append(args[0].reshape(6, -1)))
    run(x_TD[None])
    handle.remove()
    taken_TD = hidden[0][:, mine_BK[0]] @ out_DI[:, mine_BK[0]].T
    with row_updates(site.modules, factors):
        after_TD = run(x_TD[None])[0]
    wanted_TD = before_TD - taken_TD
    wanted_TD[0] += values_BD[0]
    torch.testing.assert_close(after_TD, wanted_TD, rtol=1e-3, atol=1e-3)


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


def test_neurons_are_drawn_from_the_least_used_and_by_the_text():
    squares, out = torch.tensor([4.0, 1.0, 9.0, 0.01]), torch.eye(4)
    pool = least_used(squares, out)
    assert pool.tolist() == [3, 1, 0, 2]
    one = choose(pool, "a prompt", 2, 2)
    assert sorted(one.tolist()) == [1, 3] and torch.equal(one, choose(pool, "a prompt", 2, 2))
    assert len(set(choose(pool, "more", 4, 2).tolist())) == 4
