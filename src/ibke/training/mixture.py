"""Episodes of several sources, mixed by share (:mod:`ibke.data.mixture`)."""

from __future__ import annotations

import random
from collections.abc import Iterable

from ibke.data.mixture import Source, Split, draw
from ibke.training.episodes import Episode, EpisodeMaker


def mixture(
    sources: Iterable[Source], seed: int, count: int, split: Split, *, everywhere: bool = False
) -> list[Episode]:
    """Episodes of all sources by share, in random order; see :class:`EpisodeMaker`."""
    drawn = draw(sources, seed, count, split)
    pool = [probe.prompt for _, items in drawn for request, _ in items for probe in request.locality[-1:]]
    pool = [text for text in pool if not split.excludes(text)]
    episodes: list[Episode] = []
    for source, items in drawn:
        for index, (request, kinds) in enumerate(items):
            maker = EpisodeMaker(seed, pool=pool, kinds=kinds, everywhere=everywhere)
            episodes.append(maker.make(request, source.name, index))
    random.Random(seed).shuffle(episodes)
    return episodes
