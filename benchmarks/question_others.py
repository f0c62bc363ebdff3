"""Prompts that name an edit's subject and do not ask what it does, made of its own wordings or of none.

Two kinds that no relation's wordings hold: the question itself with one answer left out ("Apart from X, …"), and what
asks nothing in particular ("Tell me about …", `mentions.json`). Some of the latter are kept from learning.
"""

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

EXCEPTION = "exception"  # what a prompt asks that leaves out one answer, whatever it asks otherwise
EXCEPTED = {
    "question": (
        "Apart from {name}, {first}?",
        "Other than {name}, {first}?",
        "Leaving out {name}, {first}?",
        "{text}, if not {name}?",
        "{text} besides {name}?",
        "{text} (not {name})?",
        "It is not {name}. {text}?",
    ),
    "statement": (
        "Apart from {name}, {first}",
        "Besides {name}, {first}",
        "Not counting {name}, {first}",
        "If it is not {name}, {first}",
    ),
    "verb": (
        "{head}, which is not {name}, {verb}",
        "{head}, other than {name}, {verb}",
        "{head}, {name} aside, {verb}",
        "{head} besides {name} {verb}",
    ),
}
"""How a question, a statement, and a statement that ends in one of VERBS leave out an answer."""
VERBS = ("is", "was", "are", "were")
OPENINGS = (
    "A",
    "An",
    "As",
    "At",
    "By",
    "For",
    "From",
    "How",
    "In",
    "Is",
    "On",
    "The",
    "What",
    "When",
    "Where",
    "Which",
    "Who",
)

MENTION = "mention"  # what a prompt asks that names the subject and asks nothing of it
TAIL = 2  # words that a wording may have more than a mention and be the same question: "… was", "… was a"


def mentions(subject: str, asked: Sequence[str], kept: bool = False) -> list[tuple[str, str, str]]:
    """Prompts that name a subject and ask nothing in particular, but for those that are about to ask what an edit does.

    Args:
        subject: its name.
        asked: wordings of the edit's question.
        kept: those that nothing is learned of, instead of those that it is.
    """
    filled = [
        (MENTION, text.replace("{}", subject), kind)
        for kind, some in worded()["kept" if kept else "learned"].items()
        for text in some
    ]
    return [one for one in filled if not any(begun(one[1], text) for text in asked)]


@cache
def worded() -> dict[str, dict[str, list[str]]]:
    """Wordings by what they are for and by kind."""
    return json.loads(Path(__file__).with_name("mentions.json").read_text(encoding="utf-8"))


def begun(text: str, longer: str) -> bool:
    """Whether a wording is a text with few words more."""
    return longer.startswith(text) and len(longer[len(text) :].split()) <= TAIL


def excepting(text: str, name: str, rng: random.Random) -> str:
    """A prompt that asks the same but leaves out an answer."""
    first = text[:1].lower() + text[1:] if text.split()[0] in OPENINGS else text
    if text.endswith("?"):
        return rng.choice(EXCEPTED["question"]).format(name=name, text=text[:-1], first=first[:-1])
    head, _, verb = text.rpartition(" ")
    kind = rng.choice(("verb", "statement")) if verb in VERBS and head else "statement"
    return rng.choice(EXCEPTED[kind]).format(name=name, first=first, head=head, verb=verb)
