"""WISE: a side memory, a copy of one down-projection that alone is trained, and a router before the two.

Wang et al. 2024, "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models", NeurIPS
2024, arXiv 2405.14768. With what the projection is fed A(x), its weight W and the copy's W' = W + ΔW,

    Δ(x) = ‖A(x) ΔW‖₂                                                                            (eq. 3)
    f(x) = A(x) W'  if Δ(x) > ε,   else A(x) W                                                    (eq. 4)
    L    = −log P_W'(y given x) + max(0, Δ(x_i) − α) + max(0, β − Δ(x)) + max(0, γ − (Δ(x) − Δ(x_i)))  (eqs. 5, 6)

with x_i an irrelevant text, and ε the least Δ of any edit, scaled down a little. Knowledge is *sharded*: of the weights
of a copy only a random share ρ is trained by one shard of edits. Full shards are merged by TIES (Yadav et al. 2023,
arXiv 2306.01708): each trimmed to its largest entries, a sign elected for every entry, and the mean taken of those that
have it. Where several memories are in force, the one with the largest Δ beyond its ε answers (WISE-Retrieve).

As in the released code (EasyEdit) Δ is a mean over tokens, and edits are learnt one after another. Its Δ compares what
the model's activation function makes of both outputs; here it is the paper's.

Shape suffixes: R rows, T tokens, I d_in, O d_out, N words of all rows.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibke.batch import Batch, Pair, collate
from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor
from ibke.editors.descent import Lessons
from ibke.editors.key_statistics import words_of
from ibke.editors.settings import refuse_below, refuse_not_positive
from ibke.editors.value_optimisation import CONTEXTS
from ibke.editors.wise.memory import Memory, Routing, SideMemory, apart, words
from ibke.errors import CaptureError, IBKEError
from ibke.models import LanguageModel
from ibke.modules import chosen_module, first_layer, in_out, resolve
from ibke.partial import PartialModel
from ibke.parts import watch_passes
from ibke.request import EditRequest


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Several updates as one: largest entries only, the sign with more weight, the mean of those that have it.

    Args:
        deltas: of one shape.
        density: share of each one's entries that is kept (ratio 0–1).
    """
    kept_M = []
    for delta in deltas:
        count = max(1, round(density * delta.numel()))
        least = delta.abs().flatten().kthvalue(delta.numel() - count + 1).values
        kept_M.append(torch.where(delta.abs() >= least, delta, 0.0))
    stacked_M = torch.stack(kept_M)
    sign = torch.where(stacked_M.sum(0) >= 0, 1.0, -1.0)
    agree_M = stacked_M.sign() == sign
    return (stacked_M * agree_M).sum(0) / agree_M.sum(0).clamp(min=1)


@dataclass(frozen=True)
class WISESettings:
    """Settings of :class:`WISE`.

    Args:
        learning_rate: of plain gradient descent. Published: 1.
        iterations: most steps for an edit. Published: 70.
        alpha, beta, gamma: margins of Δ: of irrelevant texts, of edits, and between them. Published: 5, 20, 10.
        bound: the most any entry of the weight may change. Published: 1.
        ratio: of the least Δ of any edit, what is ε. Published: 0.88.
        mask_ratio: ρ, share of the weight that a shard trains. Published: 0.2.
        shard_size: edits a shard. Published: 500.
        shards: full shards that are merged into one memory. Published: 2.
        density: share of a shard's entries that is kept in merging. Published: 0.53.
        stop_loss: an edit is done once its loss is below and moves by less than 1e-4. Published: 0.02.
        contexts: texts that stand before the prompt, besides none. Published: 10, sampled from the model.
        layer: whose down-projection has the side memory; None is as deep as layer 27 of Llama-2-7B's 32, the published
            one.
        seed: of the masks, and of which irrelevant text an edit has.
    """

    learning_rate: float = 1.0
    iterations: int = 70
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    bound: float = 1.0
    ratio: float = 0.88
    mask_ratio: float = 0.2
    shard_size: int = 500
    shards: int = 2
    density: float = 0.53
    stop_loss: float = 0.02
    contexts: tuple[str, ...] = CONTEXTS
    layer: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_not_positive(self, "learning_rate", "ratio", "mask_ratio", "density")
        refuse_not_positive(self, "bound", infinite=True)
        refuse_below(self, 1, "iterations", "shard_size", "shards")
        refuse_below(self, 0, "alpha", "beta", "gamma", "stop_loss")
        for name in ("ratio", "mask_ratio", "density"):
            if getattr(self, name) > 1:
                raise IBKEError(f"`{name}` is above 1.", "settings", "It is a share.")


class WISE(Editor):
    """Learns edits in a side memory, a copy of one down-projection, with a router before it (WISE).

    Args:
        lm: the model. Of modules the caller named at loading the last has the side memory.
        settings: see :class:`WISESettings`.
        known: memories that are in force already.
    """

    name: ClassVar[str] = "wise"
    Settings: ClassVar[type[Any]] = WISESettings
    quick = {"iterations": 3, "contexts": ()}

    def __init__(self, lm: LanguageModel, settings: WISESettings | None = None, known: SideMemory | None = None):
        super().__init__(lm)
        self.settings: WISESettings = settings or WISESettings()
        self.place = chosen_module(lm, self.settings.layer, 27, of=32)
        self.module = resolve(lm.model, [self.place])[self.place]
        self.part = PartialModel(lm.model, lm.architecture.layers, first_layer([self.place]))
        self.known = known
        texts = files("ibke.data").joinpath("probes.json").read_text(encoding="utf-8")
        self.irrelevant: list[str] = json.loads(texts)["prompts"]["bare"]

    def after(self, edit: Edit) -> WISE:
        """The editor that goes on with an edit's memories."""
        more = edit.parts.get(self.place)
        if not isinstance(more, SideMemory):
            return self
        return WISE(self.lm, self.settings, SideMemory.join([self.known, more] if self.known else [more]))

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit of the memories that the requests add to or begin, learnt one after another.

        Memories that the editor knows must be in force on the model.

        Raises:
            RequestError: no request, or one longer than the model's window.
            CaptureError: the loss is not finite, or an edit in force puts tokens in front of the prompt.
        """
        began = time.perf_counter()
        lessons = Lessons(self.part, self.pairs(requests), self.lm.tokenizer.pad_token_id)
        before, _ = lessons.judge()
        memories, steps = list(self.known.memories if self.known else ()), 0
        for request in requests:
            at = self._open(memories, request)
            memories[at], took = self._learn(memories[at], request)
            steps += took
            memories = self._merged(memories)
        joined = SideMemory(tuple(memories))
        with self._answering(joined):
            after, achieved = lessons.judge()
        known = self.known.memories if self.known else ()
        changed = SideMemory(tuple(memory for memory in memories if not any(memory is old for old in known)))
        info = EditInfo(
            self.name,
            self.lm.fingerprint,
            self.lm.name,
            refine_steps=steps,
            achieved=achieved,
            seconds=time.perf_counter() - began,
            nll_before=before,
            nll_after=after,
        )
        return Edit({}, tuple(requests), info, parts={self.place: changed})

    def _open(self, memories: list[Memory], request: EditRequest) -> int:
        """Index of the memory that learns a request; a new one is begun where the last is full or merged."""
        last = memories[-1] if memories else None
        if last is None or len(last.shards) > 1 or last.edits >= self.settings.shard_size:
            begun = [len(memories), self.settings.seed, request.prompt, request.target_new]
            name = hashlib.sha256(json.dumps(begun).encode()).hexdigest()[:16]
            d_in, d_out = in_out(self.module)
            memories.append(Memory(torch.zeros(d_out, d_in), float("inf"), (name,), 0))
        return len(memories) - 1

    def _merged(self, memories: list[Memory]) -> list[Memory]:
        """The memories, full shards merged where there are enough of them."""
        size, count = self.settings.shard_size, self.settings.shards
        full = [memory for memory in memories if len(memory.shards) == 1 and memory.edits >= size]
        if count == 1 or len(full) < count:
            return memories
        whole = Memory(
            ties([memory.delta_OI for memory in full], self.settings.density),
            min(memory.threshold for memory in full),
            tuple(name for memory in full for name in memory.shards),
            sum(memory.edits for memory in full),
        )
        return [memory for memory in memories if not any(memory is old for old in full)] + [whole]

    def _learn(self, memory: Memory, request: EditRequest) -> tuple[Memory, int]:
        """A memory that knows one request more, and the steps it took."""
        settings, device, subject = self.settings, self.lm.device, request.subject
        texts = ("", *settings.contexts)
        pairs = [self.pair(request.prompt, request.target_new, "bare", subject, text) for text in texts]
        batch = collate(pairs, self.lm.tokenizer.pad_token_id, device)
        hidden_RTD, x_RTI = self.part.prefix(batch), self.part.inputs_of(self.module, batch)
        words_RT = words_of(batch)
        away_NI = self._irrelevant_inputs(request)
        mask_OI = mask(memory.shards[0], in_out(self.module), settings.mask_ratio).to(device)
        delta_OI = memory.delta_OI.to(device).clone().requires_grad_()
        last, steps = float("inf"), 0
        for _ in range(settings.iterations):
            with torch.enable_grad(), self._copy_answering(delta_OI):
                loss = self._loss(delta_OI, hidden_RTD, batch, x_RTI, words_RT, away_NI)
            if not torch.isfinite(loss):
                raise CaptureError("the loss is not finite.", "wise", "Lower `learning_rate`, or load in float32.")
            if loss.item() <= settings.stop_loss and abs(loss.item() - last) <= 1e-4:
                break
            last, steps = loss.item(), steps + 1
            (slope_OI,) = torch.autograd.grad(loss, delta_OI)
            with torch.no_grad():
                delta_OI -= settings.learning_rate * slope_OI * mask_OI
                delta_OI.clamp_(-settings.bound, settings.bound)
        delta_OI = delta_OI.detach()
        # A question comes without its answer, and may be a single word.
        asked_T = torch.arange(x_RTI.shape[1], device=x_RTI.device) < len(pairs[0].prompt)
        asked_NI = x_RTI[0][words(asked_T[None])[0]]
        least = min(memory.threshold, settings.ratio * F.linear(asked_NI, delta_OI).norm(dim=-1).mean().item())
        return replace(memory, delta_OI=delta_OI.cpu(), threshold=least, edits=memory.edits + 1), steps

    def _loss(
        self, delta_OI: Tensor, hidden_RTD: Tensor, batch: Batch, x_RTI: Tensor, words_RT: Tensor, away_NI: Tensor
    ) -> Tensor:
        """L: nats a token of the answers, and the margins, means over the prompt alone and behind its contexts."""
        nll_R, _ = batch.score(self.part.suffix(hidden_RTD, batch))
        near_R = apart(F.linear(x_RTI, delta_OI)[None], words_RT)[0]
        far = F.linear(away_NI, delta_OI).norm(dim=-1).mean()
        s = self.settings
        margins_R = F.relu(far - s.alpha) + F.relu(s.beta - near_R) + F.relu(s.gamma - (near_R - far))
        return (nll_R / batch.predicts_RT.sum(1) + margins_R).mean()

    @torch.no_grad()
    def _irrelevant_inputs(self, request: EditRequest) -> Tensor:
        """What the module is fed by the words of a text that has nothing to do with a request (N × I)."""
        drawn = hashlib.sha256(f"{self.settings.seed}:{request.prompt}".encode()).digest()
        text = self.irrelevant[int.from_bytes(drawn[:4], "big") % len(self.irrelevant)]
        ids = self.lm.tokenizer(text).input_ids
        batch = collate([Pair(ids, ids[:1], (0, len(ids)))], self.lm.tokenizer.pad_token_id, self.lm.device)
        return self.part.inputs_of(self.module, batch)[words_of(batch)]

    @contextmanager
    def _copy_answering(self, delta_OI: Tensor) -> Iterator[None]:
        """Let a copy answer whatever is asked, in the place of memories that are in force."""

        def answer(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return module.forward(*args) + F.linear(args[0], delta_OI.to(out.dtype))

        handle = self.module.register_forward_hook(answer)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _answering(self, joined: SideMemory) -> Iterator[None]:
        """Let memories answer where they do, in the place of those that are in force."""
        routing = Routing(self.lm, [joined])

        def answer(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
            return routing.answer(module, args, module.forward(*args))

        handles = [*watch_passes(self.lm, routing.before, routing.after), self.module.register_forward_hook(answer)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def mask(shard: str, size: tuple[int, int], ratio: float) -> Tensor:
    """Which entries a shard trains (O × I, 0 or 1), drawn from its name.

    Args:
        shard: its name, hexadecimal.
        size: (d_in, d_out).
        ratio: their share.
    """
    generator = torch.Generator().manual_seed(int(shard, 16) % 2**63)
    return (torch.rand(size[1], size[0], generator=generator) < ratio).float()
