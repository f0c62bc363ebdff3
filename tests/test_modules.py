from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ibke.errors import ModuleNotEditableError
from ibke.modules import (
    ARCHITECTURES,
    add_delta_,
    architecture_of,
    in_out,
    linear_modules,
    resolve,
    target_modules,
    weight_OI,
)

KINDS = ("mlp_out", "mlp_in", "attn_out")


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_has_its_modules(tiny_model, model_type):
    lm = tiny_model(model_type)
    assert lm.architecture is ARCHITECTURES[model_type]
    for kind in KINDS:
        names = target_modules(lm, lm.architecture, kind=kind)
        assert names == target_modules(lm.model, lm.architecture, range(4), kind)
        assert len(set(names)) == 4
        sizes = [in_out(module) for module in resolve(lm.model, names).values()]
        assert all((d_in if kind == "mlp_in" else d_out) == 32 for d_in, d_out in sizes)
    assert isinstance(lm.model.get_submodule(lm.architecture.final_norm), nn.Module)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_edited_modules_are_the_ones_the_forward_pass_uses(tiny_model, model_type):
    lm = tiny_model(model_type)
    seen = []
    for kind in KINDS:
        for module in resolve(lm.model, target_modules(lm, lm.architecture, [2], kind)).values():
            module.register_forward_hook(lambda _m, args, out: seen.append((args[0].shape, out.shape)))
    lm.model(torch.tensor([[5, 6, 7]]))
    assert len(seen) == 3
    assert all(shape[-2] == 3 for pair in seen for shape in pair)


@pytest.mark.parametrize("module", [nn.Linear(5, 3), Conv1D(3, 5)])
def test_delta_has_linear_orientation_everywhere(module):
    x, delta_OI = torch.randn(7, 5), torch.randn(3, 5)
    before = module(x)
    assert in_out(module) == (5, 3)
    assert weight_OI(module).shape == (3, 5)
    add_delta_(module, delta_OI)
    torch.testing.assert_close(module(x), before + x @ delta_OI.T)


def test_delta_is_rounded_once_in_low_precision():
    module = nn.Linear(64, 64, bias=False).bfloat16()
    weight, delta = module.weight.detach().clone(), torch.randn(64, 64) * 1e-2
    add_delta_(module, delta)
    assert torch.equal(module.weight, (weight.float() + delta).bfloat16())


def test_unknown_module_names_the_nearest(tiny_model):
    lm = tiny_model("llama")
    with pytest.raises(ModuleNotEditableError, match=r"model\.layers\.2\.mlp\.down_proj'\?"):
        resolve(lm.model, ["model.layers.2.mlp.down_prj"])


def test_module_that_is_not_linear_is_refused(tiny_model):
    lm = tiny_model("llama")
    with pytest.raises(ModuleNotEditableError, match="mlp.gate_proj"):
        resolve(lm.model, ["model.layers.0.mlp"])
    with pytest.raises(ModuleNotEditableError, match="Embedding is not a linear map"):
        resolve(lm.model, ["model.embed_tokens"])
    with pytest.raises(ModuleNotEditableError, match="not a linear map"):
        in_out(nn.LayerNorm(3))


def test_layer_that_does_not_exist_is_refused(tiny_model):
    lm = tiny_model("gpt2")
    for layer in (-1, 4):
        with pytest.raises(ModuleNotEditableError, match="layers 0 to 3"):
            target_modules(lm, lm.architecture, [layer])


def test_fused_experts_are_refused_by_module_and_by_parameter(tiny_model):
    lm = tiny_model("mixtral", num_local_experts=2)
    experts = next(name for name, _ in lm.model.named_modules() if name.endswith("experts"))
    with pytest.raises(ModuleNotEditableError, match="fused"):
        resolve(lm.model, [experts])
    with pytest.raises(ModuleNotEditableError, match="fused"):
        resolve(lm.model, [f"{experts}.down_proj"])


def test_architecture_outside_the_table_works_with_named_modules(tiny_model):
    lm = tiny_model("stablelm")
    with pytest.raises(ModuleNotEditableError, match="'stablelm' is not in the table"):
        target_modules(lm, lm.architecture, [1])
    with pytest.raises(ModuleNotEditableError, match="'stablelm' is not in the table"):
        linear_modules(lm)
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 3)]
    arch = architecture_of(lm.model, names)
    assert linear_modules(replace(lm, architecture=arch)) == names
    assert target_modules(lm, arch) == names
    assert target_modules(lm, arch, layers=[3]) == names[1:]
    with pytest.raises(ModuleNotEditableError, match="Did you mean"):
        architecture_of(lm.model, ["model.layer.1.mlp.down_proj"])


def test_packed_weight_is_refused():
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModuleNotEditableError, match="packed"):
        add_delta_(module, torch.zeros(4, 4))
