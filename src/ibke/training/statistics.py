"""What belongs to a frozen layer alone, taken once from running text and from prompts.

Shape suffixes: R rows, T tokens, D width of the residual stream, I neurons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ibke.batch import Batch
from ibke.editors.ibke.statistics import COMMON, Common, KeySpectrum, key_spectrum
from ibke.editors.key_statistics import Moments, ending_in, words_of
from ibke.modules import weight_OI
from ibke.neurons import Site
from ibke.partial import PartialModel

SEEN = 40_000  # words whose keys the constant is fitted to
LOW, LOW_WEIGHT, FITS = 0.9, 10.0, 8  # where the constant is below this a word counts so much more; fitted so often
FIRST_SHARE = 0.05  # of C₀ that stands for first positions, whose keys are like no others


@dataclass(frozen=True)
class LayerStatistics:
    """What a frozen layer's MLP sees and writes.

    Args:
        spectrum: of the generic keys.
        constant_D: c, with c·x = 1 for every key.
        output_scale: mean norm of what it writes.
        seen: some of the keys.
        common: those that an editor keeps.
    """

    spectrum: KeySpectrum
    constant_D: Tensor
    output_scale: Tensor
    seen: Common
    common: Common


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
    keys: list[Tensor] = []
    ids: list[Tensor] = []
    try:
        for batch in batches:
            seen.clear()
            hidden_RTI = part.inputs_of(out, batch)
            keys_RTD = seen[0].reshape(*batch.ids_RT.shape, -1)
            words_RT = words_of(batch)
            word.add(keys_RTD[words_RT])
            first.add(keys_RTD[:, 0])
            if sum(len(some) for some in ids) < SEEN:
                keys.append(keys_RTD[words_RT].cpu())
                ids.append(ending_in(batch)[words_RT].cpu())
            norms.append((hidden_RTI[words_RT] @ weight_DI.T).norm(dim=-1).mean())
    finally:
        handle.remove()

    def mixed(words: Tensor, firsts: Tensor) -> Tensor:
        return (1 - FIRST_SHARE) * words + FIRST_SHARE * firsts

    moment_DD = mixed(word.second, first.second)
    seen_SD, ids_S2 = torch.cat(keys)[:SEEN], torch.cat(ids)[:SEEN]
    constant_D = constant(seen_SD.double(), first.second, first.first)
    spectrum = key_spectrum(moment_DD, len(moment_DD))
    words = Common(seen_SD, ids_S2)
    return LayerStatistics(spectrum, constant_D, torch.stack(norms).mean().cpu(), words, words.spread(COMMON))


def constant(words_SD: Tensor, first_DD: Tensor, first_D: Tensor) -> Tensor:
    """The constant c, with c·x ≈ 1 for every key and seldom much less (D, float32).

    A gate opens where a·x exceeds θ c·x, so where c·x is small it opens at nearly anything: by least squares alone
    one word in a hundred was below a half. So words below ``LOW`` count more, and the fit is made again.

    Args:
        words_SD: keys of words, float64.
        first_DD: second moment of first positions' keys.
        first_D: their mean.
    """
    weight_S = torch.ones(len(words_SD), dtype=torch.float64)
    constant_D = torch.zeros(words_SD.shape[1], dtype=torch.float64)
    for _ in range(FITS):
        share_S = (1 - FIRST_SHARE) * weight_S / weight_S.sum()
        moment_DD = (words_SD * share_S[:, None]).T @ words_SD + FIRST_SHARE * first_DD
        floor_DD = 1e-4 * moment_DD.diagonal().mean() * torch.eye(len(moment_DD), dtype=torch.float64)
        constant_D = torch.linalg.solve(moment_DD + floor_DD, share_S @ words_SD + FIRST_SHARE * first_D)
        weight_S = torch.where(words_SD @ constant_D < LOW, LOW_WEIGHT, 1.0).double()
    return constant_D.float()
