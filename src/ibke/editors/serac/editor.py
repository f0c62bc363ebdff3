"""SERAC: edits stay in a memory, and a classifier before the model decides whether a question is about one of them.

Mitchell et al. 2022, "Memory-Based Model Editing at Scale", ICML 2022, arXiv 2206.06520, section 3.1: with edits z_i in
memory, a scope classifier g and a counterfactual model h, a question x is answered by

    f̃(x) = f(x)  if max_i g(z_i, x) < ½,   else h(z_j, x) with j = argmax_i g(z_i, x)

The authors train two further language models, of which none is at hand here. The classifier is a trained head on the
base model's own representation (:mod:`ibke.editors.serac.scope`), and **the counterfactual model is the base model
itself**, told the one edit retrieved in front of the question, as in-context editing does. So locality and reach are
those of SERAC, and what is said in scope is what the base makes of a fact it is told.

What is asked is seen once, when the model first meets it: through the layers below the one that represents it.

Shape suffixes: R rows, T tokens, N edits, K dimensions compared, D width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ibke.context import PLACE, context_ids, insert
from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor
from ibke.editors.ike import LEAD, fact
from ibke.editors.serac.scope import Scope, ScopeSettings, layer_of, represent, scope_for
from ibke.errors import FormatError
from ibke.fingerprint import mark
from ibke.parts import Part, of_question
from ibke.request import EditRequest
from ibke.session import set_aside

if TYPE_CHECKING:
    from ibke.models import LanguageModel


@dataclass(frozen=True, eq=False)
class ScopedFacts(Part):
    """Facts, each told where a question is about it.

    Args:
        scope: the classifier.
        edits_NK: the prompts, embedded by it.
        prompts, targets: the facts.
    """

    scope: Scope
    edits_NK: Tensor
    prompts: tuple[str, ...]
    targets: tuple[str, ...]

    kind: ClassVar[str] = "scoped-facts"
    told: ClassVar[bool] = True

    @property
    def shared_nbytes(self) -> int:
        """The classifier."""
        return sum(tensor.nbytes for tensor in self.scope.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The embedded prompts, and the classifier's own."""
        return {"edits_NK": self.edits_NK, **self.scope.tensors()}

    def record(self) -> dict[str, Any]:
        """The facts, and where a question is seen."""
        return {"layer": self.scope.layer, "prompts": list(self.prompts), "targets": list(self.targets)}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> ScopedFacts:
        """The facts of some tensors and a record.

        Raises:
            FormatError: they are none.
        """
        edits_NK = tensors.get("edits_NK")
        scope = Scope.checked(record.get("layer"), {n: some for n, some in tensors.items() if n != "edits_NK"})
        prompts, targets = _texts(record.get("prompts")), _texts(record.get("targets"))
        if edits_NK is None or not prompts or len(prompts) != len(targets):
            raise FormatError("these are no scoped facts.", PLACE, "They have edits, prompts and targets.")
        fit = edits_NK.shape == (len(prompts), len(scope.projection_KD)) and edits_NK.dtype == torch.float32
        if not fit or not torch.isfinite(edits_NK).all():
            raise FormatError("the scoped facts' tensors do not fit.", PLACE, "Make the edit again.")
        return cls(scope, edits_NK, prompts, targets)

    @classmethod
    def join(cls, parts: Sequence[ScopedFacts]) -> ScopedFacts:
        """All facts; of those with one prompt the last counts.

        Raises:
            FormatError: their classifiers differ.
        """
        if not all(part.scope.same(parts[0].scope) for part in parts):
            raise FormatError("the edits' scope classifiers differ.", PLACE, "Make them again with the same settings.")
        facts = [fact for part in parts for fact in zip(part.prompts, part.targets, part.edits_NK, strict=True)]
        kept = list({prompt: (prompt, target, edit_K) for prompt, target, edit_K in facts}.values())
        prompts, targets, edits = zip(*kept, strict=True)
        return cls(parts[0].scope, torch.stack(edits), prompts, targets)

    def check(self, lm: LanguageModel, place: str) -> None:
        """Refuse any place but the prompt, and a model of another size.

        Raises:
            FormatError: it is another.
            ModuleNotEditableError: the model has no such layer.
        """
        if place != PLACE:
            raise FormatError("facts are told in front of the question only.", place, f"Their place is {PLACE!r}.")
        layer_of(lm, self.scope.layer)
        mine, wanted = len(self.scope.mean_D), lm.model.config.get_text_config().hidden_size
        if mine != wanted:
            raise FormatError(
                f"the scope classifier is for a model of width {mine}, this one has {wanted}.",
                place,
                "Use the model the edit was made for.",
            )

    @classmethod
    def attach(cls, lm: LanguageModel, place: str, rows: Sequence[ScopedFacts | None]) -> list[RemovableHandle]:
        """Tell each row the fact it is about, if it is about one."""
        del place
        told: dict[str, list[int]] = {}
        # As they are now: methods that run a model in parts put others in their place.
        layers = {part.scope.layer: layer_of(lm, part.scope.layer) for part in rows if part}

        def choose(ids_RT: Tensor, real_RT: Tensor) -> list[list[int]]:
            real_RT = of_question(real_RT)
            asked = [ids_T[real_T].tolist() for ids_T, real_T in zip(ids_RT, real_RT, strict=True)]
            states_RD = {number: represent(lm, layer, asked) for number, layer in layers.items()}
            texts = _told(states_RD, list(rows) * (len(asked) if len(rows) == 1 else 1))
            told.update({text: context_ids(lm, text) for text in set(texts) - set(told)})
            return [told[text] for text in texts]

        return insert(lm, choose)


def _told(states_RD: Mapping[int, Tensor], parts: Sequence[ScopedFacts | None]) -> list[str]:
    """What is put in front of each row, given what represents it at each layer."""
    owners: dict[ScopedFacts, list[int]] = {}
    for row, part in enumerate(parts):
        if part:
            owners.setdefault(part, []).append(row)
    texts = [""] * len(parts)
    for part, rows in owners.items():
        asked_RK = part.scope.embed(states_RD[part.scope.layer][rows])
        most_R, nearest_R = part.scope.log_odds(asked_RK, part.edits_NK).max(-1)
        for row, odds, nearest in zip(rows, most_R.tolist(), nearest_R.tolist(), strict=True):
            texts[row] = fact(part.prompts[nearest], part.targets[nearest]) + LEAD if odds >= 0 else ""
    return texts


def _texts(value: Any) -> tuple[str, ...]:
    """Texts in a list, or none."""
    fine = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return tuple(value) if fine else ()


class SERAC(Editor):
    """Keeps edits in a memory and tells the model the one a question is about (SERAC, with the base as second model).

    Args:
        lm: the model. Its scope classifier is trained now where it is not in the cache folder, 40 seconds for
            SmolLM2-135M on one core, without what is attached; nothing may be merged into the model.
        settings: see :class:`~ibke.editors.serac.scope.ScopeSettings`.

    Raises:
        TrainingError: there is no classifier, and no facts to train one on.
    """

    name: ClassVar[str] = "serac"
    Settings: ClassVar[type[Any]] = ScopeSettings
    quick = {"requests": 60, "steps": 60, "width": 32}

    def __init__(self, lm: LanguageModel, settings: ScopeSettings | None = None):
        super().__init__(lm)
        self.settings = settings or ScopeSettings()
        with set_aside(lm):  # it is kept, and has to be of the unedited model
            self.scope = scope_for(lm, self.settings)
        self.training_seconds = self.scope.seconds

    @property
    def mark(self) -> str:
        """See :attr:`Editor.mark`; its trained weights are the classifier's."""
        return mark(repr((self.name, self.settings)), self.scope.tensors())

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit that holds all new facts; earlier ones that are in force stay beside them.

        Raises:
            RequestError: no request, or one longer than the model's window.
        """
        began = time.perf_counter()
        pairs = self.pairs(requests)
        edits_NK = self.scope.embed(
            represent(self.lm, layer_of(self.lm, self.scope.layer), [pair.prompt for pair in pairs])
        )
        prompts = tuple(request.prompt.strip() for request in requests)
        targets = tuple(request.target_new.strip() for request in requests)
        # Joined, so that of one prompt there is one fact.
        facts = ScopedFacts.join([ScopedFacts(self.scope, edits_NK, prompts, targets)])
        info = EditInfo(self.name, self.lm.fingerprint, self.lm.name, seconds=time.perf_counter() - began)
        return Edit({}, tuple(requests), info, parts={PLACE: facts})
