"""Neurons that are silent in rows whose question is not their edit's.

Before a row's first pass its question is read by the model without these neurons; which of them may speak is decided
then, and what is generated afterwards follows. Where rows hold answers too, callers say where questions end
(:func:`ibke.parts.asking`); else a row's last token ends its question.

A row asks one question, so one edit answers it: of those whose question is asked the one whose first neurons are surest
of their subject, somewhere in the question, or in the sentence that asks where that names something
(:mod:`ibke.editors.gated.sentence`). To an answer no other is listened to: it may name what another is about.

An edit's neurons in later layers, which listen for what its first ones have written, are heard only from a token on
where those have spoken. So they need not be told apart from other edits', whose writes sound much alike.

Shape suffixes: R rows, T tokens, E edits, N neurons, K key, D width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from ibke.editors.gated.question import entrance, gate_file, offer_gate, question_gate, states_at
from ibke.editors.gated.sentence import about
from ibke.errors import FormatError
from ibke.modules import in_out, layer_index
from ibke.neurons import Neurons, Site, packed_told, unpacked_neurons
from ibke.partial import PartialModel
from ibke.parts import Part, all_or_none, of_question, told_ends, watch_passes

if TYPE_CHECKING:
    from ibke.batch import Batch
    from ibke.models import LanguageModel


AT_ONCE = 2048  # neurons whose words are held at a time
SPOKEN = 1.0  # what a first neuron says at least where its edit is in force; nearby keys make it say a little too


@dataclass(frozen=True, eq=False)
class GatedNeurons(Part):
    """Neurons of some edits, and the question of each edit.

    Args:
        gate: name of the maps that keys and queries are made by (see :mod:`ibke.editors.gated.question`).
        keys_EK: an edit's question, of unit length.
        levels_E: cosine above which it is asked.
        neurons: by name of an MLP's output projection.
        owners: the edit each neuron belongs to (N), by the same names.
        afar_E: edits that are looked for in the whole of a question, since their own requests name their subjects
            before the sentence that asks.
    """

    gate: str
    keys_EK: Tensor
    levels_E: Tensor
    neurons: dict[str, Neurons]
    owners: dict[str, Tensor]
    afar_E: Tensor

    kind: ClassVar[str] = "gated-neurons"
    told: ClassVar[bool] = True

    def __post_init__(self) -> None:
        first = first_of(self.neurons)  # the only ones to be told apart
        alone = {name: some if name == first else replace(some, told=None) for name, some in self.neurons.items()}
        object.__setattr__(self, "neurons", alone)

    @property
    def own_neurons(self) -> Mapping[str, Neurons]:
        """Its neurons."""
        return self.neurons

    def needs(self) -> dict[str, Path | None]:
        """The maps."""
        return {self.gate: gate_file(self.gate)}

    @classmethod
    def offer(cls, name: str, path: Path) -> None:
        """Take note of where maps are kept."""
        offer_gate(name, path)

    def tensors(self) -> dict[str, Tensor]:
        """Keys, levels, who is ``afar``, owners (``owner/MLP``), neurons and what tells them apart (``told/…``)."""
        found = {"keys": self.keys_EK, "levels": self.levels_E, "afar": self.afar_E}
        for name, some in self.neurons.items():
            found[f"owner/{name}"] = self.owners[name]
            found |= {f"neurons/{name}/{part}": tensor for part, tensor in some.tensors().items()}
        return found | packed_told(self.neurons)[0]

    def record(self) -> dict[str, Any]:
        """The maps' name, the MLPs and the numbers of their gates."""
        return {"gate": self.gate, "mlps": list(self.neurons), "gates": packed_told(self.neurons)[1]}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> GatedNeurons:
        """The neurons of some tensors and a record.

        Raises:
            FormatError: they are none.
        """
        try:
            names, gates = record["mlps"], record["gates"]
            neurons = {name: Neurons.checked(name, unpacked_neurons(tensors, name, gates.get(name))) for name in names}
            part = cls(
                str(record["gate"]),
                tensors["keys"],
                tensors["levels"],
                neurons,
                {name: tensors[f"owner/{name}"] for name in names},
                tensors.get("afar", torch.zeros(len(tensors["keys"]), dtype=torch.bool)),  # none in older files
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FormatError(f"these are no gated neurons ({error}).", "parts", "Make the edit again.") from error
        count = len(part.keys_EK)
        sound = (
            part.keys_EK.dim() == 2
            and count > 0
            and part.levels_E.shape == part.afar_E.shape == (count,)
            and part.afar_E.dtype == torch.bool
            and all(one.dtype == torch.float32 and torch.isfinite(one).all() for one in (part.keys_EK, part.levels_E))
            and all(
                owner_N.shape == (neurons[name].count,)
                and not owner_N.is_floating_point()
                and bool(((owner_N >= 0) & (owner_N < count)).all())
                for name, owner_N in part.owners.items()
            )
        )
        if not sound:
            raise FormatError("keys, levels and owners do not fit.", "parts", "Make the edit again.")
        return part

    @classmethod
    def join(cls, parts: Sequence[GatedNeurons]) -> GatedNeurons:
        """All of them side by side; the first layer's gates, at the subject, are told apart as by :meth:`Neurons.join`.

        Raises:
            FormatError: their keys are of different maps.
        """
        if len({(part.gate, part.keys_EK.shape[1]) for part in parts}) > 1:
            raise FormatError("the edits' questions are of different maps.", "parts", "Make them again.")
        before = [sum(len(part.keys_EK) for part in parts[:index]) for index in range(len(parts))]
        neurons, owners = {}, {}
        for name in dict.fromkeys(name for part in parts for name in part.neurons):
            some = [
                (part.neurons[name], part.owners[name] + n)
                for part, n in zip(parts, before, strict=True)
                if name in part.neurons
            ]
            neurons[name] = Neurons.join([one for one, _ in some])
            heard = [2 * one.told.count if one.told else 0 for one, _ in some]
            # In the order of :meth:`Neurons.join`: those that are told apart come first.
            owners[name] = torch.cat(
                [owner_N[:count] for (_, owner_N), count in zip(some, heard, strict=True)]
                + [owner_N[count:] for (_, owner_N), count in zip(some, heard, strict=True)]
            )
        keys_EK, levels_E, afar_E = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("keys_EK", "levels_E", "afar_E")
        )
        return cls(parts[0].gate, keys_EK, levels_E, neurons, owners, afar_E)

    def check(self, lm: LanguageModel, place: str) -> None:
        """Refuse a model, or a place, that neurons or questions are not of.

        Raises:
            FormatError: they are of another model's sizes, or the maps are not known here.
            ModuleNotEditableError: the model has no such MLP.
        """
        gate = question_gate(self.gate, lm)
        if place != gate.place(lm):
            raise FormatError("questions are read elsewhere.", place, f"The place of this part is {gate.place(lm)!r}.")
        if self.keys_EK.shape[1] != gate.config.size:
            raise FormatError("the edits' questions are of another size.", place, "Make them again with one editor.")
        for name, some in self.neurons.items():
            site = Site.find(lm.model, name)
            width = in_out(site.entrance)[0]
            if some.gate.shape[1] != width or (site.value is None) != (some.value is None):
                raise FormatError("the neurons do not fit the MLP.", name, "Use the model the edit was made for.")

    @torch.inference_mode()
    def reaches(self, lm: LanguageModel, place: str, batch: Batch) -> Tensor:
        """Rows with a token at which some first neuron says enough: in others no edit is heard."""
        del place
        first = first_of(self.neurons)
        site, neurons = Site.find(lm.model, first), self.neurons[first].to(lm.device)
        part = PartialModel(lm.model, lm.architecture.layers, layer_index(first) or 0)
        x_RTD = part.inputs_of(site.entrance, batch)
        loud_RT = torch.zeros(batch.ids_RT.shape, dtype=torch.bool, device=x_RTD.device)
        for begin in range(0, neurons.count, AT_ONCE):
            some = neurons[begin : begin + AT_ONCE]
            loud_RT |= (site.said(some, x_RTD) > SPOKEN).any(-1)
        return (loud_RT & batch.attention_RT.bool()).any(1).cpu()

    @classmethod
    def attach(cls, lm: LanguageModel, place: str, rows: Sequence[GatedNeurons | None]) -> list[RemovableHandle]:
        """Let each row's neurons speak where their question is asked."""
        del place
        asking = _Asking(lm, rows)

        def hooks() -> Iterator[RemovableHandle]:
            yield from watch_passes(lm, asking.before, asking.after)
            for name, (neurons, counted) in asking.neurons().items():
                yield from Site.find(lm.model, name).attach(neurons.to(lm.device), counted)

        return all_or_none(hooks())


def first_of(names: Iterable[str]) -> str:
    """Of some MLPs that of the first layer."""
    return min(names, key=lambda name: layer_index(name) or 0)


class _Asking:
    """Decides for every row of a first pass which edits are asked about, and keeps that for the passes after it.

    Decisions stay with a pass's keys and values as long as those.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[GatedNeurons | None]):
        self.device, self.rows, self.tokenizer = lm.device, rows, lm.tokenizer
        self.places: dict[GatedNeurons, list[int]] = {}
        for row, part in enumerate(rows):
            if part:
                self.places.setdefault(part, []).append(row)
        self.gates = {part: question_gate(part.gate, lm) for part in self.places}
        # As they are now: methods that run a model in parts put others in their place.
        layers = sorted({layer for gate in self.gates.values() for layer in gate.config.layers})
        self.entrances = {layer: entrance(lm, layer) for layer in layers}
        # Of passes whose keys and values are kept: what was decided, whose first neurons have spoken, and who is heard.
        self.kept: WeakKeyDictionary[Any, tuple[Tensor, Tensor, Tensor]] = WeakKeyDictionary()
        self.open_RE: Tensor | None = None
        self.spoken_RE: Tensor | None = None
        self.since_RE: Tensor | None = None  # the token of this pass from which on they have
        self.heard_RE: Tensor | None = None  # the edit that answers a row's latest question; None until it is known
        self.afar_RE: Tensor | None = None  # edits that are looked for everywhere in a question
        self.question_RT: Tensor | None = None  # which tokens of this pass belong to a question
        self.about_RT: Tensor | None = None  # and which of them may name what it asks about
        self.real_RT: Tensor | None = None  # and which are no padding

    def neurons(self) -> dict[str, tuple[Neurons, Callable[[Tensor], Tensor]]]:
        """By MLP its neurons (one set for all rows, or R × N × D), and what of what they say counts."""
        found: dict[str, tuple[Neurons, Callable[[Tensor], Tensor]]] = {}
        names = dict.fromkeys(name for part in self.places for name in part.neurons)
        for name in names:
            if len(self.rows) == 1:
                (part,) = self.places
                neurons, owners_RN = part.neurons[name], part.owners[name][None]
            else:
                some = {row: part for row, part in enumerate(self.rows) if part and name in part.neurons}
                neurons = Neurons.stack({row: part.neurons[name] for row, part in some.items()}, len(self.rows))
                owners_RN = torch.zeros(len(self.rows), neurons.count, dtype=torch.long)
                for row, part in some.items():
                    owners_RN[row, : len(part.owners[name])] = part.owners[name]
            counted = self._first if name == first_of(names) else self._later
            found[name] = (neurons, partial(self._counted, owners_RN.to(self.device), counted))
        return found

    def _counted(self, owners_RN: Tensor, how: Callable[[Tensor, Tensor], Tensor], said: Tensor) -> Tensor:
        """What counts of what neurons say (rows and tokens × N); nothing where the question was not seen."""
        if self.open_RE is None:
            return torch.zeros_like(said)
        owners_RN = owners_RN.expand(len(self.open_RE), -1)
        said_RTN = said.view(len(self.open_RE), -1, said.shape[-1])
        said_RTN = said_RTN * self.open_RE.gather(1, owners_RN)[:, None]
        return how(owners_RN, said_RTN).view_as(said)

    def _first(self, owners_RN: Tensor, said_RTN: Tensor) -> Tensor:
        """What is said by the edit that is surest of its subject in the question; from where on is noted."""
        assert self.spoken_RE is not None and self.real_RT is not None
        if self.heard_RE is None:
            self.heard_RE = self._surest(owners_RN, said_RTN.detach())
        # What stands where a row is padded is no key of anything.
        said_RTN = said_RTN * self.heard_RE.gather(1, owners_RN)[:, None] * self.real_RT[..., None]
        loud_RTN, length = said_RTN.detach() > SPOKEN, said_RTN.shape[1]
        since_RN = torch.where(loud_RTN.any(1), loud_RTN.byte().argmax(1), length)
        since_RE = torch.full_like(self.spoken_RE, length, dtype=torch.long).masked_fill(self.spoken_RE, 0)
        self.since_RE = since_RE.scatter_reduce(1, owners_RN, since_RN, "amin")
        self.spoken_RE = self.since_RE < length
        return said_RTN

    def _surest(self, owners_RN: Tensor, said_RTN: Tensor) -> Tensor:
        """The edit that says most in a row's question, if any is heard at all; of equals the latest (R × E)."""
        assert self.spoken_RE is not None and self.afar_RE is not None
        assert self.question_RT is not None and self.about_RT is not None
        most_RN = torch.where(
            self.afar_RE.gather(1, owners_RN),
            (said_RTN * self.question_RT[..., None]).amax(1),
            (said_RTN * self.about_RT[..., None]).amax(1),
        )
        most_RE = torch.zeros_like(self.spoken_RE, dtype=most_RN.dtype).scatter_reduce(1, owners_RN, most_RN, "amax")
        surest_R = most_RE.shape[1] - 1 - most_RE.flip(1).argmax(1)
        return functional.one_hot(surest_R, most_RE.shape[1]).bool() & (most_RE > SPOKEN)

    def _later(self, owners_RN: Tensor, said_RTN: Tensor) -> Tensor:
        """What is said by edits whose first neurons have spoken."""
        assert self.since_RE is not None
        columns_T1 = torch.arange(said_RTN.shape[1], device=said_RTN.device)[:, None]
        return said_RTN * (columns_T1 >= self.since_RE.gather(1, owners_RN)[:, None])

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the questions of a first pass, or recall what was decided before it."""
        self.open_RE = None  # questions are read by the model without these edits
        cache = kwargs.get("past_key_values")
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        self.real_RT = real_tokens(given)
        # Several tokens at once are a question again, as the next turn of a chat is.
        known = self.kept.get(cache) if cache is not None and cache.get_seq_length() else None
        if known and _given(given).shape[1] == 1:
            self.open_RE, self.spoken_RE, self.heard_RE = known
            return
        self.heard_RE, self.question_RT = None, of_question(self.real_RT)
        ids_RT = given.get("input_ids")
        self.about_RT = self.question_RT if ids_RT is None else about(self.tokenizer, ids_RT, self.question_RT)
        # What is read leaves no trace in keys and values that are kept.
        given["past_key_values"] = copy.deepcopy(cache) if cache is not None and cache.get_seq_length() else None
        self.open_RE = self._decide(module, given)
        # What was written in an earlier turn is still there.
        self.spoken_RE = known[1] if known else torch.zeros_like(self.open_RE, dtype=torch.bool)

    def after(self, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], out: Any) -> None:
        """Keep what was decided; nothing where the pass was broken off."""
        cache = getattr(out, "past_key_values", None)
        if cache is not None and self.open_RE is not None and self.spoken_RE is not None and self.heard_RE is not None:
            self.kept[cache] = self.open_RE, self.spoken_RE, self.heard_RE
        self.open_RE = None

    def _decide(self, module: nn.Module, given: Mapping[str, Any]) -> Tensor:
        """Which edits are asked about in each row (R × E, 0 or 1)."""
        states_RLD = states_at(list(self.entrances.values()), lambda: module.forward(**given), question_ends(given))
        rows, order = len(states_RLD), list(self.entrances)
        open_RE = torch.zeros(rows, max(len(part.keys_EK) for part in self.places), device=states_RLD.device)
        self.afar_RE = torch.zeros_like(open_RE, dtype=torch.bool)
        # Once for all rows: where each has an edit of its own, there are as many parts.
        asked = {
            gate.name: gate.queries(states_RLD[:, [order.index(layer) for layer in gate.config.layers]])
            for gate in set(self.gates.values())
        }
        for part, places in self.places.items():
            query_RK, lean_R = asked[part.gate]
            index = slice(None) if len(self.rows) == 1 else places
            cosine_RE = query_RK[index] @ part.keys_EK.to(query_RK).T + lean_R[index, None]
            self.afar_RE[index, : len(part.keys_EK)] = part.afar_E.to(self.device)
            open_RE[index, : len(part.keys_EK)] = (cosine_RE > part.levels_E.to(query_RK)).float()
        return open_RE


def question_ends(given: Mapping[str, Any]) -> Tensor:
    """Where each row's question ends, in the columns of the tokens that a pass is given (R)."""
    if (ends_R := told_ends()) is not None:
        return ends_R
    real_RT = real_tokens(given)
    return (real_RT.long() * torch.arange(real_RT.shape[1], device=real_RT.device)).argmax(1)


def real_tokens(given: Mapping[str, Any]) -> Tensor:
    """Which of the tokens that a pass is given are no padding, as far as that is said (R × T)."""
    tokens, attention = _given(given), given.get("attention_mask")
    rows, length = tokens.shape[:2]
    if not isinstance(attention, Tensor) or attention.dim() != 2:
        return torch.ones(rows, length, dtype=torch.bool, device=tokens.device)
    return attention[:, -length:].bool()


def _given(given: Mapping[str, Any]) -> Tensor:
    """What a pass is given: token ids (R × T), or what stands for them (R × T × D)."""
    ids_RT = given.get("input_ids")
    return given["inputs_embeds"] if ids_RT is None else ids_RT
