"""The examination of a set of requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ibke.edit import Edit
from ibke.errors import RequestError
from ibke.evaluation.baseline import Baseline
from ibke.evaluation.generate import MAX_NEW_TOKENS, InForce, Together
from ibke.evaluation.machine import describe
from ibke.evaluation.questions import Question, ask, questions, reachable
from ibke.evaluation.side_effects import Battery
from ibke.evaluation.tally import Tally
from ibke.frames import FRAMES, Frame
from ibke.models import LanguageModel
from ibke.request import EditRequest, plain

# (what is going on, how much of it is done, how much there is)
Progress = Callable[[str, int, int], None]


class Examination:
    """Asks all there is to ask about a set of requests, a part of them at a time.

    ``unreachable`` counts those whose target is too long, or of too many lines, to be generated.

    Args:
        lm: the model.
        requests: all of them.
        frames: how prompts are asked.
        batch_size: prompts per pass.
        progress: told how many answers have come.
        battery: what is put to edited models besides.
        baseline: where the base's answers may be known from.
        superseded: indices of requests that are not asked about, since a later one says something else.

    Raises:
        RequestError: no request, an unknown frame, or a question that does not fit the model's window with its answer.
    """

    def __init__(
        self,
        lm: LanguageModel,
        requests: Sequence[EditRequest],
        frames: Sequence[Frame],
        batch_size: int,
        progress: Progress | None,
        battery: Battery | None = None,
        baseline: Baseline | None = None,
        superseded: Collection[int] = (),
    ):
        if not requests:
            raise RequestError("there is no request to evaluate.", "evaluation", "Give a file that holds some.")
        for frame in frames or ("",):
            if frame not in FRAMES:
                raise RequestError(f"unknown frame {frame!r}.", "frames", f"Choose from {', '.join(FRAMES)}.")
        self.lm, self.requests, self.frames, self.batch_size = lm, requests, tuple(frames), batch_size
        self.tally, self.progress, self.answers, self.battery = Tally(), progress, 0, battery
        self.baseline, self.superseded, self.rewritten = baseline, superseded, 0
        self.questions, beyond, stops = 0, set[int](), lm.stops
        for question in self._asked(range(len(requests)), requests):
            self._check_window(question)
            self.questions += 1
            if question.kind == "reliability" and not reachable(question, stops):
                beyond.add(question.edit)
        self.unreachable = len(beyond)

    def parts(self) -> Iterator[range]:
        """Indices of the requests whose edits are held at once, where each has one of its own."""
        whole, size = range(len(self.requests)), self.batch_size
        return (whole[start : start + size] for start in range(0, len(whole), size))

    def examine(self, part: range, edits: InForce, beside: Iterable[EditRequest] = ()) -> None:
        """Ask about some of the requests, of the base and of the edited model; not about those superseded.

        Nor about answers to keep where another request of those in force asks the same; ``rewritten`` counts these.

        Args:
            part: indices of the requests.
            edits: one for each of them, or such as are in force together.
            beside: what the latter were made of, where it is more than these requests.
        """

        def tick(count: int) -> None:
            self.answers += count
            if self.progress:
                self.progress("answers", self.answers, 2 * self.questions)

        requests = [self.requests[index] for index in part]
        if isinstance(edits, Together):
            requests = self._to_keep(part, requests, beside)
        asked = list(self._asked(part, requests))
        for question, base, edited in ask(self.lm, asked, edits, self.batch_size, tick, self.baseline):
            self.tally.add("base", question.frame, part[question.edit], base)
            self.tally.add("edited", question.frame, part[question.edit], edited)

    def _asked(self, part: range, requests: Sequence[EditRequest]) -> Iterator[Question]:
        """All questions about a part of the requests, whose edits are counted from its beginning."""
        for edit, (index, request) in enumerate(zip(part, requests, strict=True)):
            if index not in self.superseded:
                yield from questions(request, edit, self.frames, self.lm.tokenizer)

    def _check_window(self, question: Question) -> None:
        """Refuse what cannot be asked before any edit is made, which may take hours.

        Raises:
            RequestError: prompt and answer, generated or known, are longer than the model's window.
        """
        known = [pair for pair in (question.pair, question.old_pair) if pair]
        asked, answer = len(question.pair.prompt), max(MAX_NEW_TOKENS, *(len(pair.answer) - 1 for pair in known))
        window = self.lm.window
        if window and asked + answer > window:
            said = self.lm.tokenizer.decode(question.pair.prompt[slice(*question.pair.span)]).strip()
            raise RequestError(
                f"the question {said[:60]!r} ({asked} tokens in the frame {question.frame!r}) and an answer of "
                f"{answer} tokens exceed the model's window of {window}.",
                f"request {self.requests[question.edit].prompt[:60]!r}",
                "Shorten them, or leave them out.",
            )

    def _to_keep(
        self, part: range, requests: Sequence[EditRequest], beside: Iterable[EditRequest]
    ) -> list[EditRequest]:
        """A part of the requests without probes that ask what edits in force answer."""
        taken = {plain(prompt) for one in (*requests, *beside) for prompt in (one.prompt, *one.rephrase_prompts)}
        kept = [tuple(probe for probe in one.locality if plain(probe.prompt) not in taken) for one in requests]
        pairs = zip(part, requests, kept, strict=True)
        dropped = sum(len(one.locality) - len(some) for index, one, some in pairs if index not in self.superseded)
        self.rewritten += dropped
        self.questions -= dropped * len(self.frames)
        return [replace(one, locality=probes) for one, probes in zip(requests, kept, strict=True)]

    def look(self, *models: Sequence[Edit]) -> None:
        """Look at side effects, of no more models than wanted, each with some edits in force together."""
        if self.battery is None:
            return
        for edits in models[: max(0, self.battery.edits - len(self.battery.found))]:
            self.battery.note(edits)
            if self.progress:
                self.progress("side effects", len(self.battery.found), self.battery.edits)

    def context(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Under which conditions the report holds."""
        config = {
            "model": self.lm.name,
            "fingerprint": self.lm.fingerprint,
            "dtype": str(self.lm.dtype).removeprefix("torch."),
            "frames": list(self.frames),
            "max_new_tokens": MAX_NEW_TOKENS,
            **more,
        }
        return {"config": config, "machine": describe(self.lm.device)}
