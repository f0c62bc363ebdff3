"""From keys and values to one low-rank update, in closed form.

    ΔWᵀ = A⁻¹ Kᵀ V,   A = KᵀK + B,   B = γ (C₀ + λ I)

With m written tokens, far fewer than d_in, the push-through identity gives ΔWᵀ = B⁻¹Kᵀ (I + K B⁻¹ Kᵀ)⁻¹ V: rank m, and
only an m × m system to solve (ridge regression as in MALMEN, Tan et al. 2023, eq. 5, with MEMIT's generic keys C₀).
C₀ is kept as its leading eigenvectors plus an isotropic remainder, so B⁻¹ costs two thin products.

Shape suffixes: B edits, T written tokens, I d_in, O d_out, E kept eigen-directions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_times(keys_BTI: Tensor, basis_IE: Tensor, spectrum_E: Tensor, rest: Tensor) -> Tensor:
    """B⁻¹ k for every key, B = Q diag(spectrum) Qᵀ + rest (I − QQᵀ); returns B × T × I."""
    inside_BTE = keys_BTI @ basis_IE
    correction_E = 1.0 / spectrum_E - 1.0 / rest
    return keys_BTI / rest + (inside_BTE * correction_E) @ basis_IE.T


def solve(keys_BTI: Tensor, values_BTO: Tensor, mask_BT: Tensor, pulled_BTI: Tensor) -> tuple[Tensor, Tensor]:
    """Low-rank factors of the ridge solution, one independent solve per edit.

    Args:
        keys_BTI: K; rows outside the mask are ignored.
        values_BTO: V, the wanted change of the module's output at each key.
        mask_BT: True where a token is written.
        pulled_BTI: B⁻¹K (see :func:`inverse_times`).

    Returns:
        A (B × T × I) and B (B × T × O) with ΔWᵀ = Aᵀ B for each edit.
    """
    weight_BT1 = mask_BT.unsqueeze(-1).to(keys_BTI.dtype)
    keys_BTI, pulled_BTI = keys_BTI * weight_BT1, pulled_BTI * weight_BT1
    gram_BTT = keys_BTI @ pulled_BTI.transpose(1, 2)
    eye_TT = torch.eye(gram_BTT.shape[-1], dtype=gram_BTT.dtype, device=gram_BTT.device)
    return pulled_BTI, torch.linalg.solve(gram_BTT + eye_TT, values_BTO * weight_BT1)
