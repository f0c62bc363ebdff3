"""The relay: a second write, where the first one is read.

What is written at the subject reaches the prompt's last position through the attention of the layers after it, and is
recognised there with a wide margin (docs/experiments.md). So a second pair of neurons in a later layer listens for it:
its address answers 1 at what the first write makes of the request's last position and 0 at what the base has there,

    a = A⁻¹ Kᵀ1,   A = KᵀK + NᵀN + γ (C₀ + λ I),   K edited, N base, in every frame of the request.

Where no subject was written to, nothing is heard, so what the first gate leaves alone the relay does too. What other
edits have written is heard as well, so edits in force together have their addresses found together
(:mod:`ibke.gates`). What the relay writes is decoded from further dimensions of the code, which begin at zero and are
found by refining.

Shape suffixes: B edits, R rows, T tokens, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.ibke.statistics import Grounded
from ibke.gates import Gate, Told
from ibke.neurons import Neurons, Site, row_neurons
from ibke.partial import PartialModel, Past, taking_input
from ibke.rows import OUTSIDE, RowGroup


class Relay(Grounded):
    """What the relay has to know of its layer, and the neurons made of it.

    Args:
        config: settings.
        d_out: width of the residual stream.
    """

    def __init__(self, config: IBKEConfig, d_out: int):
        super().__init__(d_out)
        self.config = config

    def told(self, edited_TD: Tensor, base_TD: Tensor, owner_T: Tensor, count: int) -> list[Told]:
        """What each edit is to be told from others by, and its address to be found from (B).

        Args:
            edited_TD: what the MLP sees at the last positions of the requests, the first write in force.
            base_TD: the same without it.
            owner_T: the edit each belongs to.
            count: B.
        """
        pull = self.spectrum.inverse(self.config.relay_gamma, self.config.ridge)
        answer_TD, silent_TD, owner_T = edited_TD.cpu(), base_TD.cpu(), owner_T.cpu()
        pulled_2TD = pull(torch.cat([answer_TD, silent_TD]).double()).float()
        found = []
        for edit in range(count):
            own_T = owner_T == edit
            keys = (answer_TD[own_T], silent_TD[own_T], pulled_2TD[own_T.repeat(2)])
            found.append(Told(*keys, torch.zeros(int(own_T.sum()), dtype=torch.long), self.gate))
        return found

    def addresses(self, told: Sequence[Told]) -> Tensor:
        """Where each edit is heard when it is alone (B × D, float32)."""
        constant_D = self.constant_D.cpu()
        return torch.cat([one.addresses(constant_D) for one in told]).to(self.constant_D.device)

    @property
    def gate(self) -> Gate:
        """When a relay is in force."""
        return Gate(self.config.relay_threshold, self.config.sharpness, self.config.ramp)

    def decode(self, z_BD: Tensor, address_BD: Tensor, site: Site) -> Neurons:
        """Neurons (B × 2 × D) from the relay's part of the code (B × D)."""
        values_BD = z_BD * (self.output_scale / self.d_out**0.5)
        return site.neurons(address_BD, self.constant_D, values_BD, self.gate)


def relay_rate(z_BD: Tensor) -> Tensor:
    """Nats of the relay's part of the code (B): KL( N(z, I) ‖ N(0, I) ) = ½‖z‖²."""
    return 0.5 * z_BD.square().sum(-1)


@dataclass
class Listening:
    """A relay in its place in a model.

    Args:
        relay: what it is made of.
        part: the model, split at the relay's layer.
        site: the MLP it is added to.
    """

    relay: Relay
    part: PartialModel
    site: Site

    def told(
        self, part: PartialModel, site: Site, neurons: Neurons, groups: Sequence[RowGroup], count: int
    ) -> tuple[list[RowGroup], tuple[Told, ...]]:
        """Rows from the relay's layer on, and what each edit's address is found from; arguments as for :meth:`heard`.

        Args:
            part: the model, split at the first write's layer.
            site: the MLP that writes first.
            neurons: one set an edit (B × K × D).
            groups: rows, owned by edit.
            count: B.
        """
        _, base_TD, _ = self.heard(part, site, None, groups)
        onward, edited_TD, owner_T = self.heard(part, site, neurons, groups)
        return onward, tuple(self.relay.told(edited_TD, base_TD, owner_T, count))

    @torch.no_grad()
    def heard(
        self, part: PartialModel, site: Site, neurons: Neurons | None, groups: Sequence[RowGroup]
    ) -> tuple[list[RowGroup], Tensor, Tensor]:
        """Rows brought as far as the relay's layer under the first write's neurons, or without any.

        Args:
            part: the model, split at the first write's layer.
            site: the MLP that writes first.
            neurons: one set an edit (B × K × D).
            groups: rows, owned by edit.

        Returns:
            the rows from the relay's layer on; what its MLP sees at the last positions of the prompts in scope
            (R × D); and the edit each of these belongs to.
        """
        onward, keys, owners = [], [], []
        for group in groups:
            chosen = {site.out: neurons[group.owner_R]} if neurons else {}
            layer = self.part.layers[self.part.first]
            with (
                taking_input(layer) as entering,
                taking_input(self.site.entrance, last=True) as fed,
                row_neurons({site.out: site}, chosen),
            ):
                part.states(group.hidden_RTD, group.batch, group.past)
            # Some models flatten rows and tokens before a linear module.
            fed_RTD = fed[0].float().reshape(*group.batch.ids_RT.shape, -1)
            inside_R = group.kind_R != OUTSIDE
            last_R = group.batch.question_ends_R
            keys.append(fed_RTD[torch.arange(len(last_R), device=last_R.device), last_R][inside_R])
            owners.append(group.owner_R[inside_R])
            past = group.past and Past(group.past.real_RT, group.past.layers[self.part.first - part.first :])
            onward.append(replace(group, hidden_RTD=entering[0], past=past))
        return onward, torch.cat(keys), torch.cat(owners)
