"""What the network is started from: spectra of keys and gradients of the frozen base.

Shape suffixes: T tokens, D width of the residual stream, I d_in, E kept eigen-directions.
"""

from __future__ import annotations

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

    def mean(self) -> float:
        """The mean eigenvalue, kept and remainder together."""
        size, kept = self.basis_IE.shape
        return (float(self.values_E.sum()) + self.rest * (size - kept)) / size


def key_spectrum(moment_II: Tensor, rank: int) -> KeySpectrum:
    """Split a second moment into its leading ``rank`` directions and an isotropic remainder."""
    values, vectors = torch.linalg.eigh(moment_II.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    rest = float(values[rank:].mean()) if rank < len(values) else float(values[-1])
    return KeySpectrum(vectors[:, :rank].float(), values[:rank].float(), max(rest, 1e-8))


def direction(grads_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Unit direction of each gradient (T × D) and the log of its length (T)."""
    norm_T = grads_TD.norm(dim=-1)
    return F.normalize(grads_TD, dim=-1, eps=1e-12), (norm_T + 1e-8).log()


def whitening(samples_TD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading principal directions (D × rank) about zero and the standard deviation along each (rank)."""
    samples = samples_TD.float()
    values, vectors = torch.linalg.eigh(samples.T @ samples / len(samples))
    return vectors[:, -rank:].flip(1).contiguous(), values[-rank:].flip(0).clamp_min(1e-10).sqrt()
