"""Scores on held-out episodes as generation would give them, without generating."""

from __future__ import annotations

import torch

from ibke.editors.ibke.bottleneck import Bottleneck, Code
from ibke.neurons import Site
from ibke.partial import PartialModel
from ibke.rows import EDIT, INSIDE, OUTSIDE, run_rows
from ibke.training.cache import EpisodeCache


@torch.no_grad()
def validate(
    network: Bottleneck,
    part: PartialModel,
    site: Site,
    episodes: EpisodeCache,
    *,
    batch: int = 32,
    swap: bool = False,
) -> dict[str, float]:
    """Share of prompts answered exactly as they should be (ratio 0–1), by kind, and the mean rate (nats per edit).

    Args:
        network: the bottleneck, not refined.
        part: the base, split at the first edited layer.
        site: the edited MLP.
        episodes: held-out episodes.
        batch: episodes per pass.
        swap: control: give each edit another edit's code. If the answer travels through Z alone, reliability dies.
    """
    right: dict[int, list[float]] = {EDIT: [], INSIDE: [], OUTSIDE: []}
    rates = []
    for begin in range(0, len(episodes), batch):
        some = episodes.batch(range(begin, min(begin + batch, len(episodes)))).to(part.model.device)
        code = network.encode(some.written)
        if swap and len(code.mean) == 1:
            continue
        z = swapped_codes(code) if swap else code.mean
        rows = run_rows(part, site, network.decode(z, code.written, site), some.groups)
        rates += network.rate(code).tolist()
        for kind, found in right.items():
            found += rows.right_R[rows.kind_R == kind].float().tolist()
    names = {EDIT: "reliability", INSIDE: "generality", OUTSIDE: "locality"}
    return {name: sum(right[kind]) / max(1, len(right[kind])) for kind, name in names.items()} | {
        "rate_nats": sum(rates) / max(1, len(rates))
    }


def swapped_codes(code: Code) -> torch.Tensor:
    """Every edit with the code of the edit before it."""
    return code.mean.roll(1, 0)
