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

    def prepare(self) -> None:
        """Generate the base's answers to the general prompts, once."""
        if not self._general:
            self._general = self._answered(self.prompts)

    def rows(self, requests: Sequence[EditRequest], settings: RefineSettings, joint: bool) -> list[RowGroup]:
        """Rows out of scope for every request, drawn by its own text so that the same edit comes out again.

        Args:
            requests: the edits.
            settings: how many probes of each sort.
            joint: all requests are one edit, which then owns every row.
        """
        self.prepare()
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rng = random.Random(request.prompt)
            chosen = rng.sample(self._general, min(settings.probes, len(self._general)))
            chosen += self._answered([(probe.prompt, "bare") for probe in request.locality])
            chosen += [self._first(text) for text in swapped(request.prompt, request.subject, settings.swaps)]
            pairs += chosen
            owners += [0 if joint else owner] * len(chosen)
        return build_groups(self.part, pairs, [OUTSIDE] * len(pairs), owners, self.lm.tokenizer.pad_token_id)

    def _first(self, prompt: str) -> Pair:
        """A prompt watched at its first answer token only, which needs no generation."""
        pair = encode_pair(prompt, "-", "bare", self.lm.tokenizer)
        return Pair(pair.prompt, pair.answer[:1], pair.span)

    def _answered(self, asked: Sequence[tuple[str, Frame]]) -> list[Pair]:
        """Prompts with the base's own greedy answer to each."""
        if not asked:
            return []
        pairs = [encode_pair(text, "-", frame, self.lm.tokenizer) for text, frame in asked]
        answers = continuations(self.lm.model, self.lm.tokenizer, [pair.prompt for pair in pairs])
        return [Pair(pair.prompt, answer, pair.span) for pair, answer in zip(pairs, answers, strict=True)]
