"""Which noun phrase a prompt without names is about, by the small and common words of English around it.

One that owns ("my dog's name"); what follows "of", "for" or "by" ("the boiling point of ethanol"); what follows an
auxiliary ("how much does the loyalty card cost"); or what a statement begins with ("ethanol boils at"). Of several, one
with a word that is not common: "the dose of loperamide for an adult" is about loperamide. The words are in
`data/english.json`; any other may be a noun.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from functools import cache
from importlib.resources import files
from typing import NamedTuple


@cache
def words(*kinds: str) -> frozenset[str]:
    """English words of some kinds, as `data/english.json` lists them; ``forms`` are those of ``verbs``."""
    listed: dict[str, str] = json.loads(files("ibke.data").joinpath("english.json").read_text(encoding="utf-8"))
    found = {word for kind in kinds for word in listed[kind].split()}
    if "forms" in kinds:
        found |= {form for verb in listed["verbs"].split() for form in _regular(verb)}
    return frozenset(found)


def _regular(verb: str) -> Iterator[str]:
    """A verb's regular forms; some that nobody uses do no harm."""
    stem = verb.removesuffix("e")
    yield from (verb + "s", verb + "es", stem + "ed", stem + "ing", verb + verb[-1] + "ed", verb + verb[-1] + "ing")
    if verb.endswith("y"):
        yield from (verb[:-1] + "ies", verb[:-1] + "ied")


class Verb(Enum):
    """Whether a clause's verb may come right behind the noun phrase, and among which kinds of words to look for it."""

    NONE = ()
    SURE = (("forms",),)  # there need not be one
    STATED = (("forms",), ("verbs",))  # or else the last word
    ASKED = (("verbs",),)  # or else the last word: "does ethanol boil"

    @property
    def last(self) -> bool:
        """Whether a phrase's last word is the verb, where none is known."""
        return self in (Verb.STATED, Verb.ASKED)


LONGEST, PLACE = 60, 8  # words of a clause, and of a place in it, that are looked at

SENTENCE_END = re.compile(r"[?!;\n]+|(?<![\s.]\w)(?<!\bdr)(?<!\bmr)(?<!\bmrs)(?<!\bst)\.+(?!\w)", re.IGNORECASE)
_CLAUSE = re.compile(r"[,:]|\s[-–—]+\s")
_WORD = re.compile(r"(\w(?:[\w+#&/.@-]*[\w+#])?)(['’]s(?!\w)|(?<=s)['’](?!\w))?")
_PLURAL = re.compile("[^su]s$")


class Word(NamedTuple):
    """A word in lower case, where it stands, and whether it owns what follows ("dog's")."""

    text: str
    begin: int
    end: int
    owns: bool = False

    def of(self, *kinds: str) -> bool:
        """Whether it is among some kinds of words."""
        return self.text in words(*kinds)

    @property
    def breaks(self) -> bool:
        """Whether no noun phrase has it in it."""
        return self.of("about", "beside", "within", "helpers", "be", "asking", "pronouns", "joining")

    @property
    def begins(self) -> bool:
        """Whether a noun phrase begins with it."""
        return self.of("articles", "owners")

    @property
    def rare(self) -> bool:
        """Whether it may name something: neither common nor a number nor a form of a common verb."""
        common = self.breaks or self.of(
            "articles", "owners", "common", "verbs", "forms", "times", "telling", "behind", "adverbs", "adjectives"
        )
        return not common and not self.text[0].isdigit()


def noun_phrase(prompt: str) -> str | None:
    """The noun phrase that a prompt is about; None where the words tell of none."""
    text = re.sub(r"\([^()]*\)", lambda found: " " * len(found[0]), prompt)
    found: list[list[Word]] = []
    beside: list[list[Word]] = []
    begin = 0
    for end in [*(stop.end() for stop in SENTENCE_END.finditer(text)), len(text)]:
        ends = [cut.start() for cut in _CLAUSE.finditer(text, begin, end)] + [end]
        clauses = filter(None, (_read(text, *both)[:LONGEST] for both in zip([begin, *ends], ends, strict=False)))
        for number, clause in enumerate(clauses):
            after = text[clause[-1].end :].lstrip(" ")[:1]
            some = _candidates(clause, whole=after in tuple(",:?-–—"))
            apart = clause[0].text == "according" or (number == 0 and len(ends) > 1 and _stands_beside(clause))
            (beside if apart else found).extend(some)
        begin = end
    chosen = _best(found) or _best(beside)
    return prompt[chosen[0].begin : chosen[-1].end] if chosen else None


def _best(found: Iterable[list[Word]]) -> list[Word]:
    """The first phrase with a word that is not common, or else the first."""
    phrases = [phrase for phrase in found if phrase]
    return next((phrase for phrase in phrases if any(word.rare for word in phrase)), phrases[0] if phrases else [])


def _read(text: str, begin: int, end: int) -> list[Word]:
    """The words between two places; "is" in "what's" is one of its own."""
    found = []
    for match in _WORD.finditer(text, begin, end):
        word = Word(match[1].lower(), match.start(1), match.end(1), bool(match[2]))
        contracted = word.owns and word.of("asking", "pronouns")
        found += [word._replace(owns=False), Word("is", word.end, word.end)] if contracted else [word]
    return found


def _stands_beside(clause: list[Word]) -> bool:
    """Whether a clause before a comma only stands beside what the next is about: "on the inside", not "in Teuva"."""
    if len(clause) < 2 or not clause[0].of("about", "beside", "within") or any(word.of("asking") for word in clause):
        return False
    return clause[1].begins or clause[1].of("beside") or not any(word.rare for word in clause)


def _candidates(clause: list[Word], whole: bool) -> list[list[Word]]:
    """Phrases that a clause may be about, the likeliest first.

    Args:
        clause: its words.
        whole: it ends as it stands, at a comma or a question mark, so that it need not have a verb.
    """
    region, verb = _region(clause, whole)
    for at, word in enumerate(region):
        if word.owns:
            before = [place for place in range(at) if region[place].breaks or region[place].of("articles", "telling")]
            return [_trimmed(region[before[-1] + 1 if before else 0 : at + 1])]
        if at and (word.of("asking") or (word.text == "that" and not region[at - 1].breaks)):
            # "the university that … went to"; of "the person who maintains …", what comes after the verb
            inner = region[at + (2 if word.text == "who" else 1) :]
            found = [*(_candidates(inner, whole) if inner else []), _phrase(region[:at], verb)]
            return found if verb is Verb.NONE else found[::-1]
    asked = verb is Verb.ASKED
    anywhere = _after(region, ("about", "beside", "within"), verb if asked else Verb.SURE)
    if about := _best(_after(region, ("about",), verb)):
        return [about, *anywhere]
    beside, phrase = _best(_after(region, ("beside",), verb)), _phrase(region, verb)
    return [*((phrase, beside) if asked else (beside, phrase)), *anywhere]


def _region(clause: list[Word], whole: bool) -> tuple[list[Word], Verb]:
    """The part of a clause in which its subject stands, and which verb may come right behind it there."""
    told = next((at for at, word in enumerate(clause) if not word.of("telling") and word.text not in ("me", "us")), 0)
    if told:  # "tell me who …", "tell me the …"
        asked = clause[told].of("asking") or clause[told - 1].text in ("say", "correct")
        return _region(clause[told:], whole) if asked else (clause[told:], Verb.NONE)
    asks = next((at for at, word in enumerate(clause[:3]) if word.of("asking")), None)
    helper = next((at for at, word in enumerate(clause) if word.of("helpers", "be") and word.text != "being"), None)
    if clause[0].of("pronouns") and len(clause) > 1:  # "I need the …", "you can find a …"
        if inner := _asked_within(clause):
            return _region(inner, whole)
        return _past_verb(clause[(helper or 0) + 1 :]), Verb.SURE
    if helper is None and asks is None:  # "ethanol boils at"
        return clause, Verb.SURE if whole else Verb.STATED
    if helper is None and (stated := _before_verb(clause[(asks or 0) + 1 :])):
        return stated, Verb.STATED
    if helper is None:  # "who maintains …"
        return _past_verb(clause[(asks or 0) + 1 :]), Verb.NONE
    if asks is None and helper:
        return clause[:helper], Verb.NONE
    article = next((at for at in range((asks or 0) + 1, helper) if clause[at].begins), None)
    if article is not None:  # "which room the toner is kept in"
        return clause[article:helper], Verb.NONE
    rest = clause[helper + 1 :]
    if rest and rest[0].of("pronouns"):  # "do I need …"
        if inner := _asked_within(rest):
            return _region(inner, whole)
        return _past_verb(rest[1:]), Verb.NONE
    if clause[helper].text in ("has", "have", "had"):  # "which oil has the highest smoke point"
        return rest, Verb.SURE
    if asks is not None and rest and rest[0].of("verbs") and helper - asks > 2:
        return clause[asks + 1 : helper], Verb.NONE  # "which side of the foil should face the food"
    return rest, Verb.ASKED if clause[helper].of("helpers") else Verb.NONE


def _asked_within(clause: list[Word]) -> list[Word]:
    """The question in "you know when …", "somebody tell me how …"; nothing where there is none."""
    at = next((at for at, word in enumerate(clause[:5]) if word.of("asking")), None)
    return clause[at:] if at and at + 1 < len(clause) else []


def _before_verb(clause: list[Word]) -> list[Word]:
    """From the noun phrase on where its verb comes after it, as in "what time the club meets"; nothing otherwise."""
    article = next((at for at, word in enumerate(clause) if word.begins), len(clause))
    for word in clause[:article]:
        if word.of("forms", "about", "beside", "within") or (word.of("verbs") and not word.of("common")):
            return []
    return clause[article:]


def _past_verb(clause: list[Word]) -> list[Word]:
    """What comes after the verb that a clause begins with, or has before its first article or preposition."""
    ends = ("articles", "owners", "about", "beside", "within")
    if not clause or clause[0].of(*ends):
        return clause
    end = next((at for at, word in enumerate(clause) if word.of(*ends)), len(clause))
    rest = clause[next((at for at in range(end) if clause[at].of("verbs", "forms")), 0) + 1 :]
    # "need to register a drone"
    return rest[2:] if len(rest) > 2 and rest[0].text == "to" and rest[1].of("verbs") else rest


def _after(region: list[Word], kinds: Sequence[str], verb: Verb) -> list[list[Word]]:
    """The phrases after prepositions of some kinds, the last first."""
    found = []
    for at in range(len(region) - 2, -1, -1):
        rest = region[at + 1 :]
        beside = "beside" in kinds
        named = beside and region[at].of("within") and not (rest[0].begins or rest[0].of("times"))  # "in africa"
        no_verb_left = verb.last and beside and len(_run(rest)) == len(rest)  # "… ends with the letter"
        to_do = region[at].text == "to" and rest[0].of("verbs")  # "used to mix batter"
        doing = rest[0].text.endswith("ing") and len(rest) > 1 and rest[1].begins  # "for claiming a deduction"
        rest = rest[1:] if to_do or doing else rest
        if rest and (region[at].of(*kinds) or named) and not no_verb_left:
            found.append(_phrase(rest, Verb.SURE if named and verb is Verb.NONE else verb))
    return found


def _phrase(region: list[Word], verb: Verb) -> list[Word]:
    """The noun phrase that words begin with; one of common words with a place ("the room on the third floor")."""
    found = _run(region)
    behind = region[len(found) :]
    if known := _verb_in(found, verb):
        return _trimmed(found[:known])
    placed = len(behind) > 2 and behind[0].of("within") and behind[1].begins
    if placed and not any(word.rare for word in found):
        place = _phrase(behind[1 : 1 + PLACE], verb)
        return _trimmed([*found, *(word for word in behind if place and word.end <= place[-1].end)])
    elsewhere = any(word.of("verbs", "forms", "helpers", "be") for word in behind)
    if verb.last and not elsewhere and sum(not word.begins for word in found) > 1:
        found = found[:-1]
    return _trimmed(found)


def _verb_in(found: Sequence[Word], verb: Verb) -> int | None:
    """Where the clause's verb stands among words that could be nouns; None where none is known."""
    behind_one = [at for at in range(1, len(found)) if not found[at - 1].begins]
    if verb is Verb.ASKED:
        behind_one.reverse()  # "does the nightly build start"
    known = [at for kinds in verb.value for at in behind_one if found[at].of(*kinds)][:1]
    if verb is Verb.STATED:  # "oak trees start producing"
        known += [at for at in behind_one if found[at].of("verbs") and _PLURAL.search(found[at - 1].text)]
    return min(known, default=None)


def _run(region: Sequence[Word]) -> list[Word]:
    """Words up to one that cannot be in the same noun phrase."""
    begin = next((at for at, word in enumerate(region) if not word.begins), len(region))
    end = next((at for at in range(begin, len(region)) if region[at].breaks or region[at].begins), len(region))
    return list(region[:end])


def _trimmed(phrase: list[Word]) -> list[Word]:
    """Without articles before, common adjectives before a word that is not, and what may stand behind.

    An owner stays: about "dog", the name of "my dog" would be that of any.
    """
    while phrase and phrase[0].of("articles", "adverbs"):
        phrase = phrase[1:]
    while len(phrase) > 1 and (phrase[-1].of("behind") or re.search("....ed$", phrase[-1].text)):
        phrase = phrase[:-1]
    while len(phrase) > 1 and phrase[0].of("adjectives") and any(word.rare for word in phrase):
        phrase = phrase[1:]
    nothing = all(word.begins or word.of("times") for word in phrase)
    return [] if nothing or phrase[0].breaks else phrase
