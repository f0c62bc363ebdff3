"""What ROME, MEMIT and AlphaEdit share: they rewrite what MLPs return at a subject's last token.

A fact is taken to be looked up there by the MLPs of some layers l = first … last: the key k is what the layer's
down-projection is fed, the value what comes out. A target z = v₀ + δ is found for the last of these layers
(:mod:`~ibke.editors.value_optimisation`); then, from the first layer to the last, with the updates of earlier ones in
force,

    ΔW_l = R A,   R = (z − v) / (last − l + 1)

where v is what is returned now, and R has one column and A one row a request. The methods differ in A, which depends on
the keys alone (MEMIT, Meng et al. 2022, arXiv 2210.07229, algorithm 1; with one layer it is ROME).

Keys are means over contexts: the prompt alone, and the prompt behind other text.

Shape suffixes: B requests, C contexts, R rows, T tokens, I d_in, O d_out of a down-projection.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ibke.batch import Batch, Pair, by_length, collate
from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor
from ibke.editors.key_statistics import key_moments
from ibke.editors.value_optimisation import CONTEXTS, Values, ValueSettings, optimise_values, value_rows
from ibke.errors import IBKEError
from ibke.models import LanguageModel
from ibke.modules import first_layer, resolve, target_modules
from ibke.partial import PartialModel, taking_input, taking_output
from ibke.request import EditRequest
from ibke.session import EditSession, set_aside

Tap = Callable[[], AbstractContextManager[list[Tensor]]]

FLOOR = 1e-4  # of C₀'s mean eigenvalue, added to its diagonal: a short text leaves directions without a key


@dataclass(frozen=True)
class LocateSettings(ValueSettings):
    """What every method that locates and edits can be told.

    Args:
        bare_share: weight of the bare prompt's key in the mean key; what is left is shared by those behind contexts
            (ratio 0–1). Published: 1/2 for MEMIT and AlphaEdit, 1/21 for ROME.
        text: file of running text for the generic keys C₀, as it is or relative to the data folder; empty takes the
            package's own.
        tokens: most tokens of it that are read. Published: 100,000 documents of Wikipedia.
    """

    bare_share: float = 0.5
    text: str = ""
    tokens: int = 50_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.bare_share <= 1:
            left_out = f"It is {type(self).bare_share:.3g} if left out."
            raise IBKEError("`bare_share` is not between 0 and 1.", "settings", left_out)


@dataclass(frozen=True)
class Located:
    """A request as it is put to the model.

    Args:
        asked: prompt and target, bare first, then behind each context; each knows the token that is written.
        about: "S is a" and one token more, where what is said of the subject in general is watched.
    """

    asked: list[Pair]
    about: Pair

    @property
    def reached(self) -> int:
        """Tokens that an edit can reach, all rows as long as the longest."""
        rows = [*self.asked, self.about]
        return len(rows) * max(len(pair) - pair.place for pair in rows)


@dataclass(frozen=True)
class _Rows:
    """Prompts up to the token written, of like length, and what enters the first edited layer."""

    numbers: list[int]
    batch: Batch
    hidden_RTD: Tensor


class LocateEditor(Editor):
    """The procedure; methods give A.

    Args:
        lm: the model. Its statistics are taken now, so it must be the pristine one: detach edits first.
        settings: of the method.
        layers: whose down-projections are changed, in ascending order.

    Raises:
        ModuleNotEditableError: a layer does not exist, or the architecture is unknown.
        FormatError: the text for the statistics cannot be used.
    """

    Settings: ClassVar[type | None] = LocateSettings
    quick = {"steps": 3, "contexts": CONTEXTS[:1]}

    def __init__(self, lm: LanguageModel, settings: LocateSettings, layers: Sequence[int]):
        super().__init__(lm)
        self.settings = settings
        if not layers or list(layers) != sorted(set(layers)):
            raise IBKEError(f"{tuple(layers)} are no layers in ascending order.", "layers", "Give each once.")
        self.modules = resolve(lm.model, target_modules(lm, lm.architecture, layers))
        self.part = PartialModel(lm.model, lm.architecture.layers, first_layer(self.modules))
        self.upper = PartialModel(lm.model, lm.architecture.layers, layers[-1])
        with set_aside(lm):  # they are kept, and have to be the unedited model's
            self.moments = key_moments(lm, self.modules, settings.text, settings.tokens)
        self._factors: dict[str, Tensor] = {}  # Cholesky's, of C₀

    @property
    def place(self) -> nn.Module:
        """The module whose output is the value: the last layer itself."""
        return self.upper.layers[self.upper.first]

    @abstractmethod
    def addresses(self, name: str, keys_BI: Tensor) -> Tensor:
        """A of a module, one row a request (B × I, float64).

        Args:
            name: the module.
            keys_BI: mean keys (float64).
        """

    def scaled(self, a_BI: Tensor, bare_BI: Tensor) -> Tensor:
        """A as the method scales it to the bare prompts' own keys (B × I, float64); most do not."""
        del bare_BI
        return a_BI

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit that makes all requests true together.

        Raises:
            RequestError: no request, or one longer than the model's window.
        """
        began = time.perf_counter()
        located = self.located(requests)
        info = EditInfo(self.name, self.lm.fingerprint, self.lm.name)
        before_B, _ = self.outcome(located)
        rows = self._rows(located)
        with EditSession(self.lm) as session, torch.no_grad():
            value = partial(taking_output, self.place, last=True)
            start_BO = self._read(rows, [value])[0][:, 0]
            values = self._values(located, start_BO)
            target_BO, edit = start_BO + values.delta_BO, Edit({}, tuple(requests), info)
            for left, (name, module) in zip(range(len(self.modules), 0, -1), self.modules.items(), strict=True):
                keys_BCI, now_BCO = self._read(rows, [partial(taking_input, module), value])
                a_BI = self.scaled(self.addresses(name, self.mean(keys_BCI)), keys_BCI[:, 0].cpu().double())
                layer = Edit({name: (a_BI, ((target_BO - now_BCO[:, 0]) / left).T)}, tuple(requests), info)
                session.attach(layer)
                edit = Edit(edit.factors | layer.factors, edit.requests, info)
            nll_B, comes_B = self.outcome(located)
        edit.info = replace(
            info,
            refine_steps=int(values.steps_B.max()),
            achieved=bool(comes_B.all()),
            seconds=time.perf_counter() - began,
            nll_before=float(before_B.mean()),
            nll_after=float(nll_B.mean()),
        )
        return edit

    def pull(self, name: str, keys_BI: Tensor) -> Tensor:
        """C₀⁻¹ k of each key of a module (B × I, float64)."""
        if name not in self._factors:
            moment_II = self.moments[name]
            floor = FLOOR * moment_II.diagonal().mean()
            self._factors[name] = torch.linalg.cholesky(moment_II + floor * torch.eye(len(moment_II)).double())
        return torch.cholesky_solve(keys_BI.T, self._factors[name]).T

    @torch.no_grad()
    def keys(self, requests: Sequence[EditRequest]) -> dict[str, Tensor]:
        """Mean keys of some requests at every edited module (B × I, float64, on the CPU), on the model as it is."""
        rows = self._rows(self.located(requests))
        *before, last = self.modules.values()
        taps: list[Tap] = [
            *(partial(taking_input, module) for module in before),
            partial(taking_input, last, last=True),
        ]
        return dict(zip(self.modules, map(self.mean, self._read(rows, taps)), strict=True))

    def mean(self, keys_BCI: Tensor) -> Tensor:
        """One key a request out of its keys in all contexts, the bare prompt first (B × I, float64, on the CPU)."""
        keys_BCI = keys_BCI.cpu().double()
        bare_BI, others_BCI = keys_BCI[:, 0], keys_BCI[:, 1:]
        if not others_BCI.shape[1]:
            return bare_BI
        return others_BCI.mean(1).lerp(bare_BI, self.settings.bare_share)

    def located(self, requests: Sequence[EditRequest]) -> list[Located]:
        """The requests as they are put to the model.

        Raises:
            RequestError: no request, or one longer than the model's window.
        """
        return [self._located(*both) for both in zip(requests, self.pairs(requests), strict=True)]

    def _located(self, request: EditRequest, bare: Pair) -> Located:
        prompt, target, subject = request.prompt, request.target_new, request.about
        # Counted from the end, since a context may change how the prompt's first words are cut into tokens.
        after = len(bare.prompt) - bare.place
        asked = [bare.reached(bare.place)]
        for context in self.settings.contexts:
            pair = self.pair(prompt, target, subject=subject, context=context)
            asked.append(pair.reached(len(pair.prompt) - after))
        about = self.pair(f"{subject} is a", "-", subject=subject)
        return Located(asked, replace(about, answer=about.answer[:1]))

    def _rows(self, located: Iterable[Located]) -> list[_Rows]:
        prompts = [pair.prompt[: pair.place + 1] for one in located for pair in one.asked]
        found = []
        for numbers in by_length([len(prompt) for prompt in prompts]):
            some = [Pair(prompts[number], [0], (0, 1)) for number in numbers]
            batch = collate(some, self.lm.tokenizer.pad_token_id, self.lm.device)
            found.append(_Rows(numbers, batch, self.part.prefix(batch)))
        return found

    def _read(self, rows: Sequence[_Rows], taps: Sequence[Tap]) -> list[Tensor]:
        """What is taken at the token written, at several places in one pass (each B × C × width, float32).

        Args:
            rows: the requests in their contexts.
            taps: each takes something of a pass; the one reached last ends it.
        """
        parts: list[list[Tensor]] = [[] for _ in taps]
        for some in rows:
            with ExitStack() as stack:
                taken = [stack.enter_context(tap()) for tap in taps]
                self.part.states(some.hidden_RTD, some.batch)
            ends_R = some.batch.attention_RT.sum(1) - 1
            for part, (values, *_) in zip(parts, taken, strict=True):
                # Some models flatten rows and tokens before a linear module.
                whole_RTX = values.float().reshape(*some.batch.ids_RT.shape, -1)
                part.append(whole_RTX[torch.arange(len(ends_R), device=ends_R.device), ends_R])
        order = torch.tensor([number for some in rows for number in some.numbers]).argsort()
        contexts = 1 + len(self.settings.contexts)
        return [torch.cat(part)[order].unflatten(0, (-1, contexts)) for part in parts]

    def _values(self, located: Sequence[Located], start_BO: Tensor) -> Values:
        delta_BO = torch.zeros_like(start_BO)
        steps_B = torch.zeros(len(located), dtype=torch.long, device=start_BO.device)
        for numbers in by_length([one.reached for one in located]):
            asked, about = zip(*((located[number].asked, located[number].about) for number in numbers), strict=True)
            group = value_rows(self.upper, asked, about, self.lm.tokenizer.pad_token_id)
            found = optimise_values(self.upper, self.place, group, start_BO[numbers], self.settings)
            delta_BO[numbers], steps_B[numbers] = found.delta_BO, found.steps_B
        return Values(delta_BO, steps_B)

    @torch.no_grad()
    def outcome(self, located: Sequence[Located]) -> tuple[Tensor, Tensor]:
        """NLL of the targets at the bare prompt (B, nats) and whether they are generated, on the model as it is."""
        pairs = [one.asked[0] for one in located]
        nll_B, comes_B = torch.zeros(len(pairs)), torch.zeros(len(pairs), dtype=torch.bool)
        for numbers in by_length([len(pair) for pair in pairs]):
            batch = collate([pairs[number] for number in numbers], self.lm.tokenizer.pad_token_id, self.lm.device)
            nll_R, comes_R = batch.score(self.part.suffix(self.part.prefix(batch), batch))
            nll_B[numbers], comes_B[numbers] = nll_R.cpu(), comes_R.cpu()
        return nll_B, comes_B
