"""Protocols: how edits are made, asked and summed up in a report.

Every number of the edited model has its like of the unedited one beside it, and what counts first is what a model
says when it must find the words itself; teacher-forced figures are there to be compared with published ones.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from ibke.edit import Edit
from ibke.editors.base import Editor
from ibke.errors import RequestError
from ibke.evaluation.baseline import Baseline
from ibke.evaluation.costs import FAILURES, Costs
from ibke.evaluation.examination import Examination, Progress
from ibke.evaluation.generate import BATCH_SIZE, Together
from ibke.evaluation.machine import peak_memory_mb
from ibke.evaluation.sequence import InSequence
from ibke.evaluation.side_effects import Battery
from ibke.frames import Frame, render
from ibke.models import LanguageModel
from ibke.request import EditRequest, normal_form

EditFrame = Literal["bare", "question"]
Regime = Literal["single", "batch", "sequential"]
Order = Literal["file", "random"]

AGES = 10  # rows of `by_age` at most


@dataclass(frozen=True)
class Protocol:
    """How edits meet the model.

    Args:
        regime: ``single``: each alone on the pristine model; ``batch``: some at once, and off again before the next;
            ``sequential``: some at a time, one after another on the same model, all asked about after the last.
        group: how many requests make one edit.

    Raises:
        RequestError: an unknown regime, or a group that it cannot have.
    """

    regime: Regime = "single"
    group: int = 1

    def __post_init__(self) -> None:
        if self.regime not in get_args(Regime):
            known = ", ".join(get_args(Regime))
            raise RequestError(f"unknown protocol {self.regime!r}.", "protocol", f"Known: {known}.")
        if self.group < 1 or (self.regime == "single" and self.group > 1):
            raise RequestError(
                f"{self.regime!r} cannot have groups of {self.group}.", "group", "A single edit is a group of one."
            )

    @classmethod
    def parse(cls, text: str) -> Protocol:
        """A protocol written as ``single``, ``batch:100``, ``sequential`` (one at a time) or ``sequential:100``.

        Raises:
            RequestError: it is none of these.
        """
        regime, colon, group = text.strip().partition(":")
        if colon and not group.isdecimal():
            raise RequestError(f"{group!r} is no size of a group.", text, "Write it as in batch:100.")
        if regime == "batch" and not colon:
            raise RequestError("a batch needs a size.", text, "Write batch:100; for `ibke eval` give --group 100.")
        return cls(cast(Regime, regime), int(group) if colon else 1)

    def __str__(self) -> str:
        return self.regime if self.regime == "single" else f"{self.regime}:{self.group}"

    def groups(self, requests: Sequence[EditRequest]) -> list[range]:
        """Indices of the requests that make an edit together.

        The last group may be smaller, and so is one that the next request contradicts: no edit makes both true.
        """
        found, start, said = list[range](), 0, dict[str, str]()
        for index, request in enumerate(requests):
            prompt, target = normal_form(request)
            if index - start == self.group or said.get(prompt, target) != target:
                found.append(range(start, index))
                start, said = index, {}
            said[prompt] = target
        return [*found, range(start, len(requests))]

    def superseded(self, requests: Sequence[EditRequest]) -> frozenset[int]:
        """Indices of the requests that are overwritten: in a sequence the last word on a prompt is another."""
        if self.regime != "sequential":
            return frozenset()
        said = [normal_form(request) for request in requests]
        last = dict(said)
        return frozenset(index for index, (prompt, target) in enumerate(said) if last[prompt] != target)


def sample(requests: Sequence[EditRequest], limit: int | None, seed: int, order: Order = "file") -> list[EditRequest]:
    """At most ``limit`` requests drawn from the whole; the same seed draws the same, in the same order.

    Args:
        requests: all there are.
        limit: how many; None takes all. Of a ``case`` all requests are drawn or none, so that there may be fewer; more
            only if a single case is larger.
        seed: of the draw, and of a random order.
        order: ``file`` as they stood, or ``random``. Requests of one ``case`` keep their order among themselves.

    Raises:
        RequestError: an unknown order.
    """
    if order not in get_args(Order):
        raise RequestError(f"unknown order {order!r}.", "order", "Choose file or random.")
    draw = random.Random(seed)
    chosen = list(requests)
    if limit is not None and limit < len(requests):
        chosen = [requests[i] for i in _drawn(requests, limit, draw)]
    if order == "file":
        return chosen
    places = draw.sample(range(len(chosen)), len(chosen))
    slots: dict[Any, list[int]] = {}
    for place, index in enumerate(places):
        slots.setdefault(chosen[index].case or index, []).append(place)
    mixed: dict[int, EditRequest] = {}
    taken = {case: iter(places) for case, places in slots.items()}
    for index, request in enumerate(chosen):
        mixed[next(taken[request.case or index])] = request
    return [mixed[place] for place in range(len(chosen))]


def _drawn(requests: Sequence[EditRequest], limit: int, draw: random.Random) -> list[int]:
    """Indices of the requests of some cases; one that belongs to none is a case of its own."""
    cases: dict[Any, list[int]] = {}
    for index, request in enumerate(requests):
        cases.setdefault(request.case or index, []).append(index)
    chosen: list[int] = []
    for case in draw.sample(list(cases.values()), min(limit, len(cases))):
        if not chosen or len(chosen) + len(case) <= limit:
            chosen += case
    return sorted(chosen)


def evaluate(
    lm: LanguageModel,
    editor: Editor,
    requests: Sequence[EditRequest],
    protocol: Protocol = Protocol(),
    *,
    frames: Sequence[Frame] = ("bare",),
    edit_frame: EditFrame = "bare",
    batch_size: int = BATCH_SIZE,
    config: Mapping[str, Any] | None = None,
    battery: Battery | None = None,
    baseline: Baseline | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make edits as a protocol says and ask for them.

    The editor sees the prompt, the target, the subject and the old answer of a request and nothing else: paraphrases
    and probes are for the examination. Edits are made, and timed, one by one; the answers of single edits come in
    batches in which every row has its own edit.

    An edit that cannot be computed (:data:`~ibke.evaluation.costs.FAILURES`) is an edit that does nothing: its requests
    are asked about like all others. What is wrong with the request or the settings ends the evaluation.

    Args:
        lm: the model; left as it was. Load it in float32: in bfloat16 the faintest update stirs up enough rounding to
            change most answers of forty tokens, and locality measures that instead of the edit.
        editor: the method under test.
        requests: what to edit, in the order in which it is done.
        protocol: how.
        frames: how prompts are asked; a metric is the mean over frames, and ``by_frame`` has each.
        edit_frame: how the request itself is worded for the editor: as it is, or in question form.
        batch_size: prompts per pass, and single edits held at once.
        config: what else the report shall say of the run, e.g. data file, limit and seed.
        battery: what is put to the edited model beside the requests' own questions; after the first edits or batches,
            or after the last edit of a sequence.
        baseline: where the unedited model's answers may be known from.
        progress: told how many edits are made and how many answers have come.

    Returns:
        A JSON-ready report, of one shape for every protocol; :func:`_report` says what is in it.

    Raises:
        RequestError: no request, an unknown frame, or a prompt longer than the model's window.
        IBKEError: the method's settings, or the edits it makes, are not for this model.
    """
    if edit_frame not in get_args(EditFrame):
        raise RequestError(f"an edit cannot be worded as {edit_frame!r}.", "edit frame", "Choose bare or question.")
    gone = protocol.superseded(requests)
    exam, costs = Examination(lm, requests, frames, batch_size, progress, battery, baseline, gone), Costs()
    shown = [_for_editor(request, edit_frame, lm.tokenizer) for request in requests]
    groups, first = protocol.groups(requests), editor.mark  # what it learns of edits is not part of its name
    run = {"single": _single, "batch": _batch, "sequential": _sequential}[protocol.regime]
    for _ in run(exam, costs, editor, shown, groups):
        if progress:
            progress("edits", costs.tried, len(requests))
    about = {"method": editor.name, "editor_mark": first, "edit_frame": edit_frame, **(config or {})}
    return _report(exam, costs, protocol, groups, editor.training_seconds, about)


def _report(
    exam: Examination,
    costs: Costs,
    protocol: Protocol,
    groups: Sequence[range],
    training_seconds: float | None,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """The report of an evaluation, JSON-ready.

    ``n`` is the number of edits, ``groups`` in how many groups they were made, ``superseded`` how many of a sequence a
    later one of the same prompt took the place of; these are not asked about, nor are the ``rewritten`` probes whose
    answers were to stay but are what another edit in force is about; ``unreachable`` how many targets no answer can be,
    for they are longer than ``config.max_new_tokens`` or of several lines; ``not_made`` of how many no edit could be
    made, ``not_made_why`` the first reason. ``metrics`` and ``base`` hold the blocks ``generation`` (normalised exact
    match of the greedy answer; locality: the same answer as the base) and ``teacher_forced`` (legacy: token accuracy;
    locality: the same tokens as the base), each of ``reliability``, ``generality``, ``locality`` and
    ``locality_accuracy`` (against the known answers) with mean and 95 % interval. ``by_age`` has the generated ones by
    the number of edits made later, youngest first; all edits of another protocol are of age 0. ``rate_nats`` is per
    edit, None where the method has no code; ``seconds_per_edit`` is wall-clock, with joining those before it in a
    sequence; ``training_seconds`` what training took up to the weights in use, caching included, None elsewhere;
    ``bytes_per_edit`` what is kept of an edit, without what all of the method have in common (``shared_bytes``);
    ``memory_per_edit_mb`` what making one needs above what the process held before (median); ``peak_memory_mb`` the
    peak of the process over loading, editing and scoring, ``peak_memory_editing_mb`` up to the first answers.
    ``scores`` has the metrics edit by edit; ``side_effects``, given a battery, what :meth:`Battery.report` says.
    """
    tally, count = exam.tally, len(exam.requests)
    later = _made_later(groups, costs.made)
    later = {index: age for index, age in later.items() if index not in exam.superseded}
    return {
        "n": count,
        "protocol": protocol.regime,
        "group": min(protocol.group, count),
        "groups": len(groups),
        "superseded": len(exam.superseded),
        "rewritten": exam.rewritten,
        "unreachable": exam.unreachable,
        "metrics": tally.core("edited"),
        "base": tally.core("base"),
        **costs.report(),
        "training_seconds": training_seconds,
        "peak_memory_mb": peak_memory_mb(),
        **tally.extras(("base", "edited")),
        "kl_nats": tally.block("edited", "kl_nats"),
        "by_frame": {f: {"metrics": tally.core("edited", f), "base": tally.core("base", f)} for f in exam.frames},
        "by_age": tally.by_age(later if protocol.regime == "sequential" else dict.fromkeys(later, 0), AGES),
        **exam.context(config),
        "scores": tally.each(exam.requests),
        **({"side_effects": exam.battery.report()} if exam.battery else {}),
    }


def _made_later(groups: Sequence[range], made: Sequence[bool]) -> dict[int, int]:
    """Of each request, how many after its group were edited: one whose edit cannot be made makes no other older."""
    ages, later = dict[int, int](), 0
    for group, is_made in zip(reversed(groups), reversed(made), strict=True):
        ages |= dict.fromkeys(group, later)
        later += len(group) * is_made
    return dict(sorted(ages.items()))


def _single(
    exam: Examination, costs: Costs, editor: Editor, shown: Sequence[EditRequest], groups: Sequence[range]
) -> Iterator[None]:
    """Each edit alone; asked about some at a time. Yields after each edit."""
    del groups
    for part in exam.parts():
        edits: list[Edit | None] = []
        for index in part:
            edits.append(costs.make(editor, [shown[index]]))
            yield
        costs.note_memory()
        exam.examine(part, edits)
        exam.look(*([edit] for edit in edits if edit))


def _batch(
    exam: Examination, costs: Costs, editor: Editor, shown: Sequence[EditRequest], groups: Sequence[range]
) -> Iterator[None]:
    """A group at once on the pristine model, asked about before the next."""
    for group in groups:
        edit = costs.make(editor, shown[group.start : group.stop])
        yield
        costs.note_memory()
        exam.examine(group, Together((edit,)) if edit else None)
        exam.look(*([[edit]] if edit else []))


def _sequential(
    exam: Examination, costs: Costs, editor: Editor, shown: Sequence[EditRequest], groups: Sequence[range]
) -> Iterator[None]:
    """Group after group on the same model, asked about after the last."""
    with InSequence(exam.lm) as edits:
        for group in groups:
            if edit := costs.make(editor, shown[group.start : group.stop]):
                editor = stay(edits, costs, editor, edit)
            yield
        whole = edits.whole
    costs.note_memory()
    exam.examine(range(len(shown)), Together((whole,)) if whole else None)
    exam.look(*([[whole]] if whole else []))


def stay(edits: InSequence, costs: Costs, editor: Editor, edit: Edit) -> Editor:
    """Put an edit in force to stay; the editor for what follows.

    What joining those before it takes, where gates are told apart again, is part of its time. Where that cannot be
    computed, sequence and editor are as they were, and the edit counts as not made.
    """
    before = edits.whole
    try:
        with _timed(costs):
            edits.add(edit)
        return costs.after(editor, edit)
    except FAILURES as error:
        edits.back_to(before)
        costs.unmake(error)
        return editor


@contextmanager
def _timed(costs: Costs) -> Iterator[None]:
    """Adds what is done to the last attempt's time, also where it fails."""
    began = time.perf_counter()
    try:
        yield
    finally:
        last = costs.attempts[-1]
        costs.attempts[-1] = replace(last, seconds=last.seconds + time.perf_counter() - began)


def _for_editor(request: EditRequest, frame: EditFrame, tokenizer: Any) -> EditRequest:
    # Without paraphrases and probes: an editor that refines on them would be examined on what it was taught.
    return replace(request.for_editor(), prompt=render(request.prompt, frame, tokenizer)[0])
