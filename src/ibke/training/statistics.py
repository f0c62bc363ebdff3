"""What belongs to a frozen layer alone, taken once from running text and from prompts.

Shape suffixes: R rows, T tokens, D width of the residual stream, I neurons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ibke.batch import Batch
from ibke.editors.ibke.statistics import KeySpectrum, key_spectrum
from ibke.editors.key_statistics import Moments, words_of
from ibke.modules import weight_OI
from ibke.neurons import Site
from ibke.partial import PartialModel

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
    word, first, norms = Moments(), Moments(), []
    try:
        for batch in batches:
            seen.clear()
            hidden_RTI = part.inputs_of(out, batch)
            keys_RTD = seen[0].reshape(*batch.ids_RT.shape, -1)
            words_RT = words_of(batch)
            word.add(keys_RTD[words_RT])
            first.add(keys_RTD[:, 0])
            norms.append((hidden_RTI[words_RT] @ weight_DI.T).norm(dim=-1).mean())
    finally:
        handle.remove()

    def mixed(words: Tensor, firsts: Tensor) -> Tensor:
        return (1 - FIRST_SHARE) * words + FIRST_SHARE * firsts

    moment_DD = mixed(word.second, first.second)
    floor_DD = 1e-4 * moment_DD.diagonal().mean() * torch.eye(len(moment_DD), dtype=torch.float64)
    constant_D = torch.linalg.solve(moment_DD + floor_DD, mixed(word.first, first.first)).float()
    return LayerStatistics(key_spectrum(moment_DD, len(moment_DD)), constant_D, torch.stack(norms).mean().cpu())
