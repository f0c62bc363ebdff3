"""Contrast keys: what the same prompt looks like about somebody else.

An edit must answer for its subject and stay silent for every other one, though their prompts share all other words. The
keys of the request's own prompt with other subjects put in tell the closed form which directions those words are; it
then addresses what only this subject brings.

Shape suffixes: L modules, B edits, S contrast tokens, R rows, T tokens, I d_in.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from ibke.batch import collate
from ibke.frames import encode_pair
from ibke.modules import in_out
from ibke.partial import PartialModel

SWAPS = 2  # other subjects a prompt is read with

# Words that begin sentences without naming anything.
_OPENERS = frozenset(
    re.findall(
        r"\w+",
        "The A An In On At Of For From To By With Who What Which Where When Why How Is Are Was Were Do Does Did Can "
        "Could Will Would Should Tell Name Give Question Please I It Its He She They We You My Our Their This That",
    )
)


@cache
def other_subjects() -> tuple[str, ...]:
    """Names of people, places, works and things to put in a prompt's subject."""
    record = json.loads(files("ibke.data").joinpath("probes.json").read_text(encoding="utf-8"))
    return tuple(record["subjects"])


def guess_subject(prompt: str) -> str | None:
    """The longest run of capitalised words that is not just a sentence opener; None where nothing is named."""
    runs = re.findall(r"(?:[A-Z0-9][\w'’.-]*)(?:\s+(?:of|in|the|de|van|von|la|and|[A-Z0-9][\w'’.-]*))*", prompt)
    named = []
    for run in runs:
        words = run.split()
        while words and words[0] in _OPENERS:
            words.pop(0)
        while words and words[-1].islower():
            words.pop()
        if words:
            named.append(" ".join(words).rstrip(".'’-"))
    return max(named, key=len, default=None) or None


def swapped(prompt: str, subject: str | None, count: int = SWAPS) -> list[str]:
    """The prompt about other subjects, drawn by the prompt itself so that the same edit comes out again."""
    subject = subject or guess_subject(prompt)
    if not subject or subject.lower() not in prompt.lower():
        return []
    rng = random.Random(prompt)
    names = rng.sample([name for name in other_subjects() if name.lower() != subject.lower()], count)
    where = re.compile(re.escape(subject), re.IGNORECASE)
    # Names go in as they are: a backslash or group reference in one must not be read as a pattern.
    return [where.sub(name.replace("\\", r"\\"), prompt) for name in names]


@torch.no_grad()
def contrast_keys(
    part: PartialModel,
    modules: Mapping[str, nn.Module],
    tokenizer: Any,
    requests: Sequence[tuple[str, str | None]],
) -> tuple[Tensor, Tensor]:
    """Keys of every swapped prompt's own words, first position left out.

    Args:
        part: the base, split at the first edited layer.
        modules: the edited modules by name.
        tokenizer: the base's.
        requests: B pairs of prompt and subject (None: guessed).

    Returns:
        keys (L × B × S × I, float32) and mask (B × S); S is 1 and masked out where nothing could be swapped.
    """
    texts = [(owner, text) for owner, (prompt, subject) in enumerate(requests) for text in swapped(prompt, subject)]
    found: list[list[Tensor]] = [[] for _ in requests]
    if texts:
        pairs = [encode_pair(text, "-", "bare", tokenizer) for _, text in texts]
        device = next(part.model.parameters()).device
        batch = collate(pairs, tokenizer.pad_token_id, device)
        keys_LRTI = _keys(part, modules, part.prefix(batch), batch)
        for row, ((owner, _), pair) in enumerate(zip(texts, pairs, strict=True)):
            begin, end = max(1, pair.span[0]), pair.span[1]
            found[owner].append(keys_LRTI[:, row, begin:end])
    d_in, _ = in_out(next(iter(modules.values())))
    longest = max([1, *(sum(part.shape[1] for part in parts) for parts in found)])
    out = torch.zeros(len(modules), len(requests), longest, d_in)
    mask = torch.zeros(len(requests), longest, dtype=torch.bool)
    for owner, parts in enumerate(found):
        if parts:
            block = torch.cat(parts, dim=1)
            out[:, owner, : block.shape[1]] = block
            mask[owner, : block.shape[1]] = True
    return out, mask


def _keys(part: PartialModel, modules: Mapping[str, nn.Module], hidden: Tensor, batch: Any) -> Tensor:
    taken: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: taken.__setitem__(name, args[0].float()))
        for name, module in modules.items()
    ]
    try:
        part.states(hidden, batch)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([taken[name].reshape(*batch.ids_RT.shape, -1) for name in modules])
