"""Prompts watched while a code is refined: those that a request says must keep their answers.

What the edit's gate is shut for needs no watching. Nor does what is said of the subject in general: with such prompts
watched as well, other questions about it were kept no more often (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ibke.batch import Pair
from ibke.frames import encode_pair
from ibke.partial import PartialModel
from ibke.prefixes import Prefixes
from ibke.request import EditRequest
from ibke.rows import OUTSIDE, RowGroup, build_groups, continuations

# Pairs and the request each belongs to → the first token at which its edit may be in force, if there is one.
Opened = Callable[[Sequence[Pair], Sequence[int]], Sequence[int | None]]


def watched_rows(
    part: PartialModel,
    prefixes: Prefixes,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    opened: Opened,
) -> list[RowGroup]:
    """A request's own probes that its edit reaches; none, where it reaches none.

    Args:
        part: the model, split at the edited layer.
        prefixes: what stands before a prompt in each frame.
        tokenizer: the model's.
        requests: the edits.
        opened: tells where an edit is in force.
    """
    probes: list[Pair] = []
    about: list[int] = []
    for owner, request in enumerate(requests):
        probes += [encode_pair(probe.prompt, "-", "bare", tokenizer) for probe in request.locality]
        about += [owner] * len(request.locality)
    places = opened(probes, about) if probes else []
    reached = [row for row, place in enumerate(places) if place is not None]
    if not reached:
        return []
    answers = continuations(part.model, tokenizer, [probes[row].prompt for row in reached])
    pairs = [
        replace(probes[row], answer=answer).reached(places[row]) for row, answer in zip(reached, answers, strict=True)
    ]
    owners = [about[row] for row in reached]
    return build_groups(part, pairs, [OUTSIDE] * len(pairs), owners, tokenizer.pad_token_id, prefixes=prefixes)
