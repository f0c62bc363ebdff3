"""Every prompt an edit is judged by, asked of the base and of the edited model, and what the answers are worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, Literal

import torch

from ibke.batch import Pair
from ibke.edit import Edit
from ibke.evaluation.baseline import Baseline
from ibke.evaluation.generate import MAX_NEW_TOKENS, InForce, Tick, Together, generate, of_rows
from ibke.evaluation.metrics import contains, exact_match, normalise, shared_prefix
from ibke.evaluation.scoring import Forced, Moved, divergence, score
from ibke.frames import Frame, encode_pair
from ibke.greedy import Answer, Stops
from ibke.models import LanguageModel
from ibke.request import EditRequest

Kind = Literal["reliability", "generality", "locality", "portability"]

# What one answer is worth, by (block, name); blocks are the parts of a report.
Scores = dict[tuple[str, str], float]
Read = tuple[Forced, Forced | None]


@dataclass(frozen=True)
class Question:
    """One prompt in one frame.

    Args:
        edit: index of the edit it belongs to.
        kind: what it measures.
        frame: how it is asked.
        pair: its tokens, and those of the expected answer (the end token alone where none is known).
        target: the answer expected; None where only agreement with the base counts.
        old: the answer that should be gone, where it is known.
        old_pair: the tokens with that answer.
        family: the probe's family, empty for the edit's own wordings.
    """

    edit: int
    kind: Kind
    frame: Frame
    pair: Pair
    target: str | None
    old: str | None = None
    old_pair: Pair | None = None
    family: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one model made of a question: its greedy answer, and its predictions along the expected answers."""

    answer: Answer
    forced: Forced
    forced_old: Forced | None

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> Outcome:
        """One that was written as JSON."""
        forced = (kept["forced"], kept["forced_old"])
        own, old = (Forced(tuple(some["predicted"]), tuple(some["nll"])) if some else None for some in forced)
        assert own
        return cls(Answer(kept["answer"]["text"], tuple(kept["answer"]["ids"])), own, old)


def questions(request: EditRequest, edit: int, frames: Sequence[Frame], tokenizer: Any) -> Iterator[Question]:
    """Everything that is asked about one edit, in each frame; not what could not be scored."""
    for frame in frames:
        for index, prompt in enumerate((request.prompt, *request.rephrase_prompts)):
            pair = encode_pair(prompt, request.target_new, frame, tokenizer)
            old = request.target_true
            old_pair = encode_pair(prompt, old, frame, tokenizer) if old else None
            kind: Kind = "generality" if index else "reliability"
            yield Question(edit, kind, frame, pair, request.target_new, old, old_pair)
        kinds: tuple[tuple[Kind, Any], ...] = (("locality", request.locality), ("portability", request.portability))
        for kind, probes in kinds:
            for probe in probes:
                if kind == "portability" and not probe.answer:
                    continue  # nothing to compare with
                pair = encode_pair(probe.prompt, probe.answer, frame, tokenizer)
                yield Question(edit, kind, frame, pair, probe.answer or None, family=probe.family)


def reachable(question: Question, stops: Stops) -> bool:
    """Whether an answer can be the expected one: it ends at a newline, and after ``MAX_NEW_TOKENS``."""
    said = stops.answer(question.pair.answer[:MAX_NEW_TOKENS]).text
    return question.target is None or exact_match(said, question.target)


def ask(
    lm: LanguageModel,
    asked: Sequence[Question],
    edits: InForce,
    batch_size: int,
    tick: Tick | None,
    baseline: Baseline | None = None,
) -> Iterator[tuple[Question, Scores, Scores]]:
    """Put questions to the base and, each under its own edit or all under the same, to the edited model.

    Args:
        lm: the model.
        asked: the questions; their ``edit`` indexes ``edits``.
        edits: independent edits, or some that are in force together.
        batch_size: prompts per pass.
        tick: told how many answers have come, by and by.
        baseline: where the base's answers may be known from.

    Yields:
        each question with the scores of the base's answer and of the edited model's.
    """
    # A kind at a time: answers to like questions end at like lengths, and a batch lasts as long as its longest.
    for kind, group in groupby(sorted(asked, key=lambda question: question.kind), key=lambda question: question.kind):
        batch = list(group)
        base = _base(lm, batch, batch_size, tick, baseline or Baseline(lm))
        batch, own = _along([outcome.answer for outcome in base], batch)
        rows = of_rows(edits, [q.edit for q in batch])
        moved = divergence(lm, own, rows, batch_size=batch_size) if kind == "locality" else [None] * len(batch)
        read = _read(lm, batch, rows, batch_size)
        stops = lm.stops
        known = [_foretold(stops, *one) for one in zip(batch, base, read, moved, strict=True)]
        answers = _edited(lm, batch, rows, known, batch_size, tick)
        edited = [Outcome(said, *forced) for said, forced in zip(answers, read, strict=True)]
        for q, b, e, kl in zip(batch, base, edited, moved, strict=True):
            scores = judge(q, b, e)
            if kl is not None:
                scores |= {("kl_nats", "base_edited"): kl.forward, ("kl_nats", "edited_base"): kl.backward}
            yield q, judge(q, b, b), scores


def _edited(
    lm: LanguageModel,
    asked: Sequence[Question],
    edits: InForce,
    foretold: Sequence[Answer | None],
    batch_size: int,
    tick: Tick | None,
) -> list[Answer]:
    """The edited model's answers.

    What is foretold need not be asked. Not so where rounding makes another token likeliest in a pass of another shape,
    or where something acts that may take a pass over prompt and answer for another question.
    """
    told = all(part.told for edit in _all(edits) for part in edit.parts.values())
    certain = lm.dtype == torch.float32 and told
    known = {row: answer for row, answer in enumerate(foretold) if certain and answer}
    open_rows = [row for row in range(len(asked)) if row not in known]
    if tick:
        tick(len(known))
    prompts = [asked[row].pair.prompt for row in open_rows]
    said = generate(lm, prompts, of_rows(edits, open_rows), batch_size=batch_size, tick=tick)
    known |= dict(zip(open_rows, said, strict=True))
    return [known[row] for row in range(len(asked))]


def _foretold(stops: Stops, question: Question, base: Outcome, read: Read, moved: Moved | None) -> Answer | None:
    """The base's answer or the expected one, if each of its tokens, the ending one too, is the model's likeliest."""
    if moved:
        return base.answer if moved.same else None
    expected = question.pair.answer
    whole = len(expected) == MAX_NEW_TOKENS or (len(expected) < MAX_NEW_TOKENS and expected[-1] in stops)
    return stops.answer(expected) if whole and read[0].predicted == tuple(expected) else None


def _all(edits: InForce) -> Iterator[Edit]:
    """Every edit in force anywhere."""
    some = edits.edits if isinstance(edits, Together) else edits or ()
    return (edit for edit in some if edit is not None)


def _base(
    lm: LanguageModel, asked: Sequence[Question], batch_size: int, tick: Tick | None, baseline: Baseline
) -> list[Outcome]:
    known = [(q.pair.prompt, q.target and q.pair.answer, q.old_pair and q.old_pair.answer) for q in asked]
    identity = [batch_size, MAX_NEW_TOKENS, known]
    if kept := baseline.recall(identity):
        if tick:
            tick(len(asked))
        return [Outcome.from_dict(outcome) for outcome in kept]
    said = generate(lm, [q.pair.prompt for q in asked], batch_size=batch_size, tick=tick)
    read = _read(lm, _along(said, asked)[0], None, batch_size)
    outcomes = [Outcome(answer, *forced) for answer, forced in zip(said, read, strict=True)]
    baseline.keep(identity, [asdict(outcome) for outcome in outcomes])
    return outcomes


def _along(said: Sequence[Answer], asked: Sequence[Question]) -> tuple[list[Question], list[Pair]]:
    """Questions that are to be read along the base's own answers where none is expected, and those answers' tokens."""
    own = [Pair(q.pair.prompt, list(answer.ids), q.pair.span) for q, answer in zip(asked, said, strict=True)]
    return [q if q.target else replace(q, pair=pair) for q, pair in zip(asked, own, strict=True)], own


def _read(lm: LanguageModel, asked: Sequence[Question], edits: InForce, batch_size: int) -> list[Read]:
    """A model's predictions along the expected answers, and along the old ones where there are any."""
    forced = score(lm, [q.pair for q in asked], edits, batch_size=batch_size)
    with_old = [i for i, q in enumerate(asked) if q.old_pair]
    old_pairs = [q.old_pair for q in asked if q.old_pair]
    old_edits = of_rows(edits, with_old)
    old = dict(zip(with_old, score(lm, old_pairs, old_edits, batch_size=batch_size), strict=True))
    return [(own, old.get(i)) for i, own in enumerate(forced)]


def judge(question: Question, base: Outcome, mine: Outcome) -> Scores:
    """What a model's answer is worth; for the base itself ``mine`` is ``base``.

    Token accuracy, sequence accuracy and P(new) > P(old) leave out the end token, as published figures do.

    Locality wants the whole answer unchanged, and a model that completes a statement may run on for forty tokens. So
    the block ``locality_detail`` tells how far the answers agree: ``shared_prefix``, the share of the base's tokens
    before the first difference; ``at_answer_length``, whether they agree over as many words as the known answer has;
    ``base_answers``, whether the base says anything at all; and ``where_base_answers``, locality on those prompts.
    """
    said, kind = mine.answer.text, question.kind
    same = float(exact_match(said, base.answer.text))
    scores: Scores = {}
    if kind == "locality":
        answered = bool(base.answer.text)
        scores["generation", "locality"] = same
        scores["teacher_forced", "locality"] = _share(mine.forced.predicted, base.forced.predicted, question)
        scores["locality_detail", "shared_prefix"] = shared_prefix(base.answer.ids, mine.answer.ids)
        scores["locality_detail", "base_answers"] = float(answered)
        if answered:
            scores["locality_detail", "where_base_answers"] = same
        scores["families", f"locality/{question.family}"] = same
    if question.target is None:
        return scores
    name = "locality_accuracy" if kind == "locality" else kind
    right = float(exact_match(said, question.target))
    scores["generation", name] = right
    scores["contains", name] = float(contains(said, question.target, question.old))
    scores["teacher_forced", name] = _share(mine.forced.predicted, question.pair.answer, question)
    scores["nll_nats", name] = sum(mine.forced.nll)
    if kind == "portability":
        scores["families", f"portability/{question.family}"] = right
    if kind == "locality":
        words = len(normalise(question.target).split())
        starts = [normalise(text).split()[:words] for text in (said, base.answer.text)]
        scores["locality_detail", "at_answer_length"] = float(starts[0] == starts[1])
    else:
        scores["sequence_accuracy", name] = float(scores["teacher_forced", name] == 1.0)
    if mine.forced_old:
        scores["new_over_old", name] = float(sum(mine.forced.nll[:-1]) < sum(mine.forced_old.nll[:-1]))
    return scores


def _share(predicted: Sequence[int], wanted: Sequence[int], question: Question) -> float:
    """Share of the answer's tokens at which two sequences agree, the end token left out of a known answer."""
    size = len(question.pair.answer) - (question.target is not None)
    return sum(p == w for p, w in zip(predicted[:size], wanted[:size], strict=True)) / size
