"""Running mean and spread of keys and gradients, by shape of module, and how edits carry them from turn to turn.

Shape suffixes: N rows, F features, I d_in, O d_out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibke.edit import Edit
from ibke.errors import FormatError
from ibke.modules import in_out

EPSILON = torch.finfo(torch.float32).eps
PARTS = ("count", "mean_F", "square_F")  # of statistics, as an edit carries them


@dataclass(frozen=True)
class RowStatistics:
    """Mean and spread of some rows, in double precision, on the CPU.

    Args:
        count: how many.
        mean_F: their mean.
        square_F: sum of squared differences from it.
    """

    count: Tensor
    mean_F: Tensor
    square_F: Tensor

    @classmethod
    def of(cls, rows_NF: Tensor) -> RowStatistics:
        """Of rows as they are."""
        rows_NF = rows_NF.double().cpu()
        mean_F = rows_NF.mean(0)
        return cls(torch.tensor(float(len(rows_NF)), dtype=torch.float64), mean_F, (rows_NF - mean_F).square().sum(0))

    def join(self, other: RowStatistics) -> RowStatistics:
        """Of both sets of rows (pairwise update of Chan, Golub and LeVeque)."""
        count, shift_F = self.count + other.count, other.mean_F - self.mean_F
        between_F = shift_F.square() * self.count * other.count / count
        return RowStatistics(
            count, self.mean_F + shift_F * other.count / count, self.square_F + other.square_F + between_F
        )

    def normalise(self, rows_NF: Tensor) -> Tensor:
        """Rows less the mean, over the deviation (N × F, double precision); 0 where nothing has varied yet."""
        deviation_F = (self.square_F / (self.count - 1 + EPSILON)).sqrt()
        return (rows_NF.double().cpu() - self.mean_F) / (deviation_F + EPSILON)


History = Mapping[str, RowStatistics]
"""By shape of module, what is known of keys and gradients side by side."""


def joined(one: History, other: History) -> History:
    """Both, shape by shape."""
    return {**one, **{shape: one[shape].join(some) if shape in one else some for shape, some in other.items()}}


def to_latent(history: History) -> dict[str, Tensor]:
    """As an edit carries it in ``info.latent``."""
    return {f"{shape}/{part}": getattr(some, part) for shape, some in history.items() for part in PARTS}


def from_latent(edit: Edit, method: str) -> History:
    """What an edit carries.

    Raises:
        FormatError: it carries none, since another method made it, or it is a composition of several.
    """
    latent = edit.info.latent
    shapes = {name.partition("/")[0] for name in latent}
    if not shapes or {f"{shape}/{part}" for shape in shapes for part in PARTS} != set(latent):
        raise FormatError(
            f"the edit does not carry the statistics of keys and gradients that {method} goes on from.",
            f"an edit by {edit.info.method}",
            f"Tell an editor of {method} of its own edits alone, one by one before they are composed.",
        )
    return {shape: RowStatistics(*(latent[f"{shape}/{part}"] for part in PARTS)) for shape in sorted(shapes)}


def shape_of(module: nn.Module) -> str:
    """Name of a linear module's shape, d_in × d_out."""
    return "{}x{}".format(*in_out(module))
