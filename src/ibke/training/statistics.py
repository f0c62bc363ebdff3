"""What belongs to a frozen layer alone, taken once from running text and from prompts.

Shape suffixes: R rows, T tokens, D width of the residual stream, I neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ibke.batch import Batch, Pair, collate
from ibke.editors.ibke.statistics import KeySpectrum, key_spectrum
from ibke.modules import weight_OI
from ibke.neurons import Site
from ibke.partial import PartialModel

CHUNK = 64  # tokens of running text seen at a time
FIRST_SHARE = 0.05  # of C₀ that stands for first positions, whose keys are like no others


@dataclass(frozen=True)
class LayerStatistics:
    """The generic keys' spectrum, the constant, and the mean norm of what the MLP writes."""

    spectrum: KeySpectrum
    constant_D: Tensor
    output_scale: Tensor


@torch.no_grad()
def layer_statistics(part: PartialModel, site: Site, batches: Iterable[Batch]) -> LayerStatistics:
    """Gather what the layer's MLP sees and does over some batches.

    First positions hold an activation that belongs to no word. They count by a fixed share, so that no address
    answers there and the constant holds there too.
    """
    seen: list[Tensor] = []
    handle = site.entrance.register_forward_pre_hook(lambda _, args: seen.append(args[0].float()))
    out = site.modules[site.out]
    weight_DI = weight_OI(out).detach().float()
    totals: dict[str, Tensor] = {}
    count = {"word": 0, "first": 0}
    norms = []
    try:
        for batch in batches:
            seen.clear()
            hidden_RTI = part.inputs_of(out, batch)
            keys_RTD = seen[0].reshape(*batch.ids_RT.shape, -1)
            words_RT = batch.attention_RT.bool().clone()
            words_RT[:, 0] = False
            for name, keys_ND in (("word", keys_RTD[words_RT]), ("first", keys_RTD[:, 0])):
                totals[f"{name} moment"] = totals.get(f"{name} moment", 0.0) + keys_ND.T @ keys_ND
                totals[f"{name} sum"] = totals.get(f"{name} sum", 0.0) + keys_ND.sum(0)
                count[name] += len(keys_ND)
            norms.append((hidden_RTI[words_RT] @ weight_DI.T).norm(dim=-1).mean())
    finally:
        handle.remove()

    def mixed(kind: str) -> Tensor:
        word, first = (totals[f"{name} {kind}"].cpu().double() / count[name] for name in ("word", "first"))
        return (1 - FIRST_SHARE) * word + FIRST_SHARE * first

    moment_DD = mixed("moment")
    floor_DD = 1e-4 * moment_DD.diagonal().mean() * torch.eye(len(moment_DD), dtype=torch.float64)
    constant_D = torch.linalg.solve(moment_DD + floor_DD, mixed("sum")).float()
    return LayerStatistics(key_spectrum(moment_DD, len(moment_DD)), constant_D, torch.stack(norms).mean().cpu())


def text_batches(tokenizer: Any, texts: Iterable[str], tokens: int, device: torch.device) -> Iterator[Batch]:
    """Running text in rows of ``CHUNK`` tokens, ``tokens`` of it at most."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) >= tokens:
            break
    rows = [ids[begin : begin + CHUNK] for begin in range(0, min(len(ids), tokens) - CHUNK + 1, CHUNK)]
    yield from pair_batches([Pair(row, row[:1], (0, CHUNK)) for row in rows], tokenizer, device)


def pair_batches(pairs: Sequence[Pair], tokenizer: Any, device: torch.device) -> Iterator[Batch]:
    """Prompts of like length together."""
    ordered = iter(sorted(pairs, key=len))
    while some := list(islice(ordered, 32)):
        yield collate(some, tokenizer.pad_token_id, device)
