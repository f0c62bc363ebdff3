"""What a request is about, where nobody says it.

What is quoted, or else a name: what a statement begins with, or the longest run of words with capitals. Where there is
none, a noun phrase (`ibke.phrases`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ibke.phrases import noun_phrase, words

# A word with a capital in it (eBay), up to a possessive ("Microsoft's CEO") unless it is part of a title ("Schindler's
# List").
_NAME = r"\w*[A-Z0-9](?:[\w.-]|['’](?!s?(?!\w))|['’]s(?=\s+[A-Z][^\W\dA-Z]))*"
_INSIDE = "of|in|the|and|de|del|della|di|da|do|dos|du|des|la|le|el|al|van|von|der|den|bin|ibn|y"  # names' small words
_NAMES = re.compile(rf"(?<!\w){_NAME}(?:\s+(?:{_INSIDE}|{_NAME})(?!\w))*")
_NUMBER = re.compile(r"\d[\d.,-]*[a-z]*")  # the 3rd, 2024
_QUOTED = re.compile(r"(?<!\w)(?:\"([^\"]+)\"|“([^”]+)”|'([^']{2,})'(?!\w)|‘([^’]{2,})’(?!\w))")
_FORM = re.compile(r"^\s*(?:q|question)\s*:|(?<!\w)(?:a|answer)\s*:\s*$", re.IGNORECASE)  # what is around a question
_SPACED = re.compile(r"\S+")
# A word in lower case right behind.
_LOWER = re.compile(r"\s([^\W\dA-Z_]+)(?![\w'’-])")
_AFTER = re.compile(r"\s+(?:at|in|of|for|on|from|to|with)\b")


def guess_subject(prompt: str) -> str | None:
    """What is quoted, or else a name, or else a noun phrase; None where there is none."""
    return name_of(prompt) or noun_phrase(_unformed(prompt))


def name_of(prompt: str) -> str | None:
    """What is quoted, or else a name; None where there is none."""
    text = _unformed(prompt)
    if quoted := _QUOTED.search(text):
        return next(filter(None, quoted.groups()))
    return _name(text)


def _unformed(prompt: str) -> str:
    """A prompt with blanks for what is around a question."""
    return _FORM.sub(lambda found: " " * len(found[0]), prompt)


def _name(prompt: str) -> str | None:
    # Capitals of any alphabet, as one that a pattern can name.
    shadow = "".join("A" if letter.isupper() else letter for letter in prompt)
    named = []
    for run in _NAMES.finditer(shadow):
        before = prompt[: run.start()].rpartition("\n")[2].rstrip()
        first = not before
        places = [word.span() for word in _SPACED.finditer(prompt, *run.span())]
        parts = [prompt[slice(*place)] for place in places]
        opened = first and _opens(parts[0], first)
        if before.endswith(("?", "!", ".")) and _opens(parts[0], True):
            del parts[0], places[0]  # "… hiking? Usually, you need a"
        if first and len(parts) == 1 and _noun_follows(parts[0], prompt[run.end() :]):
            continue  # "Table salt", whose capital is the sentence's
        while parts and (_opens(parts[0], first) or (len(parts) > 1 and (_common(parts[0]) or parts[0].islower()))):
            del parts[0], places[0]  # of "CEO of Larkfield" too
        while parts and ((parts[-1].isalpha() and parts[-1].islower()) or (len(parts) > 2 and _dated(parts))):
            parts.pop()
        # As it stands there, with whatever is between its words.
        name = prompt[places[0][0] : places[len(parts) - 1][1]].rstrip(".'’-") if parts else ""
        if name and not _common(name) and not all(map(_NUMBER.fullmatch, parts)):
            # "Oslo lies in Norway" is about Oslo, "Employees at Larkfield get" about Larkfield.
            begins = first and not opened and not _AFTER.match(prompt, run.end())
            named.append((begins, len(name), name))
    return max(named, key=lambda found: found[:2])[2] if named else None


def _opens(word: str, first: bool) -> bool:
    """Whether a word has its capital only where a sentence begins, or, of small words, a title."""
    small = words(
        "articles", "owners", "pronouns", "about", "beside", "within", "helpers", "be", "asking", "telling", "joining"
    )
    begun = words("verbs", "forms", "common", "adverbs", "adjectives") - words("naming")
    opening = small | begun if first else small
    return (len(word) == 1 or word[1:].islower()) and word.lower() in opening


def _noun_follows(word: str, rest: str) -> bool:
    """Whether a sentence's first word may be part of a common noun: one in lower case follows that is not its verb."""
    behind = _LOWER.match(rest)
    if not (behind and word[1:].islower()):
        return False
    kinds = ("about", "beside", "within", "helpers", "be", "asking", "joining", "adverbs", "verbs", "forms", "behind")
    after = _LOWER.match(rest, behind.end())
    acted = behind[1] not in words("helpers", "be") and after is not None and after[1] in words("helpers", "be")
    return acted or (behind[1] not in words(*kinds) and not behind[1].endswith("ed"))


def _common(word: str) -> bool:
    """Whether a word has a capital and names nothing an edit would be about: CEO, Saturdays."""
    lower = word.lower()
    return (word[-1].isupper() and lower in words("acronyms")) or (word.istitle() and lower in words("times"))


def _dated(parts: list[str]) -> bool:
    """Whether a name is followed by "in 2019"."""
    return parts[-2] == "in" and bool(_NUMBER.fullmatch(parts[-1]))


def place_of(subject: str, text: str, begin: int = 0) -> tuple[int, int] | None:
    """First and last-plus-one character at which a subject stands in a text; None where it does not.

    Whole words come before parts of one, as "US" of "populous", and the same letters before others' case.
    """
    name = re.escape(subject)
    for pattern in (rf"(?<!\w){name}(?!\w)", name):
        for flags in (0, re.IGNORECASE):
            # In the text as it is: letters may become more of them in lower case.
            if found := re.compile(pattern, flags).search(text, begin):
                return found.span()
    return None


def subject_of(prompt: str, subject: str | None, wordings: Iterable[str] = ()) -> str:
    """What an edit is about: as given where it stands in the prompt, or guessed, or else the whole prompt.

    An edit is in force where its subject stands, and the wordings given with it must follow. So where they do not name
    what is guessed of the prompt, what is guessed of one of them is taken if more of them do.
    """
    if subject and place_of(subject, prompt):
        return subject
    texts = [prompt, *wordings]
    guesses = [guess_subject(text) or text.strip().rstrip("?!. ") for text in texts]
    named = [guess for guess in guesses if place_of(guess, prompt)] or guesses
    return max(named, key=lambda guess: sum(place_of(guess, text) is not None for text in texts))
