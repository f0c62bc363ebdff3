"""An edit as neurons of its own: a gate that opens at one address, and the value written behind it.

An MLP is a sum of neurons, each a gate that looks at the input and a vector it writes to the output. A linear update
W + ΔW answers every input a little; a neuron whose gate stays shut answers nothing at all. So an edit adds two neurons
to a layer. With the gate's pre-activation s = α (a·x − θ c·x), where a·x is 1 at the edit's address and c·x is 1
everywhere, the difference of the two,

    (act(s) − act(s − τ)) / τ,

is a step: 0 where a·x is below θ, 1 from θ + τ/α on, for every activation that is 0 far below zero and the identity far
above it. Seen in the weights: pad the MLP with empty neurons, which changes nothing; what the edit then puts in their
rows of the input projections and their columns of the output projection is a low-rank update of the padded matrices.

Shape suffixes: B edits, D width of the residual stream, I neurons of the MLP, K added neurons, R rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ibke.errors import FormatError, ModuleNotEditableError
from ibke.gates import Gate, Told, gate_rows
from ibke.modules import append_inputs_, in_out, insert_outputs_, resolve, resolve_any, target_modules
from ibke.parts import all_or_none

if TYPE_CHECKING:
    from ibke.models import LanguageModel

FAR = 50.0  # input at which an activation is as it is ever after
SHUT = 1e-30  # what a neuron says at most that is shut, to whatever the activation's far end rounds

# Where architectures keep the activation of an MLP, beside its projections or in the configuration.
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "gelu_impl")
_CONFIGURED = ("hidden_act", "hidden_activation", "activation_function", "activation")


@dataclass(frozen=True)
class Neurons:
    """Neurons to be added to an MLP.

    Args:
        gate: rows of the branch that goes through the activation (K × D, or R × K × D with rows of their own).
        value: rows of the branch the gate is multiplied with, shaped like ``gate``; None where the MLP has none.
        out: what each neuron writes, shaped like ``gate``.
        told: what the gates of the first ones were found from, where they have to be found again beside those of
            other edits (see :mod:`ibke.gates`). Neurons changed or picked out of others have none.
    """

    gate: Tensor
    value: Tensor | None
    out: Tensor
    told: Told | None = None

    @property
    def count(self) -> int:
        """K."""
        return self.gate.shape[-2]

    def map(self, change: Callable[[Tensor], Tensor]) -> Neurons:
        """The same with every tensor changed."""
        return Neurons(change(self.gate), None if self.value is None else change(self.value), change(self.out))

    def to(self, device: torch.device) -> Neurons:
        """The same on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def __getitem__(self, rows: Any) -> Neurons:
        """Those of some rows (or of one), where rows have neurons of their own."""
        return self.map(lambda tensor: tensor[rows])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors there are, by name; what gates were found from is none of them."""
        found = {"gate": self.gate, "value": self.value, "out": self.out}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def join(cls, parts: Sequence[Neurons]) -> Neurons:
        """Several sets side by side; gates that have to be told apart are found again, together.

        Raises:
            FormatError: their gates open at different thresholds.
        """
        if len(parts) == 1:
            return parts[0]
        # Those to be told apart come first, and what else there is of each behind them.
        told = [part.told for part in parts if part.told]
        if told:
            parts = [part.heard() for part in parts if part.told] + [part.unheard() for part in parts]
        values = [part.value for part in parts if part.value is not None]
        gate, out = (torch.cat([getattr(part, name) for part in parts], dim=-2) for name in ("gate", "out"))
        whole = cls(gate, torch.cat(values, dim=-2) if values else None, out)
        return whole.found_from(Told.join(told)) if told else whole

    @classmethod
    def stack(cls, sets: Mapping[int, Neurons], rows: int) -> Neurons:
        """Neurons of some rows side by side (rows × K × D), filled up with ones that write nothing."""
        parts = {row: some.tensors() for row, some in sets.items()}
        whole = {
            key: filled({row: part[key] for row, part in parts.items()}, rows) for key in next(iter(parts.values()))
        }
        return cls(whole["gate"], whole.get("value"), whole["out"])

    def by_edit(self, told: Sequence[Told]) -> list[Neurons]:
        """Of B × K × D, one set an edit with what tells it from others, where that is known of each."""
        return [replace(self[row], told=told[row] if told else None) for row in range(len(self.gate))]

    def heard(self) -> Neurons:
        """Those whose gates were found from keys that are known."""
        return self[..., : 2 * self.told.count if self.told else 0, :]

    def unheard(self) -> Neurons:
        """The others."""
        return self[..., 2 * self.told.count if self.told else 0 :, :]

    def found_from(self, told: Told) -> Neurons:
        """The same with the gates of the first ones found from these keys."""
        rows = told.rows(told.constant(self.gate)).to(self.gate)
        return replace(self, gate=torch.cat([rows, self.gate[len(rows) :]]), told=told)

    @classmethod
    def checked(cls, name: str, neurons: Neurons) -> Neurons:
        """The same as an Edit keeps them: K × D each, float32 and finite, on the CPU.

        Raises:
            FormatError: they are not.
        """
        told = neurons.told
        neurons = neurons.map(lambda tensor: tensor.detach().to("cpu", torch.float32))
        shapes = {part: tuple(tensor.shape) for part, tensor in neurons.tensors().items()}
        if neurons.gate.dim() != 2 or len(set(shapes.values())) > 1:
            raise FormatError(f"the neurons do not fit: {shapes}.", name, "Each is [neurons, width].")
        if not all(torch.isfinite(tensor).all() for tensor in neurons.tensors().values()):
            raise FormatError("the neurons hold values that are not finite.", name, "Make the edit again, in float32.")
        return replace(neurons, told=told)


@dataclass(frozen=True)
class Branch:
    """One input projection of an MLP.

    Args:
        name: dotted name of its linear module, which may hold several branches.
        end: its last-plus-one row there.
    """

    name: str
    end: int


@dataclass(frozen=True)
class Site:
    """The MLP of one layer, seen as neurons.

    Args:
        model: the model it is part of.
        gate: the branch that goes through the activation.
        value: the branch the gate is multiplied with, where the MLP has one.
        out: dotted name of the output projection.
        activation: what the gate goes through.
    """

    model: nn.Module
    gate: Branch
    value: Branch | None
    out: str
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def find(cls, model: nn.Module, out: str) -> Site:
        """The MLP that a given output projection closes, known by the shapes of the linear maps beside it.

        Raises:
            ModuleNotEditableError: nothing beside it leads into it, or its activation is not known.
        """
        neurons, width = in_out(resolve(model, [out])[out])
        parent = out.rpartition(".")[0]
        home = resolve_any(model, parent)
        beside = {
            f"{parent}.{name}" if parent else name: in_out(module)
            for name, module in home.named_children()
            if isinstance(module, nn.Linear | Conv1D)
        }
        # An MLP widens what it is fed; an attention's projections beside each other do not.
        widens = neurons > width
        whole = [name for name, size in beside.items() if size == (width, neurons) and widens]
        fused = [name for name, size in beside.items() if size == (width, 2 * neurons) and widens]
        if fused:
            return cls(model, Branch(fused[0], neurons), Branch(fused[0], 2 * neurons), out, _activation(home, model))
        if len(whole) == 2:
            gate, value = sorted(whole, key=lambda name: "gate" not in name.rpartition(".")[2])
            return cls(model, Branch(gate, neurons), Branch(value, neurons), out, _activation(home, model))
        if len(whole) == 1:
            return cls(model, Branch(whole[0], neurons), None, out, _activation(home, model))
        raise ModuleNotEditableError(
            "no linear map beside this module leads into it, so it closes no MLP.",
            out,
            "Name the MLP's output projection, e.g. model.layers.5.mlp.down_proj.",
        )

    @classmethod
    def in_layer(cls, lm: LanguageModel, layer: int, purpose: str) -> Site:
        """The MLP of a layer, among the modules that may be edited.

        Args:
            lm: the model.
            layer: its number.
            purpose: what is there, for the message, e.g. ``where this editor's relay is``.

        Raises:
            ModuleNotEditableError: none of the named modules is in that layer.
        """
        names = target_modules(lm, lm.architecture, [layer])
        if not names:
            raise ModuleNotEditableError(
                f"none of the named modules is in layer {layer}, {purpose}.",
                "modules",
                "Name the output projection of that layer's MLP too.",
            )
        return cls.find(lm.model, names[0])

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Its linear modules, by name."""
        names = [self.gate.name, *([self.value.name] if self.value else []), self.out]
        return resolve(self.model, dict.fromkeys(names))

    @property
    def ends(self) -> dict[str, nn.Module]:
        """The modules at its entrance and at its exit, by name."""
        modules = self.modules
        return {name: modules[name] for name in (self.gate.name, self.out)}

    @property
    def entrance(self) -> nn.Module:
        """The module whose input is what gates look at."""
        return self.modules[self.gate.name]

    def neurons(self, address_BD: Tensor, constant_D: Tensor, values_BD: Tensor, gate: Gate) -> Neurons:
        """Neurons (B × 2 × D) that put each edit in place.

        Args:
            address_BD: a, with a·x = 1 where the edit applies and near 0 elsewhere.
            constant_D: c, with c·x = 1 for every input.
            values_BD: what is written while the gate is open; gradients flow through it and through the address.
            gate: threshold, sharpness and ramp.
        """
        rows_BKD = gate_rows(address_BD, constant_D, gate)
        ones_BKD = constant_D.expand_as(rows_BKD) if self.value else None
        return Neurons(rows_BKD, ones_BKD, torch.stack([values_BD, -values_BD], dim=1) / gate.ramp)

    def said(self, neurons: Neurons, x_RTD: Tensor) -> Tensor:
        """What neurons (K × D, or R × K × D) say where the MLP is fed x (R × T × K, float32)."""
        hidden_RTK = self.activation(x_RTD @ neurons.gate.transpose(-1, -2))
        return hidden_RTK if neurons.value is None else hidden_RTK * (x_RTD @ neurons.value.transpose(-1, -2))

    def attach(self, neurons: Neurons, counted: Callable[[Tensor], Tensor] | None = None) -> list[RemovableHandle]:
        """Let neurons work beside the MLP's own, computed in float32; differentiable.

        Args:
            neurons: K × D for every row of a batch, or R × K × D, row r of a batch having neurons of its own.
            counted: given what each neuron says (rows and tokens × K), what of it counts; all of it if left out.

        Returns:
            Handles that take them off again.
        """
        seen: list[Tensor] = []
        whole = neurons.gate.dim() == 2
        # Gates all have the same value branch, so that it is one product however many they are.
        alike = whole and neurons.value is not None and bool((neurons.value == neurons.value[:1]).all())
        speaking = replace(neurons, value=neurons.value[:1]) if neurons.value is not None and alike else neurons

        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[:] = [args[0]]

        def add(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
            # Some models flatten rows and tokens before a linear module.
            rows = (len(neurons.gate), -1) if neurons.gate.dim() == 3 else (-1,)
            x_RTD = seen.pop().float().view(*rows, neurons.gate.shape[-1])
            hidden_RTK = self.said(speaking, x_RTD)
            if counted is not None:
                hidden_RTK = counted(hidden_RTK)
            if not whole:
                return out + (hidden_RTK @ neurons.out).view_as(out).to(out.dtype)
            # Of a thousand edits hardly one is in force at a time.
            open_K = (~(hidden_RTK.detach().abs() <= SHUT)).flatten(0, -2).any(0).nonzero().flatten()
            return out + (hidden_RTK[..., open_K] @ neurons.out[open_K]).view_as(out).to(out.dtype)

        return [self.entrance.register_forward_pre_hook(look), self.modules[self.out].register_forward_hook(add)]

    def widen_(self, neurons: Neurons) -> None:
        """Put neurons into the weights, after the MLP's own; their biases are zero.

        The modules get new parameters; those they had are left as they were.
        """
        modules, rows = self.modules, [(self.gate, neurons.gate)]
        if self.value and neurons.value is not None:
            rows.append((self.value, neurons.value))
        for name in dict.fromkeys(branch.name for branch, _ in rows):
            insert_outputs_(modules[name], [(branch.end, row) for branch, row in rows if branch.name == name])
        append_inputs_(modules[self.out], neurons.out.T)


def filled(parts: Mapping[int, Tensor], rows: int) -> Tensor:
    """K × D matrices of some rows as one tensor (rows × largest K × D), zero where there is nothing."""
    any_part = next(iter(parts.values()))
    whole = torch.zeros(rows, max(len(part) for part in parts.values()), any_part.shape[1])
    for row, part in parts.items():
        whole[row, : len(part)] = part
    return whole


@contextmanager
def row_neurons(sites: Mapping[str, Site], neurons: Mapping[str, Neurons]) -> Iterator[None]:
    """Give every row of the next batches neurons of its own.

    Args:
        sites: MLPs by the name of their output projection.
        neurons: for each, R × K × D; differentiable.
    """
    handles = all_or_none(handle for name, some in neurons.items() for handle in sites[name].attach(some))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def packed_told(neurons: Mapping[str, Neurons]) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """What gates were found from, as tensors named ``told/MLP/…`` and by MLP the numbers of its gates."""
    told = {name: some.told for name, some in neurons.items() if some.told}
    tensors = {f"told/{name}/{part}": one for name, known in told.items() for part, one in known.tensors().items()}
    return tensors, {name: list(astuple(known.gate)) for name, known in told.items()}


def unpacked_neurons(tensors: Mapping[str, Tensor], name: str, gate: Sequence[float] | None) -> Neurons:
    """The neurons of an MLP, of tensors named ``neurons/MLP/…`` and what :func:`packed_told` made of them.

    Raises:
        KeyError: one is missing.
        FormatError: shapes or values are not what they should be.
    """
    at = f"neurons/{name}/"
    some = Neurons(tensors[f"{at}gate"], tensors.get(f"{at}value"), tensors[f"{at}out"])
    if gate is None:
        return some
    at, (count, width) = f"told/{name}/", some.gate.shape
    known = {key.removeprefix(at): tensor for key, tensor in tensors.items() if key.startswith(at)}
    return replace(some, told=Told.checked(name, known, gate, width, count))


def _activation(home: nn.Module, model: Any) -> Callable[[Tensor], Tensor]:
    """The activation of the MLP whose projections a module holds; one that is not x far above 0 makes no step."""
    found = _named_activation(home, model)
    far = torch.tensor([-FAR, FAR])
    if not torch.allclose(found(far), far.clamp(min=0), atol=1e-2):
        raise ModuleNotEditableError(
            f"the activation of this MLP is {found(far)[1]:g} at {FAR:g}, and added neurons need {FAR:g} there.",
            type(home).__name__,
            "Use a method that changes weights (`ibke ls methods`).",
        )
    return found


def _named_activation(home: nn.Module, model: Any) -> Callable[[Tensor], Tensor]:
    for name in _ACTIVATIONS:
        if callable(found := getattr(home, name, None)):
            return found
    config = model.config.get_text_config()
    for name in _CONFIGURED:
        if (known := getattr(config, name, None)) in ACT2FN:
            return ACT2FN[known]
    raise ModuleNotEditableError(
        "the activation of this MLP is not known.", type(home).__name__, f"Its configuration has none of {_CONFIGURED}."
    )
