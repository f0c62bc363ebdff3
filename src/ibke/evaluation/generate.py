"""Greedy answers of a model to many prompts at once, every prompt under an edit of its own.

Prompts are batched by their lengths alone and no row ever leaves a batch before its end, so the base and an edited
model meet the same prompts in tensors of the same shapes: what differs between their answers is the edit's doing and
not a sum rounded in another order.

Shape suffixes: R rows (prompts), T tokens, K rank, I d_in, O d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ibke.edit import Edit
from ibke.greedy import Answer, greedy
from ibke.models import LanguageModel
from ibke.modules import resolve
from ibke.neurons import Neurons, Site, filled, row_neurons
from ibke.partial import row_updates
from ibke.parts import row_parts
from ibke.session import EditSession

MAX_NEW_TOKENS = 40
BATCH_SIZE = 96

T = TypeVar("T")
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Together:
    """Edits in force for every row alike, in the order in which they were made."""

    edits: tuple[Edit, ...]


InForce = Sequence[Edit | None] | Together | None
"""The edit of each row (None for none), edits of all rows together, or nothing at all."""


def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    edits: InForce = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    tick: Tick | None = None,
) -> list[Answer]:
    """Greedy answers, each ending at an end token, at a newline, or after ``max_new_tokens``.

    Args:
        lm: the model; its weights are not touched.
        prompts: token ids of each prompt.
        edits: what is in force for each prompt, or for all; None for the unedited model.
        max_new_tokens: longest answer (tokens).
        batch_size: prompts per pass.
        tick: told after each pass how many prompts it answered.

    Raises:
        RequestError: a prompt and its answer do not fit the model's window.
    """
    lm.refuse_beyond_window(max(map(len, prompts), default=0), max_new_tokens)
    stops = lm.stops
    answers: dict[int, Answer] = {}
    with in_force(lm, edits) as on_rows:
        for rows in plan([len(prompt) for prompt in prompts], batch_size):
            with on_rows(rows):
                chosen = greedy(
                    lm.model, [prompts[row] for row in rows], lm.tokenizer.pad_token_id, stops, max_new_tokens
                )
            answers |= {row: stops.answer(tokens) for row, tokens in zip(rows, chosen, strict=True)}
            if tick:
                tick(len(rows))
    return [answers[row] for row in range(len(prompts))]


def plan(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of items of like length, by batch; depends on nothing but the lengths."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def of_rows(edits: InForce, rows: Sequence[int]) -> InForce:
    """What is in force for some of the rows."""
    return [edits[row] for row in rows] if isinstance(edits, Sequence) else edits


@contextmanager
def in_force(lm: LanguageModel, edits: InForce) -> Iterator[Callable[[Sequence[int]], AbstractContextManager[None]]]:
    """Put edits in force for several passes.

    Yields:
        a context manager for one pass, given which of the rows are in it.
    """
    if isinstance(edits, Together):
        # Once for all passes: attaching some hundred edits one after another takes seconds.
        with EditSession(lm) as session:
            for edit in edits.edits:
                session.attach(edit)
            yield lambda rows: nullcontext()
    else:
        rows_of = edits
        yield lambda rows: edited_rows(lm, None if rows_of is None else [rows_of[row] for row in rows])


@contextmanager
def edited_rows(lm: LanguageModel, edits: Sequence[Edit | None] | None) -> Iterator[None]:
    """Let row r of every batch pass through the model as ``edits[r]`` changes it; None leaves all rows unedited."""
    if edits is None:
        yield
        return
    factors, neurons = stack_factors(edits), stack_neurons(edits)
    factors = {name: (a.to(lm.device, lm.dtype), b.to(lm.device, lm.dtype)) for name, (a, b) in factors.items()}
    neurons = {name: some.to(lm.device) for name, some in neurons.items()}
    sites = {name: Site.find(lm.model, name) for name in neurons}
    parts = [edit.parts if edit else {} for edit in edits]
    with row_updates(resolve(lm.model, factors), factors), row_neurons(sites, neurons), row_parts(lm, parts):
        yield


def stack_factors(edits: Sequence[Edit | None]) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of several edits side by side, zero-padded to the largest rank of each module.

    Returns:
        by module name, A (R × K × I) and B (R × K × O).
    """
    stacked = {}
    for name, pairs in _by_name([edit.factors if edit else {} for edit in edits]).items():
        a_RKI = filled({row: a_KI for row, (a_KI, _) in pairs.items()}, len(edits))
        stacked[name] = (a_RKI, filled({row: b_OK.T for row, (_, b_OK) in pairs.items()}, len(edits)))
    return stacked


def stack_neurons(edits: Sequence[Edit | None]) -> dict[str, Neurons]:
    """Neurons of several edits side by side, filled up with ones that write nothing.

    Returns:
        by name of an MLP's output projection, neurons (R × K × D).
    """
    stacked = {}
    for name, sets in _by_name([edit.neurons if edit else {} for edit in edits]).items():
        stacked[name] = Neurons.stack(sets, len(edits))
    return stacked


def _by_name(rows: Sequence[Mapping[str, T]]) -> dict[str, dict[int, T]]:
    """By name, what each row that has something there has."""
    found: dict[str, dict[int, T]] = {}
    for row, named in enumerate(rows):
        for name, item in named.items():
            found.setdefault(name, {})[row] = item
    return found
