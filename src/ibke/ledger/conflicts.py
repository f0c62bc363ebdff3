"""Which edits a new one takes the place of: the same fact, in the same words or in others.

The same prompt is the same fact. Suspected are edits about the same subject too, and those whose gates were found from
keys like the new one's; and asked is the model: with the old edit alone in force, does the new prompt get the old
answer, or with the new edit alone the old prompt the new answer? An edit may change other questions about its subject
as well, so the two must also ask the same: most of their words besides the subject are the same, or the unedited model
answers both alike.

Shape suffixes: T keys, D width of what gates look at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache

import torch

from ibke.edit import Edit
from ibke.evaluation.generate import generate
from ibke.evaluation.metrics import normalise, signed
from ibke.frames import encode_pair
from ibke.models import LanguageModel
from ibke.request import EditRequest

# Words that do not say what is asked.
_LITTLE = """
    a an and are at be by did do does for from has have how in is it its of on or s that the to was were what when where
    which who
"""
EMPTY = frozenset(_LITTLE.split())
ALIKE = 0.6  # cosine of two keys in the metric of generic ones, from which on they may be of one subject


def superseded(lm: LanguageModel, kept: Mapping[int, Edit], new: Edit, request: EditRequest) -> list[int]:
    """The numbers of the edits that say something else, or the same, of the very fact a new one is about.

    Args:
        lm: the pristine model.
        kept: edits in force, by number.
        new: the new one.
        request: what it was made for.
    """
    found: list[int] = []
    asked: list[tuple[int, Edit, EditRequest]] = []
    likeness = alike(kept, new)
    mine, subject = _said_of(request)
    for number, old in kept.items():
        for other in old.requests:
            theirs, about = _said_of(other)
            if theirs == mine:
                found.append(number)
            elif _within(subject, about) or _within(about, subject) or likeness.get(number, 0.0) >= ALIKE:
                asked.append((number, old, other))
    asked = _asking_the_same(lm, request, asked)
    if asked:
        prompts = [request.prompt] * len(asked) + [other.prompt for _, _, other in asked]
        edited = _answers(lm, prompts, [old for _, old, _ in asked] + [new] * len(asked))
        wanted = [other.target_new for _, _, other in asked] + [request.target_new] * len(asked)
        follows = [said == normalise(target) for said, target in zip(edited, wanted, strict=True)]
        found += [asked[row % len(asked)][0] for row, yes in enumerate(follows) if yes]
    return sorted(set(found))


def _asking_the_same(
    lm: LanguageModel, request: EditRequest, asked: list[tuple[int, Edit, EditRequest]]
) -> list[tuple[int, Edit, EditRequest]]:
    """Those that ask what a request asks: in much the same words, or the unedited model answers both alike."""
    unlike = [other.prompt for _, _, other in asked if not same_words(request, other)]
    prompts = list(dict.fromkeys([request.prompt, *unlike])) if unlike else []
    base = dict(zip(prompts, _answers(lm, prompts, None), strict=True)) if prompts else {}
    mine = base.get(request.prompt)
    return [one for one in asked if same_words(request, one[2]) or (mine and base[one[2].prompt] == mine)]


def _answers(lm: LanguageModel, prompts: list[str], edits: list[Edit] | None) -> list[str]:
    """What the model answers, with an edit a prompt in force or as it is."""
    ids = [encode_pair(text, "-", "bare", lm.tokenizer).prompt for text in prompts]
    return [normalise(said.text) for said in generate(lm, ids, edits)]


def alike(kept: Mapping[int, Edit], new: Edit) -> dict[int, float]:
    """The largest cosine of two keys that the first gates of a new edit and of each old one were found from.

    In the metric of generic keys: with p = B⁻¹ k beside each key, ⟨k, k'⟩ = kᵀ p'. Edits without such keys are left
    out.
    """
    for name, some in new.all_neurons.items():
        mine = some.told
        theirs = {number: old.all_neurons[name].told for number, old in kept.items() if name in old.all_neurons}
        told = {number: one for number, one in theirs.items() if one is not None}
        if mine is None or not told:
            continue
        counts = [len(one.answer_TD) for one in told.values()]
        keys_UD = torch.cat([one.answer_TD for one in told.values()])
        pulled_UD = torch.cat([one.pulled_UD[:count] for one, count in zip(told.values(), counts, strict=True)])
        mine_T = (mine.answer_TD * mine.pulled_UD[: len(mine.answer_TD)]).sum(-1)
        theirs_U = (keys_UD * pulled_UD).sum(-1)
        cosine_TU = mine.answer_TD @ pulled_UD.T / torch.outer(mine_T, theirs_U).clamp_min(1e-12).sqrt()
        parts = cosine_TU.amax(0).split(counts)
        return {number: float(part.max()) for number, part in zip(told, parts, strict=True)}
    return {}


def same_fact(one: EditRequest, other: EditRequest) -> bool:
    """Whether two requests are of the same fact as far as words tell: of one subject, in much the same words."""
    (mine, subject), (theirs, about) = _said_of(one), _said_of(other)
    return mine == theirs or ((_within(subject, about) or _within(about, subject)) and same_words(one, other))


def same_facts(asked: Mapping[int, Sequence[EditRequest]], chosen: Collection[int]) -> Iterator[tuple[int, int]]:
    """Pairs of edits that are of the same fact as far as words tell, the first of them one of those chosen.

    Args:
        asked: what each edit was made for, by its number.
        chosen: numbers that are in ``asked``.
    """
    by_key: dict[str, list[int]] = {}
    for number, requests in asked.items():
        for key in {key for request in requests for key in _keys(request)}:
            by_key.setdefault(key, []).append(number)
    for number in sorted(chosen):
        near = {other for request in asked[number] for key in _keys(request) for other in by_key[key]}
        for other in sorted(near - {number}):
            if any(same_fact(one, two) for one in asked[number] for two in asked[other]):
                yield number, other


def _keys(request: EditRequest) -> list[str]:
    """Texts of which requests of the same fact have one in common: the prompt, and the subject's words."""
    prompt, subject = _said_of(request)
    return [prompt, *subject.split()]


def same_words(one: EditRequest, other: EditRequest) -> bool:
    """Whether most of what two prompts say besides their subjects is the same."""
    mine, theirs = _words(one), _words(other)
    return bool(mine & theirs) and len(mine & theirs) * 2 > len(mine | theirs)


def _within(name: str, other: str) -> bool:
    """Whether a name is, word by word, part of another."""
    return bool(name) and f" {name} " in f" {other} "


def _words(request: EditRequest) -> set[str]:
    subject = set(normalise(request.about).split())
    return set(normalise(request.prompt).split()) - subject - EMPTY


@lru_cache(maxsize=100_000)
def _said_of(request: EditRequest) -> tuple[str, str]:
    """A request's prompt and its subject, in forms in which C is not C++."""
    return signed(request.prompt), " ".join(request.about.casefold().split())
