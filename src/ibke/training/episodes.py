"""What the editor is trained on: an edit, places where it must show, and places where nothing may move."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from ibke.frames import FRAMES, Frame
from ibke.request import EditRequest
from ibke.subjects import subject_of

# How likely a wording is met bare, in question form and in a chat turn, by what kind of wording it is.
FRAME_WEIGHTS: dict[str, tuple[float, float, float]] = {
    "statement": (0.65, 0.10, 0.25),
    "indirect": (0.75, 0.05, 0.20),
    "question": (0.30, 0.30, 0.40),
    "chat": (0.10, 0.10, 0.80),
}


def kind_of(prompt: str) -> str:
    """A wording's kind where its source does not say: a question ends with a question mark."""
    return "question" if prompt.rstrip().endswith("?") else "statement"


@dataclass(frozen=True)
class Asked:
    """A prompt as it meets the model."""

    prompt: str
    frame: Frame
    target: str | None = None


@dataclass(frozen=True)
class Episode:
    """One edit to learn from.

    Args:
        edit: the request itself, always captured bare.
        inside: prompts that must give the new answer (sufficiency).
        outside: prompts whose answers must stay those of the base (independence).
        source: where it comes from, for balance and for scores by source.
        subject: what the edit is about, where known.
    """

    edit: Asked
    inside: tuple[Asked, ...]
    outside: tuple[Asked, ...]
    source: str = ""
    subject: str | None = None

    @property
    def about(self) -> str:
        """The subject, or what is guessed to be it."""
        return subject_of(self.edit.prompt, self.subject)


@dataclass
class EpisodeMaker:
    """Draws frames and fills up an episode's prompts, reproducibly.

    Args:
        seed: decides every draw.
        inside: prompts in scope per episode.
        outside: most prompts out of scope per episode; where something is said of the subject they are about that.
        kinds: the kind of wordings whose source knows it; of others the question mark tells.
        pool: prompts of other requests, to fill up what a request lacks out of scope.
        everywhere: whether what is trained moves answers to any prompt, as changed weights do; then one prompt out of
            scope of each family, and one of another request.
    """

    seed: int
    inside: int = 2
    outside: int = 1
    kinds: Mapping[str, str] = field(default_factory=dict)
    pool: list[str] = field(default_factory=list)
    everywhere: bool = False

    def make(self, request: EditRequest, source: str, index: int) -> Episode:
        """The episode of one request; the same seed and index give the same episode."""
        rng = random.Random(f"{self.seed}:{source}:{index}")
        wordings = list(request.rephrase_prompts)
        rng.shuffle(wordings)
        # The edit's own words in another frame are a paraphrase too, and the only one some requests have.
        if len(wordings) < self.inside or rng.random() < 0.4:
            wordings.insert(0, request.prompt)
        inside = [self._ask(text, rng, other=text == request.prompt) for text in wordings[: self.inside]]
        inside += [self._ask(request.prompt, rng, other=True) for _ in range(self.inside - len(inside))]
        probes = self._of_each_family(request, rng) if self.everywhere else self._about_subject(request, rng)
        return Episode(
            Asked(request.prompt, "bare", request.target_new),
            tuple(Asked(asked.prompt, asked.frame, request.target_new) for asked in inside),
            tuple(self._ask(text, rng) for text in probes),
            source,
            request.subject,
        )

    def _about_subject(self, request: EditRequest, rng: random.Random) -> list[str]:
        """Where a gate opens at the subject, only what is said of it can move; of other prompts one is enough."""
        subject = (request.subject or request.prompt).lower()
        probes = [probe.prompt for probe in request.locality]
        rng.shuffle(probes)
        about = [text for text in probes if subject in text.lower()][: self.outside]
        return about or probes[:1] or rng.choices(self.pool, k=1 if self.pool else 0)

    def _of_each_family(self, request: EditRequest, rng: random.Random) -> list[str]:
        probes = list(request.locality)
        rng.shuffle(probes)
        first = {probe.family: probe.prompt for probe in probes}
        return [*first.values(), *rng.choices(self.pool, k=1 if self.pool else 0)]

    def _ask(self, prompt: str, rng: random.Random, other: bool = False) -> Asked:
        weights = FRAME_WEIGHTS[self.kinds.get(prompt) or kind_of(prompt)]
        if other:  # the edit's own prompt, bare, is scored already
            weights = (0.0, weights[1] + 0.1, weights[2] + 0.1)
        return Asked(prompt, rng.choices(FRAMES, weights=weights)[0])
