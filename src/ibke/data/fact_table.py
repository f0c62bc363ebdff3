"""A table of facts that knows which of them are safe to use."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest

from ibke.data.relations import Relation
from ibke.data.triples import Skips, Triple, leave_out

WORD = re.compile(r"[^\W_]+")


class FactTable:
    """Facts by relation and subject, with what makes a fact safe to use.

    Args:
        triples: facts; those without wordings are left out, and a fact given twice is kept once.
        wordings: relations by id.
        skips: where facts without wordings are counted.
    """

    def __init__(self, triples: Iterable[Triple], wordings: Mapping[str, Relation], skips: Skips | None = None):
        self.wordings = wordings
        self.triples: dict[str, list[Triple]] = defaultdict(list)
        self.objects: dict[str, list[str]] = defaultdict(list)
        self.relations_of: dict[str, list[str]] = defaultdict(list)
        self._objects_of: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._with_object: dict[tuple[str, str], list[Triple]] = defaultdict(list)
        for triple in triples:
            if triple.relation in wordings:
                self._add(triple)
            else:
                leave_out(skips, f"no wordings for relation {triple.relation}", f"{triple.subject} ({triple.source})")
        self.inverse = self._inverse_pairs()

    def _add(self, triple: Triple) -> None:
        subject, obj = key(triple.subject), key(triple.obj)
        known = self._objects_of[triple.relation, subject]
        if any(key(other) == obj for other in known):
            return
        if not known:
            self.relations_of[subject].append(triple.relation)
        known.append(triple.obj)
        sharing = self._with_object[triple.relation, obj]
        if not sharing:
            self.objects[triple.relation].append(triple.obj)
        sharing.append(triple)
        self.triples[triple.relation].append(triple)

    def _inverse_pairs(self, share: float = 0.1) -> set[tuple[str, str]]:
        """Pairs (r, r2) where r2 often leads from an object of r back to its subject, like capital and capital of."""
        followed: Counter[tuple[str, str]] = Counter()
        returned: Counter[tuple[str, str]] = Counter()
        for relation, triples in self.triples.items():
            for triple in triples:
                obj, subject = key(triple.obj), key(triple.subject)
                for second in self.relations_of.get(obj, ()):
                    followed[relation, second] += 1
                    returned[relation, second] += subject in map(key, self._objects_of[second, obj])
        return {pair for pair, times in returned.items() if times > share * followed[pair]}

    def all_objects(self, relation: str, subject: str) -> list[str]:
        """Every known object of a subject; empty where there is none."""
        return self._objects_of.get((relation, key(subject)), [])

    def the_object(self, relation: str, subject: str) -> str | None:
        """The one object of a subject, or None where there is none or there are several different ones."""
        known = self.all_objects(relation, subject)
        return known[0] if known and all(same(known[0], other) for other in known[1:]) else None

    def sharing(self, relation: str, obj: str) -> list[Triple]:
        """Facts of a relation that have the same object."""
        return self._with_object.get((relation, key(obj)), [])

    def in_turn(self, seed: int, per_relation: int | None) -> Iterator[Triple]:
        """Every fact, one of each relation in turn, both shuffled."""
        relations = sorted(self.triples)
        random.Random(f"{seed}").shuffle(relations)
        columns = []
        for relation in relations:
            facts = self.triples[relation]
            columns.append(random.Random(f"{seed}|{relation}").sample(facts, len(facts))[:per_relation])
        for row in zip_longest(*columns):
            yield from (triple for triple in row if triple is not None)


def key(text: str) -> str:
    """What two spellings of one name have in common: neither case nor a leading article matters."""
    return text.casefold().removeprefix("the ")


def equal(one: str, other: str) -> bool:
    """Whether two names are one but for case, a leading article and punctuation."""
    return _words(one) == _words(other)


def same(one: str, other: str) -> bool:
    """Whether two names may mean the same: the words of one stand within the other (Washington, Washington D.C.)."""
    one, other = _words(one), _words(other)
    return one in other or other in one


def _words(name: str) -> str:
    return f" {' '.join(re.findall(WORD, key(name)))} "
