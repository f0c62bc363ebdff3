"""The encoder q_φ1(z | e), the decoder φ2 and what they share.

Start from what is known to work: the code begins as the whitened value gradient at the written token and the whitened
address (linear maps found by principal components), the value begins as that map's inverse, and attention and MLPs
only add corrections that are zero at first. Only z crosses from encoder to decoder, so all the edited model learns of
the answer passes through z.

Shape suffixes: B edits, T tokens, D width of the residual stream, Z code, C content, H width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibke.batch import ROLES
from ibke.editors.ibke.config import HEADS, IBKEConfig

CLAMP = 6.0


class Block(nn.Module):
    """Pre-norm attention over one edit's tokens, then an MLP."""

    def __init__(self, width: int, heads: int = HEADS):
        super().__init__()
        self.norm_a, self.norm_m = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        """Mix tokens within each edit."""
        batch, tokens, width = x_BTH.shape
        q, k, v = self.qkv(self.norm_a(x_BTH)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(width // self.heads)
        scores = scores.masked_fill(~mask_BT[:, None, None, :], -1e9)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        x_BTH = x_BTH + self.out(mixed)
        return x_BTH + self.down(F.silu(self.up(self.norm_m(x_BTH))))


def _zero(linear: nn.Linear, bias: float = 0.0) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, bias)
    return linear


class Encoder(nn.Module):
    """q(z | e): mean and log-variance of an edit's code, read at its written token after all tokens have mixed."""

    def __init__(self, config: IBKEConfig, d_out: int):
        super().__init__()
        width, code = config.width, config.code_dim
        self.begin, self.inp = nn.Linear(code, width), nn.Linear(2 * d_out + 1, width)
        self.role = nn.Embedding(ROLES, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.mean = _zero(nn.Linear(width, code))
        # Start nearly deterministic (σ ≈ e⁻²), as variational bottlenecks on trained networks do best.
        self.log_variance = _zero(nn.Linear(width, code), bias=-4.0)
        # What a dimension of the start is worth: the optimal Gaussian encoder shrinks those that pay for less than
        # they cost, down to nothing.
        self.log_gain = nn.Parameter(torch.zeros(code))

    def forward(
        self, start_BZ: Tensor, features_BTF: Tensor, role_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B × Z).

        Args:
            start_BZ: what the code begins as.
            features_BTF: of every coded token, the written one first.
            role_BT: what each token is.
            mask_BT: True where a token is real.
        """
        h = self.inp(features_BTF) + self.role(role_BT)
        h = torch.cat([h[:, :1] + self.begin(start_BZ).unsqueeze(1), h[:, 1:]], dim=1)
        for block in self.blocks:
            h = block(h, mask_BT)
        h = self.norm(h[:, 0])
        return (0.5 * self.log_gain).exp() * start_BZ + self.mean(h), self.log_variance(h).clamp(-10.0, 4.0)


class Decoder(nn.Module):
    """φ2: a code to the value wanted at the written token, in units of the layer's typical output."""

    def __init__(self, config: IBKEConfig, d_out: int):
        super().__init__()
        width, self.d_out = config.width, d_out
        self.content = config.content_dim
        self.inp = nn.Linear(config.code_dim, width)
        self.hidden = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.code = _zero(nn.Linear(width, config.content_dim))
        self.value = _zero(nn.Linear(width, d_out))
        # Several typical outputs: the write has to outweigh what the subject's token holds already.
        self.log_step = nn.Parameter(torch.tensor(math.log(8.0)))

    def forward(self, z_BZ: Tensor, basis_CD: Tensor) -> Tensor:
        """Values (B × D); ``basis_CD`` maps content codes back to gradient directions."""
        h = F.silu(self.inp(z_BZ))
        h = self.norm(h + F.silu(self.hidden(h)))
        content_BC = z_BZ[:, : self.content] + self.code(h)
        return -self.log_step.exp() * (content_BC @ basis_CD + self.value(h) / math.sqrt(self.d_out))


class StandardPrior(nn.Module):
    """r(z) = N(0, I)."""

    def forward(self, mean_BZ: Tensor, answer_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of r(z), shaped like the code."""
        del answer_BD
        zero = torch.zeros_like(mean_BZ)
        return zero, zero


class DiagonalPrior(nn.Module):
    """r(z) = N(m, diag s²), both learned: the tightest Gaussian with independent dimensions."""

    def __init__(self, config: IBKEConfig):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(config.code_dim))
        self.log_variance = nn.Parameter(torch.zeros(config.code_dim))

    def forward(self, mean_BZ: Tensor, answer_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of r(z), shaped like the code."""
        del answer_BD
        return self.mean.expand_as(mean_BZ), self.log_variance.expand_as(mean_BZ)


class AnswerPrior(nn.Module):
    """CEB (Fischer 2020): b(z | o), a backward encoder of the answer; the rate becomes I(E; Z | O)."""

    def __init__(self, config: IBKEConfig, d_answer: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_answer)
        self.inp = nn.Linear(d_answer, config.width)
        self.mean = _zero(nn.Linear(config.width, config.code_dim))
        self.log_variance = _zero(nn.Linear(config.width, config.code_dim))

    def forward(self, mean_BZ: Tensor, answer_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of b(z | o)."""
        del mean_BZ
        h = F.silu(self.inp(self.norm(answer_BD)))
        return self.mean(h), self.log_variance(h).clamp(-6.0, 4.0)


def rate(mean: Tensor, log_variance: Tensor, prior: tuple[Tensor, Tensor]) -> Tensor:
    """KL( q(z|e) ‖ r(z) ) of each edit in nats, summed over dimensions (B)."""
    prior_mean, prior_log_variance = prior
    difference = (mean - prior_mean).square() + log_variance.exp()
    kl = 0.5 * (prior_log_variance - log_variance + difference / prior_log_variance.exp() - 1.0)
    return kl.sum(-1)
