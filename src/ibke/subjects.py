"""What a request is about, where nobody says it."""

from __future__ import annotations

import re

# Words that begin sentences without naming anything.
_OPENERS = frozenset(
    re.findall(
        r"\w+",
        "The A An In On At Of For From To By With Who What Which Where When Why How Is Are Was Were Do Does Did Can "
        "Could Will Would Should Tell Name Give Question Please I It Its He She They We You My Our Their This That",
    )
)

# A word with a capital in it (eBay), up to a possessive ("Microsoft's CEO") unless it is part of a title ("Schindler's
# List").
_NAME = r"\w*[A-Z0-9](?:[\w.-]|['’](?!s?(?!\w))|['’]s(?=\s+[A-Z][^\W\dA-Z]))*"
_NAMES = re.compile(rf"(?<!\w){_NAME}(?:\s+(?:of|in|the|de|van|von|la|and|{_NAME})(?!\w))*")


def guess_subject(prompt: str) -> str | None:
    """The longest run of capitalised words that is not just a sentence opener; None where nothing is named."""
    # Capitals of any alphabet, as one that a pattern can name.
    shadow = "".join("A" if letter.isupper() else letter for letter in prompt)
    named = []
    for run in _NAMES.finditer(shadow):
        words = prompt[run.start() : run.end()].split()
        while words and words[0] in _OPENERS:
            words.pop(0)
        while words and words[-1].isalpha() and words[-1].islower():
            words.pop()
        if words:
            named.append(" ".join(words).rstrip(".'’-"))
    return max(named, key=len, default=None) or None


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


def subject_of(prompt: str, subject: str | None) -> str:
    """What an edit is about: as given where it stands in the prompt, or guessed, or else the whole prompt."""
    if subject and place_of(subject, prompt):
        return subject
    return guess_subject(prompt) or prompt.strip().rstrip("?!. ")
