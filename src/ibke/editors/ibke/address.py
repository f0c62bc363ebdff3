"""Where an edit applies: a direction that answers 1 at the request's subject and 0 elsewhere, in closed form.

Keys are what the edited layer's MLP sees at the last token of the subject. K, where the edit shall answer: the subject
in the request's own words, in every frame, and in contexts that ask nothing. N, where it shall not: the words before
that token in the request, the subject behind words that ask something else about it, its last word by itself where
that is one token, for other bridges end in "Bridge" too, and names like the subject in the request's own words. People
type names with capitals or without, so the request typed otherwise is in K, and a name of one word as any noun ("some
apple") in N. Both stand before generic keys C₀, so with all targets in K equal to 1 and weights W and V, larger for the
request's own words and smaller for lone last words and nouns,

    a = A⁻¹ KᵀW 1,   A = KᵀWK + NᵀVN + γ (C₀ + λ I),

and a is then made longer until the request's own words answer 1 in the mean and each of them clears the threshold. γ
says against how many generic keys the edit's own stand: with few, K and N are told apart by directions that common
words have too, and the edit opens in running text (docs/experiments.md). What a second moment does not say, a sample
of running text does: words in it that answer nevertheless go to N, unless they end as the subject does (in its last
two tokens, or in the only one it has), and the address is made again. Norway is such a word where the currency of
Sweden is edited. It is asked about in the same words, so a word goes to N as it is in the text and once more as it
would be in the request: moved by what the request adds to its own subject's key.

The words before a subject are all a causal model knows at its last token. So contrast with other questions makes sense
only where they say what is asked, as in "The capital of …", and it is made of phrases of that build; one that asks what
the request asks (closely, in the whitened space) is left out of N. Elsewhere the subject alone opens the edit. The
answer is never looked at: an address carries nothing of it.

Shape suffixes: B edits, T keys, D width of the residual stream.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibke.batch import Pair, by_length, collate
from ibke.editors.aggregate import solve
from ibke.editors.ibke.statistics import ANY, Common, KeySpectrum
from ibke.frames import FRAMES, Frame, encode_pair
from ibke.partial import PartialModel
from ibke.prefixes import Prefixes, Reading, Row
from ibke.subjects import place_of, subject_of

REQUEST, NEUTRAL, OTHER, ENDING, ALIKE, TYPED, NOUN = range(7)
OWN_WEIGHT = 3.0  # of the request's own words in K, against 1 for other contexts
ENDING_WEIGHT = 0.3  # of a lone last word in N, and of a name as a noun, against 1 for other questions
NEAR, LOUDEST, ROUNDS = 0.3, 64, 2  # common words so near to opening go to N, the nearest first, so many times
NEAR_WEIGHT = 0.1  # of each, against 1 for the rest of N: there are many, and they must not outweigh other questions
MARGIN = 0.15  # responses this far below the threshold write nothing, whatever rounding does
_TYPED_FRAMES: tuple[Frame, ...] = ("bare", "chat")
CLEAR, LONGEST = 1.08, 1.5  # what an edit is sure of answers so many times θ c, for at most so much longer an address

_ASKING = r"(?:(?:what|who|which|where)(?:'s| is| was| are| were)?\s+)?"
# "The capital of …", "the league which …"; what goes with the subject without such a word ("The team …") names nothing.
_PHRASE = rf"\s*{_ASKING}(the\s[^.,;:!?]*\b(?:of|by|for|in|from|to|at|with|on|which|that))\s*"


@cache
def _own() -> dict[str, Any]:
    """What we wrote for addresses."""
    return json.loads(files("ibke.data").joinpath("contexts.json").read_text(encoding="utf-8"))


@cache
def contexts() -> dict[str, list[tuple[str, Frame]]]:
    """Our own contexts for a subject.

    ``neutral`` ones ask nothing, ``questions`` name what they ask before it, as a phrase, and ``asking`` ones name it
    after it, if at all. ``endings`` are for a subject's last word alone, ``nouns`` for a name without its capital.
    """
    kinds = ("neutral", "asking", "questions", "endings", "nouns")
    return {kind: [(text, frame) for frame, texts in _own()[kind].items() for text in texts] for kind in kinds}


def names_the_question(prompt: str, subject: str) -> str | None:
    """The words before the subject where they are a noun phrase that says what is asked, as in "The capital of"."""
    begin, _ = place_of(subject, prompt) or (0, 0)
    before = prompt[:begin]
    match = re.fullmatch(_PHRASE, before, re.IGNORECASE)
    return match[1] if match else None


def first_open(part: PartialModel, entrance: nn.Module, pairs: Sequence[Pair], gate_RD: Tensor) -> list[int | None]:
    """The first token of each row at which an edit may be in force; None where there is none.

    Args:
        part: the model.
        entrance: the module whose input is the key.
        pairs: tokens.
        gate_RD: what opens the gate of each, a − θ c; a little less than open is taken as open.
    """
    first: list[int | None] = [None] * len(pairs)
    device = part.model.device
    for chosen in by_length([len(pair) for pair in pairs]):
        batch = collate([pairs[row] for row in chosen], 0, device)
        keys_RTD = part.inputs_of(entrance, batch)
        response_RT = torch.einsum("rtd,rd->rt", keys_RTD, gate_RD[chosen].to(device))
        open_RT = ((response_RT > -MARGIN) & batch.attention_RT).cpu()
        for row, places in zip(chosen, open_RT, strict=True):
            if places.any():
                first[row] = int(places.nonzero()[0])
    return first


@dataclass(frozen=True)
class Context:
    """One place where a subject stands.

    Args:
        kind: ``REQUEST``, ``NEUTRAL``, ``OTHER`` (question), ``ENDING`` (the last word alone), ``ALIKE`` (a name like
            the subject, in the request's words), ``TYPED`` (the request without capitals, or with them) or ``NOUN``
            (the name as one).
        prefix: tokens before it that are the same for every request.
        tail: the tokens after those, up to the subject's last.
        size: how many tokens of the tail are the subject.
    """

    kind: int
    prefix: tuple[int, ...]
    tail: tuple[int, ...]
    size: int

    @property
    def ending(self) -> tuple[int, int]:
        """The subject's last two tokens; ``ANY`` before one that is alone."""
        return (self.tail[-2] if self.size > 1 else ANY, self.tail[-1])


class About(NamedTuple):
    """What an address is made for: a request's prompt, its subject, and other wordings given with it."""

    prompt: str
    subject: str
    wordings: tuple[str, ...] = ()

    @classmethod
    def of(cls, prompt: str, subject: str | None, wordings: tuple[str, ...] = ()) -> About:
        """The same, where the subject may not be given."""
        return cls(prompt, subject_of(prompt, subject), wordings)

    @property
    def sure(self) -> int:
        """How many contexts are the prompt and the wordings themselves, at which the edit has to be in force."""
        return len(FRAMES) + sum(place_of(self.subject, text) is not None for text in self.wordings)


class Addressed(NamedTuple):
    """What comes of making addresses.

    Args:
        address_BD: float32.
        own: by request, keys of its subject's last token in the request's own words (T × D).
        read: what was to be read in the same passes.
    """

    address_BD: Tensor
    own: tuple[Tensor, ...]
    read: list[Reading]


def names_like(subject: str) -> list[str]:
    """Names that another subject of the same kind might have: another number, another first or last word."""
    found = []
    if number := re.search(r"\d{1,9}", subject):
        others = (str(int(number[0]) + more) for more in (1, 3))
        found += [subject[: number.start()] + other + subject[number.end() :] for other in others]
    first, *rest = subject.split() or [""]
    if rest:
        instead = _own()["instead"]["word" if subject.islower() else "Name"]
        found += [" ".join([other, *rest]) for other in instead["first"]]
        if not number:
            found += [" ".join([first, *rest[:-1], other]) for other in instead["last"]]
    return [name for name in found if name != subject]


def contexts_of(about: About, tokenizer: Any, *, alike: bool = False) -> list[Context]:
    """Every context an address is made from, cut off after the subject.

    Args:
        about: what the address is for.
        tokenizer: the model's.
        alike: with names like the subject's.
    """
    asked = [(REQUEST, text, frame, about.subject) for text, frame in _own_words(about)]
    asked += _told_of(about)
    if typed := _otherwise_typed(about):
        asked += [(TYPED, typed[0], frame, typed[1]) for frame in _TYPED_FRAMES]
    if alike and (place := place_of(about.subject, about.prompt)):
        head, tail = about.prompt[: place[0]], about.prompt[place[1] :]
        asked += [(ALIKE, f"{head}{name}{tail}", "bare", name) for name in names_like(about.subject)]
    found = []
    for kind, text, frame, name in asked:
        pair = encode_pair(text, "-", frame, tokenizer, name)
        begin, end = pair.subject or pair.span
        fixed = pair.span[0] if kind in (REQUEST, ALIKE, TYPED) else begin
        # A first position holds an activation that belongs to no word; a key from there would answer everywhere. A
        # request that begins with a subject of one token is known by the token after it.
        end = min(max(end, 2), len(pair.prompt)) if kind == REQUEST else end
        # A last word of several tokens hardly ever ends another name; told of it, an address only grows longer.
        if end > 1 and not (kind == ENDING and end - begin > 1):
            found.append(Context(kind, tuple(pair.prompt[:fixed]), tuple(pair.prompt[fixed:end]), end - begin))
    return found


def _own_words(about: About) -> list[tuple[str, Frame]]:
    """The request as it is worded, and as a question where that is known from a phrase."""
    prompt, subject, wordings = about
    asked: list[tuple[str, Frame]] = [(prompt, frame) for frame in FRAMES]
    asked += [(text, "bare") for text in wordings if place_of(subject, text)]
    if phrase := names_the_question(prompt, subject):
        # "The national currency of" is also asked for as "the currency of".
        for named in dict.fromkeys((f"{phrase[0].lower()}{phrase[1:]}", f"the {' '.join(phrase.split()[-2:])}")):
            asked += [(f"What is {named} {subject}?", "bare"), (f"What is {named} {subject}?", "chat")]
    return asked


def _otherwise_typed(about: About) -> tuple[str, str] | None:
    """The prompt in lower case, or with capitals where its subject has none, and its subject; None without case."""
    prompt, subject, _ = about
    lower, place = subject.lower(), place_of(subject, prompt)
    if place is None:
        return None
    if lower != subject:
        return (prompt.lower(), lower) if place_of(lower, prompt.lower()) else None
    name = re.sub(r"(?<!\S)\w", lambda letter: letter[0].upper(), subject)
    sentence = f"{prompt[: place[0]]}{name}{prompt[place[1] :]}"
    return (sentence[:1].upper() + sentence[1:], name) if name != subject else None


def _told_of(about: About) -> list[tuple[int, str, Frame, str]]:
    """Our own contexts for a subject: their kind, text and frame, and the name they end with."""
    subject = about.subject
    *first, last = subject.split() or [""]
    wanted = [(NEUTRAL, "neutral", subject)]
    if names_the_question(about.prompt, subject):
        wanted += [(NEUTRAL, "asking", subject), (OTHER, "questions", subject)]
    if first:
        wanted += [(ENDING, "endings", last)]
    elif subject.lower() != subject:
        wanted += [(NOUN, "nouns", subject.lower())]
    found = []
    for kind, group, name in wanted:
        for text, frame in contexts()[group]:
            # One that names the subject twice is read from the first name to the last.
            whole = text[text.index("{}") : text.rindex("{}") + 2].replace("{}", name)
            found.append((kind, text.replace("{}", name), frame, whole))
    return found


class Addresser:
    """Makes addresses for one layer of one model.

    Args:
        part: the model.
        entrance: the module whose input is the key.
        tokenizer: the model's.
        spectrum: of C₀, the generic keys.
        common: some of them as they are.
        shut_D: θ c, which an address has to exceed for its edit to be in force.
        gamma, ridge, alike: see :class:`IBKEConfig`.
    """

    def __init__(
        self,
        part: PartialModel,
        entrance: nn.Module,
        tokenizer: Any,
        spectrum: KeySpectrum,
        common: Common,
        shut_D: Tensor,
        *,
        gamma: float,
        ridge: float,
        alike: float,
    ):
        self.part, self.entrance, self.tokenizer = part, entrance, tokenizer
        self.gamma, self.ridge, self.alike = gamma, ridge, alike
        self.basis_DE = spectrum.basis_IE.cpu().double()
        self.values_E = spectrum.values_E.cpu().double() + ridge * spectrum.mean()
        self.pull = spectrum.inverse(gamma, ridge)
        self.common = Common(common.keys_SD.cpu().float(), common.ids_S2.cpu())
        self.shut_D = shut_D.cpu().double()
        self.shut_S = self.common.keys_SD @ self.shut_D.float()

    @property
    def identity(self) -> tuple[Any, ...]:
        """All that decides an address but the model and the request."""
        fixed = (OWN_WEIGHT, NEAR, LOUDEST, ROUNDS, NEAR_WEIGHT, ENDING_WEIGHT, CLEAR, LONGEST)
        return (self.gamma, self.ridge, self.alike, *fixed, json.dumps(_own()))

    def __call__(self, requests: Sequence[About]) -> Tensor:
        """Addresses (B × D, float32)."""
        return self.beside((), requests).address_BD

    def beside(
        self,
        pairs: Sequence[Pair],
        requests: Sequence[About],
        earlier: Sequence[nn.Module] = (),
        *,
        alike: bool = False,
    ) -> Addressed:
        """Addresses, made in the same passes in which some pairs are read.

        Args:
            pairs: the requests themselves, say: contexts that they begin with are not run again.
            requests: what addresses are made for.
            earlier: modules before the entrance whose inputs are read, too.
            alike: tell addresses of names like their subjects, at the price of a few more rows each.
        """
        made = [contexts_of(about, self.tokenizer, alike=alike) for about in requests]
        rows = [Row((), tuple(pair.fed)) for pair in pairs]
        rows += [Row(context.prefix, context.tail) for contexts in made for context in contexts]
        found = self.prefixes.read((*earlier, self.entrance), rows)
        keys = iter(reading.fed[-1].cpu() for reading in found[len(pairs) :])
        taken = [list(islice(keys, len(contexts))) for contexts in made]
        sure = [about.sure for about in requests]
        addresses = [self._address(*one) for one in zip(made, taken, sure, strict=True)]
        # The request as it is in every frame, of which an edit is sure; other contexts are guesses.
        asked = [
            [keys_TD[-1] for context, keys_TD in zip(contexts, keys, strict=True) if context.kind == REQUEST]
            for contexts, keys in zip(made, taken, strict=True)
        ]
        own = tuple(torch.stack(keys[: len(FRAMES)]) if keys else torch.zeros(0, len(self.basis_DE)) for keys in asked)
        return Addressed(torch.stack(addresses).float(), own, found[: len(pairs)])

    @cached_property
    def prefixes(self) -> Prefixes:
        """What every request's contexts begin with, run once."""
        known = [row.prefix for row in contexts_of(About("The X of Y Z", "Y Z"), self.tokenizer)]
        return Prefixes(self.part, known)

    def _address(self, rows: Sequence[Context], found: Sequence[Tensor], sure: int) -> Tensor:
        kind_T = torch.tensor([row.kind for row in rows])
        answers_T = (kind_T == REQUEST) | (kind_T == NEUTRAL) | (kind_T == TYPED)
        if not answers_T.any():
            return torch.zeros(len(self.basis_DE), dtype=torch.float64)
        keys_TD = torch.stack([keys_TD[-1] for keys_TD in found]).double()
        answer_TD, other_TD = keys_TD[answers_T], keys_TD[kind_T == OTHER]
        if len(other_TD):
            other_TD = other_TD[~self._asks_the_same(keys_TD, kind_T)]
        # What comes before the subject's last token, without a first position, which belongs to no word.
        before = [
            keys[0 if row.prefix else 1 : -1] for row, keys in zip(rows, found, strict=True) if row.kind == REQUEST
        ]
        silent = [(torch.cat([other_TD, keys_TD[kind_T == ALIKE], *(keys.double() for keys in before)]), 1.0)]
        silent.append((keys_TD[(kind_T == ENDING) | (kind_T == NOUN)], ENDING_WEIGHT))
        root_T = torch.where(kind_T == REQUEST, OWN_WEIGHT**0.5, 1.0)[answers_T]
        own_TD = keys_TD[kind_T == REQUEST] if (kind_T == REQUEST).any() else answer_TD

        def solved() -> Tensor:
            silent_TD = torch.cat([some_TD for some_TD, _ in silent])
            root_S = torch.cat([some_TD.new_full((len(some_TD),), weight**0.5) for some_TD, weight in silent])
            address_D = solve(answer_TD[None], root_T[None], silent_TD[None], root_S[None], self.pull)[0].sum(0)
            return address_D / (own_TD @ address_D).mean().clamp_min(1e-3)

        address_D = solved()
        bar_S = self._bar(torch.tensor([row.ending for row in rows if row.kind in (REQUEST, NEUTRAL, OTHER)]))
        # What standing in the request adds to a key.
        moved_D = own_TD.mean(0) - keys_TD[kind_T == NEUTRAL].mean(0)
        for _ in range(ROUNDS):
            over_S = self.common.keys_SD @ address_D.float() - bar_S
            near = [self.near(over_S), self.near(over_S + float(moved_D @ address_D))]
            if not any(map(len, near)):
                break
            in_text_SD, asked_SD = (self.common.keys_SD[some].double() for some in near)
            silent.append((torch.cat([in_text_SD, asked_SD + moved_D]), NEAR_WEIGHT))
            address_D = solved()
        # Answering in the mean is not enough where a key has much of c, or one frame is unlike the others.
        least = CLEAR * (own_TD[:sure] @ self.shut_D) / (own_TD[:sure] @ address_D).clamp_min(1e-3)
        return address_D * least.max().clamp(1.0, LONGEST)

    def _bar(self, mine_M2: Tensor) -> Tensor:
        """What responses of common words have to exceed; those that end as the subject does never do (S)."""
        # Rows without a token hold no word.
        never_S = self.common.ends(mine_M2) | (self.common.ids_S2[:, 1] < 0)
        return self.shut_S.masked_fill(never_S, torch.inf)

    def near(self, over_S: Tensor) -> Tensor:
        """Which common words answer, or nearly, given by how much each is above its bar."""
        most_S, which_S = over_S.topk(min(LOUDEST, len(over_S)))
        return which_S[most_S > -NEAR]

    def _asks_the_same(self, keys_TD: Tensor, kind_T: Tensor) -> Tensor:
        """Which questions ask what the request asks: they move the subject's key the same way (bool, T of OTHER)."""
        white_TE = (keys_TD @ self.basis_DE) / self.values_E.sqrt()
        rest = white_TE[kind_T == NEUTRAL].mean(0)
        asked_E = white_TE[kind_T == REQUEST].mean(0) - rest
        return F.cosine_similarity(white_TE[kind_T == OTHER] - rest, asked_E[None], dim=-1) >= self.alike
