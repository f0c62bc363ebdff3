"""In-context editing: the new fact is told, not taught.

Zheng et al. 2023, "Can We Edit Factual Knowledge by In-Context Learning?" (IKE), EMNLP 2023, arXiv 2305.12740. With the
new fact f = (x*, y*) the model is asked

    P(y given x, f, C),      C = {c₁, …, c_k} demonstrations, the likest last                       (section 3.1)

each of which tells a fact of its own and answers one question: by *copy* that fact's prompt, by *update* another
wording of it, by *retain* a question that it has nothing to do with, whose answer stays (section 3.2). k = 0 is the
zero-shot form. No weight changes.

Shape suffixes: M stored records, D width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibke.context import PLACE, Context
from ibke.data.readers import read
from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor
from ibke.editors.settings import refuse_below
from ibke.errors import RequestError
from ibke.files import find_file
from ibke.models import LanguageModel
from ibke.request import EditRequest

LEAD = "Prompt: "
KINDS = ("copy", "update", "retain")


def fact(prompt: str, answer: str) -> str:
    """How a new fact is told."""
    return f"New Fact: {prompt.strip()} {answer.strip()}\n"


class IKE(Editor):
    """States the new fact in front of the question (IKE, zero-shot).

    Args:
        lm: the model.
    """

    name: ClassVar[str] = "ike"

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit that tells all new facts; it costs nothing to make, and its tokens with every question.

        Raises:
            RequestError: no request, or one longer than the model's window.
        """
        began = time.perf_counter()
        self.pairs(requests)
        passages = tuple(passage for request in requests for passage in self._passages(request))
        info = EditInfo(self.name, self.lm.fingerprint, self.lm.name, seconds=time.perf_counter() - began)
        # Once each: requests that belong together may have demonstrations in common.
        return Edit({}, tuple(requests), info, parts={PLACE: Context.join([Context(passages, LEAD)])})

    def _passages(self, request: EditRequest) -> list[str]:
        return [fact(request.prompt, request.target_new)]


@dataclass(frozen=True)
class RetrievalSettings:
    """Settings of :class:`IKERetrieval`.

    Args:
        copies, updates, retains: demonstrations of each kind. Published: 4, 12 and 16 of 32 in all, in the ratio
            1 : 3 : 4; eight here, since every question costs their tokens again.
        store: file of requests with other wordings and locality probes to make demonstrations of, looked for in the
            data folder too; None takes those that ship.
        format: of that file (`ibke ls formats`).
    """

    copies: int = 1
    updates: int = 3
    retains: int = 4
    store: str | None = None
    format: str = "jsonl"

    def __post_init__(self) -> None:
        refuse_below(self, 0, "copies", "updates", "retains")

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        return dict(zip(KINDS, (self.copies, self.updates, self.retains), strict=True))


@dataclass(frozen=True)
class Demonstration:
    """A fact told, and a question answered.

    Args:
        kind: copy, update or retain.
        told: the fact.
        text: all of it, as the model is shown it.
    """

    kind: str
    told: str
    text: str


class IKERetrieval(IKE):
    """States the new fact behind demonstrations like it of what to change and what to keep (IKE).

    Args:
        lm: the model.
        settings: see :class:`RetrievalSettings`.
    """

    name: ClassVar[str] = "ike-retrieval"
    Settings: ClassVar[type[Any]] = RetrievalSettings

    def __init__(self, lm: LanguageModel, settings: RetrievalSettings | None = None):
        super().__init__(lm)
        self.settings: RetrievalSettings = settings or RetrievalSettings()
        self.store = demonstrations(_stored(self.settings.store, self.settings.format))
        for kind, count in self.settings.counts.items():
            if count and not any(shown.kind == kind for shown in self.store):
                raise RequestError(
                    f"no record of it makes a demonstration of the kind {kind!r}.",
                    str(self.settings.store),
                    "Give records with `rephrase_prompts` and with `locality` that has a `target`, or ask for none.",
                )

    def _passages(self, request: EditRequest) -> list[str]:
        told = fact(request.prompt, request.target_new)
        return [*(shown.text for shown in self.retrieve(request)), told]

    def retrieve(self, request: EditRequest) -> list[Demonstration]:
        """The demonstrations likest to a request, so many of each kind, the likest last."""
        told = fact(request.prompt, request.target_new)
        likeness_M = self._directions_MD @ self._direction(told)
        found: list[int] = []
        for kind, count in self.settings.counts.items():
            # One that tells the same fact would tell the answer.
            fit = [at for at, shown in enumerate(self.store) if shown.kind == kind and shown.told != told]
            found += sorted(fit, key=lambda at: (-likeness_M[at].item(), at))[:count]
        return [self.store[at] for at in sorted(found, key=lambda at: (likeness_M[at].item(), at))]

    @cached_property
    def _centre_D(self) -> Tensor:
        return torch.stack([self._mean(shown.told) for shown in self.store]).mean(0)

    @cached_property
    def _directions_MD(self) -> Tensor:
        return torch.stack([self._direction(shown.told) for shown in self.store])

    def _direction(self, text: str) -> Tensor:
        # What all facts have in common says nothing of any of them.
        return torch.nn.functional.normalize(self._mean(text) - self._centre_D, dim=0)

    @torch.no_grad()
    def _mean(self, text: str) -> Tensor:
        """Mean of a text's token embeddings (D): no pass through the model, and no edit in force on it counts."""
        ids = torch.tensor(self.lm.tokenizer(text, add_special_tokens=False).input_ids)
        table: Any = self.lm.model.get_input_embeddings()
        return table(ids.to(self.lm.device)).float().mean(0).cpu()


def demonstrations(records: Sequence[EditRequest]) -> list[Demonstration]:
    """What each record demonstrates: its prompt, its first other wording, and its first probe with a known answer."""
    shown = []
    for record in records:
        told = fact(record.prompt, record.target_new)
        kept = next(((probe.prompt, probe.target) for probe in record.locality if probe.target), None)
        asked = {
            "copy": (record.prompt, record.target_new),
            "update": (record.rephrase_prompts[0], record.target_new) if record.rephrase_prompts else None,
            "retain": kept,
        }
        for kind, question in asked.items():
            if question:
                shown.append(Demonstration(kind, told, f"{told}{LEAD}{question[0].strip()} {question[1].strip()}\n\n"))
    return shown


def _stored(path: str | None, format: str) -> list[EditRequest]:
    """The records of a store; those that a reader must leave out are not in it.

    Raises:
        RequestError: it cannot be read, or holds no request.
    """
    if path is None:
        text = files("ibke.data").joinpath("demonstrations.json").read_text(encoding="utf-8")
        return [EditRequest.from_dict(record) for record in json.loads(text)]
    records = list(read(find_file(path), format, []))
    if not records:
        raise RequestError("there is no request in it.", path, "Give a file that holds some.")
    return records
