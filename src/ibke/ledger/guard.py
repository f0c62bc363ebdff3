"""Before an edit is kept: does it come, and does everything else stay put?

An edit is measured with all others in force, beside the same without it. Probes are prompts that no edit should
concern; the unedited model's own greedy answers to them are taken once, and one teacher-forced pass over them decides
whether greedy decoding would still give them, for it does if and only if every token is the likeliest after those
before it.

Shape suffixes: P probes, N answer positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ibke.batch import Pair
from ibke.edit import Edit
from ibke.errors import LedgerError
from ibke.evaluation.baseline import Baseline
from ibke.evaluation.generate import Together, generate, in_force
from ibke.evaluation.metrics import contains, exact_match, same_answer
from ibke.evaluation.running_text import RunningText, depends_on_prompt
from ibke.evaluation.scoring import score
from ibke.frames import Frame, encode_pair
from ibke.models import LanguageModel
from ibke.modules import first_layer, resolve
from ibke.partial import PartialModel, answer_states
from ibke.request import EditRequest
from ibke.rows import CONTINUATION, OUTSIDE, RowGroup, build_groups, continuations, row_terms
from ibke.session import refuse_merged, set_aside

Prompt = tuple[str, Frame]

ABOUT: tuple[tuple[str, Frame], ...] = (("{} is known for", "bare"), ("Tell me about {}.", "chat"))
TITLES = {
    "changed": "probes changed",
    "drift": "probes changed by all edits",
    "kl_nats": "KL, nats",
    "perplexity": "perplexity, more",
    "lost": "earlier edits lost",
}
TOKENS = 1024  # of running text


@dataclass(frozen=True)
class Limits:
    """What an edit must reach, and how much it may change.

    Args:
        wordings: least share of the wordings given with a request that must get the target too (ratio 0–1).
        keep: least share of the locality prompts given with it whose answer must stay (ratio 0–1).
        probes: most probes asked.
        changed: most of them whose answer one edit may change (ratio 0–1).
        drift: most of them whose answer may be another than the unedited model's, by all edits together (ratio 0–1);
            one that adds none is not refused for what others did.
        kl_nats: how much KL(base‖edited) may grow at their answers, mean per token (nats).
        perplexity: how much the perplexity of running text may grow (ratio; .01 is one percent).
        edits: most earlier edits asked again, those nearest to the new one.
        lost: most of them whose target may cease to come (ratio 0–1).
    """

    wordings: float = 1.0
    keep: float = 1.0
    probes: int = 200
    changed: float = 0.02
    drift: float = 0.1
    kl_nats: float = 0.02
    perplexity: float = 0.01
    edits: int = 32
    lost: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Limits:
        """Limits of a JSON object; what it does not name is as it is here.

        Raises:
            LedgerError: it cannot be read, names a limit that there is not, or a value that is no number.
        """
        known = asdict(cls())
        try:
            given = json.loads(path.read_bytes())
            wrong = [name for name, value in given.items() if name not in known or not _fits(value, known[name])]
        except (OSError, ValueError, AttributeError) as error:
            raise LedgerError(f"the limits cannot be read ({error}).", str(path), "Give one JSON object.") from error
        if wrong:
            todo = f"Known, each a number: {', '.join(known)}."
            raise LedgerError(f"{wrong[0]!r} is no limit, or its value is none.", str(path), todo)
        return cls(**{name: type(known[name])(value) for name, value in given.items()})


def _fits(value: object, example: float) -> bool:
    """Whether a value can stand for a limit; one that counts cannot be negative."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and (isinstance(example, float) or value >= 0)


class _How(NamedTuple):
    """How states are run, so that they are measured in passes of the same shapes.

    Args:
        first: the first layer that one of them changes; what is below it is run once and for all.
        asked: whether what one of them does to text depends on where a prompt ends.
    """

    first: int
    asked: bool


@dataclass(frozen=True)
class Measured:
    """What a state does to probes and text.

    Args:
        kept_P: whether the unedited model's answer still comes.
        kl_nats: KL(base‖edited) at the answers, mean per token.
        nll: of running text (nats per token).
    """

    kept_P: Tensor
    kl_nats: float
    nll: float


@dataclass(frozen=True)
class Verdict:
    """What a guard found.

    Args:
        scores: JSON-ready figures.
        broken: the limits it does not keep, in words, each with how far.
        changed: probes whose answer changes.
    """

    scores: dict[str, Any]
    broken: tuple[str, ...]
    changed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the edit may be kept."""
        return not self.broken

    def __add__(self, other: Verdict) -> Verdict:
        """Both."""
        return Verdict(self.scores | other.scores, self.broken + other.broken, self.changed + other.changed)


class Guard:
    """Measures states of one model; nothing is attached to it when the guard is made.

    Args:
        lm: the pristine model.
        limits: see :class:`Limits`.
        probes: prompts and how each is asked; None takes our own. ``left_out`` of them are beyond the limit.
    """

    def __init__(self, lm: LanguageModel, limits: Limits | None = None, probes: Sequence[Prompt] | None = None):
        refuse_merged(lm, "guard")
        self.lm, self.limits = lm, limits or Limits()
        given = list(own_probes() if probes is None else probes)
        self.probes = given[: self.limits.probes]
        self.left_out = 0 if probes is None else len(given) - len(self.probes)
        prompts = [encode_pair(text, "-", frame, lm.tokenizer).prompt for text, frame in self.probes]
        self.baseline = Baseline.in_cache(lm)
        with set_aside(lm):  # the answers are kept, and have to be the unedited model's
            answers = self._answered(prompts)
        self.pairs = [Pair(prompt, answer, (0, 1)) for prompt, answer in zip(prompts, answers, strict=True)]
        self.tokens = sum(len(pair.answer) for pair in self.pairs)
        text = files("ibke.data").joinpath("text.txt").read_text(encoding="utf-8")
        self.text = RunningText(lm, text, TOKENS, self.baseline)
        self._rows: dict[int, tuple[PartialModel, list[RowGroup]]] = {}
        # The state last kept and the one last checked, by how they were run.
        self._known: dict[_How, tuple[Edit | None, Measured]] = {}
        self._after: dict[_How, tuple[Edit | None, Measured]] = {}
        self._unedited: dict[_How, Measured] = {}

    def _answered(self, prompts: list[list[int]]) -> list[list[int]]:
        """What the unedited model answers, known from an earlier time or asked now."""
        if not prompts:
            return []
        identity = ["probes", CONTINUATION, prompts]
        if (known := self.baseline.recall(identity)) is None:
            known = continuations(self.lm.model, self.lm.tokenizer, prompts)
            self.baseline.keep(identity, known)
        return known

    def _how(self, *states: Edit | None) -> _How:
        """How some states are run beside each other."""
        edits = [state for state in states if state]
        names = [name for state in edits for name in (*state.factors, *state.neurons)]
        parts = any(state.parts for state in edits)
        first = first_layer(resolve(self.lm.model, names)) if names and not parts else 0
        return _How(first, depends_on_prompt(edits))

    def _groups(self, first: int) -> tuple[PartialModel, list[RowGroup]]:
        if first not in self._rows:
            part = PartialModel(self.lm.model, self.lm.architecture.layers, first)
            count, pad_id = len(self.pairs), self.lm.tokenizer.pad_token_id
            self._rows[first] = part, build_groups(part, self.pairs, [OUTSIDE] * count, range(count), pad_id)
        return self._rows[first]

    def _measure(self, state: Edit | None, how: _How) -> Measured:
        """What a state does; of the unedited model it is known from an earlier time, or kept for a later one."""
        if state:
            return self._run(state, how)
        read = [[pair.prompt, pair.answer] for pair in (*self.pairs, *self.text.windows)]
        identity = ["guard", how.first, how.asked, len(self.pairs), read]
        if (known := self.baseline.recall(identity)) is None:
            found = self._run(None, how)
            known = [found.kept_P.tolist(), found.kl_nats, found.nll]
            self.baseline.keep(identity, known)
        return Measured(torch.tensor(known[0], dtype=torch.bool), *known[1:])

    @torch.inference_mode()
    def _run(self, state: Edit | None, how: _How) -> Measured:
        kept_P, kl = torch.zeros(len(self.probes), dtype=torch.bool), 0.0
        part, groups = self._groups(how.first)
        if state and how.asked:  # twice a pass, but for what it can change
            kept_P, groups = self._measure(None, how).kept_P.clone(), list(self._reached(state, groups))
        edits = (state,) if state else ()
        with in_force(self.lm, Together(edits) if edits else None):
            for group in groups:
                # From the first layer on they are whole passes, in which a text may be put in front of the question.
                if how.first:
                    logits_NV = part.suffix(group.hidden_RTD, group.batch)
                else:
                    logits_NV = part.logits(answer_states(self.lm.model, group.batch))
                terms = row_terms(logits_NV, group)
                kept_P[terms.owner_R.cpu()] = terms.right_R.cpu()
                kl += float(terms.forward_R.sum())
        return Measured(kept_P, kl / max(1, self.tokens), self.text.nll(edits, how.asked))

    def _reached(self, state: Edit, groups: Sequence[RowGroup]) -> Iterator[RowGroup]:
        """The rows in which a state can change anything."""
        for group in groups:
            rows_R = state.reaches(self.lm, group.batch).to(group.owner_R.device)
            if rows_R.any():
                yield group.select(rows_R)

    def check(
        self,
        before: Edit | None,
        after: Edit,
        requests: Sequence[EditRequest],
        earlier: Sequence[EditRequest] = (),
    ) -> tuple[list[Verdict], Verdict]:
        """What more edits do.

        Args:
            before: all others in force, as one.
            after: the same with them.
            requests: what they were made for.
            earlier: of what others in force were made for, what is to be asked again.

        Returns:
            for each request whether it is answered and keeps what it says must stay; and what happens to all else.
        """
        return self._asked(before, after, requests), self._effects(before, after, earlier)

    def _effects(self, before: Edit | None, after: Edit, earlier: Sequence[EditRequest]) -> Verdict:
        """Probes, text and earlier edits, beside what they were."""
        how = self._how(before, after)
        # Measured in passes of the same shapes, so that what differs is the edit's doing and not a sum's rounding.
        if how not in self._known or self._known[how][0] is not before:
            self._known = {how: (before, self._measure(before, how))}
        was, now = self._known[how][1], self._measure(after, how)
        if how not in self._unedited:
            self._unedited[how] = self._measure(None, how) if before else was
        self._after = {how: (after, now)}
        unedited = self._unedited[how]
        lost_P = was.kept_P & ~now.kept_P
        drifted, drifted_before = (int((unedited.kept_P & ~one.kept_P).sum()) for one in (now, was))
        count = max(1, len(self.probes))
        scores = {
            "probes": len(self.probes),
            "changed": float(lost_P.sum()) / count,
            "drift": drifted / count,
            "kl_nats": now.kl_nats - was.kl_nats,
            "perplexity": math.exp(min(now.nll - was.nll, 100.0)) - 1.0,
            "edits": len(earlier),
            "lost": len(gone := self._lost(before, after, earlier)) / max(1, len(earlier)),
        }
        limits, broken = asdict(self.limits), []
        for name, title in TITLES.items():
            if name == "drift" and drifted <= drifted_before:  # others' doing: this edit adds nothing to it
                continue
            if not scores[name] <= limits[name]:  # not-a-number breaks every limit
                broken.append(f"{title} {scores[name]:.4f}, at most {limits[name]:g}")
        changed = tuple(self.probes[number][0] for number in lost_P.nonzero().flatten().tolist())
        return Verdict(scores, tuple(broken), (*changed, *gone))

    def _lost(self, before: Edit | None, after: Edit, earlier: Sequence[EditRequest]) -> list[str]:
        """The prompts of earlier edits whose target came and comes no more: some token is not the likeliest."""
        if not earlier or before is None:
            return []
        pairs = [encode_pair(one.prompt, one.target_new, "bare", self.lm.tokenizer) for one in earlier]
        comes = [
            [one.predicted[:-1] == tuple(pair.answer[:-1]) for one, pair in zip(read, pairs, strict=True)]
            for read in (score(self.lm, pairs, Together((state,))) for state in (before, after))
        ]
        return [one.prompt for one, was, now in zip(earlier, *comes, strict=True) if was and not now]

    def _asked(self, before: Edit | None, after: Edit, requests: Sequence[EditRequest]) -> list[Verdict]:
        """Each request's own prompt, wordings and locality prompts."""
        told = [[one.prompt, *one.rephrase_prompts, *(probe.prompt for probe in one.locality)] for one in requests]
        said = iter(self._answers([text for texts in told for text in texts], after))
        own = [probe.prompt for one in requests for probe in one.locality]
        old = iter(self._answers(own, before))
        verdicts = []
        for request in requests:
            answer = next(said)
            wordings = [contains(next(said), request.target_new, request.target_true) for _ in request.rephrase_prompts]
            kept = [exact_match(next(said), next(old)) for _ in request.locality]
            scores = {
                "answer": answer,
                "achieved": same_answer(answer, request.target_new),
                "wordings": sum(map(bool, wordings)) / len(wordings) if wordings else None,
                "keep": sum(map(bool, kept)) / len(kept) if kept else None,
            }
            lost = tuple(probe.prompt for probe, same in zip(request.locality, kept, strict=True) if not same)
            verdicts.append(Verdict(scores, tuple(self._missed(scores, request)), lost))
        return verdicts

    def keep(self, state: Edit | None) -> None:
        """The state last checked is in force from now on, and need not be measured again."""
        if any(known is state for known, _ in self._after.values()):
            self._known = self._after

    def _answers(self, prompts: Sequence[str], state: Edit | None) -> list[str]:
        if not prompts:
            return []
        ids = [encode_pair(text, "-", "bare", self.lm.tokenizer).prompt for text in prompts]
        return [answer.text for answer in generate(self.lm, ids, Together((state,)) if state else None)]

    def _missed(self, scores: dict[str, Any], request: EditRequest) -> Iterator[str]:
        if not scores["achieved"]:
            yield f"the target is not generated: {scores['answer'][:40]!r} instead of {request.target_new!r}"
        for name, title in (("wordings", "wordings answered"), ("keep", "prompts to keep that kept their answer")):
            least = asdict(self.limits)[name]
            if scores[name] is not None and scores[name] < least:
                yield f"{title} {scores[name]:.2f}, at least {least:g}"


def own_probes() -> list[Prompt]:
    """Prompts of ours: common knowledge, beginnings of sentences, and questions about well-known names."""
    ours = json.loads(files("ibke.data").joinpath("probes.json").read_text(encoding="utf-8"))
    found = [(text, cast(Frame, frame)) for frame, texts in ours["prompts"].items() for text in texts]
    return found + [(text.format(name), frame) for name in ours["subjects"] for text, frame in ABOUT]
