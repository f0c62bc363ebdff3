"""Where a subject stands when an address is made: in the request's words, typed otherwise, beside names like it.

What each of these contexts is for says `address.py`; the texts are in `data/contexts.json`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from ibke.editors.ibke.statistics import ANY
from ibke.frames import FRAMES, Frame, encode_pair
from ibke.request import EditRequest
from ibke.subjects import place_of

REQUEST, NEUTRAL, OTHER, ENDING, ALIKE, TYPED, NOUN = range(7)
_TYPED_FRAMES: tuple[Frame, ...] = ("bare", "chat")

_ASKING = r"(?:(?:what|who|which|where)(?:'s| is| was| are| were)?\s+)?"
# "The capital of …", "the league which …"; what goes with the subject without such a word ("The team …") names nothing.
_PHRASE = rf"\s*{_ASKING}(the\s[^.,;:!?]*\b(?:of|by|for|in|from|to|at|with|on|which|that))\s*"


@cache
def own_texts() -> dict[str, Any]:
    """What we wrote for addresses."""
    return json.loads(files("ibke.data").joinpath("contexts.json").read_text(encoding="utf-8"))


@cache
def contexts() -> dict[str, list[tuple[str, Frame]]]:
    """Our own contexts for a subject.

    ``neutral`` ones ask nothing, ``questions`` name what they ask before it, as a phrase, and ``asking`` ones name it
    after it, if at all. ``endings`` are for a subject's last word alone, ``nouns`` for a name without its capital.
    """
    kinds = ("neutral", "asking", "questions", "endings", "nouns")
    return {kind: [(text, frame) for frame, texts in own_texts()[kind].items() for text in texts] for kind in kinds}


def names_the_question(prompt: str, subject: str) -> str | None:
    """The words before the subject where they are a noun phrase that says what is asked, as in "The capital of"."""
    begin, _ = place_of(subject, prompt) or (0, 0)
    before = prompt[:begin]
    match = re.fullmatch(_PHRASE, before, re.IGNORECASE)
    return match[1] if match else None


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
    def of(cls, request: EditRequest) -> About:
        """The same of a request."""
        return cls(request.prompt, request.about, request.rephrase_prompts)

    @property
    def sure(self) -> int:
        """How many contexts are the prompt and the wordings themselves, at which the edit has to be in force."""
        return len(FRAMES) + sum(place_of(self.subject, text) is not None for text in self.wordings)


def names_like(subject: str) -> list[str]:
    """Names that another subject of the same kind might have: another number, another first or last word."""
    found = []
    if number := re.search(r"\d{1,9}", subject):
        others = (str(int(number[0]) + more) for more in (1, 3))
        found += [subject[: number.start()] + other + subject[number.end() :] for other in others]
    first, *rest = subject.split() or [""]
    if rest:
        instead = own_texts()["instead"]["word" if subject.islower() else "Name"]
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
