"""Edit requests made from facts: give a subject another subject's answer, and word it as people would.

A triple (s, r, o) and the wordings of r become one request: a prompt about s, a target o' that is the answer of
another subject, other wordings of the same thing, prompts whose answers must stay, and prompts whose answers must
follow. Memory grows with the table, requests are streamed, and the same seed always gives the same requests.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ibke.data.fact_table import FactTable, key, same
from ibke.data.relations import Kind, Relation, family, fits
from ibke.data.triples import Skips, Triple, leave_out
from ibke.request import EditRequest, Probe

Item = TypeVar("Item")

EDIT_KINDS: dict[Kind, float] = {"statement": 0.5, "question": 0.3, "chat": 0.2}
OTHER_KINDS: dict[Kind, float] = {"statement": 0.35, "indirect": 0.2, "question": 0.25, "chat": 0.2}
"""How often a prompt, and a wording beside it, is of each kind (ratios)."""
TRUE_TARGETS = 0.1
"""Share of requests that ask for the true object: corrections toward the truth exist, too."""
PARAPHRASES = 3
HOPS = 2
"""Most one-hop consequences of a request."""

ANYTHING_ABOUT = (
    "The first thing that comes to mind when somebody mentions {} is",
    "A short article about {} would begin with the words",
    "The first time somebody told me about {}, I was",
    "Somebody who collects everything there is about {} would never part with",
    "In the photo album, on the page about {}, there is a picture of",
    "A good title for a talk about {} would be",
    "Why would anybody be interested in {}?",
    "What should I know about {}?",
    "Can you tell me something surprising about {}?",
    "How would you explain {} to a child?",
)
"""Wordings for a subject of which no other relation is known."""


@dataclass(frozen=True)
class FactRequest:
    """An edit request made from a fact.

    Args:
        request: the request itself.
        relation: id of the relation it is about.
        source: table the fact came from.
        kinds: the kind of every prompt in the request (edit, rephrase, locality, portability), by its text.
    """

    request: EditRequest
    relation: str
    source: str
    kinds: Mapping[str, Kind]


def generate(
    triples: Iterable[Triple],
    wordings: Mapping[str, Relation],
    *,
    seed: int,
    limit: int | None = None,
    per_relation: int | None = None,
    true_targets: float = TRUE_TARGETS,
    skips: Skips | None = None,
) -> Iterator[FactRequest]:
    """Stream edit requests made from facts, relation by relation in turn.

    A share of the requests has the true object as its target and no ``target_true``. Each has three rephrase
    prompts; two locality prompts of the family ``same_relation``, two of ``same_subject``, one ``unrelated``; and
    ``one_hop`` portability prompts where the new object is itself a known subject.

    Args:
        triples: facts; all of them are read before the first request comes.
        wordings: relations by id, from :func:`~ibke.data.relations.load_wordings`.
        seed: what decides every choice; requests do not depend on ``limit``.
        limit: most requests in all.
        per_relation: most requests of one relation.
        true_targets: that share (ratio).
        skips: where facts without a request are counted: no wordings for the relation, or no other object in it.

    Raises:
        FormatError: a fact cannot become a request and ``skips`` is None.
    """
    table = FactTable(triples, wordings, skips)
    made = 0
    for triple in table.in_turn(seed, per_relation):
        if limit is not None and made >= limit:
            return
        request = _Maker(table, triple, random.Random("|".join((str(seed), *triple[:3])))).make(true_targets)
        if request is None:
            leave_out(skips, f"no other object in relation {triple.relation}", f"{triple.subject} ({triple.source})")
        else:
            made += 1
            yield request


class _Maker:
    """Makes the request of one triple, with that triple's own random numbers; no prompt occurs in it twice."""

    def __init__(self, table: FactTable, triple: Triple, rng: random.Random):
        self.table, self.triple, self.rng = table, triple, rng
        self.relation = table.wordings[triple.relation]
        self.kinds: dict[str, Kind] = {}

    def make(self, true_targets: float) -> FactRequest | None:
        """The request, or None where the relation has no other object."""
        triple = self.triple
        is_true = self.rng.random() < true_targets
        target = triple.obj if is_true else self._other_object()
        if target is None:
            return None
        prompt = self._word(self.relation, triple.subject, EDIT_KINDS) or self._word(self.relation, triple.subject)
        rephrases = [self._word(self.relation, triple.subject) for _ in range(PARAPHRASES)]
        locality = [*self._same_relation(target), *self._same_subject(), *self._unrelated(target)]
        request = EditRequest(
            prompt=prompt or "",
            target_new=target,
            subject=triple.subject,
            target_true=None if is_true else triple.obj,
            rephrase_prompts=tuple(text for text in rephrases if text),
            locality=tuple(locality),
            portability=tuple(self._one_hop(target)),
        )
        return FactRequest(request, triple.relation, triple.source, self.kinds)

    def _other_object(self) -> str | None:
        """An object of another subject that is none of this subject's own, nor the subject itself."""
        avoid = [*self.table.all_objects(self.triple.relation, self.triple.subject), self.triple.subject]
        return _pick(
            self.rng, self.table.objects[self.triple.relation], lambda obj: not any(same(obj, other) for other in avoid)
        )

    def _same_relation(self, target: str) -> Iterator[Probe]:
        """Two other subjects; the first has this subject's true object where there is such a one (hard neighbour)."""
        seen = [self.triple.subject]

        def usable(other: Triple) -> bool:
            objects = self.table.all_objects(other.relation, other.subject)
            certain = self.relation.many or self.table.the_object(other.relation, other.subject)
            taken = any(same(obj, target) for obj in objects) or any(same(other.subject, name) for name in seen)
            return bool(certain) and not taken

        everybody = self.table.triples[self.triple.relation]
        for facts in (self.table.sharing(self.triple.relation, self.triple.obj), everybody):
            other = _pick(self.rng, facts, usable) or _pick(self.rng, everybody, usable)
            if other is not None and (text := self._word(self.relation, other.subject)):
                seen.append(other.subject)
                yield Probe(text, None if self.relation.many else other.obj, "same_relation")

    def _same_subject(self, count: int = 2) -> Iterator[Probe]:
        """Other things about the subject: known ones first, then what one may ask of such a subject, then anything."""
        subject, mine = self.triple.subject, self.relation
        others = [other for other in self.table.wordings.values() if _apart(mine, other)]
        known = [other for other in others if self.table.the_object(other.id, subject)]
        chosen = self.rng.sample(known, min(count, len(known)))
        apt = [other for other in others if fits(mine.subject_kind, other.subject_kind) and other not in chosen]
        chosen += self.rng.sample(apt, min(count - len(chosen), len(apt)))
        for relation in chosen:
            if text := self._word(relation, subject):
                yield Probe(text, self.table.the_object(relation.id, subject), "same_subject")
        for template in self.rng.sample(ANYTHING_ABOUT, count - len(chosen)):
            text = mine.fill(template, subject)
            self.kinds[text] = "question" if text.endswith("?") else "statement"
            yield Probe(text, None, "same_subject")

    def _unrelated(self, target: str) -> Iterator[Probe]:
        """A fact of another relation about another subject."""

        def usable(other: Triple) -> bool:
            obj = self.table.the_object(other.relation, other.subject)
            return obj is not None and not same(obj, target) and not same(other.subject, self.triple.subject)

        relations = [name for name in self.table.triples if name != self.triple.relation]
        relations = [name for name in relations if not self.table.wordings[name].many]
        for name in self.rng.sample(relations, min(len(relations), 3)):
            other = _pick(self.rng, self.table.triples[name], usable)
            if other is not None and (text := self._word(self.table.wordings[name], other.subject)):
                yield Probe(text, other.obj, "unrelated")
                return

    def _one_hop(self, target: str) -> Iterator[Probe]:
        """What follows from the new object: somebody born in Rome instead of Oslo was born in Italy."""
        table, triple = self.table, self.triple
        if self.relation.many or not self.relation.noun_phrase or not table.the_object(triple.relation, triple.subject):
            return
        phrase = self.relation.fill(self.relation.noun_phrase, triple.subject)
        found = []
        for name in table.relations_of.get(key(target), ()):
            second, obj = table.wordings[name], table.the_object(name, target)
            before = table.the_object(name, triple.obj)
            usable = fits(self.relation.object_kind, second.subject_kind) and not second.many
            inverse = (triple.relation, name) in table.inverse
            if usable and not inverse and obj and not same(obj, triple.subject) and not (before and same(obj, before)):
                found.append((second, obj))
        for second, obj in self.rng.sample(found, min(HOPS, len(found))):
            if text := self._word(second, phrase, suits=_takes_phrase):
                yield Probe(text, obj, "one_hop")

    def _word(
        self,
        relation: Relation,
        subject: str,
        shares: Mapping[Kind, float] = OTHER_KINDS,
        suits: Callable[[str], bool] = bool,
    ) -> str | None:
        """A wording of the relation that the request does not have yet; None when there is no such wording left."""
        texts: dict[Kind, list[str]] = {}
        for kind in shares:
            filled = [relation.fill(template, subject) for template in relation.templates(kind) if suits(template)]
            if fresh := [text for text in filled if text not in self.kinds]:
                texts[kind] = fresh
        if not texts:
            return None
        kind = self.rng.choices(list(texts), [shares[kind] for kind in texts])[0]
        text = self.rng.choice(texts[kind])
        self.kinds[text] = kind
        return text


def _apart(mine: Relation, other: Relation) -> bool:
    """Whether two relations may hold of one subject and their answers are of quite another kind.

    Answers of one kind may be the same fact under another name, or follow from it (a city and its country).
    """
    one_subject = fits(mine.subject_kind, other.subject_kind) or fits(other.subject_kind, mine.subject_kind)
    return one_subject and family(mine.object_kind) != family(other.object_kind) and not other.many


def _pick(rng: random.Random, items: Sequence[Item], usable: Callable[[Item], bool], tries: int = 40) -> Item | None:
    """A random usable item, or None where none of ``tries`` different ones is."""
    return next(filter(usable, rng.sample(items, min(len(items), tries))), None)


def _takes_phrase(template: str) -> bool:
    """Whether a noun phrase reads well in a template's gap: not quoted, no article before, no possessive after it."""
    return not re.search(
        r"""["“]\{\}|\b(an?|the|any|every|typical|word|name|named|called) \{\}|\{\}['’]s""", template, re.IGNORECASE
    )
