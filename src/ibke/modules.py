"""Which linear modules of a model may be edited, and how their weights lie in memory.

The only file that knows that GPT-2's ``Conv1D`` stores its weight transposed: everybody else sees ``nn.Linear``
orientation. Shape suffixes: O d_out, I d_in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ibke.errors import ModuleNotEditableError

Kind = Literal["mlp_out", "mlp_in", "attn_out"]


@dataclass(frozen=True)
class Architecture:
    """Where the editable linear maps of a model family are.

    Args:
        name: the ``model_type`` of the configuration.
        layers: dotted name of the list of transformer layers.
        mlp_out: last linear map of the MLP, within a layer.
        mlp_in: first linear map of the MLP (the value branch where it is gated), within a layer.
        attn_out: output projection of the attention, within a layer.
        final_norm: dotted name of the norm after the last layer.
        modules: full dotted names given by the caller; when set they stand in for the fields above.
    """

    name: str
    layers: str = ""
    mlp_out: str = ""
    mlp_in: str = ""
    attn_out: str = ""
    final_norm: str = ""
    modules: tuple[str, ...] = ()


def _llama_like(name: str, root: str = "model", mlp_in: str = "mlp.up_proj") -> Architecture:
    return Architecture(name, f"{root}.layers", "mlp.down_proj", mlp_in, "self_attn.o_proj", f"{root}.norm")


def _four_h(name: str, layers: str, attn_out: str, final_norm: str) -> Architecture:
    return Architecture(name, layers, "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", attn_out, final_norm)


ARCHITECTURES: dict[str, Architecture] = {
    arch.name: arch
    for arch in (
        *(_llama_like(name) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3")),
        _llama_like("gemma3", root="model.language_model"),
        _llama_like("phi3", mlp_in="mlp.gate_up_proj"),
        Architecture("gpt2", "transformer.h", "mlp.c_proj", "mlp.c_fc", "attn.c_proj", "transformer.ln_f"),
        Architecture("gptj", "transformer.h", "mlp.fc_out", "mlp.fc_in", "attn.out_proj", "transformer.ln_f"),
        Architecture(
            "opt", "model.decoder.layers", "fc2", "fc1", "self_attn.out_proj", "model.decoder.final_layer_norm"
        ),
        _four_h("gpt_neox", "gpt_neox.layers", "attention.dense", "gpt_neox.final_layer_norm"),
        _four_h("bloom", "transformer.h", "self_attention.dense", "transformer.ln_f"),
        _four_h("falcon", "transformer.h", "self_attention.dense", "transformer.ln_f"),
    )
}


def architecture_of(model: nn.Module, modules: Iterable[str] | None = None) -> Architecture:
    """The table's entry for a model, or one made of the names the caller gives.

    An architecture that is not in the table is no error yet: its model can be loaded and asked, and edited as soon as
    its modules are named.

    Args:
        model: a transformers causal language model.
        modules: full dotted names of the modules to edit, in forward order.

    Raises:
        ModuleNotEditableError: a name in ``modules`` does not exist or is not a linear map.
    """
    config: Any = model.config
    known = ARCHITECTURES.get(config.model_type, Architecture(config.model_type))
    if not modules:
        return known
    names = tuple(modules)
    resolve(model, names)
    # The list of layers is whatever stands before the first number in a module's name.
    layers = known.layers or re.split(r"\.\d+\.", names[0])[0]
    return Architecture(known.name, layers, final_norm=known.final_norm, modules=names)


def target_modules(
    lm: Any, arch: Architecture, layers: Sequence[int] | None = None, kind: Kind = "mlp_out"
) -> list[str]:
    """Full dotted names of one kind of module in the given layers.

    Args:
        lm: a transformers model, or a ``LanguageModel`` that holds one.
        arch: its architecture.
        layers: layer indices; None takes every layer.
        kind: ``mlp_out``, ``mlp_in`` or ``attn_out``; ignored where the caller named the modules.

    Raises:
        ModuleNotEditableError: the architecture is unknown and no modules are named, or a layer does not exist.
    """
    if arch.modules:
        return [name for name in arch.modules if layers is None or layer_index(name) in layers]
    suffix = getattr(arch, kind)
    if not suffix:
        raise ModuleNotEditableError(
            f"the architecture {arch.name!r} is not in the table.",
            "target modules",
            "Name the modules to edit, e.g. load_model(..., modules=['model.layers.5.mlp.down_proj']). "
            f"Known: {', '.join(sorted(ARCHITECTURES))}.",
        )
    model = lm if isinstance(lm, nn.Module) else lm.model
    count = len(resolve_any(model, arch.layers))
    chosen = range(count) if layers is None else layers
    for layer in chosen:
        if not 0 <= layer < count:
            raise ModuleNotEditableError(
                f"layer {layer} does not exist.", arch.layers, f"The model has layers 0 to {count - 1}."
            )
    return [f"{arch.layers}.{layer}.{suffix}" for layer in chosen]


def chosen_module(lm: Any, layer: int | None, deep: int, of: int) -> str:
    """The one module of a method that has one: the last that the caller named at loading, or else one of a layer.

    Args:
        lm: a ``LanguageModel``.
        layer: whose; None is as deep as a published one, see :func:`by_depth`.
        deep: the published layer.
        of: how many layers the published model has.

    Raises:
        ModuleNotEditableError: as :func:`target_modules` does.
    """
    layers = by_depth(lm, (deep,), of=of) if layer is None else [layer]
    return (list(lm.architecture.modules) or target_modules(lm, lm.architecture, layers))[-1]


def by_depth(lm: Any, published: Sequence[int], of: int) -> tuple[int, ...]:
    """Layers as deep in this model as some are in a published one; those of the modules that the caller named.

    Args:
        lm: the model.
        published: the published model's first and last layer, or its only one.
        of: how many layers that has.
    """
    if lm.architecture.modules:
        named = (layer_index(name) for name in lm.architecture.modules)
        return tuple(sorted({layer for layer in named if layer is not None}))
    count = len(resolve_any(lm.model, lm.architecture.layers)) if lm.architecture.layers else of
    first, last = (min(round(layer / of * count), count - 1) for layer in (published[0], published[-1]))
    return tuple(range(first, last + 1))


def first_layer(names: Iterable[str]) -> int:
    """The lowest layer that any of some modules is in.

    Raises:
        ModuleNotEditableError: there is no module, or one of them is in no layer.
    """
    found = []
    for name in names:
        layer = layer_index(name)
        if layer is None:
            raise ModuleNotEditableError("this module is in no layer.", name, "Name modules within the layers.")
        found.append(layer)
    if not found:
        raise ModuleNotEditableError(
            "none of the named modules is in a layer that is to be changed.", "layers", "Name others, or other layers."
        )
    return min(found)


def linear_modules(lm: Any, layers: Iterable[int] = ()) -> list[str]:
    """Full dotted names of every linear map in the given layers (none is all), or of those the caller named.

    Raises:
        ModuleNotEditableError: the architecture is unknown, and the caller named none.
    """
    arch = lm.architecture
    if not arch.layers:
        return target_modules(lm, arch)  # those named, or it says that some have to be
    return list(arch.modules) or [
        f"{arch.layers}.{layer}.{name}"
        for layer in layers or range(len(resolve_any(lm.model, arch.layers)))
        for name, module in resolve_any(lm.model, f"{arch.layers}.{layer}").named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]


def stored_transposed(module: nn.Module) -> bool:
    """Whether a linear module keeps its weight as d_in × d_out."""
    return isinstance(module, Conv1D)


def resolve_any(model: nn.Module, name: str) -> Any:
    """The submodule of that dotted name, of whatever type.

    Raises:
        ModuleNotEditableError: there is none; names the nearest match.
    """
    with suppress(AttributeError):
        return model.get_submodule(name)
    if name in dict(model.named_parameters()):
        raise ModuleNotEditableError(
            "this is a parameter, not a linear module (mixture-of-experts weights are fused like this).",
            name,
            "Name a linear module instead, e.g. the attention's output projection.",
        )
    near = difflib.get_close_matches(name, dict(model.named_modules()), n=1, cutoff=0.0)
    raise ModuleNotEditableError("the model has no such module.", name, f"Did you mean {near[0]!r}?" if near else "")


def resolve(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The linear modules of those dotted names.

    Raises:
        ModuleNotEditableError: a name does not exist (with the nearest match) or is not a linear map.
    """
    found = {}
    for name in names:
        module = resolve_any(model, name)
        if not isinstance(module, nn.Linear | Conv1D):
            raise ModuleNotEditableError(
                f"a {type(module).__name__} is not a linear map (fused mixture-of-experts weights are not either).",
                name,
                _suggest_within(module, name),
            )
        found[name] = module
    return found


def in_out(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear module."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    raise ModuleNotEditableError("not a linear map.", type(module).__name__, "Choose an nn.Linear or Conv1D.")


def weight_OI(module: nn.Module) -> Tensor:
    """A view of a linear module's weight in ``nn.Linear`` orientation (d_out × d_in).

    Raises:
        ModuleNotEditableError: the module is not linear, or its weight is stored packed (quantised).
    """
    d_in, d_out = in_out(module)
    weight: Any = module.weight
    view = weight.T if isinstance(module, Conv1D) else weight
    if tuple(view.shape) != (d_out, d_in) or not view.is_floating_point():
        raise ModuleNotEditableError(
            "the weight is stored packed, so nothing can be folded into it.",
            type(module).__name__,
            "Attach the edit instead of merging it, or load the model unquantised.",
        )
    return view


@torch.no_grad()
def add_delta_(module: nn.Module, delta_OI: Tensor) -> None:
    """Add an update to a linear module's weight in place, summed in float32 and rounded once.

    Args:
        module: a linear module.
        delta_OI: the update in ``nn.Linear`` orientation (d_out × d_in).
    """
    weight = weight_OI(module)
    weight.copy_(weight.float() + delta_OI.to(weight.device, torch.float32))


@torch.no_grad()
def insert_outputs_(module: Any, inserts: Sequence[tuple[int, Tensor]]) -> None:
    """Give a linear module more outputs, with zero bias, under new parameters; the old ones are left as they were.

    Args:
        module: a linear module.
        inserts: the place (an index of the outputs it has) and the rows (K × d_in) to put there, in order.
    """
    weight, bias = weight_OI(module), module.bias
    rows, biases, begin = [], [], 0
    for place, more_KI in [*inserts, (len(weight), weight[:0])]:
        rows += [weight[begin:place], more_KI.to(weight)]
        if bias is not None:
            biases += [bias[begin:place], bias.new_zeros(len(more_KI))]
        begin = place
    set_parameters_(module, *_parameters(module, torch.cat(rows), torch.cat(biases) if bias is not None else None))


@torch.no_grad()
def append_inputs_(module: Any, columns_OK: Tensor) -> None:
    """Give a linear module more inputs, under a new parameter; the old one is left as it was."""
    weight = weight_OI(module)
    set_parameters_(module, *_parameters(module, torch.cat([weight, columns_OK.to(weight)], dim=1), module.bias))


def parameters_of(module: Any) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias of a linear module, as :func:`set_parameters_` takes them."""
    return module.weight, module.bias


def set_parameters_(module: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    """Put parameters in a linear module, which may change its size."""
    module.weight, module.bias = weight, bias
    if isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape
    else:
        module.out_features, module.in_features = weight.shape


def _parameters(
    module: nn.Module, weight_OI: Tensor, bias_O: Tensor | None
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """As the module stores them; a bias that is a parameter already is taken as it is."""
    learns = bool(module.weight.requires_grad)
    stored = (weight_OI.T if isinstance(module, Conv1D) else weight_OI).contiguous()
    if bias_O is not None and not isinstance(bias_O, nn.Parameter):
        bias_O = nn.Parameter(bias_O, requires_grad=learns)
    return nn.Parameter(stored, requires_grad=learns), bias_O


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that a model's answers end with."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    known = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in known if token is not None))


def finished_logits(model: Any, logits_NV: Tensor) -> Tensor:
    """What a model makes of its head's output: some scale it, some cap it (float32)."""
    config, logits_NV = model.config.get_text_config(), logits_NV.float()
    if scale := getattr(model, "logit_scale", None):  # Cohere
        logits_NV = logits_NV * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits_NV = logits_NV / scaling
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return torch.tanh(logits_NV / cap) * cap if cap else logits_NV


def layer_index(name: str) -> int | None:
    """The layer a module is in: the first number in its dotted name; None where there is none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _suggest_within(module: nn.Module, name: str) -> str:
    inner = [f"{name}.{child}" for child, sub in module.named_modules() if isinstance(sub, nn.Linear | Conv1D)]
    return f"Linear modules in it: {', '.join(inner[:4])}." if inner else "Choose an nn.Linear or Conv1D module."
