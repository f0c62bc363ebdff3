"""What the network is started from: spectra of keys and gradients of the frozen base.

Shape suffixes: L modules, T tokens, I d_in, O d_out, E kept eigen-directions, C content, X context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class KeySpectrum:
    """Leading eigenvectors of one module's second moment of generic keys, C₀.

    Args:
        basis_IE: orthonormal columns.
        values_E: their eigenvalues, largest first.
        rest: mean of the other eigenvalues, which stand for the remainder.
    """

    basis_IE: Tensor
    values_E: Tensor
    rest: float


def key_spectrum(moment_II: Tensor, rank: int) -> KeySpectrum:
    """Split a second moment into its leading ``rank`` directions and an isotropic remainder."""
    values, vectors = torch.linalg.eigh(moment_II.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    rest = float(values[rank:].mean()) if rank < len(values) else float(values[-1])
    return KeySpectrum(vectors[:, :rank].float(), values[:rank].float(), max(rest, 1e-8))


def joint_direction(grads_LTO: Tensor, scale_L: Tensor) -> tuple[Tensor, Tensor]:
    """One unit direction per token over all modules, and the log of its length.

    Gradients of neighbouring modules at one token tell nearly the same, so they are coded together: each module's
    gradient is divided by that module's typical norm and the concatenation is normalised.

    Returns:
        directions (T × L·O) and log-norms (T).
    """
    scaled_TLO = (grads_LTO / scale_L[:, None, None]).transpose(0, 1)
    flat = scaled_TLO.flatten(1)
    norm_T = flat.norm(dim=-1)
    return F.normalize(flat, dim=-1, eps=1e-12), (norm_T + 1e-8).log()


def whitening(samples_TD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading principal directions (D × rank) about zero and the standard deviation along each (rank)."""
    samples = samples_TD.float()
    values, vectors = torch.linalg.eigh(samples.T @ samples / len(samples))
    return vectors[:, -rank:].flip(1).contiguous(), values[-rank:].flip(0).clamp_min(1e-10).sqrt()


def context_features(keys_LTI: Sequence[Tensor], spectra: Sequence[KeySpectrum], leading: int) -> Tensor:
    """Whitened leading coordinates of the keys of all modules, side by side (T × L·leading)."""
    parts = [
        (keys @ spectrum.basis_IE[:, :leading]) / spectrum.values_E[:leading].clamp_min(1e-10).sqrt()
        for keys, spectrum in zip(keys_LTI, spectra, strict=True)
    ]
    return torch.cat(parts, dim=-1)
