"""Prompts watched while a code is refined, so that the target is not bought with everything else."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from importlib.resources import files

from ibke.batch import Pair
from ibke.editors.ibke.contrast import swapped
from ibke.editors.ibke.refine import RefineSettings
from ibke.frames import Frame, encode_pair
from ibke.models import LanguageModel
from ibke.partial import PartialModel
from ibke.request import EditRequest
from ibke.rows import OUTSIDE, RowGroup, build_groups, continuations


class ProbeBank:
    """General prompts of ours, the request's own locality probes, and its prompt about other subjects.

    The base's answers to the general prompts never change, so they are generated once.

    Args:
        lm: the model.
        part: the model, split at the first edited layer.
    """

    def __init__(self, lm: LanguageModel, part: PartialModel):
        self.lm, self.part = lm, part
        record = json.loads(files("ibke.data").joinpath("probes.json").read_text(encoding="utf-8"))
        self.prompts: list[tuple[str, Frame]] = [
            (text, frame) for frame, texts in record["prompts"].items() for text in texts
        ]
        self._general: list[Pair] = []

    def rows(self, requests: Sequence[EditRequest], settings: RefineSettings) -> list[RowGroup]:
        """Rows out of scope for every request, drawn by its own text so that the same edit comes out again."""
        if not self._general:
            self._general = self._answered(self.prompts)
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rng = random.Random(request.prompt)
            chosen = rng.sample(self._general, min(settings.probes, len(self._general)))
            chosen += self._answered(self._own(request, settings))
            pairs += chosen
            owners += [owner] * len(chosen)
        return build_groups(self.part, pairs, [OUTSIDE] * len(pairs), owners, self.lm.tokenizer.pad_token_id)

    def _own(self, request: EditRequest, settings: RefineSettings) -> list[tuple[str, Frame]]:
        asked: list[tuple[str, Frame]] = [(probe.prompt, "bare") for probe in request.locality]
        return asked + [(text, "bare") for text in swapped(request.prompt, request.subject, settings.swaps)]

    def _answered(self, asked: Sequence[tuple[str, Frame]]) -> list[Pair]:
        """Prompts with the base's own greedy answer to each."""
        pairs = [encode_pair(text, "-", frame, self.lm.tokenizer) for text, frame in asked]
        answers = continuations(self.lm.model, self.lm.tokenizer, [pair.prompt for pair in pairs])
        return [Pair(pair.prompt, answer, pair.span) for pair, answer in zip(pairs, answers, strict=True)]
