"""The scope classifier: how likely a question is one that an edit is about.

A text is represented by the base model itself, as the mean of its words' states entering an early layer, centred,
scaled and of unit length, x̂. With a trained projection P and bias b

    g(z, x) = σ( b − ‖P x̂ − P ẑ‖² )

for an edit's prompt z and a question x: the embedding classifier of Mitchell et al. 2022 (SERAC, arXiv 2206.06520,
section 3.2), whose encoder is a language model of its own, trained whole. Its loss is theirs,

    ℓ = −E[ log g(z, x_in) + log(1 − g(z, x_out)) ]

over other wordings of an edit and what it must leave alone, of requests drawn as those that hypernetworks and IBKE are
trained on (:mod:`ibke.data.mixture`). Relations of the hard split are never trained on. A classifier belongs to a
model; it is trained once and kept in the cache folder.

Shape suffixes: R rows (texts), D width of the model, K dimensions compared, N edits, B training pairs.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from ibke.batch import Pair, by_length, collate
from ibke.data.fetch import load_sources
from ibke.data.mixture import Source, Split, draw
from ibke.editors.key_statistics import words_of
from ibke.editors.settings import refuse_below, refuse_not_finite, refuse_not_positive
from ibke.errors import CaptureError, FormatError, IBKEError, TrainingError
from ibke.files import cache_folder, digest, write_atomically
from ibke.frames import FRAMES, render
from ibke.models import LanguageModel
from ibke.modules import resolve_any, target_modules
from ibke.partial import runs_in_parts, taking_input
from ibke.request import EditRequest

LAYOUT = 1  # of the files kept; raised when what is computed changes
ANSWERED = 0.3  # share of training questions that go on with their answer, as they do while a model is scored
SPREAD = 0.3  # of each dimension when training starts, where they are principal axes


@dataclass(frozen=True)
class ScopeSettings:
    """How a scope classifier is trained.

    Args:
        requests: edit requests it is trained on, all sources together, each with other wordings and probes of its own.
        steps: of Adam.
        batch: pairs a step.
        learning_rate: of Adam. Published: 1e-5, all of DistilBERT.
        width: K.
        layer: whose input represents a text; None is an eighth of the model's depth.
        sources: of the requests, with their shares, e.g. ``facts=2``, ``counterfact:train.json``; see
            :mod:`ibke.data.mixture`.
        held_out: share of relations left out, the hard split.
        exclude: request files whose subjects and prompts are left out, as ``format:path``.
        seed: of requests, frames and pairs.
    """

    requests: int = 600
    steps: int = 300
    batch: int = 256
    learning_rate: float = 3e-3
    width: int = 128
    layer: int | None = None
    sources: tuple[str, ...] = ("lre", "pararel")
    held_out: float = 0.2
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_below(self, 2, "requests")
        refuse_below(self, 1, "steps", "batch", "width")
        refuse_not_positive(self, "learning_rate")
        refuse_not_finite(self, "held_out")
        for text in self.sources or ("",):
            Source.parse(text)  # refuses what is none


@dataclass(frozen=True, eq=False)
class Scope:
    """A trained classifier.

    Args:
        layer: whose input represents a text.
        mean_D, spread_D: what states are centred and scaled by.
        projection_KD: P.
        bias: b, no dimension.
        seconds: what training took; None where it is not known.
    """

    layer: int
    mean_D: Tensor
    spread_D: Tensor
    projection_KD: Tensor
    bias: Tensor
    seconds: float | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What it computes with."""
        return {name: getattr(self, name) for name in ("mean_D", "spread_D", "projection_KD", "bias")}

    @classmethod
    def checked(cls, layer: object, tensors: dict[str, Tensor]) -> Scope:
        """A classifier from what was stored.

        Raises:
            FormatError: it is none.
        """
        if set(tensors) != {"mean_D", "spread_D", "projection_KD", "bias"} or type(layer) is not int or layer < 0:
            raise FormatError("this is no scope classifier.", "scope", "It has mean, spread, projection, bias, layer.")
        width, shapes = tensors["projection_KD"].shape[-1:], {name: some.shape for name, some in tensors.items()}
        fit = shapes["mean_D"] == shapes["spread_D"] == width and len(shapes["projection_KD"]) == 2
        fine = all(some.dtype == torch.float32 and bool(torch.isfinite(some).all()) for some in tensors.values())
        if not fit or shapes["bias"] != torch.Size() or not fine:
            raise FormatError(
                "the scope classifier's tensors do not fit.", "scope", "Train it, or make the edit again."
            )
        return cls(layer, tensors["mean_D"], tensors["spread_D"], tensors["projection_KD"], tensors["bias"])

    def same(self, other: Scope) -> bool:
        """Whether two classifiers are one."""
        mine, theirs = self.tensors(), other.tensors()
        return self.layer == other.layer and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def embed(self, states_RD: Tensor) -> Tensor:
        """P x̂ of each row (R × K)."""
        return F.normalize((states_RD - self.mean_D) / self.spread_D, dim=-1) @ self.projection_KD.T

    def log_odds(self, asked_RK: Tensor, edits_NK: Tensor) -> Tensor:
        """Log-odds that a row is in the scope of an edit, in nats (R × N); above 0 it is likelier than not."""
        return self.bias - torch.cdist(asked_RK, edits_NK).square()


@torch.no_grad()
def represent(lm: LanguageModel, layer: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """Mean state of each row's words on entering a layer (R × D, float32, on the CPU); nothing after it is run.

    Raises:
        CaptureError: the model is being run in parts.
    """
    decoder = lm.model.get_decoder()
    if runs_in_parts(decoder):
        raise CaptureError(
            "an attached edit looks at the whole question, and this method runs the model in parts.",
            "scope",
            "Detach that edit, make this one, and attach both.",
        )
    pairs = [Pair(list(row), list(row[:1]), (0, len(row))) for row in rows]
    means: list[Tensor] = [torch.empty(0)] * len(pairs)
    for group in by_length([len(pair) for pair in pairs]):
        batch = collate([pairs[row] for row in group], lm.tokenizer.pad_token_id, lm.device)
        with taking_input(layer, last=True) as taken:
            # Not called but its `forward`: edits that put a text in front of the question hang on the call.
            decoder.forward(input_ids=batch.ids_RT, attention_mask=batch.attention_RT, use_cache=False)
        words_RT = words_of(batch)
        words_RT[:, 0] |= words_RT.sum(1) == 0
        shares_RT = words_RT.float() / words_RT.sum(1, keepdim=True)
        mean_RD = torch.einsum("rt,rtd->rd", shares_RT, taken[0].float()).cpu()
        for row, mean_D in zip(group, mean_RD, strict=True):
            means[row] = mean_D
    return torch.stack(means)


def layer_of(lm: LanguageModel, number: int) -> nn.Module:
    """A layer of a model.

    Raises:
        ModuleNotEditableError: there is no such layer.
    """
    return resolve_any(lm.model, f"{lm.architecture.layers}.{number}")


def _early(lm: LanguageModel) -> int:
    """An eighth of a model's depth.

    Raises:
        ModuleNotEditableError: the architecture is unknown.
    """
    if not lm.architecture.layers:
        target_modules(lm, lm.architecture)  # says so
    return round(len(resolve_any(lm.model, lm.architecture.layers)) / 8)


def scope_for(lm: LanguageModel, settings: ScopeSettings) -> Scope:
    """The classifier of a model, from the cache folder where it has been trained before.

    A file there counts only if it says of itself that it is of this model, these settings and the requests that the
    sources give today; without these there is nothing newer than what is kept. The model must be the pristine one:
    detach edits first.

    Args:
        lm: the model.
        settings: how it is trained; 40 seconds for SmolLM2-135M on one core.

    Raises:
        TrainingError: there are no facts to train on.
    """
    wanted = asdict(settings) | {"layer": _early(lm) if settings.layer is None else settings.layer}
    identity = {"layout": LAYOUT, "model": lm.fingerprint, "dtype": str(lm.dtype), "settings": wanted}
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = cache_folder() / "scope" / lm.fingerprint / f"{name}.safetensors"
    about, began = {"identity": json.dumps(identity)}, time.perf_counter()
    try:
        requests = training_requests(settings)
    except IBKEError:
        if kept := _read(path, about):
            return kept
        raise
    about["requests"] = digest([request.to_dict() for request in requests])
    scope = _read(path, about)
    if scope is None:
        scope = train_scope(lm, wanted["layer"], requests, settings)
        scope = replace(scope, seconds=time.perf_counter() - began)
        data = serialise(scope.tensors(), about | {"seconds": str(scope.seconds)})
        # A cache that cannot be written costs time and nothing else.
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
    return scope


def training_requests(settings: ScopeSettings) -> list[EditRequest]:
    """Requests of the sources by share, none of an excluded subject and no relation of the hard split among them.

    Raises:
        TrainingError: a source is not there, or they give no two requests.
    """
    sources = [Source.parse(text) for text in settings.sources]
    split = Split(settings.held_out, settings.exclude)
    try:
        drawn = draw(sources, settings.seed, settings.requests, split)
    except (FormatError, OSError) as error:
        names = list(dict.fromkeys(source.name for source in sources if source.name in load_sources()))
        raise TrainingError(
            f"its scope classifier has not been trained for this model, and there are no facts to do so ({error}).",
            "serac",
            f"Run `ibke data fetch {' '.join(names)}` and try again." if names else "Name other `sources`.",
        ) from None
    requests = [request for _, items in drawn for request, _ in items]
    random.Random(settings.seed).shuffle(requests)
    if len(requests) < 2:
        raise TrainingError("the sources give no two requests.", "serac", "Name more `sources`, or exclude less.")
    return requests


def train_scope(lm: LanguageModel, layer: int, requests: Sequence[EditRequest], settings: ScopeSettings) -> Scope:
    """Train a classifier on the wordings and probes of some requests.

    Args:
        lm: the model, pristine.
        layer: whose input represents a text.
        requests: what it learns from: rephrase prompts are in scope, locality probes are not.
        settings: how.
    """
    rng = random.Random(f"{settings.seed}:frames")
    asked: list[tuple[int, bool, list[int]]] = []
    for number, request in enumerate(requests):
        inside = [(text, request.target_new) for text in (request.prompt, *request.rephrase_prompts)]
        outside = [(probe.prompt, probe.target) for probe in request.locality]
        asked += [(number, True, _framed(lm, *question, rng)) for question in inside]
        asked += [(number, False, _framed(lm, *question, rng)) for question in outside]
    edits = [lm.tokenizer(request.prompt.strip()).input_ids for request in requests]
    states_RD = represent(lm, layer_of(lm, layer), [*edits, *(ids for *_, ids in asked)])
    owner_R = torch.tensor([number for number, *_ in asked])
    inside_R = torch.tensor([is_inside for _, is_inside, _ in asked])
    return fit(layer, states_RD[: len(edits)], states_RD[len(edits) :], owner_R, inside_R, settings)


def _framed(lm: LanguageModel, prompt: str, answer: str | None, rng: random.Random) -> list[int]:
    """A question as it may come: in any frame, and now and then with its answer."""
    frame = rng.choice(("bare", *FRAMES))
    text, joiner = render(prompt, frame, lm.tokenizer)
    templated = frame == "chat" and bool(getattr(lm.tokenizer, "chat_template", None))
    text += joiner + answer if answer and rng.random() < ANSWERED else ""
    return lm.tokenizer(text, add_special_tokens=not templated).input_ids


def fit(
    layer: int, edits_ND: Tensor, asked_RD: Tensor, owner_R: Tensor, inside_R: Tensor, settings: ScopeSettings
) -> Scope:
    """Fit projection and bias to pairs of an edit and a question: a request's own, and half as many at random.

    Args:
        layer: where the states are from.
        edits_ND: representations of the requests' prompts.
        asked_RD: of questions.
        owner_R: the request a question was made for.
        inside_R: whether it is in that request's scope; it is in no other's.
        settings: how.
    """
    states = torch.cat([edits_ND, asked_RD])
    mean_D, spread_D = states.mean(0), states.std(0).clamp(min=1e-6)
    unit = F.normalize((states - mean_D) / spread_D, dim=-1)
    _, sizes, axes = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    width = min(settings.width, len(sizes))
    start_KD = SPREAD * axes[:width] / (sizes[:width, None] / len(unit) ** 0.5).clamp(min=1e-6)
    projection_KD, bias = start_KD.clone().requires_grad_(), torch.tensor(3.0, requires_grad=True)
    scope = Scope(layer, mean_D, spread_D, projection_KD, bias)
    adam = torch.optim.AdamW([projection_KD, bias], lr=settings.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.steps):
        drawn_B = torch.randint(len(asked_RD), (settings.batch,), generator=generator)
        other_B = torch.randint(len(edits_ND), (settings.batch,), generator=generator)
        own_B = owner_R[drawn_B]
        labels_B = inside_R[drawn_B]
        with torch.enable_grad():
            asked_BK = scope.embed(asked_RD[drawn_B])
            own = bias - (asked_BK - scope.embed(edits_ND[own_B])).square().sum(-1)
            other = bias - (asked_BK - scope.embed(edits_ND[other_B])).square().sum(-1)
            loss = F.binary_cross_entropy_with_logits(own, labels_B.float())
            loss = loss + 0.5 * F.binary_cross_entropy_with_logits(other, (labels_B & (own_B == other_B)).float())
        adam.zero_grad()
        loss.backward()
        adam.step()
    return Scope(layer, mean_D, spread_D, projection_KD.detach().contiguous(), bias.detach())


def _read(path: Path, wanted: dict[str, str]) -> Scope | None:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not wanted.items() <= about.items():
            return None
        scope = Scope.checked(json.loads(wanted["identity"])["settings"]["layer"], tensors)
        return replace(scope, seconds=float(about["seconds"])) if "seconds" in about else scope
    except (OSError, ValueError, SafetensorError, FormatError):
        return None
