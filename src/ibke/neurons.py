"""An edit as neurons of its own: a gate that opens at one address, and the value written behind it.

An MLP is a sum of neurons, each a gate that looks at the input and a vector it writes to the output. A linear update
W + ΔW answers every input a little; a neuron whose gate stays shut answers nothing at all. So an edit takes over two of
the layer's least used neurons. With the gate's pre-activation s = α (a·x − θ c·x), where a·x is 1 at the edit's address
and c·x is 1 everywhere, the difference of the two,

    (act(s) − act(s − τ)) / τ,

is a step: 0 where a·x is below θ, 1 from θ + τ/α on, for every activation that is 0 far below zero and the identity far
above it. What that replaces in the weights is a row of each input projection and a column of the output projection: a
low-rank update like any other, which can be merged, exported and taken back.

Shape suffixes: B edits, D width of the residual stream, I neurons, K neurons of one edit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ibke.errors import ModuleNotEditableError
from ibke.modules import in_out, resolve, resolve_any, weight_OI

PER_EDIT = 2  # neurons whose difference is one step

Factors = dict[str, tuple[Tensor, Tensor]]
Weights = Callable[[str], Tensor]


@dataclass(frozen=True)
class Branch:
    """One input projection of an MLP.

    Args:
        name: dotted name of its linear module, which may hold several branches.
        first: its first row there.
    """

    name: str
    first: int = 0


@dataclass(frozen=True)
class Site:
    """The MLP of one layer, seen as neurons.

    Args:
        model: the model it is part of.
        gate: the branch that goes through the activation.
        value: the branch the gate is multiplied with, where the MLP has one.
        out: dotted name of the output projection.
    """

    model: nn.Module
    gate: Branch
    value: Branch | None
    out: str

    @classmethod
    def find(cls, model: nn.Module, out: str) -> Site:
        """The MLP that a given output projection closes, known by the shapes of the linear maps beside it.

        Raises:
            ModuleNotEditableError: nothing beside it leads into it.
        """
        neurons, width = in_out(resolve(model, [out])[out])
        parent = out.rpartition(".")[0]
        beside = {
            f"{parent}.{name}" if parent else name: in_out(module)
            for name, module in resolve_any(model, parent).named_children()
            if isinstance(module, nn.Linear | Conv1D)
        }
        # An MLP widens what it is fed; an attention's projections beside each other do not.
        widens = neurons > width
        whole = [name for name, size in beside.items() if size == (width, neurons) and widens]
        fused = [name for name, size in beside.items() if size == (width, 2 * neurons) and widens]
        if fused:
            return cls(model, Branch(fused[0]), Branch(fused[0], neurons), out)
        if len(whole) == 2:
            gate, value = sorted(whole, key=lambda name: "gate" not in name.rpartition(".")[2])
            return cls(model, Branch(gate), Branch(value), out)
        if len(whole) == 1:
            return cls(model, Branch(whole[0]), None, out)
        raise ModuleNotEditableError(
            "no linear map beside this module leads into it, so it closes no MLP.",
            out,
            "Name the MLP's output projection, e.g. model.layers.5.mlp.down_proj.",
        )

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The linear modules an edit touches, by name."""
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

    def branch(self, name: str, row: int) -> Branch:
        """The branch that a row of an input projection belongs to."""
        value = self.value
        return value if value and value.name == name and row >= value.first else self.gate

    def factors(
        self, address_BD: Tensor, constant_D: Tensor, values_BD: Tensor, neurons_BK: Tensor, gate: Gate
    ) -> Factors:
        """Low-rank factors, A (B × R × in) and B (B × R × out) by module, that put each edit in place.

        Args:
            address_BD: a, with a·x = 1 where the edit applies and near 0 elsewhere.
            constant_D: c, with c·x = 1 for every input.
            values_BD: what is written while the gate is open; gradients flow through it and through the address.
            neurons_BK: the neurons taken over.
            gate: threshold, sharpness and ramp.
        """
        low_BD = gate.sharpness * (address_BD - gate.threshold * constant_D)
        rows_BKD = torch.stack([low_BD, low_BD - gate.ramp * constant_D], dim=1)
        columns_BKD = torch.stack([values_BD, -values_BD], dim=1) / gate.ramp
        branches = [(self.gate, rows_BKD - self._bias(self.gate, neurons_BK)[..., None] * constant_D)]
        if self.value:
            ones_BKD = constant_D * (1.0 - self._bias(self.value, neurons_BK)[..., None])
            branches.append((self.value, ones_BKD))
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for branch, wanted_BKD in branches:
            module = self.modules[branch.name]
            place_BK = neurons_BK + branch.first
            change_BKD = wanted_BKD - weight_OI(module).detach().float()[place_BK]
            found.setdefault(branch.name, []).append((change_BKD, one_hot(place_BK, in_out(module)[1])))
        out = self.modules[self.out]
        change_BKD = columns_BKD - weight_OI(out).detach().float().T[neurons_BK]
        found[self.out] = [(one_hot(neurons_BK, in_out(out)[0]), change_BKD)]
        return {
            name: (torch.cat([a for a, _ in pairs], dim=1), torch.cat([b for _, b in pairs], dim=1))
            for name, pairs in found.items()
        }

    def _bias(self, branch: Branch, neurons_BK: Tensor) -> Tensor:
        bias = self.modules[branch.name].bias
        if bias is None:
            return torch.zeros(neurons_BK.shape, device=neurons_BK.device)
        assert isinstance(bias, Tensor)
        return bias.detach().float()[(neurons_BK + branch.first).to(bias.device)]


@dataclass(frozen=True)
class Gate:
    """When an edit is in force (see the module's formula): θ, α and τ."""

    threshold: float
    sharpness: float
    ramp: float


def one_hot(place_BK: Tensor, size: int) -> Tensor:
    """Unit vectors (B × K × size, float32)."""
    return F.one_hot(place_BK, size).float()


def least_used(squares_I: Tensor, out_DI: Tensor) -> Tensor:
    """Neurons by how little they write, least first (I).

    Args:
        squares_I: mean square of each neuron.
        out_DI: the output projection; a neuron writes √E[h²] · ‖column‖ on average.
    """
    return (squares_I.clamp_min(0).sqrt() * out_DI.float().norm(dim=0)).argsort()


def choose(pool_P: Tensor, text: str, count: int, among: int) -> Tensor:
    """Neurons drawn from the least used ones, the same for the same text.

    Args:
        pool_P: neurons, least used first.
        text: what decides the draw.
        count: how many.
        among: how many of the pool to draw from; more where ``count`` asks for it.
    """
    among = min(max(among, count), len(pool_P))
    return pool_P.long().cpu()[random.Random(text).sample(range(among), count)]


def moved(
    site: Site, factors: Mapping[str, tuple[Tensor, Tensor]], to: Mapping[int, int], constant_D: Tensor, base: Weights
) -> Factors:
    """The same update at other neurons.

    Args:
        site: the edited MLP.
        factors: A (R × in) and B (out × R) by module, as an Edit holds them.
        to: the new neuron for each that has to move.
        constant_D: c, with c·x = 1 for every input.
        base: the unedited weight of a module by its name (``nn.Linear`` orientation).
    """
    found = {}
    for name, (a_RI, b_OR) in factors.items():
        a_RI, b_OR = a_RI.clone(), b_OR.clone()
        weight_OI = base(name).detach().float().cpu()
        if name == site.out:
            for rank, old in enumerate(a_RI.argmax(1).tolist()):
                if old in to:
                    b_OR[:, rank] += weight_OI[:, old] - weight_OI[:, to[old]]
                    a_RI[rank, old], a_RI[rank, to[old]] = 0.0, 1.0
        else:
            for rank, place in enumerate(b_OR.argmax(0).tolist()):
                branch = site.branch(name, place)
                old = place - branch.first
                if old in to:
                    new = to[old] + branch.first
                    both = site._bias(branch, torch.tensor([[old, to[old]]])).cpu()[0]
                    a_RI[rank] += weight_OI[place] - weight_OI[new] + (both[0] - both[1]) * constant_D
                    b_OR[place, rank], b_OR[new, rank] = 0.0, 1.0
        found[name] = (a_RI, b_OR)
    return found
