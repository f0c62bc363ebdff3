"""What an Edit may hold beside changed weights: parts that act while the model runs.

A codebook at a layer, a side memory with its own routing, a scope classifier before the model, a text in front of the
question: none of them is a sum of weights, and all are put on, served row by row and taken off in the same way.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ibke.errors import FormatError

if TYPE_CHECKING:
    from ibke.batch import Batch
    from ibke.models import LanguageModel

# One line a kind: its name in files and where its class is. A file can name nothing that is not here.
PARTS: dict[str, str] = {
    "codebook": "ibke.editors.grace:Codebook",
    "context": "ibke.context:Context",
    "gated-neurons": "ibke.editors.gated.memory:GatedNeurons",
    "scoped-facts": "ibke.editors.serac.editor:ScopedFacts",
    "side-memory": "ibke.editors.wise.memory:SideMemory",
}


PROMPT = "prompt"  # the place in front of the question


class Part(ABC):
    """Something that acts while the model runs, at one place of it.

    A place is a name: of the module that is acted on, or ``prompt``. Parts never change once they are made.
    """

    kind: ClassVar[str]
    told: ClassVar[bool] = False
    """Whether it treats a pass over question and answer as it treats the answer's being generated (:func:`asking`)."""

    @property
    def own_neurons(self) -> Mapping[str, Any]:
        """Neurons in it (:mod:`ibke.neurons`), by name of an MLP's output projection."""
        return {}

    def needs(self) -> dict[str, Path | None]:
        """Names of files that it cannot act without, which all edits of the method have in common, and where they are.

        None where that is not known in this process.
        """
        return {}

    @classmethod
    def offer(cls, name: str, path: Path) -> None:
        """Take note of where such a file is kept.

        Args:
            name: as :meth:`needs` has it.
            path: of the file.
        """
        del name, path

    @property
    def nbytes(self) -> int:
        """What it takes to keep: its tensors, and its record as JSON in UTF-8."""
        record = json.dumps(self.record(), ensure_ascii=False).encode()
        return len(record) + sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def shared_nbytes(self) -> int:
        """How much of that all edits of the method have in common, as what it was trained to; kept once for all."""
        return 0

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it holds in tensors, by name; on the CPU."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Everything else it holds, as JSON-ready values."""

    @classmethod
    @abstractmethod
    def read(cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Self:
        """The part that :meth:`tensors` and :meth:`record` came from, checked before it is believed.

        Raises:
            FormatError: they are not what this kind of part holds.
        """

    @classmethod
    @abstractmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Several parts of one place in force together, as one; where they disagree, the last counts.

        Raises:
            FormatError: they do not fit each other.
        """

    @abstractmethod
    def check(self, lm: LanguageModel, place: str) -> None:
        """Refuse a model that this part does not fit.

        Raises:
            FormatError: shapes differ.
            ModuleNotEditableError: there is no such place.
        """

    def reaches(self, lm: LanguageModel, place: str, batch: Batch) -> Tensor:
        """In which rows it can change anything at all, as far as is easily told (R, bool); nothing is attached.

        Args:
            lm: the model.
            place: where it acts.
            batch: rows to come.
        """
        del lm, place
        return torch.ones(batch.rows, dtype=torch.bool)

    @classmethod
    @abstractmethod
    def attach(cls, lm: LanguageModel, place: str, rows: Sequence[Self | None]) -> list[RemovableHandle]:
        """Let parts act on a model until their handles are removed.

        Args:
            lm: the model; each part fits it.
            place: where.
            rows: the part for each row of the batches to come, None for a row without; a single one is for all rows.
        """


def part_class(kind: str) -> type[Part]:
    """The class of a registered kind.

    Raises:
        FormatError: there is no such kind.
    """
    if kind not in PARTS:
        raise FormatError(f"there is no kind of part {kind!r}.", "parts", f"Known: {', '.join(sorted(PARTS))}.")
    module, _, attribute = PARTS[kind].partition(":")
    return getattr(import_module(module), attribute)


def join_parts(several: Iterable[Mapping[str, Part]]) -> dict[str, Part]:
    """The parts of several edits, one a place.

    Raises:
        FormatError: parts of different kinds, or that do not fit each other, are at one place.
    """
    found: dict[str, list[Part]] = {}
    for parts in several:
        for place, part in parts.items():
            found.setdefault(place, []).append(part)
    joined = {}
    for place, same in found.items():
        if len(kinds := {type(part): part.kind for part in same}) > 1:
            raise FormatError(
                f"parts of different kinds are in one place: {', '.join(kinds.values())}.",
                place,
                "Use them one at a time.",
            )
        joined[place] = same[0] if len(same) == 1 else type(same[0]).join(same)
    return joined


def all_or_none(hooks: Iterable[RemovableHandle]) -> list[RemovableHandle]:
    """Handles of hooks that are put on one after another; where one cannot be, those before it go again."""
    handles: list[RemovableHandle] = []
    try:
        handles.extend(hooks)
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    return handles


def attach_parts(lm: LanguageModel, rows: Sequence[Mapping[str, Part]]) -> list[RemovableHandle]:
    """Let the parts of each row's edit act on that row; those of a single row on all rows."""
    found: dict[tuple[str, type[Part]], list[Part | None]] = {}
    for row, parts in enumerate(rows):
        for place, part in parts.items():
            found.setdefault((place, type(part)), [None] * len(rows))[row] = part
    # What changes the tokens comes before what looks at them.
    ordered = sorted(found.items(), key=lambda item: item[0][0] != PROMPT)
    return all_or_none(handle for (place, kind), some in ordered for handle in kind.attach(lm, place, some))


@contextmanager
def row_parts(lm: LanguageModel, rows: Sequence[Mapping[str, Part]]) -> Iterator[None]:
    """Give every row of the next batches parts of its own."""
    handles = attach_parts(lm, rows)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch_passes(lm: LanguageModel, before: Callable[..., Any], after: Callable[..., Any]) -> list[RemovableHandle]:
    """See what the decoder is given and what it returns, also where a pass is broken off, until handles are removed.

    Some models call one decoder, some another within it, so both are watched and the outermost is acted on. A pass may
    be broken off without ``after`` being called, so ``before`` relies on nothing that was left behind.

    Args:
        lm: the model.
        before: a forward pre-hook with keyword arguments.
        after: a forward hook with keyword arguments.
    """
    acting: nn.Module | None = None

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal acting
        # The same one again: its last pass was broken off from outside, as by Ctrl-C, which no hook is told of.
        if acting not in (None, module):
            return None
        acting = module
        return before(module, args, kwargs)

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        nonlocal acting
        if acting is not module:
            return None
        acting = None
        return after(module, args, kwargs, out)

    handles = []
    for decoder in dict.fromkeys([lm.model.base_model, lm.model.get_decoder()]):
        handles.append(decoder.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(decoder.register_forward_hook(end, with_kwargs=True, always_call=True))
    return handles


_ENDS: ContextVar[Tensor | None] = ContextVar("_ENDS", default=None)


@contextmanager
def asking(ends_R: Tensor) -> Iterator[None]:
    """Tell parts in which column each row's question ends, in passes over rows that hold answers too."""
    token = _ENDS.set(ends_R)
    try:
        yield
    finally:
        _ENDS.reset(token)


def told_ends() -> Tensor | None:
    """Where questions end (R), if :func:`asking` says so; else rows are all question."""
    return _ENDS.get()


def of_question(real_RT: Tensor) -> Tensor:
    """Which of some columns are real and no part of an answer (R × T), as far as that is told."""
    if (ends_R := told_ends()) is None:
        return real_RT
    columns_T = torch.arange(real_RT.shape[1], device=real_RT.device)
    return real_RT & (columns_T <= ends_R.to(real_RT.device)[:, None])


def move_ends(columns_RT: Tensor) -> Callable[[], None] | None:
    """Tell parts in which columns of a pass the caller's tokens stand (R × T), until what is returned is called."""
    if (ends_R := told_ends()) is None:
        return None
    return partial(_ENDS.reset, _ENDS.set(columns_RT.gather(1, ends_R.to(columns_RT.device)[:, None])[:, 0]))
