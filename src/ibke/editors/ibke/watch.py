"""Prompts watched while a code is refined, so that the target is not bought with everything else about the subject.

Other subjects need no watching: the edit's gate is shut for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ibke.batch import Pair
from ibke.editors.ibke.address import contexts, subject_of
from ibke.frames import encode_pair
from ibke.partial import PartialModel, Prefixes
from ibke.request import EditRequest
from ibke.rows import OUTSIDE, RowGroup, build_groups, continuations


def watched_rows(
    part: PartialModel, prefixes: Prefixes, tokenizer: Any, requests: Sequence[EditRequest], joint: bool
) -> list[RowGroup]:
    """Rows out of scope for every request: its own locality probes, and what else is said of its subject.

    Args:
        part: the model, split at the edited layer.
        prefixes: what stands before a prompt in each frame.
        tokenizer: the model's.
        requests: the edits.
        joint: all requests are one edit, which then owns every row.
    """
    pairs: list[Pair] = []
    owners: list[int] = []
    for owner, request in enumerate(requests):
        subject = subject_of(request.prompt, request.subject)
        asked = [
            encode_pair(text.format(subject), "-", frame, tokenizer, subject) for text, frame in contexts()["watched"]
        ]
        # The first token alone: it needs no generation, and these prompts are there to hold the subject in general.
        chosen = [Pair(pair.prompt, pair.answer[:1], pair.span, pair.subject) for pair in asked]
        probes = [encode_pair(probe.prompt, "-", "bare", tokenizer, subject) for probe in request.locality]
        answers = continuations(part.model, tokenizer, [pair.prompt for pair in probes]) if probes else []
        chosen += [
            Pair(pair.prompt, answer, pair.span, pair.subject) for pair, answer in zip(probes, answers, strict=True)
        ]
        pairs += chosen
        owners += [0 if joint else owner] * len(chosen)
    return build_groups(part, pairs, [OUTSIDE] * len(pairs), owners, tokenizer.pad_token_id, prefixes=prefixes)
