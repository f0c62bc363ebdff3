"""When an edit is in force: its gate, and what the gates of several edits are told apart by.

Edits made apart know nothing of each other. Where their gates listen for what an edit has written, as IBKE's relays
do, one edit sounds much like the next, and each would answer for all. So neurons may carry what their addresses were
found from, and edits that come to stand side by side have theirs found again, together:

    a_e = s_e Σ_t A⁻¹ k_t,   A = Σ_j u_j u_jᵀ + B,   t over the keys of edit e, j over all keys of all edits,

as if all had been made at once. No edit holds B, the generic keys: with p_j = B⁻¹ u_j beside each key u_j,

    A⁻¹ k_t = (I + Σ_j p_j u_jᵀ)⁻¹ p_t .

s_e makes an edit's own keys answer 1 in the mean. Where another's key still answers louder than ``QUIET`` of the
threshold, s_e is lowered until it does not: an edit that cannot be told from another one falls silent before it speaks
for it.

Other gates tell nearly all edits apart already, and were found from more than what is at hand here. They keep their
address a, and only where another's key u answers too loudly is that taken back, own keys k answering as before,

    a ← a + Σ_j w_j p_j   with the least  ‖d‖²_B + F Σ_k (d·k)² + F Σ_u ((a + d)·u)²,  d the change, F = ``FIRM``.

The more edits there are, the more often some gate opens where none should. So beyond ``FEW`` edits each must be surer:
its address is made shorter, as if the threshold were higher by ``SURER`` for every tenfold number.

Shape suffixes: E edits, T keys that answer, S keys that must not, U = T + S, D width of what gates look at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ibke.errors import FormatError

QUIET = 0.8  # of the threshold, at keys of other edits
FIRM = 3.0  # weight of a key against those that B stands for
STILL, SLACK = 0.7, 0.1  # of its own response an edit keeps at least, and above its threshold, or stays as it is
LEAST = 0.05  # response at an edit's own keys that is still made 1
LEAST_CONSTANT = 0.1  # c·x, by which responses are divided, counts as so much at least
FEW, SURER = 100, 0.05  # edits, and response (ratio 0–1)
AT_ONCE = 256  # edits whose responses are held at a time
NEAR = 1e-3  # of a response: so near a bound double precision decides, so that it hangs on nothing else


@dataclass(frozen=True)
class Gate:
    """When an edit is in force (see :mod:`ibke.neurons`): θ, α and τ."""

    threshold: float
    sharpness: float
    ramp: float


@dataclass
class Met:
    """What is known of some edits that came together before: it need not be found out again beside others.

    Args:
        edits: which; they stand side by side.
        keys: those that answer to them.
        loud: by edit, keys of the others that answer too loudly, in order.
        changes: by edit, what was found for such keys: those keys, d, and the response left of its own (ratio).
    """

    edits: range = range(0)
    keys: range = range(0)
    loud: dict[int, list[int]] = field(default_factory=dict)
    changes: dict[int, tuple[list[int], Tensor, float]] = field(default_factory=dict)

    def behind(self, edits: int, keys: int) -> Met:
        """The same where so many edits and keys stand before them."""
        return Met(
            range(self.edits.start + edits, self.edits.stop + edits),
            range(self.keys.start + keys, self.keys.stop + keys),
            {edit + edits: [key + keys for key in some] for edit, some in self.loud.items()},
            {e + edits: ([key + keys for key in some], d, left) for e, (some, d, left) in self.changes.items()},
        )


@dataclass(frozen=True)
class Told:
    """What the addresses of some edits were found from.

    Args:
        answer_TD: keys u that shall answer.
        silent_SD: keys u that shall not.
        pulled_UD: B⁻¹ u of both, those that answer first.
        owner_T: the edit each answering key belongs to, from 0; edit e has the neurons 2e and 2e + 1.
        gate: of all of them.
        kept_ED: addresses that are kept but for what answers to other edits; None where they are found from the keys.
        met: what is known of them, or some of them, already.
    """

    answer_TD: Tensor
    silent_SD: Tensor
    pulled_UD: Tensor
    owner_T: Tensor
    gate: Gate
    kept_ED: Tensor | None = None
    met: Met = field(init=False, default_factory=Met, compare=False, repr=False)

    @property
    def count(self) -> int:
        """E."""
        return int(self.owner_T.max()) + 1

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by name."""
        found = {
            "answer": self.answer_TD,
            "silent": self.silent_SD,
            "pulled": self.pulled_UD,
            "owner": self.owner_T,
        }
        return found if self.kept_ED is None else found | {"kept": self.kept_ED}

    @classmethod
    def checked(cls, name: str, tensors: Mapping[str, Tensor], gate: Sequence[float], width: int, count: int) -> Told:
        """From :meth:`tensors`, checked before it is believed.

        Args:
            name: of the MLP, for messages.
            tensors: float32, the owners integers.
            gate: θ, α and τ.
            width: D.
            count: neurons there are at least two of for each edit.

        Raises:
            FormatError: shapes or values are not what they should be.
        """
        threshold, sharpness, ramp = gate
        keys = (tensors["answer"], tensors["silent"], tensors["pulled"])
        kept_ED = tensors.get("kept")
        told = cls(*keys, tensors["owner"], Gate(threshold, sharpness, ramp), kept_ED)
        rows = (*keys, *([] if kept_ED is None else [kept_ED]))
        sound = (
            all(key.dim() == 2 and key.shape[1] == width and torch.isfinite(key).all() for key in rows)
            and len(told.pulled_UD) == len(told.answer_TD) + len(told.silent_SD)
            and told.owner_T.shape == (len(told.answer_TD),)
            and not told.owner_T.is_floating_point()
            and len(told.owner_T) > 0
            and int(told.owner_T.min()) >= 0
            and 2 * told.count <= count
            and (kept_ED is None or len(kept_ED) == told.count)
        )
        if not sound:
            raise FormatError("the keys its gates were found from do not fit.", name, "Make the edit again.")
        return told

    @classmethod
    def join(cls, several: Sequence[Told]) -> Told:
        """Those of several edits as one, in this order.

        Raises:
            FormatError: their gates differ.
        """
        kept = [told.kept_ED for told in several if told.kept_ED is not None]
        if len({told.gate for told in several}) > 1 or len(kept) not in (0, len(several)):
            raise FormatError(
                "their gates open at different thresholds, or were found in different ways.",
                "edits to compose",
                "Make them with one editor.",
            )
        owners, edits, keys, met = [], 0, 0, Met()
        for told in several:
            owners.append(told.owner_T + edits)
            if len(told.met.edits) > len(met.edits):
                met = told.met.behind(edits, keys)
            edits, keys = edits + told.count, keys + len(told.owner_T)
        whole = cls(
            torch.cat([told.answer_TD for told in several]),
            torch.cat([told.silent_SD for told in several]),
            torch.cat(
                [told.pulled_UD[: len(told.answer_TD)] for told in several]
                + [told.pulled_UD[len(told.answer_TD) :] for told in several]
            ),
            torch.cat(owners),
            several[0].gate,
            torch.cat(kept) if kept else None,
        )
        object.__setattr__(whole, "met", met)
        return whole

    def addresses(self, constant_D: Tensor) -> Tensor:
        """Where each edit answers when all are in force (E × D, float32).

        Args:
            constant_D: c, with c·x = 1 for every input.
        """
        if self.kept_ED is not None:
            return self._amended(self.kept_ED, constant_D)
        rows_TD = self._solved()
        found_ED = rows_TD.new_zeros(self.count, rows_TD.shape[1]).index_add(0, self.owner_T, rows_TD)
        answer_TD = self.answer_TD.double()
        own_T = (answer_TD * found_ED[self.owner_T]).sum(-1)
        found_ED = found_ED / self._mean_by_edit(own_T).clamp_min(LEAST).unsqueeze(-1)
        loudest_E = self._loudest(found_ED, constant_D.double())
        return (found_ED / (loudest_E / (QUIET * self.gate.threshold)).clamp_min(1.0).unsqueeze(-1)).float()

    def rows(self, constant_D: Tensor) -> Tensor:
        """The gates' rows (2E × D, float32) of neurons that listen there; see :meth:`ibke.neurons.Site.neurons`."""
        return gate_rows(self.addresses(constant_D), constant_D, self.gate).flatten(0, 1)

    def constant(self, rows_KD: Tensor) -> Tensor:
        """c, from the gates' rows of an edit (K × D)."""
        return (rows_KD[0] - rows_KD[1]) / self.gate.ramp

    def _solved(self) -> Tensor:
        """A⁻¹ k of every key that answers (T × D, float64)."""
        keys_UD = torch.cat([self.answer_TD, self.silent_SD]).double()
        pulled_UD = self.pulled_UD.double()
        answering, width = len(self.answer_TD), keys_UD.shape[1]
        if len(keys_UD) > width:
            eye_DD = torch.eye(width, dtype=torch.float64)
            return torch.linalg.solve(eye_DD + pulled_UD.T @ keys_UD, pulled_UD[:answering].T).T
        # Fewer keys than dimensions: by the push-through identity a system of their number only.
        gram_UU = torch.eye(len(keys_UD), dtype=torch.float64) + keys_UD @ pulled_UD.T
        return torch.linalg.inv(gram_UU)[:, :answering].T @ pulled_UD

    def _loudest(self, found_ED: Tensor, constant_D: Tensor) -> Tensor:
        """The largest response of each address at a key that is not its own (E); single precision does for a length."""
        keys_UD, edits = torch.cat([self.answer_TD, self.silent_SD]).float(), range(len(found_ED))
        some = self._foreign(found_ED.float(), keys_UD, constant_D.float(), edits, range(len(keys_UD)))
        return torch.cat([response_EU.amax(-1) for _, response_EU in some]).double()

    def _foreign(
        self, found_ED: Tensor, keys_UD: Tensor, constant_D: Tensor, edits: range, keys: range
    ) -> Iterator[tuple[int, Tensor]]:
        """The response of some addresses at some keys, 0 at their own (E × U); answering keys come first.

        Some addresses at a time, each time with the first one's number: of ten thousand edits all of it were gigabytes.
        """
        some_UD = keys_UD[keys.start : keys.stop]
        level_U = (some_UD @ constant_D).clamp_min(LEAST_CONSTANT)
        owner_T = self.owner_T[keys.start : keys.stop]
        own_T = torch.arange(len(owner_T))
        for first in range(edits.start, edits.stop, AT_ONCE):
            last = min(first + AT_ONCE, edits.stop)
            response_EU = found_ED[first:last] @ some_UD.T / level_U
            mine_T = (owner_T >= first) & (owner_T < last)
            response_EU[owner_T[mine_T] - first, own_T[mine_T]] = 0.0
            yield first, response_EU

    def _loud(self, kept_ED: Tensor, constant_D: Tensor) -> dict[int, list[int]]:
        """By edit, keys of other edits at which its address answers too loudly; few, for others' keys seldom answer."""
        bound, known = QUIET * self.gate.threshold, self.met
        everyone, all_keys = range(len(kept_ED)), range(len(self.answer_TD))
        pairs = [
            (range(known.edits.start), all_keys),
            (range(known.edits.stop, everyone.stop), all_keys),
            (known.edits, range(known.keys.start)),
            (known.edits, range(known.keys.stop, all_keys.stop)),
        ]
        found = {edit: list(some) for edit, some in known.loud.items()}
        for edits, keys in pairs:
            if not len(edits) or not len(keys):
                continue
            for first, response_EU in self._foreign(kept_ED, self.answer_TD, constant_D, edits, keys):
                near_P2 = (response_EU > bound - NEAR).nonzero()
                edit_P, key_P = near_P2[:, 0] + first, near_P2[:, 1] + keys.start
                u_PD = self.answer_TD[key_P].double()
                level_P = (u_PD @ constant_D.double()).clamp_min(LEAST_CONSTANT)
                loud_P = (kept_ED[edit_P].double() * u_PD).sum(-1) / level_P > bound
                for edit, key in zip(edit_P[loud_P].tolist(), key_P[loud_P].tolist(), strict=True):
                    found.setdefault(edit, []).append(key)
        return {edit: sorted(found[edit]) for edit in sorted(found)}

    def _amended(self, kept_ED: Tensor, constant_D: Tensor) -> Tensor:
        """Addresses that answer to other edits' keys no more (E × D, float32)."""
        loud, changes = self._loud(kept_ED, constant_D), self.met.changes
        for edit, keys in loud.items():
            if edit not in changes or changes[edit][0] != keys:
                changes[edit] = (keys, *self._change(edit, keys, kept_ED[edit].double()))
        known = self.met
        known.edits, known.keys, known.loud = range(len(kept_ED)), range(len(self.answer_TD)), loud
        threshold = self.gate.threshold + SURER * max(0.0, math.log10(self.count / FEW))
        # Else both say the same of the same: there is nothing to tell apart.
        told = [edit for edit in loud if changes[edit][2] >= max(STILL, threshold + SLACK)]
        found_ED = kept_ED.double()
        if told:
            found_ED[told] -= torch.stack([changes[edit][1] for edit in told])
        return (found_ED * (self.gate.threshold / threshold)).float()

    def _change(self, edit: int, loud: Sequence[int], kept_D: Tensor) -> tuple[Tensor, float]:
        """What takes an address's answers at some keys back (D, float64), and what it leaves of its own (ratio)."""
        chosen_T = (self.owner_T == edit).index_fill(0, torch.tensor(loud), True).nonzero().flatten()
        u_CD, p_CD = self.answer_TD[chosen_T].double(), self.pulled_UD[chosen_T].double()
        own_C, response_C = self.owner_T[chosen_T] == edit, u_CD @ kept_D
        gram_CC = torch.eye(len(u_CD), dtype=u_CD.dtype) + FIRM * u_CD @ p_CD.T
        change_D = FIRM * torch.linalg.solve(gram_CC, response_C.masked_fill(own_C, 0.0)) @ p_CD
        left = (response_C[own_C] - u_CD[own_C] @ change_D).mean() / response_C[own_C].mean()
        return change_D, float(left)

    def _mean_by_edit(self, values_T: Tensor) -> Tensor:
        zeros_E = torch.zeros(self.count, dtype=values_T.dtype)
        number_E = zeros_E.index_add(0, self.owner_T, torch.ones_like(values_T))
        return zeros_E.index_add(0, self.owner_T, values_T) / number_E


def gate_rows(address_BD: Tensor, constant_D: Tensor, gate: Gate) -> Tensor:
    """The two rows of each edit's gate (B × 2 × D), for pre-activations α (a·x − θ c·x) and the same less τ c·x."""
    low_BD = gate.sharpness * (address_BD - gate.threshold * constant_D)
    return torch.stack([low_BD, low_BD - gate.ramp * constant_D], dim=1)
