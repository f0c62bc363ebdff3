"""Run a causal language model in two parts: the layers no edit can touch, once, and the rest, as often as needed.

The hidden states entering the first edited layer are a function of the frozen base alone, so they are computed once
and kept. The second part runs the model's own code with pass-through modules in place of the first layers, so masks,
rotary or learned positions and layer types stay those of the architecture.

Shape suffixes: R rows, T tokens, D hidden size, N answer positions, I d_in, O d_out, K rank, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from ibke.batch import Batch
from ibke.errors import CaptureError
from ibke.modules import finished_logits
from ibke.parts import asking


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


@dataclass
class Past:
    """Attention keys and values of the tokens that no edit can reach, which stay as the base made them.

    Args:
        real_RT: which of them are real; rows are padded on the left.
        layers: keys and values (R × heads × T × size) of each layer: of all before a whole pass, from the first edited
            one on before a partial one.
    """

    real_RT: Tensor
    layers: list[tuple[Tensor, Tensor]]

    def map(self, change: Callable[[Tensor], Tensor]) -> Past:
        """The same with every tensor changed; its first dimension is the rows."""
        return Past(change(self.real_RT), [(change(keys), change(values)) for keys, values in self.layers])

    def padded(self, length: int) -> Past:
        """The same with more padding, up to a length."""
        more = length - self.real_RT.shape[1]
        wide = [(F.pad(keys, (0, 0, more, 0)), F.pad(values, (0, 0, more, 0))) for keys, values in self.layers]
        return Past(F.pad(self.real_RT, (more, 0)), wide)


def join(pasts: Sequence[Past]) -> Past:
    """Several pasts as one, row after row."""
    wide = [past.padded(max(past.real_RT.shape[1] for past in pasts)) for past in pasts]
    layers = [
        (torch.cat([keys for keys, _ in same]), torch.cat([values for _, values in same]))
        for same in zip(*(past.layers for past in wide), strict=True)
    ]
    return Past(torch.cat([past.real_RT for past in wide]), layers)


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
        self._takes_positions = "position_ids" in inspect.signature(self.decoder.forward).parameters
        wraps = self._wraps_output()
        self._skipped = _Rest([*(_PassThrough(wraps) for _ in range(first)), *self.layers[first:]])

    @torch.no_grad()
    def prefix(self, batch: Batch) -> Tensor:
        """Hidden states entering layer ``first`` (R × T × D), without gradient.

        Raises:
            CaptureError: an attached edit puts tokens in front of the rows.
        """
        with taking_input(self.layers[self.first], last=True) as taken, asking(batch.question_ends_R):
            self.decoder(input_ids=batch.ids_RT, attention_mask=batch.attention_RT, use_cache=False)
        _refuse_longer(taken[0], batch)
        return taken[0]

    @torch.no_grad()
    def inputs_of(self, module: nn.Module, batch: Batch) -> Tensor:
        """What a module of the model is fed (R × T × its d_in, float32), without gradient; nothing after it is run."""
        with taking_input(module, last=True) as taken, asking(batch.question_ends_R):
            self.decoder(input_ids=batch.ids_RT, attention_mask=batch.attention_RT, use_cache=False)
        _refuse_longer(taken[0].reshape(batch.rows, -1, taken[0].shape[-1]), batch)
        # Some models flatten rows and tokens before a linear module.
        return taken[0].float().reshape(*batch.ids_RT.shape, -1)

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

    @torch.no_grad()
    def whole(self, batch: Batch, past: Past) -> tuple[Tensor, Tensor, Past]:
        """One pass of the unedited model.

        Args:
            batch: tokens.
            past: what comes before them, for all layers.

        Returns:
            hidden states entering layer ``first`` (R × T × D), final ones at the answer positions (N × D), and keys and
            values of all tokens, past ones first, for each layer from ``first`` on.
        """
        with taking_input(self.layers[self.first]) as taken, asking(batch.question_ends_R):
            out = self.decoder(input_ids=batch.ids_RT, **self.after(past, batch))
        kept = [(keys, values) for keys, values, *_ in out.past_key_values][self.first :]
        real_RT = torch.cat([past.real_RT, batch.attention_RT], dim=1)
        return taken[0], out.last_hidden_state[batch.predicts_RT], Past(real_RT, kept)

    def after(self, past: Past, batch: Batch) -> dict[str, Any]:
        """How to tell the decoder of what comes before a batch."""
        real_RT = torch.cat([past.real_RT.to(batch.attention_RT.dtype), batch.attention_RT], dim=1)
        cache = DynamicCache(past.layers) if past.real_RT.shape[1] else DynamicCache()
        positions = self.positions(real_RT, batch.ids_RT.shape[1])
        return {"attention_mask": real_RT, "past_key_values": cache, "use_cache": True, **positions}

    def positions(self, real_RT: Tensor, new: int) -> dict[str, Tensor]:
        """Positions of the last ``new`` tokens of left-padded rows, for models that take them."""
        if not self._takes_positions:
            return {}
        return {"position_ids": (real_RT.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]}

    def states(self, hidden_RTD: Tensor, batch: Batch, past: Past | None = None) -> Tensor:
        """Final hidden states (R × T × D) from those entering layer ``first``, and what was before, if anything."""
        more: dict[str, Any] = {"attention_mask": batch.attention_RT, "use_cache": False}
        if past is not None:
            # Layers that are skipped need no keys, only as many as the others.
            absent = past.real_RT.new_zeros(batch.rows, 1, past.real_RT.shape[1], 1, dtype=hidden_RTD.dtype)
            more = self.after(Past(past.real_RT, [(absent, absent)] * self.first + past.layers), batch)
        with self._skipping(hidden_RTD), self._plain_attention(), asking(batch.question_ends_R):
            out = self.decoder(input_ids=batch.ids_RT, **more)
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

    def suffix(self, hidden_RTD: Tensor, batch: Batch, past: Past | None = None) -> Tensor:
        """Logits at the answer positions (N × V, float32) from hidden states entering layer ``first``."""
        return self.logits(self.states(hidden_RTD, batch, past)[batch.predicts_RT])

    def logits(self, states_ND: Tensor) -> Tensor:
        """Logits (N × V, float32) of final hidden states."""
        # Backward, the head sums over the whole vocabulary. On a CPU the kernels for a number of rows that is no
        # multiple of four add up one by one, which leaves errors of 3e-4 in a gradient that has 3e-6 otherwise.
        count = len(states_ND)
        padded_ND = F.pad(states_ND, (0, 0, 0, -count % 4)) if torch.is_grad_enabled() else states_ND
        return finished_logits(self.model, self.head(padded_ND)[:count])


def answer_states(model: Any, batch: Batch) -> Tensor:
    """Final hidden states at the answer positions (N × D) of a pass of the model as it is, attached edits and all."""
    with asking(batch.question_ends_R):
        out = model.base_model(input_ids=batch.ids_RT, attention_mask=batch.attention_RT, use_cache=False)
    return out.last_hidden_state[batch.predicts_RT]


def _refuse_longer(states_RTD: Tensor, batch: Batch) -> None:
    if states_RTD.shape[1] != batch.ids_RT.shape[1]:
        raise CaptureError(
            "an attached edit puts a text in front of the question, and this method reads states token by token.",
            "capture",
            "Detach that edit, make this one, and attach both.",
        )


def _replace_hidden(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


class _Rest(nn.ModuleList):
    """The layers of a model that is run from one of them on."""


def runs_in_parts(decoder: nn.Module) -> bool:
    """Whether a decoder is being run from hidden states on, so that it cannot read other tokens meanwhile."""
    return any(isinstance(module, _Rest) for module in decoder.modules())


@contextmanager
def taking_input(module: nn.Module, *, last: bool = False) -> Iterator[list[Tensor]]:
    """What a module is given in the passes run meanwhile.

    Args:
        module: takes hidden states as its first argument, or by that name.
        last: end a pass there; the block ends with it.
    """

    def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    with _taking(module.register_forward_pre_hook, given, last) as taken:
        yield taken


@contextmanager
def taking_inputs(modules: Sequence[nn.Module], *, last: bool = True) -> Iterator[list[list[Tensor]]]:
    """As :func:`taking_input`, of several modules.

    Args:
        modules: in the order in which they are run.
        last: end a pass in the last one.
    """
    with ExitStack() as stack:
        # The last one's block, which a pass may end, is the innermost.
        yield [stack.enter_context(taking_input(one, last=last and one is modules[-1])) for one in modules]


@contextmanager
def taking_output(module: nn.Module, *, last: bool = False) -> Iterator[list[Tensor]]:
    """What a module returns in the passes run meanwhile; of several things the first, as hidden states are.

    Args:
        module: any.
        last: end a pass there; the block ends with it.
    """

    def returned(_: Any, __: Any, out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    with _taking(module.register_forward_hook, returned, last) as taken:
        yield taken


@contextmanager
def _taking(register: Callable[..., Any], pick: Callable[..., Tensor], last: bool) -> Iterator[list[Tensor]]:
    """Pick something of what a hook sees, pass by pass."""
    taken: list[Tensor] = []

    def take(_: nn.Module, *seen: Any) -> None:
        taken.append(pick(*seen))
        if last:
            raise _Reached

    handle = register(take, with_kwargs=True)
    try:
        with suppress(_Reached):
            yield taken
    finally:
        handle.remove()


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
