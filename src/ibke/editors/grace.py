"""GRACE: a codebook at one layer, which answers for the layer wherever a known prompt comes by.

Hartvigsen et al. 2023, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", NeurIPS 2023, arXiv
2211.11031, eq. 1: with entries of key K_i, value V_i and deferral radius ε_i, a layer f gives

    h = V_i  where i = argmin_j d(x, K_j)  if d(x, K_i) ≤ ε_i,   else f(x)          (d Euclidean).

A key is what the layer is fed at a prompt's last token, a value is found by gradient descent on the answer, and a new
entry is made room for by the rules of its algorithm 1: alone, it has the first radius; within reach of an entry with
the same answer, that one is *expanded* to it and learns it too; within reach of one with another answer, both are
*split* halfway.

Each token is looked up by itself, so a cached token answers as it did, and a key depends on no value of its own layer.

Shape suffixes: B requests, N entries, I d_in, O d_out, R rows, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from ibke.batch import Pair, by_length, collate
from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor
from ibke.editors.descent import Descent, DescentSettings, Lessons
from ibke.editors.settings import refuse_not_positive
from ibke.errors import FormatError
from ibke.modules import chosen_module, first_layer, in_out, resolve
from ibke.partial import PartialModel
from ibke.parts import Part
from ibke.request import EditRequest

if TYPE_CHECKING:
    from ibke.models import LanguageModel

SAME = 1e-3  # keys nearer than this share of their length are one key, rounded otherwise


@dataclass(frozen=True, eq=False)
class Codebook(Part):
    """Entries of a codebook.

    Args:
        keys: N × I, float32.
        values: N × O, float32.
        radii: N.
        labels: the answer each entry was made for.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: tuple[str, ...]

    kind: ClassVar[str] = "codebook"

    def tensors(self) -> dict[str, Tensor]:
        """Keys, values and radii."""
        return {"keys": self.keys, "values": self.values, "radii": self.radii}

    def record(self) -> dict[str, Any]:
        """The labels."""
        return {"labels": list(self.labels)}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Codebook:
        """The codebook of some tensors and a record.

        Raises:
            FormatError: they are none.
        """
        labels = record.get("labels")
        if set(tensors) != {"keys", "values", "radii"} or not isinstance(labels, list):
            raise FormatError("this is no codebook.", "parts", "It has keys, values, radii and labels.")
        shapes = [list(tensors[name].shape) for name in ("keys", "values", "radii")]
        fit = [len(shape) for shape in shapes] == [2, 2, 1] and {shape[0] for shape in shapes} == {len(labels)}
        if not fit or not labels or not all(isinstance(label, str) for label in labels):
            raise FormatError(
                f"the codebook's shapes do not fit: {shapes}, {len(labels)} labels.", "parts", "Make the edit again."
            )
        if not all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise FormatError("the codebook holds values that are no finite float32.", "parts", "Make the edit again.")
        return cls(tensors["keys"], tensors["values"], tensors["radii"], tuple(labels))

    @classmethod
    def join(cls, parts: Sequence[Codebook]) -> Codebook:
        """All entries; of those with one key the last counts.

        Raises:
            FormatError: their widths differ.
        """
        if len({(part.keys.shape[1], part.values.shape[1]) for part in parts}) > 1:
            raise FormatError("the codebooks' widths differ.", "parts", "Use edits of one model only.")
        labels = [label for part in parts for label in part.labels]
        keys, values, radii = (torch.cat([part.tensors()[n] for part in parts]) for n in ("keys", "values", "radii"))
        last = {key.numpy().tobytes(): at for at, key in enumerate(keys)}
        kept = sorted(last.values())
        return cls(keys[kept], values[kept], radii[kept], tuple(labels[at] for at in kept))

    def check(self, lm: LanguageModel, place: str) -> None:
        """Refuse a module of another size.

        Raises:
            FormatError: its widths differ.
            ModuleNotEditableError: there is no such module.
        """
        mine = self.keys.shape[1], self.values.shape[1]
        if (wanted := in_out(resolve(lm.model, [place])[place])) != mine:
            raise FormatError(
                f"the codebook is for a module of {mine[0]} inputs and {mine[1]} outputs, this one has {wanted}.",
                place,
                "Use the model the edit was made for.",
            )

    @classmethod
    def attach(cls, lm: LanguageModel, place: str, rows: Sequence[Codebook | None]) -> list[RemovableHandle]:
        """Let each row's codebook answer for a module."""
        books = [book for book in rows if book]
        if not books:
            return []
        none = replace(books[0], keys=books[0].keys[:0], values=books[0].values[:0], radii=books[0].radii[:0])
        filled = [book or none for book in rows]
        keys, values = (pad_sequence([b.tensors()[n] for b in filled], batch_first=True) for n in ("keys", "values"))
        # A radius below zero is no entry.
        radii = pad_sequence([book.radii for book in filled], batch_first=True, padding_value=-1.0)
        hook = _answering(*(tensor.to(lm.device) for tensor in (keys, values, radii)))
        return [resolve(lm.model, [place])[place].register_forward_hook(hook)]


def _answering(keys_RNI: Tensor, values_RNO: Tensor, radii_RN: Tensor) -> Any:
    """A hook that looks up every token; one row of entries is for all rows. Values are differentiable."""
    absent_RN = radii_RN < 0

    def answer(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        # Some models flatten rows and tokens before a linear module.
        x_RTI = args[0].detach().float().reshape(len(keys_RNI), -1, keys_RNI.shape[-1])
        distance_RTN = torch.cdist(x_RTI, keys_RNI).masked_fill(absent_RN[:, None], torch.inf)
        least_RT, nearest_RT = distance_RTN.min(-1)
        near_RT = least_RT <= radii_RN.gather(1, nearest_RT)
        chosen_RTO = values_RNO.gather(1, nearest_RT[..., None].expand(-1, -1, values_RNO.shape[-1]))
        return torch.where(near_RT[..., None], chosen_RTO.to(out.dtype), out.reshape(chosen_RTO.shape)).view_as(out)

    return answer


@dataclass(frozen=True)
class GRACESettings(DescentSettings):
    """Settings of :class:`GRACE`, with those of :class:`~ibke.editors.descent.DescentSettings`.

    Args:
        learning_rate: of Adam. Published: 1.
        epochs: most steps a value takes. Published: 100.
        layer: whose down-projection has the codebook; None is as deep as 27 of Llama-2-7B's 32, EasyEdit's choice.
            Published, Hartvigsen et al.: layer 35 of GPT-2 XL's 48.
        radius: ε of a new entry. Published: 1.
    """

    learning_rate: float = 1.0
    epochs: int = 100
    layer: int | None = None
    radius: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_not_positive(self, "radius")


class GRACE(Editor):
    """Keeps answers in a codebook at one layer, for prompts it knows (GRACE).

    Args:
        lm: the model. Of modules the caller named at loading the last has the codebook.
        settings: see :class:`GRACESettings`.
        known: entries that are in force already.
    """

    name: ClassVar[str] = "grace"
    Settings: ClassVar[type[Any]] = GRACESettings
    quick = {"epochs": 5}

    def __init__(self, lm: LanguageModel, settings: GRACESettings | None = None, known: Codebook | None = None):
        super().__init__(lm)
        self.settings: GRACESettings = settings or GRACESettings()
        self.place = chosen_module(lm, self.settings.layer, 27, of=32)
        self.module = resolve(lm.model, [self.place])[self.place]
        self.part = PartialModel(lm.model, lm.architecture.layers, first_layer([self.place]))
        self.known = known

    def after(self, edit: Edit) -> GRACE:
        """The editor that knows an edit's entries too."""
        more = edit.parts.get(self.place)
        if not isinstance(more, Codebook):
            return self
        return GRACE(self.lm, self.settings, Codebook.join([self.known, more] if self.known else [more]))

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit of all entries that the requests add or change.

        Raises:
            RequestError: no request, or one longer than the model's window.
            CaptureError: the loss is not finite.
        """
        began = time.perf_counter()
        pairs = self.pairs(requests)
        keys_BI, values_BO = self._look(pairs)
        book, fresh, touched = self.known, set[int](), set[int]()
        for key_I, value_O, request in zip(keys_BI, values_BO, requests, strict=True):
            book, new, changed = place(book, key_I, value_O, request.target_new.strip(), self.settings.radius)
            fresh, touched = fresh | new, touched | new | changed
        assert book is not None
        book, told = self._learn(book, sorted(fresh), pairs)
        chosen = sorted(touched)
        entries = Codebook(
            book.keys[chosen], book.values[chosen], book.radii[chosen], tuple(book.labels[at] for at in chosen)
        )
        info = EditInfo(
            self.name,
            self.lm.fingerprint,
            self.lm.name,
            refine_steps=told.steps,
            achieved=told.achieved,
            seconds=time.perf_counter() - began,
            nll_before=told.nll_before,
            nll_after=told.nll_after,
        )
        return Edit({}, tuple(requests), info, parts={self.place: entries})

    @torch.no_grad()
    def _look(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """What the module is fed at each prompt's last token (B × I), and what it makes of it (B × O)."""
        keys: list[Tensor] = [torch.empty(0)] * len(pairs)
        for rows in by_length([len(pair) for pair in pairs]):
            batch = collate([pairs[row] for row in rows], self.lm.tokenizer.pad_token_id, self.lm.device)
            x_RTI = self.part.inputs_of(self.module, batch)
            for row, x_TI in zip(rows, x_RTI, strict=True):
                keys[row] = x_TI[len(pairs[row].prompt) - 1]
        keys_BI = torch.stack(keys)
        return keys_BI.cpu(), self.module(keys_BI.to(self.lm.dtype)).float().cpu()

    def _learn(self, book: Codebook, fresh: Sequence[int], pairs: Sequence[Pair]) -> tuple[Codebook, Descent]:
        """Move the values of new and expanded entries down the loss, the whole codebook being in force."""
        device = self.lm.device
        base_NO, at = book.values.to(device), torch.tensor(fresh, dtype=torch.long, device=device)
        values_NO = base_NO[at].requires_grad_()
        lessons = Lessons(self.part, pairs, self.lm.tokenizer.pad_token_id)
        with self._in_force(book, base_NO, at, values_NO):
            told = lessons.learn([values_NO], self.settings)
        return replace(book, values=base_NO.index_copy(0, at, values_NO.detach()).cpu()), told

    @contextmanager
    def _in_force(self, book: Codebook, base_NO: Tensor, at: Tensor, values_NO: Tensor) -> Iterator[None]:
        keys_1NI, radii_1N = book.keys[None].to(base_NO.device), book.radii[None].to(base_NO.device)

        def answer(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
            # Not on top of what is attached: radii may have shrunk, and what falls outside is the base's again.
            answering = _answering(keys_1NI, base_NO.index_copy(0, at, values_NO)[None], radii_1N)
            return answering(module, args, module.forward(*args))

        handle = self.module.register_forward_hook(answer)
        try:
            yield
        finally:
            handle.remove()


def place(
    book: Codebook | None, key_I: Tensor, value_O: Tensor, label: str, radius: float
) -> tuple[Codebook, set[int], set[int]]:
    """Make room for a key by the rules of the paper's algorithm 1.

    Returns:
        the codebook; indices of entries whose values are to be found; indices of others that changed.
    """
    alone = Codebook(key_I[None], value_O[None], torch.tensor([radius]), (label,))
    if book is None:
        return alone, {0}, set()
    least, nearest = (book.keys - key_I).norm(dim=-1).min(0)
    distance, at, radii = float(least), int(nearest), book.radii.clone()
    if label == book.labels[at] and distance <= radii[at] + radius:
        radii[at] = max(float(radii[at]), distance)
        # Its value was found for another prompt, and is moved on for this one, as the authors' code does.
        return replace(book, radii=radii), {at}, set()
    if distance <= SAME * float(key_I.norm()):
        # The same prompt with a new answer: there is no halfway, and the last answer counts.
        labels = tuple(label if index == at else old for index, old in enumerate(book.labels))
        return replace(book, labels=labels), {at}, set()
    changed: set[int] = set()
    if distance <= radii[at] + radius:
        half = distance / 2
        radii[at], alone = min(float(radii[at]), half), replace(alone, radii=torch.tensor([min(radius, half)]))
        changed = {at}
    # Known to be a new key, so nothing has to be looked for as in joining.
    keys, values = torch.cat([book.keys, alone.keys]), torch.cat([book.values, alone.values])
    grown = Codebook(keys, values, torch.cat([radii, alone.radii]), (*book.labels, label))
    return grown, {len(book.labels)}, changed
