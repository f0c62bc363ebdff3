"""What the network is started from: spectra of keys and gradients of the frozen base.

Shape suffixes: T tokens, D width of the residual stream, I d_in, E kept eigen-directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibke.editors.aggregate import inverse_times


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

    def inverse(self, gamma: float, ridge: float) -> Callable[[Tensor], Tensor]:
        """What multiplies keys (… × I, float64, on the CPU) by B⁻¹, B = γ (C₀ + λ I).

        In double precision: small eigenvalues make of rounding in a solve what a sharp gate makes larger still.

        Args:
            gamma: γ.
            ridge: λ in units of the mean eigenvalue.
        """
        floor = ridge * self.mean()
        basis_IE = self.basis_IE.cpu().double()
        values_E = gamma * (self.values_E.cpu().double() + floor)
        rest = torch.tensor(gamma * (self.rest + floor), dtype=torch.float64)
        return lambda keys_BTI: inverse_times(keys_BTI, basis_IE, values_E, rest)


COMMON = 6500  # words an editor keeps: 3.8 MB of a shipped one
ANY = -2  # stands for any token before a word
STEPS = 24.0  # of a byte in which one is kept, a standard deviation; what is beyond five of them is cut off


class Common(NamedTuple):
    """Words as they come in running text.

    Args:
        keys_SD: the key at each.
        ids_S2: the token before it and the token itself; negative where there is no word.
    """

    keys_SD: Tensor
    ids_S2: Tensor

    def ends(self, mine_M2: Tensor) -> Tensor:
        """Which words are the end of something (bool, S).

        Args:
            mine_M2: its last two tokens, in each way that it is cut into tokens; ``ANY`` before one that is alone.
        """
        mine_M2 = mine_M2.unique(dim=0)
        same_SM2 = self.ids_S2[:, None] == mine_M2
        same_SM2[..., 0] |= mine_M2[:, 0] == ANY
        return same_SM2.all(-1).any(-1)

    def spread(self, count: int) -> Common:
        """At most so many of them, evenly spread."""
        every = -(-len(self.ids_S2) // count)
        return Common(self.keys_SD[::every], self.ids_S2[::every])


def packed(keys_SD: Tensor, spectrum: KeySpectrum) -> Tensor:
    """Keys as bytes (S × D, int8): their coordinates along the spectrum's directions, each in its own unit.

    An address is long where generic keys are short, so rounding has to be finer there.
    """
    return (keys_SD @ spectrum.basis_IE / _unit(spectrum) * STEPS).round().clamp(-127, 127).to(torch.int8)


def unpacked(bytes_SD: Tensor, spectrum: KeySpectrum) -> Tensor:
    """Keys from :func:`packed` (S × D, float32)."""
    return (bytes_SD.float() / STEPS * _unit(spectrum)) @ spectrum.basis_IE.T


def _unit(spectrum: KeySpectrum) -> Tensor:
    """Standard deviations along a whole spectrum's directions."""
    return (spectrum.values_E + 1e-4 * spectrum.mean()).sqrt()


class Grounded(nn.Module):
    """A module that knows of one frozen layer what belongs to the layer alone.

    Args:
        d_out: width of the residual stream.
    """

    output_scale: Tensor
    key_basis_DE: Tensor
    key_values_E: Tensor
    constant_D: Tensor

    def __init__(self, d_out: int):
        super().__init__()
        self.d_out = d_out
        shapes = {"output_scale": (), "key_basis_DE": (d_out, d_out), "key_values_E": (d_out,), "constant_D": (d_out,)}
        for buffer, shape in shapes.items():
            self.register_buffer(buffer, torch.zeros(shape))

    @torch.no_grad()
    def ground(self, spectrum: KeySpectrum, constant_D: Tensor, output_scale: Tensor) -> None:
        """Set what belongs to the layer.

        Args:
            spectrum: of the generic keys, whole.
            constant_D: c with c·x = 1 for every key.
            output_scale: mean norm of what it writes.
        """
        self.key_basis_DE.copy_(spectrum.basis_IE)
        self.key_values_E.copy_(spectrum.values_E)
        self.constant_D.copy_(constant_D)
        self.output_scale.copy_(output_scale)

    @property
    def spectrum(self) -> KeySpectrum:
        """Of the generic keys at the layer."""
        return KeySpectrum(self.key_basis_DE, self.key_values_E, float(self.key_values_E[-1]))


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
