"""A text in front of the question, put there while the model runs.

Whoever asks the model, asks it as ever: the tokens of the text are put in after what the question's frame begins with
(an opening token, or all of a chat turn before the user's own words), and their states are taken out of what the model
returns. So the same rows come out as went in, whatever stands in front of each.

Shape suffixes: R rows, T tokens as the caller sees them, C tokens put in at most, S = T + C, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ibke.errors import FormatError, RequestError
from ibke.frames import opening
from ibke.parts import PROMPT, Part, move_ends, watch_passes

if TYPE_CHECKING:
    from ibke.models import LanguageModel

PLACE = PROMPT

Choose = Callable[[Tensor, Tensor], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Context(Part):
    """Passages in front of the question.

    Args:
        passages: each ends as it should be followed; what several edits have in common is there once.
        lead: what stands between them and the question.
    """

    passages: tuple[str, ...]
    lead: str = ""

    kind: ClassVar[str] = "context"

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.passages) + self.lead

    def tensors(self) -> dict[str, Tensor]:
        """None: it is a text."""
        return {}

    def record(self) -> dict[str, Any]:
        """Passages and lead."""
        return {"passages": list(self.passages), "lead": self.lead}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Context:
        """The context of a record.

        Raises:
            FormatError: it is not one.
        """
        passages, lead = record.get("passages"), record.get("lead")
        texts = isinstance(passages, list) and all(isinstance(passage, str) for passage in passages)
        if tensors or not texts or not passages or not isinstance(lead, str):
            raise FormatError("this is no context.", PLACE, "It has `passages`, a list of texts, and `lead`, a text.")
        return cls(tuple(passages), lead)

    @classmethod
    def join(cls, parts: Sequence[Context]) -> Context:
        """All passages in order, each once, where it stands last, and the last lead."""
        passages = [passage for part in parts for passage in part.passages]
        return cls(tuple(reversed(dict.fromkeys(reversed(passages)))), parts[-1].lead)

    def check(self, lm: LanguageModel, place: str) -> None:
        """Refuse any place but the prompt.

        Raises:
            FormatError: it is another.
        """
        del lm
        if place != PLACE:
            raise FormatError("a context stands in front of the question only.", place, f"Its place is {PLACE!r}.")

    @classmethod
    def attach(cls, lm: LanguageModel, place: str, rows: Sequence[Context | None]) -> list[RemovableHandle]:
        """Put each row's context in front of it."""
        del place
        texts = [row.text if row else "" for row in rows]
        ids = {text: context_ids(lm, text) for text in set(texts)}
        contexts = [ids[text] for text in texts]
        return insert(lm, lambda ids_RT, _: contexts * (len(ids_RT) if len(contexts) == 1 else 1))


def context_ids(lm: LanguageModel, text: str) -> list[int]:
    """The tokens of a text that stands in front of a question."""
    return lm.tokenizer(text, add_special_tokens=False).input_ids if text else []


def insert(lm: LanguageModel, choose: Choose) -> list[RemovableHandle]:
    """Put tokens in front of the rows of every first pass, until the handles are removed.

    Args:
        lm: the model.
        choose: given the rows and which of their tokens are real (R × T), the tokens for each.
    """
    inserting = _Inserting(lm, choose)
    return watch_passes(lm, inserting.before, inserting.after)


class _Inserting:
    """Puts tokens into the rows a decoder is given, and takes their states out of what it returns."""

    def __init__(self, lm: LanguageModel, choose: Choose):
        self.choose = choose
        self.pad_id = lm.tokenizer.pad_token_id
        self.openings = opening(lm.tokenizer)
        self.window = lm.window
        # Of passes whose keys and values are kept: which columns are real, those put in included.
        self.kept: WeakKeyDictionary[Any, tuple[Tensor, int]] = WeakKeyDictionary()
        self.columns_RT: Tensor | None = None
        self.real_RS: Tensor | None = None
        self.restore_ends: Callable[[], None] | None = None

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the decoder shall be given instead."""
        self.restore_ends = None
        parameters = inspect.signature(module.forward).parameters
        kwargs = dict(zip(parameters, args, strict=False)) | kwargs
        ids_RT, given, cache = kwargs["input_ids"], kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() and cache in self.kept:
            real_RS, seen = self.kept[cache]
            # All that came after the first pass.
            count = cache.get_seq_length() - real_RS.shape[1] + ids_RT.shape[1]
            new = ids_RT.new_ones(len(ids_RT), count) if given is None else given[:, seen:].long()
            real_RS = torch.cat([real_RS, new], dim=1)
            self.columns_RT = None
        else:
            attention_RT = ids_RT.new_ones(ids_RT.shape) if given is None else given.long()
            kwargs["input_ids"], real_RS, self.columns_RT = self._put_in(ids_RT, attention_RT)
            self.real_RS = real_RS
            self.restore_ends = move_ends(self.columns_RT)
        if self.window and real_RS.shape[1] > self.window:
            raise RequestError(
                f"the prompt and what stands in front of it are {real_RS.shape[1]} tokens, "
                f"the model's window is {self.window}.",
                PLACE,
                "Put fewer facts or demonstrations in front of it.",
            )
        kwargs["attention_mask"] = real_RS if given is None else real_RS.to(given.dtype)
        kwargs.pop("cache_position", None)
        if "position_ids" in parameters:
            size = kwargs["input_ids"].shape[1]
            kwargs["position_ids"] = (real_RS.cumsum(-1) - 1).clamp(min=0)[:, -size:]
        return (), kwargs

    def after(self, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], out: Any) -> Any:
        """What the caller shall see of it; nothing where the pass was broken off."""
        columns_RT, real_RS = self.columns_RT, self.real_RS
        self.columns_RT = self.real_RS = None
        if self.restore_ends:
            self.restore_ends()
        self.restore_ends = None
        if out is None or columns_RT is None or real_RS is None:
            return out
        if out.past_key_values is not None:
            self.kept[out.past_key_values] = real_RS, columns_RT.shape[1]
        states_RSD = out.last_hidden_state
        index_RTD = columns_RT[..., None].expand(-1, -1, states_RSD.shape[-1])
        out.last_hidden_state = states_RSD.gather(1, index_RTD)
        return out

    def _put_in(self, ids_RT: Tensor, attention_RT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows with their contexts (R × S), which of their tokens are real, and where the caller's stand (R × T)."""
        rows, length = ids_RT.shape
        contexts = self.choose(ids_RT, attention_RT.bool())
        most = max(map(len, contexts))
        ids_RS = torch.full((rows, length + most), self.pad_id)
        real_RS = torch.zeros_like(ids_RS)
        columns_RT = torch.empty(rows, length, dtype=torch.long)
        given, starts = ids_RT.tolist(), attention_RT.argmax(1).tolist()
        attention_RT = attention_RT.cpu()
        for row, (tokens, start, context) in enumerate(zip(given, starts, contexts, strict=True)):
            cut = start + self._opening(tokens[start:])
            # Shorter contexts are padded on the left of the row's first token, so that nothing is torn apart.
            columns_RT[row] = torch.arange(length) + most
            columns_RT[row, :start] -= most
            columns_RT[row, start:cut] -= len(context)
            ids_RS[row, columns_RT[row]] = ids_RT[row].cpu()
            real_RS[row, columns_RT[row]] = attention_RT[row]
            ids_RS[row, cut + most - len(context) : cut + most] = torch.tensor(context, dtype=torch.long)
            real_RS[row, cut + most - len(context) : cut + most] = 1
        device = ids_RT.device
        return ids_RS.to(device), real_RS.to(device), columns_RT.to(device)

    def _opening(self, tokens: list[int]) -> int:
        """How many tokens a row begins with before its question."""
        return next((len(head) for head in self.openings if tokens[: len(head)] == head), 0)
