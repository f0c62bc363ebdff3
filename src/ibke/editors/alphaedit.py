"""AlphaEdit: MEMIT's spread, projected to where generic keys hardly reach, with the keys of earlier edits remembered.

Fang, Jiang, Wang, Ma, Shi, Wang, He, Chua: AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models,
2024 (arXiv 2410.02355), eq. 14 with the ridge of the authors' code:

    ΔWᵀ = [P (K Kᵀ + C_hist) + λ I]⁻¹ P K Rᵀ

P = U Uᵀ projects to the eigenvectors of C₀, the second moment of generic keys, whose eigenvalues are below a threshold;
C_hist = Σ k kᵀ over the keys of edits in force; see :mod:`~ibke.editors.locate` for K and R. The solution lies in the
range of P, where the system is symmetric: with G = Uᵀ K,

    A = U (G Gᵀ + Uᵀ C_hist U + λ I)⁻¹ G        (:mod:`~ibke.editors.aggregate`).

Shape suffixes: B requests, I d_in, P directions kept.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ibke.edit import Edit
from ibke.editors.aggregate import regress
from ibke.editors.locate import LocateEditor, LocateSettings
from ibke.editors.settings import refuse_not_positive
from ibke.errors import SettingError
from ibke.models import LanguageModel
from ibke.modules import by_depth


@dataclass(frozen=True)
class AlphaEditSettings(LocateSettings):
    """Settings of AlphaEdit.

    Args:
        layers: whose down-projections are changed, in ascending order; empty is as deep as layers 4 to 8 of
            Llama-3-8B's 32, the published ones.
        threshold: eigenvalue of C₀ below which a direction is free. Published: 0.02.
        ridge: λ. Published: 10.
        clamp: see :class:`~ibke.editors.value_optimisation.ValueSettings`.
    """

    layers: tuple[int, ...] = ()
    threshold: float = 0.02
    ridge: float = 10.0
    clamp: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_not_positive(self, "threshold", "ridge")


class AlphaEditEditor(LocateEditor):
    """Rewrites MLPs' values at the subject's last token, in the null space of generic keys (AlphaEdit).

    What it knows of earlier edits is in ``history``; :meth:`after` gives an editor that knows of one more.

    Args:
        lm: the pristine model.
        settings: of the method.
    """

    name: ClassVar[str] = "alphaedit"
    Settings: ClassVar[type | None] = AlphaEditSettings

    def __init__(self, lm: LanguageModel, settings: AlphaEditSettings | None = None):
        settings = settings or AlphaEditSettings()
        super().__init__(lm, settings, settings.layers or by_depth(lm, (4, 8), of=32))
        self.ridge = settings.ridge
        self.free = {name: null_space(moment_II, settings.threshold, name) for name, moment_II in self.moments.items()}
        self.history: dict[str, Tensor] = {}
        """Uᵀ C_hist U by module (P × P); empty as long as no edit is in force."""

    def addresses(self, name: str, keys_BI: Tensor) -> Tensor:
        """A of the module's docstring, one row a key (B × I, float64)."""
        return regress(keys_BI @ self.free[name], lambda rows: self._pull(name, rows)) @ self.free[name].T

    def _pull(self, name: str, rows_RP: Tensor) -> Tensor:
        """(Uᵀ C_hist U + λ I)⁻¹ of each row."""
        if name not in self.history:
            return rows_RP / self.ridge
        known_PP = self.history[name].clone()
        known_PP.diagonal().add_(self.ridge)
        return torch.cholesky_solve(rows_RP.T, torch.linalg.cholesky(known_PP)).T

    def after(self, edit: Edit) -> AlphaEditEditor:
        """The editor for what follows: the edit's keys, as they are with it in force, are in its ``history``."""
        knows = copy(self)
        inside = {name: keys_BI @ self.free[name] for name, keys_BI in self.keys(edit.requests).items()}
        knows.history = {
            name: self.history.get(name, 0.0) + inside_BP.T @ inside_BP for name, inside_BP in inside.items()
        }
        return knows


def null_space(moment_II: Tensor, threshold: float, name: str) -> Tensor:
    """U: eigenvectors of C₀ whose eigenvalues are below a threshold (I × P, float64).

    Raises:
        SettingError: there is none.
    """
    values_I, vectors_II = torch.linalg.eigh(moment_II)
    free_I = values_I < threshold
    if not free_I.any():
        raise SettingError(
            f"no direction is free: the least eigenvalue of C₀ is {float(values_I[0]):.3g}.",
            name,
            f"Raise `threshold`, which is {threshold:g}.",
        )
    return vectors_II[:, free_I]
