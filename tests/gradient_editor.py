"""A plain method for tests of what is built on methods: Adam on the low-rank factors of a few modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibke.batch import collate
from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor
from ibke.frames import encode_pair
from ibke.models import LanguageModel
from ibke.modules import in_out, resolve, target_modules
from ibke.partial import PartialModel
from ibke.request import EditRequest

LAYERS = (12, 16, 20)


class GradientEditor(Editor):
    """Moves low-rank factors down the target's gradient."""

    name: ClassVar[str] = "gradient"
    steps: ClassVar[int] = 25
    rank: ClassVar[int] = 4

    def __init__(self, lm: LanguageModel):
        super().__init__(lm)
        self.modules = resolve(lm.model, target_modules(lm, lm.architecture, LAYERS))

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit for all requests."""
        pairs = [encode_pair(r.prompt, r.target_new, "bare", self.lm.tokenizer) for r in requests]
        batch = collate(pairs, self.lm.tokenizer.pad_token_id, self.lm.device)
        generator = torch.Generator().manual_seed(0)
        factors = {name: self._start(module, generator) for name, module in self.modules.items()}
        adam = torch.optim.Adam([tensor for pair in factors.values() for tensor in pair], lr=1e-2)
        part = PartialModel(self.lm.model, self.lm.architecture.layers, LAYERS[0])
        before = part.prefix(batch)
        for _ in range(self.steps):
            with self._in_force(factors):
                loss = F.cross_entropy(part.suffix(before, batch), batch.labels_N)
            if loss < 0.02:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
        info = EditInfo(self.name, self.lm.fingerprint, self.lm.name)
        return Edit({name: (a.detach(), b.detach()) for name, (a, b) in factors.items()}, tuple(requests), info)

    def _start(self, module: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        d_in, d_out = in_out(module)
        a = torch.randn(self.rank, d_in, generator=generator) / d_in**0.5
        return a.requires_grad_(), torch.zeros(d_out, self.rank, requires_grad=True)

    @contextmanager
    def _in_force(self, factors: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
        def adder(a: Tensor, b: Tensor):
            return lambda _, args, out: out + F.linear(F.linear(args[0], a.to(out.dtype)), b.to(out.dtype))

        handles = [self.modules[name].register_forward_hook(adder(*pair)) for name, pair in factors.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class IdleEditor(GradientEditor):
    """Takes no step, so its edits change nothing."""

    name: ClassVar[str] = "idle"
    steps: ClassVar[int] = 0
