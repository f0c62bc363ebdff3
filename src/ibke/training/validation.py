"""Scores on held-out episodes as generation would give them, without generating."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ibke.editors.ibke.bottleneck import Bottleneck, Code
from ibke.partial import PartialModel
from ibke.rows import EDIT, INSIDE, OUTSIDE, run_rows
from ibke.training.cache import EpisodeCache
from ibke.training.step import written


@torch.no_grad()
def validate(
    network: Bottleneck,
    part: PartialModel,
    modules: Mapping[str, nn.Module],
    episodes: EpisodeCache,
    *,
    batch: int = 32,
    swap: bool = False,
) -> dict[str, float]:
    """Share of prompts answered exactly as they should be (ratio 0–1), by kind, and the mean rate (nats per edit).

    Args:
        network: the bottleneck, not refined.
        part: the base, split at the first edited layer.
        modules: its edited modules by name.
        episodes: held-out episodes.
        batch: episodes per pass.
        swap: control: give each edit another edit's code. If the answer travels through Z alone, reliability dies.
    """
    right: dict[int, list[float]] = {EDIT: [], INSIDE: [], OUTSIDE: []}
    rates = []
    for begin in range(0, len(episodes), batch):
        some = episodes.batch(range(begin, min(begin + batch, len(episodes)))).to(part.model.device)
        code = network.encode(written(some, part))
        if swap and len(code.mean) == 1:
            continue
        z = swapped_codes(code) if swap else code.mean
        rows = run_rows(part, modules, network.decode(z, code.written), some.groups)
        rates += network.rate(code).tolist()
        for kind, found in right.items():
            found += rows.right_R[rows.kind_R == kind].float().tolist()
    names = {EDIT: "reliability", INSIDE: "generality", OUTSIDE: "locality"}
    return {name: sum(right[kind]) / max(1, len(right[kind])) for kind, name in names.items()} | {
        "rate_nats": sum(rates) / max(1, len(rates))
    }


def swapped_codes(code: Code) -> torch.Tensor:
    """Every edit's tokens with the codes of the edit before it, real ones only (a shorter edit's are repeated)."""
    lengths_B = code.written.mask_BT.sum(1).roll(1, dims=0)
    index_BT = torch.arange(code.mean.shape[1], device=code.mean.device) % lengths_B[:, None]
    return code.mean.roll(1, dims=0).gather(1, index_BT.unsqueeze(-1).expand_as(code.mean))
