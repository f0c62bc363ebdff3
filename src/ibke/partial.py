"""Run a causal language model in two parts: the layers no edit can touch, once, and the rest, as often as needed.

The hidden states entering the first edited layer are a function of the frozen base alone, so they are computed once
and kept. The second part runs the model's own code with pass-through modules in place of the first layers, so masks,
rotary or learned positions and layer types stay those of the architecture.

Shape suffixes: R rows, T tokens, D hidden size, N answer positions, I d_in, O d_out, K rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ibke.batch import Batch


class _Reached(Exception):
    """Ends a forward pass at the first edited layer."""


class _PassThrough(nn.Module):
    """Stands in for a skipped layer; the first one puts in the hidden states computed before."""

    def __init__(self, wraps_output: bool):
        super().__init__()
        self.wraps_output = wraps_output
        self.hidden_RTD: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        out = hidden_states if self.hidden_RTD is None else self.hidden_RTD
        return (out,) if self.wraps_output else out


class PartialModel:
    """The part of a model from layer ``first`` on, and the part before it.

    Args:
        model: a transformers causal language model.
        layers: dotted name of its list of layers, e.g. ``model.layers``.
        first: index of the first layer that an edit may change.
    """

    def __init__(self, model: Any, layers: str, first: int):
        self.model, self.first = model, first
        self.parent: Any = model.get_submodule(layers.rpartition(".")[0])
        self.attribute = layers.rpartition(".")[2]
        self.layers: nn.ModuleList = getattr(self.parent, self.attribute)
        self.decoder: Any = model.base_model
        self.head: nn.Module = model.get_output_embeddings()
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        wraps = self._wraps_output()
        self._skipped = nn.ModuleList([*(_PassThrough(wraps) for _ in range(first)), *self.layers[first:]])

    def prefix(self, batch: Batch) -> Tensor:
        """Hidden states entering layer ``first`` (R × T × D), without gradient."""
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        handle = self.layers[self.first].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with suppress(_Reached), torch.no_grad():
                self.decoder(input_ids=batch.ids_RT, attention_mask=batch.attention_RT, use_cache=False)
        finally:
            handle.remove()
        return caught[0]

    def _wraps_output(self) -> bool:
        # Some architectures return a tuple from each layer; ask the first one with a single token.
        kinds: list[bool] = []

        def note(_: nn.Module, __: Any, out: Any) -> None:
            kinds.append(isinstance(out, tuple))
            raise _Reached

        handle = self.layers[0].register_forward_hook(note)
        one = torch.zeros(1, 1, dtype=torch.long, device=next(self.model.parameters()).device)
        with suppress(_Reached), torch.no_grad():
            self.decoder(input_ids=one, use_cache=False)
        handle.remove()
        return kinds[0]

    @contextmanager
    def _skipping(self, hidden_RTD: Tensor) -> Iterator[None]:
        if self.first == 0:
            handle = self.layers[0].register_forward_pre_hook(
                lambda _m, args, kwargs: _replace_hidden(hidden_RTD, args, kwargs), with_kwargs=True
            )
            try:
                yield
            finally:
                handle.remove()
            return
        entrance: Any = self._skipped[0]
        entrance.hidden_RTD = hidden_RTD
        setattr(self.parent, self.attribute, self._skipped)
        try:
            yield
        finally:
            setattr(self.parent, self.attribute, self.layers)
            entrance.hidden_RTD = None

    def states(self, hidden_RTD: Tensor, batch: Batch) -> Tensor:
        """Final hidden states (R × T × D) from those entering layer ``first``."""
        with self._skipping(hidden_RTD), self._plain_attention():
            out = self.decoder(input_ids=batch.ids_RT, attention_mask=batch.attention_RT, use_cache=False)
        return out.last_hidden_state

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        # On a CPU the fused attention's backward pass is several times slower than plain products on short rows.
        config = self.decoder.config
        kept = config._attn_implementation
        if kept != "sdpa" or not torch.is_grad_enabled() or self.model.device.type != "cpu":
            yield
            return
        config._attn_implementation = "eager"
        try:
            yield
        finally:
            config._attn_implementation = kept

    def suffix(self, hidden_RTD: Tensor, batch: Batch) -> Tensor:
        """Logits at the answer positions (N × V, float32) from hidden states entering layer ``first``."""
        logits = self.head(self.states(hidden_RTD, batch)[batch.predicts_RT]).float()
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def _replace_hidden(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


@contextmanager
def row_updates(modules: Mapping[str, nn.Module], factors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Give every row of the next batches a low-rank update of its own: y_r += (x_r A_rᵀ) B_r.

    Args:
        modules: linear modules by name.
        factors: by module name, A (R × K × I) and B (R × K × O); differentiable.
    """

    def hook(a_RKI: Tensor, b_RKO: Tensor) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            # Some models flatten rows and tokens before a linear module.
            x_RTI = args[0].reshape(len(a_RKI), -1, a_RKI.shape[-1])
            added = torch.bmm(torch.bmm(x_RTI, a_RKI.to(x_RTI.dtype).transpose(1, 2)), b_RKO.to(x_RTI.dtype))
            return out + added.view_as(out)

        return add

    handles = [modules[name].register_forward_hook(hook(a, b)) for name, (a, b) in factors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
