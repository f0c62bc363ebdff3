"""The encoder q_φ1(z | e), the decoder φ2 and what they share.

Start from what is known to work: the code begins as the whitened value gradient and key features (a linear map found by
principal components), the values begin as that map's inverse, and attention and MLPs only add corrections that are zero
at first. Only z crosses from encoder to decoder, so all the edited model learns of the answer passes through z.

Shape suffixes: B edits, T tokens, L modules, I d_in, O d_out, Z code, C content, X context, H width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibke.batch import ANSWER, LAST, ROLES, SUBJECT
from ibke.editors.ibke.config import IBKEConfig

CLAMP = 6.0


class Block(nn.Module):
    """Pre-norm attention over one edit's tokens, then an MLP."""

    def __init__(self, width: int, heads: int = 4):
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
    """q(z | e): mean and log-variance of each written token's code."""

    def __init__(self, config: IBKEConfig):
        super().__init__()
        width, code = config.width, config.code_dim
        self.inp = nn.Linear(code, width)
        self.role = nn.Embedding(ROLES, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.mean = _zero(nn.Linear(width, code))
        # Start nearly deterministic (σ ≈ e⁻²), as variational bottlenecks on trained networks do best.
        self.log_variance = _zero(nn.Linear(width, code), bias=-4.0)

    def forward(self, start_BTZ: Tensor, role_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B × T × Z) from the whitened features z₀."""
        h = self.inp(start_BTZ) + self.role(role_BT)
        for block in self.blocks:
            h = block(h, mask_BT)
        h = self.norm(h)
        return start_BTZ + self.mean(h), self.log_variance(h).clamp(-10.0, 4.0)


class Decoder(nn.Module):
    """φ2: a token's code to the value wanted at each module, in units of that module's typical output."""

    def __init__(self, config: IBKEConfig, modules: int, d_out: int):
        super().__init__()
        width, self.modules_, self.d_out = config.width, modules, d_out
        self.content = config.content_dim
        self.inp = nn.Linear(config.code_dim, width)
        self.role = nn.Embedding(ROLES, width)
        self.block = Block(width)
        self.norm = nn.LayerNorm(width)
        self.code = _zero(nn.Linear(width, config.content_dim))
        self.value = _zero(nn.Linear(width, modules * d_out))
        self.gate = _zero(nn.Linear(width, modules))
        self.role_gate = nn.Parameter(_open_gates(config))
        # Half a typical output: enough to steer by, little enough that the first steps do not wreck everything else.
        self.log_step = nn.Parameter(torch.full((modules,), math.log(0.5)))

    def forward(self, z_BTZ: Tensor, role_BT: Tensor, mask_BT: Tensor, basis_CD: Tensor) -> Tensor:
        """Values (B × T × L × O); ``basis_CD`` maps content codes back to joint gradient directions."""
        h = self.norm(self.block(self.inp(z_BTZ) + self.role(role_BT), mask_BT))
        content_BTC = z_BTZ[..., : self.content] + self.code(h)
        flat = content_BTC @ basis_CD + self.value(h) / math.sqrt(self.d_out)
        values = flat.unflatten(-1, (self.modules_, self.d_out))
        step = 2.0 * torch.sigmoid(self.gate(h) + self.role_gate[role_BT]) * self.log_step.exp()
        return -step.unsqueeze(-1) * values


def _open_gates(config: IBKEConfig) -> Tensor:
    """Where writing starts out allowed, by role and module: gate biases, 0 for half open and −3 for nearly shut.

    A subject stands out most in early layers, an answer is read out in late ones, and the other words of a prompt
    belong to everybody. A configuration with layers on one side only writes everything there.
    """
    late = torch.tensor([layer >= config.readout for layer in config.layers])
    early = ~late if not late.all() else late
    late = late if late.any() else ~late
    gates = torch.full((ROLES, len(config.layers)), -3.0)
    gates[SUBJECT, early] = 0.0
    gates[ANSWER, late] = 0.0
    gates[LAST, late] = 0.0
    return gates


class StandardPrior(nn.Module):
    """r(z) = N(0, I)."""

    def forward(self, mean_BTZ: Tensor, answer_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of r(z), shaped like the code."""
        del answer_BD
        zero = torch.zeros_like(mean_BTZ)
        return zero, zero


class DiagonalPrior(nn.Module):
    """r(z) = N(m, diag s²), both learned: the tightest Gaussian with independent dimensions."""

    def __init__(self, config: IBKEConfig):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(config.code_dim))
        self.log_variance = nn.Parameter(torch.zeros(config.code_dim))

    def forward(self, mean_BTZ: Tensor, answer_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of r(z), shaped like the code."""
        del answer_BD
        return self.mean.expand_as(mean_BTZ), self.log_variance.expand_as(mean_BTZ)


class AnswerPrior(nn.Module):
    """CEB (Fischer 2020): b(z | o), a backward encoder of the answer; the rate becomes I(E; Z | O)."""

    def __init__(self, config: IBKEConfig, d_answer: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_answer)
        self.inp = nn.Linear(d_answer, config.width)
        self.mean = _zero(nn.Linear(config.width, config.code_dim))
        self.log_variance = _zero(nn.Linear(config.width, config.code_dim))

    def forward(self, mean_BTZ: Tensor, answer_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of b(z | o), the same for every token of an edit."""
        h = F.silu(self.inp(self.norm(answer_BD))).unsqueeze(1)
        mean, log_variance = self.mean(h), self.log_variance(h).clamp(-6.0, 4.0)
        return mean.expand_as(mean_BTZ), log_variance.expand_as(mean_BTZ)


def rate(mean: Tensor, log_variance: Tensor, prior: tuple[Tensor, Tensor], mask_BT: Tensor) -> Tensor:
    """KL( q(z|e) ‖ r(z) ) of each edit in nats, summed over tokens and dimensions (B)."""
    prior_mean, prior_log_variance = prior
    difference = (mean - prior_mean).square() + log_variance.exp()
    kl = 0.5 * (prior_log_variance - log_variance + difference / prior_log_variance.exp() - 1.0)
    return (kl.sum(-1) * mask_BT).sum(-1)
