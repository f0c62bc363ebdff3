"""Protocols: how edits are made, asked and summed up in a report.

Every number of the edited model has its like of the unedited one beside it, and what counts first is what a model
says when it must find the words itself; teacher-forced figures are there to be compared with published ones.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any, Literal, get_args

from ibke.edit import Edit
from ibke.editors.base import Editor
from ibke.errors import RequestError
from ibke.evaluation.generate import BATCH_SIZE, MAX_NEW_TOKENS
from ibke.evaluation.machine import describe, peak_memory_mb
from ibke.evaluation.metrics import proportion, quantile
from ibke.evaluation.questions import ask, questions
from ibke.evaluation.tally import Tally
from ibke.frames import FRAMES, Frame, render
from ibke.models import LanguageModel
from ibke.request import EditRequest

EditFrame = Literal["bare", "question"]

# (what is going on, how much of it is done, how much there is)
Progress = Callable[[str, int, int], None]


def sample(requests: Sequence[EditRequest], limit: int | None, seed: int) -> list[EditRequest]:
    """At most ``limit`` requests drawn from the whole, in their original order; the same seed draws the same."""
    if limit is None or limit >= len(requests):
        return list(requests)
    return [requests[i] for i in sorted(random.Random(seed).sample(range(len(requests)), limit))]


def evaluate_single(
    lm: LanguageModel,
    editor: Editor,
    requests: Sequence[EditRequest],
    *,
    frames: Sequence[Frame] = ("bare",),
    edit_frame: EditFrame = "bare",
    batch_size: int = BATCH_SIZE,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make each edit alone on the pristine model and ask for it at once.

    The editor sees the prompt, the target, the subject and the old answer of a request and nothing else: paraphrases
    and probes are for the examination. Edits are made, and timed, one by one; their answers come in batches in which
    every row has its own edit.

    Args:
        lm: the model; left as it was. Load it in float32: in bfloat16 the faintest update stirs up enough rounding to
            change most answers of forty tokens, and locality measures that instead of the edit.
        editor: the method under test.
        requests: what to edit.
        frames: how prompts are asked; a metric is the mean over frames, and ``by_frame`` has each.
        edit_frame: how the request itself is worded for the editor: as it is, or in question form.
        batch_size: prompts per pass, and edits held at once.
        config: what else the report shall say of the run, e.g. data file, limit and seed.
        progress: told how many edits are made and how many answers have come.

    Returns:
        A JSON-ready report. ``metrics`` and ``base`` hold the blocks ``generation`` (normalised exact match of the
        greedy answer; locality: the same answer as the base) and ``teacher_forced`` (legacy: token accuracy;
        locality: the same tokens as the base), each of ``reliability``, ``generality``, ``locality`` and
        ``locality_accuracy`` (against the known answers) with mean and 95 % interval. ``rate_nats`` is per edit,
        None where the method has no code; ``seconds_per_edit`` is wall-clock; ``peak_memory_mb`` that of the process
        over loading, editing and scoring, ``peak_memory_editing_mb`` up to the first answers.

    Raises:
        RequestError: no request, an unknown frame, or a prompt longer than the model's window.
    """
    if edit_frame not in get_args(EditFrame):
        raise RequestError(f"an edit cannot be worded as {edit_frame!r}.", "edit frame", "Choose bare or question.")
    exam, log = _Examination(lm, requests, frames, batch_size, progress), _Log()
    for part in exam.parts():
        edits = []
        for index in part:
            edits.append(log.time(editor, _for_editor(requests[index], edit_frame, lm.tokenizer)))
            if progress:
                progress("edits", index + 1, len(requests))
        log.note_memory()
        exam.examine(part, edits)
    tally = exam.tally
    return {
        "n": len(requests),
        "protocol": "single",
        "metrics": tally.core("edited"),
        "base": tally.core("base"),
        **log.report(),
        "peak_memory_mb": peak_memory_mb(),
        **tally.extras(("base", "edited")),
        "kl_nats": tally.block("edited", "kl_nats"),
        "by_frame": {f: {"metrics": tally.core("edited", f), "base": tally.core("base", f)} for f in frames},
        **exam.context({"method": editor.name, "edit_frame": edit_frame, **(config or {})}),
    }


def evaluate_base(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    *,
    frames: Sequence[Frame] = ("bare",),
    batch_size: int = BATCH_SIZE,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What the unedited model answers: the ``base`` half of :func:`evaluate_single`.

    Raises:
        RequestError: no request, an unknown frame, or a prompt longer than the model's window.
    """
    exam = _Examination(lm, requests, frames, batch_size, progress)
    for part in exam.parts():
        exam.examine(part, None)
    return {
        "n": len(requests),
        "protocol": "base",
        "base": exam.tally.core("base"),
        "peak_memory_mb": peak_memory_mb(),
        **exam.tally.extras(("base",)),
        "by_frame": {f: {"base": exam.tally.core("base", f)} for f in frames},
        **exam.context(config or {}),
    }


class _Examination:
    """Asks all there is to ask about a set of requests, a part of them at a time."""

    def __init__(
        self,
        lm: LanguageModel,
        requests: Sequence[EditRequest],
        frames: Sequence[Frame],
        batch_size: int,
        progress: Progress | None,
    ):
        if not requests:
            raise RequestError("there is no request to evaluate.", "evaluation", "Give a file that holds some.")
        for frame in frames or ("",):
            if frame not in FRAMES:
                raise RequestError(f"unknown frame {frame!r}.", "frames", f"Choose from {', '.join(FRAMES)}.")
        self.lm, self.requests, self.frames, self.batch_size = lm, requests, tuple(frames), batch_size
        self.tally, self.progress, self.answers = Tally(), progress, 0
        asked = (1 + len(r.rephrase_prompts) + len(r.locality) + len(r.portability) for r in requests)
        self.questions = len(frames) * sum(asked)

    def parts(self) -> Iterator[range]:
        """Indices of the requests whose edits are held at once."""
        size = self.batch_size
        return (range(len(self.requests))[start : start + size] for start in range(0, len(self.requests), size))

    def examine(self, part: range, edits: Sequence[Edit] | None) -> None:
        """Ask about some of the requests, of the base and, where edits are given, of the edited model."""
        total = self.questions if edits is None else 2 * self.questions

        def tick(count: int) -> None:
            self.answers += count
            if self.progress:
                self.progress("answers", self.answers, total)

        asked = [
            question
            for edit, index in enumerate(part)
            for question in questions(self.requests[index], edit, self.frames, self.lm.tokenizer)
        ]
        for question, base, edited in ask(self.lm, asked, edits, self.batch_size, tick):
            self.tally.add("base", question.frame, part[question.edit], base)
            if edited is not None:
                self.tally.add("edited", question.frame, part[question.edit], edited)

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


class _Log:
    """What making the edits took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.steps: list[float] = []
        self.rates: list[float] = []
        self.achieved: list[float] = []
        self.editing_mb: float | None = None

    def time(self, editor: Editor, request: EditRequest) -> Edit:
        """Make one edit and keep its figures."""
        start = time.perf_counter()
        edit = editor.edit([request])
        self.seconds.append(time.perf_counter() - start)
        self.steps.append(edit.info.refine_steps)
        if edit.info.rate_nats is not None:
            self.rates.append(edit.info.rate_nats)
        if edit.info.achieved is not None:
            self.achieved.append(float(edit.info.achieved))
        return edit

    def note_memory(self) -> None:
        """Remember the peak before anything has been asked."""
        if self.editing_mb is None:
            self.editing_mb = peak_memory_mb()

    def report(self) -> dict[str, Any]:
        return {
            "rate_nats": fmean(self.rates) if self.rates else None,
            "seconds_per_edit": fmean(self.seconds),
            "seconds": _spread(self.seconds),
            "steps": _spread(self.steps),
            "achieved": asdict(proportion(self.achieved)),
            "peak_memory_editing_mb": self.editing_mb,
        }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": fmean(values), "median": median(values), "p95": quantile(values, 0.95)}


def _for_editor(request: EditRequest, frame: EditFrame, tokenizer: Any) -> EditRequest:
    # Without paraphrases and probes: an editor that refines on them would be examined on what it was taught.
    return EditRequest(
        render(request.prompt, frame, tokenizer)[0], request.target_new, request.subject, request.target_true
    )
