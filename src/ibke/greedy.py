"""Greedy decoding of several prompts at once.

The loop is our own since transformers' `generate` mixes in whatever a model's generation settings hold (repetition
penalties, suppressed tokens), which is not greedy decoding.

Shape suffixes: R rows (prompts), T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Args:
        text: the answer up to the first newline, without space around it.
        ids: the tokens chosen, the one that ended the answer included.
    """

    text: str
    ids: tuple[int, ...]


class Stops:
    """Knows which tokens end an answer: a model's end tokens, and any that holds a newline."""

    def __init__(self, ends: Iterable[int], tokenizer: Any):
        self.tokenizer = tokenizer
        self.known = dict.fromkeys(ends, True)

    def __contains__(self, token: Any) -> bool:
        if token not in self.known:
            self.known[token] = "\n" in self.tokenizer.decode([token])
        return self.known[token]

    def answer(self, tokens: list[int]) -> Answer:
        """The answer in a row of chosen tokens, which may run on after its end."""
        tokens = ended(tokens, self)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text.split("\n")[0].strip(), tuple(tokens))


@torch.inference_mode()
def greedy(
    model: Any, prompts: Sequence[Sequence[int]], pad_id: int, ends: Container[int], steps: int
) -> list[list[int]]:
    """The tokens chosen for each prompt, until every row has come to an end; a row may run on after its own.

    Args:
        model: a causal language model; what hangs on it or on its decoder acts.
        prompts: token ids, computed together.
        pad_id: what stands before the shorter ones, and is not looked at.
        ends: tokens that end an answer.
        steps: longest answer (tokens).
    """
    decoder, head = model.base_model, model.get_output_embeddings()
    takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters
    ids_RT, attention_RT = _pad_left(prompts, pad_id, head.weight.device)
    open_rows = set(range(len(prompts)))
    chosen: list[list[int]] = [[] for _ in prompts]
    cache = None
    while open_rows and steps:
        positions_RT = (attention_RT.cumsum(-1) - 1).clamp(min=0)[:, -ids_RT.shape[1] :]
        out = decoder(
            input_ids=ids_RT,
            attention_mask=attention_RT,
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": positions_RT} if takes_positions else {}),
        )
        cache, steps = out.past_key_values, steps - 1
        # One row a prompt: a three-dimensional slice would have PyTorch copy the head's weight for every prompt. Caps
        # and scales that some models put on logits do not change which is largest.
        next_R = head(out.last_hidden_state[:, -1]).argmax(-1)
        for row, token in enumerate(next_R.tolist()):
            chosen[row].append(token)
            if token in ends:
                open_rows.discard(row)
        ids_RT = next_R[:, None]
        attention_RT = torch.cat([attention_RT, attention_RT.new_ones(len(ids_RT), 1)], dim=1)
    return chosen


def ended(tokens: list[int], ends: Container[int]) -> list[int]:
    """A row of :func:`greedy` up to the token that ends it, which is kept."""
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids_RT = torch.full((len(prompts), longest), pad_id)
    attention_RT = torch.zeros_like(ids_RT)
    for row, prompt in enumerate(prompts):
        ids_RT[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_RT[row, longest - len(prompt) :] = 1
    return ids_RT.to(device), attention_RT.to(device)
