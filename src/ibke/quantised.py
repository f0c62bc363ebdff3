"""Matrices as bytes, which is how weights that ship are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

SCALE = ".scale"  # what follows the name of a tensor kept as bytes


def quantise(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Some tensors as bytes (int8), each row (last dimension) in its own unit; a half unit is the most that is lost.

    Args:
        tensors: by name; those that are not named stay as they are.
        names: of those that become bytes.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in names:
            scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
            found |= {name: (tensor / scale).round().to(torch.int8), name + SCALE: scale}
        else:
            found[name] = tensor
    return found


def restore(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`quantise` was given, within half a unit (float32).

    Raises:
        RuntimeError: a scale does not fit its tensor.
    """
    return {
        name: tensor.float() * tensors[name + SCALE].float() if name + SCALE in tensors else tensor.float()
        for name, tensor in tensors.items()
        if not name.endswith(SCALE)
    }
