"""LoRA: low-rank factors beside many linear maps, trained on the requests through PEFT's own modules.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3,

    h = W x + (α/r) B A x,      A drawn at random, B = 0 at first,

so an :class:`~ibke.edit.Edit` of A and (α/r) B is the trained adapter. The loss is that of :mod:`ibke.editors.descent`.

PEFT puts its modules into a model in place. Here it gets a second set of modules over the same weights, which is
dropped afterwards: the model itself is never touched, whatever happens meanwhile.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ibke.edit import Edit
from ibke.editors.base import Editor
from ibke.editors.descent import DescentSettings, Lessons
from ibke.editors.settings import refuse_below, refuse_not_finite
from ibke.errors import MissingPackageError, ModuleNotEditableError
from ibke.models import LanguageModel
from ibke.modules import first_layer, linear_modules, resolve, stored_transposed
from ibke.partial import PartialModel
from ibke.request import EditRequest


@dataclass(frozen=True)
class LoRASettings(DescentSettings):
    """Settings of :class:`LoRA`, with those of :class:`~ibke.editors.descent.DescentSettings`.

    Published for editing is what EasyEdit ships for Llama-3-8B; its dropout of 0.1 is left out, since an edit is a
    function of its request.

    Args:
        learning_rate: of Adam. Published: 5e-3, with which a small model soon gives the target to every prompt; Hu et
            al. 2e-4 for GPT-2, on whole data sets.
        epochs: most passes over the requests. Published: 70.
        stop_loss: see there; 0 is never. Published: 0.
        rank: r. Published: 8; Hu et al. 4 for GPT-2.
        alpha: α. Published: 32; Hu et al. 32 for GPT-2.
        layers: whose linear maps are adapted; empty is all of them, as published.
        targets: last parts of the names of the linear maps to adapt; empty is all in attention and MLP. Published:
            those of queries and values; in some models they are one with that of keys.
    """

    learning_rate: float = 5e-3
    epochs: int = 70
    rank: int = 8
    alpha: float = 32.0
    layers: tuple[int, ...] = ()
    targets: tuple[str, ...] = ("q_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(self, 1, "rank")
        refuse_not_finite(self, "alpha")


class LoRA(Editor):
    """Trains low-rank adapters of the attention's queries and values on the requests (LoRA, through PEFT).

    Args:
        lm: the model. Modules the caller named at loading are adapted instead of the default ones.
        settings: see :class:`LoRASettings`.

    Raises:
        MissingPackageError: PEFT is not installed.
        ModuleNotEditableError: no linear map has a name that ends as `targets` says.
    """

    name: ClassVar[str] = "lora"
    Settings: ClassVar[type[Any]] = LoRASettings
    quick = {"epochs": 3}

    def __init__(self, lm: LanguageModel, settings: LoRASettings | None = None):
        super().__init__(lm)
        self.peft = _peft()
        self.settings: LoRASettings = settings or self.Settings()
        names = linear_modules(lm, self.settings.layers)
        if (targets := self.settings.targets) and not lm.architecture.modules:
            names = [name for name in names if name.rpartition(".")[2] in targets]
        if not names:
            raise ModuleNotEditableError(
                f"no linear map there is called {' or '.join(self.settings.targets)}.", "lora", "Leave `targets` out."
            )
        self.modules = resolve(lm.model, names)

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit that makes all requests true together.

        Raises:
            RequestError: no request, or one longer than the model's window.
            CaptureError: the loss is not finite.
        """
        began = time.perf_counter()
        pairs = self.pairs(requests)
        model = second_view(self.lm.model)
        adapted = self._adapted(model)
        part = PartialModel(model, self.lm.architecture.layers, first_layer(self.modules))
        lessons = Lessons(part, pairs, self.lm.tokenizer.pad_token_id)
        told = lessons.learn([weight for weight in adapted.parameters() if weight.requires_grad], self.settings)
        # Embeddings are not trained; whether to save them would be asked of the hub.
        trained = self.peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        scale = self.settings.alpha / self.settings.rank
        factors = {}
        for name in self.modules:
            a_RI, b_OR = (trained[f"base_model.model.{name}.lora_{side}.weight"].detach().float() for side in "AB")
            factors[name] = (a_RI, scale * b_OR)
        return Edit(factors, tuple(requests), told.info(self.name, self.lm, time.perf_counter() - began))

    def _adapted(self, model: Any) -> Any:
        """A model with PEFT's modules in it; what is drawn depends on the seed alone."""
        config = self.peft.LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,
            target_modules=list(self.modules),
            fan_in_fan_out=any(stored_transposed(module) for module in self.modules.values()),
            lora_dropout=0.0,
            bias="none",
        )
        device = self.lm.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.settings.seed)
            return self.peft.get_peft_model(model, config)


def second_view(model: Any) -> Any:
    """The modules of a model anew, over the same parameters and buffers; hooks go along.

    What is put into it or taken out of it leaves the model as it is.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError(
            f"PEFT is not installed ({error}).", "lora", "Install it with `pip install 'ibke[peft]'`."
        ) from None
    return peft
