"""Linear layers in float32 by the quicker of PyTorch's two libraries.

PyTorch multiplies float32 matrices with MKL, which keeps its AVX-512 kernels for Intel's processors: on an AMD one with
AVX-512 it runs at half of what oneDNN, which PyTorch brings too, gets out of the same core (EPYC, one thread, 96 rows
of 576 × 1536: 100 against 220 GFLOP/s). So there a model's linear layers go through oneDNN.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 8  # fewer are bound by reading the weight, and MKL is as fast


class OneDNNLinear(nn.Linear):
    """``nn.Linear`` whose float32 products on a CPU, forward and backward, are oneDNN's."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``; other types and devices go its way."""
        if x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu":
            return _product(x, self.weight) if self.bias is None else _product(x, self.weight) + self.bias
        return super().forward(x)


def speed_up(model: nn.Module) -> None:
    """Let a model's linear layers compute by oneDNN where that is the quicker library, in place."""
    if onednn_is_quicker():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear


@cache
def onednn_is_quicker() -> bool:
    """Whether this is a processor with AVX-512 that MKL does not use it on."""
    try:
        maker = Path("/proc/cpuinfo").read_text()
    except OSError:
        maker = platform.processor()
    return (
        "AuthenticAMD" in maker
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _product(x: Tensor, weight_OI: Tensor) -> Tensor:
    """X Wᵀ over the last dimension."""
    if x.numel() < ROWS * x.shape[-1]:
        return F.linear(x, weight_OI)
    if torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad):
        return _Product.apply(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], len(weight_OI))
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, None, "none", [], "")


class _Product(torch.autograd.Function):
    """Y = X Wᵀ with ∂X = ∂Y W and ∂W = ∂Yᵀ X, each a product of the same kind, so that it can be derived twice."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, weight_OI)
        return _product(x_RI.detach(), weight_OI.detach())

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_RI, weight_OI = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        return (
            _product(grad_RO, weight_OI.T) if for_x else None,
            _product(grad_RO.T, x_RI.T) if for_weight else None,
        )
