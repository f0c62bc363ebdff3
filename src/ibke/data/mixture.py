"""Requests to learn from, of several sources mixed by share, with a hard split by relation.

A source is written ``name``, ``name:PATH`` and optionally ``=SHARE``: ``facts``, ``pararel``, ``lre``,
``entityquestions`` (tables turned into requests by our wordings), ``csv:PATH`` or ``csv:PATH+WORDINGS`` (anybody's own
table, with wordings of its relations as JSON), or a file of requests ``FORMAT:PATH`` in a format of
:mod:`ibke.data.readers`, such as ``counterfact`` or ``jsonl``; a name that is both is the table. Paths are looked for
as they are, then under the folder of data sets.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from ibke.data.facts import generate
from ibke.data.readers import READERS, Skipped, read
from ibke.data.relations import load_wordings
from ibke.data.split import held_out
from ibke.data.triples import Skips, Triple, read_csv, read_entityquestions, read_facts, read_lre, read_pararel
from ibke.errors import TrainingError
from ibke.files import data_folder, find_file
from ibke.request import EditRequest

PACKAGED = ("facts", "pararel", "lre", "entityquestions")  # tables whose files are where the data sets are
UNFILED = PACKAGED[:3]  # of entityquestions a path names the part
TABLES = (*PACKAGED, "csv")


@dataclass(frozen=True)
class Source:
    """One source of the mixture: its name, an optional path, and its share of the episodes."""

    name: str
    path: str
    share: float

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read ``name[:path][=share]``.

        Raises:
            TrainingError: unknown source, a share that is not a positive number, or no file where one is needed.
        """
        match = re.fullmatch(r"([a-z]+)(?::(.+?))?(?:=(\d+\.?\d*|\.\d+))?", text)
        if not match or match[1] not in (*TABLES, *READERS):
            known = ", ".join(dict.fromkeys((*TABLES, *READERS)))
            raise TrainingError(f"unknown data source {text!r}.", "training data", f"Known: {known}.")
        share = float(match[3] or 1)
        if share <= 0:
            raise TrainingError(f"the share of {text!r} is not positive.", "training data", "Leave it out instead.")
        if match[2] and match[1] in UNFILED:
            raise TrainingError(
                f"{match[1]!r} is read from the data folder, not from {match[2]}.",
                "training data",
                f"Write {match[1]}, or csv:FILE for facts of your own.",
            )
        if not match[2] and match[1] not in PACKAGED:
            raise TrainingError(f"{match[1]!r} is of no file.", "training data", f"Write {match[1]}:FILE.")
        return cls(match[1], match[2] or "", share)


def triples(source: Source, share_held_out: float, *, want_held_out: bool = False) -> Iterator[Triple]:
    """Facts of a table, from relations in training or from those held out."""
    skips = Skips()
    readers = {
        "facts": lambda: read_facts(data_folder(), skips),
        "pararel": lambda: read_pararel(data_folder(), skips),
        "lre": lambda: read_lre(data_folder(), skips),
        "entityquestions": lambda: read_entityquestions(data_folder(), source.path or "train", skips),
        "csv": lambda: read_csv(find_file(source.path.split("+")[0]), skips),
    }
    for triple in readers[source.name]():
        if source.name == "csv" or held_out(triple.relation, share_held_out) == want_held_out:
            yield triple


def requests(source: Source, seed: int, count: int, split: Split) -> Iterator[tuple[EditRequest, dict[str, str]]]:
    """Requests of one source with the kind of each wording where the source knows it."""
    rng = random.Random(f"{seed}:{source.name}")
    if source.name in TABLES:
        pool = [item for item in triples(source, split.relations) if not split.excludes(item.subject)]
        # Locality is drawn from the table handed over; a bounded one keeps memory and time bounded too.
        rng.shuffle(pool)
        own = [find_file(path) for path in source.path.split("+")[1:]] if source.name == "csv" else []
        wordings = load_wordings(*own, templates_from=None if source.name == "csv" else data_folder())
        if source.name != "csv":  # prompts out of scope are of other relations, and none of those held out
            wordings = {name: one for name, one in wordings.items() if not held_out(name, split.relations)}
        made = generate(pool[: max(20 * count, 20_000)], wordings, seed=seed, limit=count, skips=Skips())
        for item in made:
            yield item.request, dict(item.kinds)
        return
    skipped: list[Skipped] = []
    everything = list(read(find_file(source.path), source.name, skipped))
    rng.shuffle(everything)
    # Other files are people's own, of no known relation.
    nameless = source.name == "counterfact"
    usable = (request for request in everything if split.allows(request, look_up=nameless))
    for request in islice(usable, count):
        yield request, {}


class Split:
    """What training must not see: subjects and prompts of other files, and a share of the relations.

    Args:
        relations: share of relations held out (ratio 0–1).
        excluded: request files whose subjects and prompts are kept out, as ``format:path``.

    Raises:
        TrainingError: one is of an unknown format, or of no file.
    """

    def __init__(self, relations: float, excluded: Iterable[str] = ()):
        self.relations = relations
        self.words: set[str] = set()
        for text in excluded:
            source = Source.parse(text)
            if not source.path:
                raise TrainingError(f"{text!r} is of no file.", "exclude", f"Write {text}:FILE.")
            skipped: list[Skipped] = []
            for request in read(find_file(source.path), source.name, skipped):
                self.words.add(request.prompt.lower())
                self.words.add((request.subject or request.prompt).lower())
        self._known: dict[tuple[str, str], set[str]] | None = None

    def excludes(self, text: str) -> bool:
        """Whether a subject or prompt belongs to an excluded file."""
        return text.lower() in self.words

    def relations_of(self, request: EditRequest) -> set[str]:
        """The relations of ParaRel that its subject and true answer are a fact of."""
        if self._known is None:
            self._known = {}
            for item in read_pararel(data_folder(), Skips()):
                self._known.setdefault((item.subject.lower(), item.obj.lower()), set()).add(item.relation)
        return self._known.get(((request.subject or "").lower(), (request.target_true or "").lower()), set())

    def allows(self, request: EditRequest, look_up: bool = False) -> bool:
        """Whether a request of a file may be trained on.

        CounterFact names no relation; with ``look_up`` it is found by subject and true answer among the facts those
        requests were made from, and a request of unknown relation is left out, so that no held-out one slips in.
        """
        if self.excludes(request.prompt) or self.excludes(request.subject or request.prompt):
            return False
        if not look_up or not self.relations or request.target_true is None:
            return True
        found = self.relations_of(request)
        return bool(found) and not any(held_out(relation, self.relations) for relation in found)


def draw(
    sources: Iterable[Source], seed: int, count: int, split: Split
) -> list[tuple[Source, list[tuple[EditRequest, dict[str, str]]]]]:
    """Of each source its share of ``count`` requests, with the kinds of their wordings; fewer where it has no more."""
    sources = list(sources)
    whole = sum(source.share for source in sources)
    return [(source, list(requests(source, seed, round(count * source.share / whole), split))) for source in sources]
