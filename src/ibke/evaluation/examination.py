"""The examination of a set of requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from ibke.edit import Edit
from ibke.errors import RequestError
from ibke.evaluation.baseline import Baseline
from ibke.evaluation.generate import MAX_NEW_TOKENS, InForce
from ibke.evaluation.machine import describe
from ibke.evaluation.questions import ask, questions
from ibke.evaluation.side_effects import Battery
from ibke.evaluation.tally import Tally
from ibke.frames import FRAMES, Frame
from ibke.models import LanguageModel
from ibke.request import EditRequest

# (what is going on, how much of it is done, how much there is)
Progress = Callable[[str, int, int], None]


class Examination:
    """Asks all there is to ask about a set of requests, a part of them at a time.

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
        RequestError: no request, or an unknown frame.
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
        self.baseline, self.superseded = baseline, superseded
        scored = [request for index, request in enumerate(requests) if index not in superseded]
        follows = (sum(bool(probe.answer) for probe in request.portability) for request in scored)
        asked = (1 + len(request.rephrase_prompts) + len(request.locality) for request in scored)
        self.questions = len(frames) * (sum(asked) + sum(follows))

    def parts(self) -> Iterator[range]:
        """Indices of the requests whose edits are held at once, where each has one of its own."""
        whole, size = range(len(self.requests)), self.batch_size
        return (whole[start : start + size] for start in range(0, len(whole), size))

    def examine(self, part: range, edits: InForce) -> None:
        """Ask about some of the requests, of the base and of the edited model; not about those superseded.

        Args:
            part: indices of the requests.
            edits: one for each of them, or such as are in force together.
        """

        def tick(count: int) -> None:
            self.answers += count
            if self.progress:
                self.progress("answers", self.answers, 2 * self.questions)

        asked = [
            question
            for edit, index in enumerate(part)
            if index not in self.superseded
            for question in questions(self.requests[index], edit, self.frames, self.lm.tokenizer)
        ]
        for question, base, edited in ask(self.lm, asked, edits, self.batch_size, tick, self.baseline):
            self.tally.add("base", question.frame, part[question.edit], base)
            self.tally.add("edited", question.frame, part[question.edit], edited)

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
