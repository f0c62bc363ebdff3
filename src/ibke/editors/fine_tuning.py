"""Fine-tuning of one down-projection: LocFT-BF, and its norm-bounded form FT-L.

LocFT-BF (Yang et al., "Fine-tuning Done Right in Model Editing", ICLR 2026, as released): Adam on the mean loss of the
answers' tokens, end token included, over batches of requests and several epochs, on the output projection of the MLP of
one layer. The loss is in :mod:`ibke.editors.descent`.

FT-L: the same under the constraint of Zhu et al. 2020 ("Modifying Memories in Transformer Models", arXiv 2012.00363,
constrained fine-tuning), in the form of Meng et al. 2022 (ROME, arXiv 2202.05262, appendix on baselines),

    min L(W + ΔW)   subject to   ‖ΔW‖∞ ≤ ε,

kept by clamping every entry of ΔW to [−ε, ε] after each step. ROME's own code scores all of a target's tokens at the
prompt's last position, which only one of them can satisfy; here each is scored at its own.

Shape suffixes: O d_out, I d_in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibke.edit import Edit, dense_factors
from ibke.editors.base import Editor
from ibke.editors.descent import DescentSettings, Lessons
from ibke.editors.settings import refuse_not_positive
from ibke.models import LanguageModel
from ibke.modules import by_depth, first_layer, in_out, resolve, target_modules
from ibke.partial import PartialModel
from ibke.request import EditRequest


@dataclass(frozen=True)
class FineTuningSettings(DescentSettings):
    """Settings of :class:`FineTuning`, with those of :class:`~ibke.editors.descent.DescentSettings`.

    Args:
        layer: whose down-projection is trained; None is as deep as layer 22 of Llama-3-8B's 32, the published one.
            Published too: 23 of Mistral-7B's 32, 6 of Qwen2.5-7B's 28.
        bound: ε, the most any entry of the weight may change. Published, LocFT-BF: none.
    """

    layer: int | None = None
    bound: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_not_positive(self, "bound", infinite=True)


@dataclass(frozen=True)
class BoundedSettings(FineTuningSettings):
    """Settings of :class:`BoundedFineTuning`.

    Args:
        layer: whose down-projection is trained. Published, ROME's FT+L: 0 for GPT-2 XL and GPT-J, after a sweep.
        bound: ε. Published, ROME's FT+L: 5e-4 for GPT-2 XL, 5e-5 for GPT-J. SmolLM2-135M's weights have a standard
            deviation of 0.19; under 5e-4 no answer comes.
    """

    layer: int | None = 0
    bound: float = 5e-4


class FineTuning(Editor):
    """Fine-tunes one MLP output projection on the requests (LocFT-BF).

    Args:
        lm: the model. Modules the caller named at loading are trained, all of them, instead of the default one.
        settings: see :class:`FineTuningSettings`.
    """

    name: ClassVar[str] = "ft"
    Settings: ClassVar[type[Any]] = FineTuningSettings
    quick = {"epochs": 2}

    def __init__(self, lm: LanguageModel, settings: FineTuningSettings | None = None):
        super().__init__(lm)
        self.settings: FineTuningSettings = settings or self.Settings()
        arch = lm.architecture
        wanted = self.settings.layer
        names = arch.modules or target_modules(lm, arch, by_depth(lm, (22,), of=32) if wanted is None else [wanted])
        self.modules = resolve(lm.model, names)
        self.part = PartialModel(lm.model, arch.layers, first_layer(names))

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit that makes all requests true together; its update is that of the weight, to the bit.

        Raises:
            RequestError: no request, or one longer than the model's window.
            CaptureError: the loss is not finite.
        """
        began = time.perf_counter()
        lessons = Lessons(self.part, self.pairs(requests), self.lm.tokenizer.pad_token_id)
        deltas = {name: self._start(module) for name, module in self.modules.items()}

        @torch.no_grad()
        def clamp() -> None:
            for delta_OI in deltas.values():
                delta_OI.clamp_(-self.settings.bound, self.settings.bound)

        with self._in_force(deltas):
            told = lessons.learn(list(deltas.values()), self.settings, clamp)
        factors = {name: dense_factors(delta_OI.detach()) for name, delta_OI in deltas.items()}
        return Edit(factors, tuple(requests), told.info(self.name, self.lm, time.perf_counter() - began))

    def _start(self, module: nn.Module) -> Tensor:
        d_in, d_out = in_out(module)
        return torch.zeros(d_out, d_in, device=self.lm.device, requires_grad=True)

    @contextmanager
    def _in_force(self, deltas: Mapping[str, Tensor]) -> Iterator[None]:
        # Beside the weights, which stay as they are: in float32, whatever they are in, and nothing to put back.
        def adder(delta_OI: Tensor) -> Any:
            return lambda _, args, out: out + F.linear(args[0], delta_OI.to(out.dtype))

        handles = [self.modules[name].register_forward_hook(adder(delta)) for name, delta in deltas.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class BoundedFineTuning(FineTuning):
    """Fine-tunes one MLP output projection, no entry of which may move far (FT-L)."""

    name: ClassVar[str] = "ft-l"
    Settings: ClassVar[type[Any]] = BoundedSettings
    quick = {"epochs": 2, "learning_rate": 2e-3, "bound": 1e-2}
