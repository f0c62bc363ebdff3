"""Copies of a module's weight beside it, and the router that decides who answers.

See :mod:`ibke.editors.wise.editor` for the method. The whole row goes one way: by its words when the model first sees
them, and what is generated then follows. A row's first token is left out, whose activation belongs to no word (in layer
27 of SmolLM2-135M it is five times as long as any other).

Shape suffixes: R rows, T tokens, M memories, I d_in, O d_out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ibke.errors import FormatError
from ibke.modules import in_out, resolve
from ibke.parts import Part, of_question, watch_passes

if TYPE_CHECKING:
    from ibke.models import LanguageModel


@dataclass(frozen=True, eq=False)
class Memory:
    """One copy of the weight.

    Args:
        delta_OI: ΔW, float32.
        threshold: ε.
        shards: names of the shards in it; one, or those it was merged of.
        edits: how many edits it has learnt.
    """

    delta_OI: Tensor
    threshold: float
    shards: tuple[str, ...]
    edits: int


@dataclass(frozen=True, eq=False)
class SideMemory(Part):
    """Memories beside a module, and who answers.

    Args:
        memories: at least one.
    """

    memories: tuple[Memory, ...]

    kind: ClassVar[str] = "side-memory"
    told: ClassVar[bool] = True

    def tensors(self) -> dict[str, Tensor]:
        """What the copies differ by (M × O × I), and thresholds (M)."""
        return {
            "deltas": torch.stack([memory.delta_OI for memory in self.memories]),
            "thresholds": torch.tensor([memory.threshold for memory in self.memories], dtype=torch.float64),
        }

    def record(self) -> dict[str, Any]:
        """Names of shards, and numbers of edits."""
        return {
            "shards": [list(memory.shards) for memory in self.memories],
            "edits": [memory.edits for memory in self.memories],
        }

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> SideMemory:
        """The side memory of some tensors and a record.

        Raises:
            FormatError: they are none.
        """
        shards: Any = record.get("shards")
        edits: Any = record.get("edits")
        if set(tensors) != {"deltas", "thresholds"} or not _are_shards(shards) or not _are_counts(edits):
            raise FormatError("this is no side memory.", "parts", "It has deltas, thresholds, shards and edits.")
        deltas, thresholds = tensors["deltas"], tensors["thresholds"]
        if (
            deltas.dim() != 3
            or thresholds.dim() != 1
            or len({len(deltas), len(thresholds), len(shards), len(edits)}) > 1
        ):
            raise FormatError("the side memory's shapes do not fit each other.", "parts", "Make the edit again.")
        if not deltas.dtype == torch.float32 or not all(bool(torch.isfinite(some).all()) for some in tensors.values()):
            raise FormatError("the side memory holds values that are not finite.", "parts", "Make the edit again.")
        rows = zip(deltas, thresholds.tolist(), shards, edits, strict=True)
        return cls(tuple(Memory(delta, threshold, tuple(names), count) for delta, threshold, names, count in rows))

    @classmethod
    def join(cls, parts: Sequence[SideMemory]) -> SideMemory:
        """All memories; one takes the place of earlier ones whose shards it holds.

        Raises:
            FormatError: their sizes differ.
        """
        joined: list[Memory] = []
        for memory in (memory for part in parts for memory in part.memories):
            joined = [old for old in joined if not set(old.shards) <= set(memory.shards)]
            if not any(set(memory.shards) < set(old.shards) for old in joined):
                joined.append(memory)
        if len({memory.delta_OI.shape for memory in joined}) > 1:
            raise FormatError("the side memories' sizes differ.", "parts", "Use edits of one model only.")
        return cls(tuple(joined))

    def check(self, lm: LanguageModel, place: str) -> None:
        """Refuse a module of another size.

        Raises:
            FormatError: its widths differ.
            ModuleNotEditableError: there is no such module.
        """
        d_out, d_in = self.memories[0].delta_OI.shape
        if (wanted := in_out(resolve(lm.model, [place])[place])) != (d_in, d_out):
            raise FormatError(
                f"the side memory is for a module of {d_in} inputs and {d_out} outputs, this one has {wanted}.",
                place,
                "Use the model the edit was made for.",
            )

    @classmethod
    def attach(cls, lm: LanguageModel, place: str, rows: Sequence[SideMemory | None]) -> list[RemovableHandle]:
        """Let each row's memories answer for a module."""
        routing = Routing(lm, rows)

        def answer(*given: Any) -> Tensor:
            # A copy of the model copies what a method is bound to, which would then know of no pass.
            return routing.answer(*given)

        return [
            *watch_passes(lm, routing.before, routing.after),
            resolve(lm.model, [place])[place].register_forward_hook(answer),
        ]


def _are_shards(names: Any) -> bool:
    return (
        isinstance(names, list)
        and len(names) > 0
        and all(isinstance(some, list) and some and all(isinstance(name, str) for name in some) for some in names)
    )


def _are_counts(counts: Any) -> bool:
    return isinstance(counts, list) and all(type(count) is int and count > 0 for count in counts)


class Routing:
    """Decides for every row of a pass which memory answers, and adds what it has to say.

    Which tokens are words is what the decoder is told; decisions stay with a pass's keys and values as long as those.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[SideMemory | None]):
        owners: dict[SideMemory, list[int]] = {}
        for row, part in enumerate(rows):
            if part:
                owners.setdefault(part, []).append(row)
        # Part by part: each weight is read once, and never copied for each row that has it.
        self.parts = []
        for part, places in owners.items():
            tensors = {name: tensor.to(lm.device) for name, tensor in part.tensors().items()}
            index = slice(None) if len(rows) == 1 else torch.tensor(places, device=lm.device)
            self.parts.append((index, tensors["deltas"].to(lm.dtype), tensors["thresholds"].float()))
        self.kept: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
        self.inside = False  # a pass of the decoder
        self.words_RT: Tensor | None = None
        self.chosen_R: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which tokens of a pass are words, or what was decided in the passes before it."""
        self.inside, self.words_RT, self.chosen_R = True, None, None
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() and cache in self.kept:
            self.chosen_R = self.kept[cache]
            return
        ids_RT, attention = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        if isinstance(ids_RT, Tensor) and isinstance(attention, Tensor) and attention.dim() == 2:
            # Of what came before, nothing is known here.
            self.words_RT = words(of_question(attention[:, -ids_RT.shape[1] :].bool()))

    def after(self, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], out: Any) -> None:
        """Keep what was decided; nothing where the pass was broken off."""
        cache = getattr(out, "past_key_values", None)
        if cache is not None and self.chosen_R is not None:
            self.kept[cache] = self.chosen_R
        self.inside, self.words_RT, self.chosen_R = False, None, None

    def answer(self, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """What the module returns, or the chosen memory in its place (a hook of the module)."""
        known = self.words_RT if self.words_RT is not None else self.chosen_R
        rows = len(known) if known is not None else (args[0].shape[0] if args[0].dim() == 3 else 1)
        # Some models flatten rows and tokens before a linear module.
        x_RTI, out_RTO = (some.reshape(rows, -1, some.shape[-1]) for some in (args[0], out))
        words_RT = self.words_RT
        if words_RT is None:
            words_RT = words(torch.ones(x_RTI.shape[:2], dtype=torch.bool, device=x_RTI.device))
        answers_RTO, decided_R = out_RTO, torch.full((rows,), -1, device=x_RTI.device)
        for index, deltas_MOI, thresholds_M in self.parts:
            change_MRTO = torch.einsum("rti,moi->mrto", x_RTI[index], deltas_MOI)
            if self.chosen_R is not None:
                chosen_R = self.chosen_R[index]
            else:
                apart_MR = apart(change_MRTO, words_RT[index])
                most_R, best_R = torch.where(apart_MR > thresholds_M[:, None], apart_MR, -1.0).max(0)
                chosen_R = torch.where(most_R >= 0, best_R, -1)
                decided_R[index] = chosen_R
            change_RTO = change_MRTO[chosen_R.clamp(min=0), torch.arange(len(chosen_R), device=chosen_R.device)]
            own_RTO = answers_RTO[index]
            said_RTO = torch.where(chosen_R[:, None, None] >= 0, own_RTO + change_RTO, own_RTO)
            answers_RTO = said_RTO if isinstance(index, slice) else answers_RTO.index_copy(0, index, said_RTO)
        if self.chosen_R is None and self.inside:
            self.chosen_R = decided_R
        return answers_RTO.view_as(out)


def words(real_RT: Tensor) -> Tensor:
    """Real tokens without the first of a row; of a single one, that one."""
    first_RT = real_RT & (real_RT.cumsum(-1) == 1)
    return torch.where(real_RT.sum(-1, keepdim=True) > 1, real_RT & ~first_RT, real_RT)


def apart(change_MRTO: Tensor, words_RT: Tensor) -> Tensor:
    """Δ: how far a memory's answer is from the model's own, a mean over words (M × R, float32)."""
    return (change_MRTO.float().norm(dim=-1) * words_RT).sum(-1) / words_RT.sum(-1)
