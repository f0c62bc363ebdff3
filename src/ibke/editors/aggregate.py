"""The closed form behind an address, of whichever method: ridge regression on keys.

    A⁻¹ KᵀW,   A = KᵀWK + ρ NᵀN + B,   B = γ (C₀ + λ I)

With far fewer keys than dimensions the push-through identity gives A⁻¹Kᵀ = B⁻¹Uᵀ (I + U B⁻¹ Uᵀ)⁻¹ [I; 0] for the stack
U = [K; √ρ N]: only a system of the size of U to solve (as in MALMEN, Tan et al. 2023, eq. 5, with MEMIT's generic keys
C₀, which are given as eigenvectors, leading ones and an isotropic remainder, so B⁻¹ costs two products).

Shape suffixes: B edits, T keys that shall answer, S that shall not, U = T + S, I d_in, E eigen-directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def inverse_times(keys_BTI: Tensor, basis_IE: Tensor, spectrum_E: Tensor, rest: Tensor) -> Tensor:
    """B⁻¹ k for every key, B = Q diag(spectrum) Qᵀ + rest (I − QQᵀ); returns B × T × I."""
    inside_BTE = keys_BTI @ basis_IE
    correction_E = 1.0 / spectrum_E - 1.0 / rest
    return keys_BTI / rest + (inside_BTE * correction_E) @ basis_IE.T


def solve(
    keys_BTI: Tensor, root_BT: Tensor, contrast_BSI: Tensor, root_BS: Tensor, pull: Callable[[Tensor], Tensor]
) -> Tensor:
    """A⁻¹ KᵀW as one row a key (B × T × I), so that values V in their places give AᵀV; one independent solve per edit.

    Contrast keys N are places that must not answer; they enter as further rows with value zero, without raising the
    rank: A = KᵀWK + ρ NᵀN + B.

    Args:
        keys_BTI: K.
        root_BT: √W, the root of each key's weight, 0 where there is none.
        contrast_BSI: N.
        root_BS: √ρ of each contrast key, 0 where there is none.
        pull: multiplies keys by B⁻¹ (see :func:`inverse_times`).
    """
    root_BT = root_BT.to(keys_BTI.dtype)
    rows_BUI = torch.cat([keys_BTI, contrast_BSI], dim=1) * torch.cat([root_BT, root_BS], dim=1).unsqueeze(-1)
    pulled_BUI = pull(rows_BUI)
    gram_BUU = rows_BUI @ pulled_BUI.transpose(1, 2)
    eye_UU = torch.eye(gram_BUU.shape[-1], dtype=gram_BUU.dtype, device=gram_BUU.device)
    # (I + K B⁻¹ Kᵀ)⁻¹ is symmetric, so its first T columns transposed weight the rows of each address.
    pick_UT = eye_UU[:, : keys_BTI.shape[1]].expand(len(keys_BTI), -1, -1) * root_BT.unsqueeze(1)
    return torch.linalg.solve(gram_BUU + eye_UU, pick_UT).transpose(1, 2) @ pulled_BUI


def regress(keys_TI: Tensor, pull: Callable[[Tensor], Tensor]) -> Tensor:
    """(KᵀK + B)⁻¹ Kᵀ as one row a key (T × I): :func:`solve` for one edit, all keys alike, without contrast.

    Args:
        keys_TI: K.
        pull: multiplies rows (T × I) by B⁻¹.
    """
    ones_BT, none_BSI = keys_TI.new_ones(1, len(keys_TI)), keys_TI.new_zeros(1, 0, keys_TI.shape[1])
    return solve(keys_TI[None], ones_BT, none_BSI, keys_TI.new_zeros(1, 0), lambda rows: pull(rows[0])[None])[0]
