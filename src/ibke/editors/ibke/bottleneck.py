"""The whole map from a capture to low-rank factors, through the code Z.

Shape suffixes: B edits, T tokens, L modules, I d_in, O d_out, Z code, C content, X context, E eigen-directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ibke.capture import Capture
from ibke.editors.ibke.aggregate import inverse_times, solve
from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.ibke.network import CLAMP, AnswerPrior, Decoder, DiagonalPrior, Encoder, StandardPrior, rate
from ibke.editors.ibke.statistics import KeySpectrum, context_features, joint_direction, whitening
from ibke.errors import FormatError

LEADING = 64  # key coordinates per module that context features are made from


@dataclass
class Written:
    """The tokens an edit may write at, taken out of a capture.

    Args:
        keys_LBTI: keys of the written tokens.
        grads_LBTO: value gradients of the same tokens.
        role_BT: what each token is (``ibke.batch``: ``PROMPT``, ``LAST``, ``ANSWER``, ``SUBJECT``).
        mask_BT: True where a token is real.
        contrast_LBSI: keys of the same prompt about other subjects, where nothing may answer.
        contrast_mask_BS: True where such a key is real.
        answer_BD: mean input embedding of each edit's answer, which a CEB prior is conditioned on.
    """

    keys_LBTI: Tensor
    grads_LBTO: Tensor
    role_BT: Tensor
    mask_BT: Tensor
    contrast_LBSI: Tensor
    contrast_mask_BS: Tensor
    answer_BD: Tensor


@dataclass
class Code:
    """q(z | e) of a batch of edits: mean and log-variance (B × T × Z), with the tokens they belong to."""

    mean: Tensor
    log_variance: Tensor
    written: Written

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw z = μ + σ ε."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
        return self.mean + noise * (0.5 * self.log_variance).exp()


class Bottleneck(nn.Module):
    """Encoder, prior, decoder and closed-form aggregation for one model's modules.

    Args:
        config: settings.
        names: dotted names of the L edited modules; all have the same d_in and d_out.
        d_in, d_out: their sizes.
    """

    gradient_scale_L: Tensor
    output_scale_L: Tensor
    content_basis_CD: Tensor
    content_scale_C: Tensor
    context_basis_DX: Tensor
    context_scale_X: Tensor
    length_stats: Tensor
    key_basis_LIE: Tensor
    key_values_LE: Tensor
    key_rest_L: Tensor

    def __init__(self, config: IBKEConfig, names: Sequence[str], d_in: int, d_out: int):
        super().__init__()
        self.config, self.names, self.d_in, self.d_out = config, list(names), d_in, d_out
        if config.key_rank > d_in:
            raise FormatError(
                f"key_rank {config.key_rank} exceeds the modules' input size {d_in}.", "IBKE config", "Lower key_rank."
            )
        count, content, context = len(names), config.content_dim, config.context_dim
        self.leading = min(LEADING, config.key_rank)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, count, d_out)
        self.prior: nn.Module = {
            "standard": lambda: StandardPrior(),
            "diagonal": lambda: DiagonalPrior(config),
            "ceb": lambda: AnswerPrior(config, d_out),
        }[config.prior]()
        # γ sets how much an edit must stand out from generic keys, λ how far C₀ is trusted; both learned per module.
        self.log_gamma = nn.Parameter(torch.full((count,), 5.5))
        self.log_ridge = nn.Parameter(torch.full((count,), -2.0))
        self.log_contrast = nn.Parameter(torch.full((count,), 1.0))
        for name, shape in {
            "gradient_scale_L": (count,),
            "output_scale_L": (count,),
            "content_basis_CD": (content, count * d_out),
            "content_scale_C": (content,),
            "context_basis_DX": (count * self.leading, context),
            "context_scale_X": (context,),
            "length_stats": (2,),
            "key_basis_LIE": (count, d_in, config.key_rank),
            "key_values_LE": (count, config.key_rank),
            "key_rest_L": (count,),
        }.items():
            self.register_buffer(name, torch.zeros(shape))

    @torch.no_grad()
    def initialise(
        self, keys_LTI: Sequence[Tensor], grads_LTO: Tensor, spectra: Sequence[KeySpectrum], output_scale_L: Tensor
    ) -> None:
        """Set every linear map from the keys and gradients of training edits and the spectra of generic keys."""
        self.output_scale_L.copy_(output_scale_L)
        self.gradient_scale_L.copy_(grads_LTO.norm(dim=-1).mean(1))
        for index, spectrum in enumerate(spectra):
            self.key_basis_LIE[index], self.key_values_LE[index] = spectrum.basis_IE, spectrum.values_E
            self.key_rest_L[index] = spectrum.rest
        direction, log_norm = joint_direction(grads_LTO, self.gradient_scale_L)
        self.length_stats.copy_(torch.stack([log_norm.mean(), log_norm.std()]))
        basis, scale = whitening(direction, self.config.content_dim)
        self.content_basis_CD.copy_(basis.T)
        self.content_scale_C.copy_(scale)
        basis, scale = whitening(
            context_features(keys_LTI, spectra, self.leading).clamp(-CLAMP, CLAMP), self.config.context_dim
        )
        self.context_basis_DX.copy_(basis)
        self.context_scale_X.copy_(scale)

    def scalars(self) -> list[nn.Parameter]:
        """The few parameters that set sizes (logarithms and gate biases); they want larger steps than weights do."""
        return [self.log_gamma, self.log_ridge, self.log_contrast, self.decoder.log_step, self.decoder.role_gate]

    def start(self, written: Written) -> Tensor:
        """The whitened features z₀ that the code's mean begins as (B × T × Z)."""
        count, batch, tokens, _ = written.grads_LBTO.shape
        direction, log_norm = joint_direction(written.grads_LBTO.flatten(1, 2), self.gradient_scale_L)
        content = direction @ self.content_basis_CD.T / self.content_scale_C
        coordinates = torch.einsum("lbti,lie->btle", written.keys_LBTI, self.key_basis_LIE[:, :, : self.leading])
        coordinates = coordinates / self.key_values_LE[:, : self.leading].clamp_min(1e-10).sqrt()
        context = coordinates.flatten(2).clamp(-CLAMP, CLAMP) @ self.context_basis_DX / self.context_scale_X
        length = (log_norm - self.length_stats[0]) / self.length_stats[1]
        z0 = torch.cat([content.unflatten(0, (batch, tokens)), context, length.view(batch, tokens, 1)], dim=-1)
        return z0.clamp(-CLAMP, CLAMP)

    def encode(self, written: Written) -> Code:
        """q(z | e) for every written token."""
        mean, log_variance = self.encoder(self.start(written), written.role_BT, written.mask_BT)
        return Code(mean, log_variance, written)

    def rate(self, code: Code) -> Tensor:
        """R of each edit in nats (B): KL( q(z|e) ‖ r(z) ), arXiv 2512.16227's bound on I(E; Z)."""
        prior = self.prior(code.mean, code.written.answer_BD)
        return rate(code.mean, code.log_variance, prior, code.written.mask_BT)

    def decode(self, z_BTZ: Tensor, written: Written, *, joint: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """Low-rank factors from codes: A (B × T × I) and B (B × T × O) by module name.

        Args:
            z_BTZ: codes of the written tokens.
            written: those tokens; their keys are the address.
            joint: solve all edits together, as one update of rank up to B·T (then the leading size is 1).
        """
        basis_CD = self.content_scale_C[:, None] * self.content_basis_CD * len(self.names) ** 0.5
        values_BTLO = self.decoder(z_BTZ, written.role_BT, written.mask_BT, basis_CD)
        keys_LBTI = written.keys_LBTI if self.config.keys == "address" else self.decode_keys(z_BTZ)
        factors = {}
        for index, name in enumerate(self.names):
            keys, mask = keys_LBTI[index], written.mask_BT
            values = values_BTLO[:, :, index] * self.output_scale_L[index] * mask.unsqueeze(-1)
            contrast, real = written.contrast_LBSI[index], written.contrast_mask_BS
            root = real * (0.5 * self.log_contrast[index]).exp()
            if joint:
                keys, values, mask = keys[mask][None], values[mask][None], mask[mask][None]
                contrast, root = contrast[real][None], root[real][None]
            pull = partial(inverse_times, basis_IE=self.key_basis_LIE[index], **self._ridge(index))
            factors[name] = (solve(keys, mask, contrast, root, pull), values)
        return factors

    def _ridge(self, index: int) -> dict[str, Tensor]:
        """Eigenvalues of B = γ (C₀ + λ I) for one module: the leading ones and the remainder's."""
        leading_E, rest = self.key_values_LE[index], self.key_rest_L[index]
        typical = (leading_E.sum() + rest * (self.d_in - len(leading_E))) / self.d_in
        gamma, ridge = self.log_gamma[index].exp(), self.log_ridge[index].exp() * typical
        return {"spectrum_E": gamma * (leading_E + ridge), "rest": gamma * (rest + ridge)}

    def decode_keys(self, z_BTZ: Tensor) -> Tensor:
        """Keys from the context part of the code by the inverse of its linear map (L × B × T × I), strict variant."""
        context = z_BTZ[..., self.config.content_dim : self.config.content_dim + self.config.context_dim]
        flat = (context * self.context_scale_X) @ self.context_basis_DX.T
        spread_LE = self.key_values_LE[:, : self.leading].sqrt()
        coordinates = flat.unflatten(-1, (len(self.names), self.leading)) * spread_LE
        return torch.einsum("btle,lie->lbti", coordinates, self.key_basis_LIE[:, :, : self.leading])


def select(
    capture: Capture,
    names: Sequence[str],
    where: tuple[Tensor, Tensor, Tensor],
    contrast: tuple[Tensor, Tensor],
    answer_BD: Tensor,
) -> Written:
    """Gather the written tokens of a capture into one padded block.

    Args:
        capture: keys and gradients of every token.
        names: the modules, in order.
        where: positions, roles and mask from :func:`ibke.batch.written_positions`.
        contrast: contrast keys (L × B × S × I) and which of them are real (B × S).
        answer_BD: mean input embedding of each answer (see :func:`answer_embedding`).
    """
    position_BT, role_BT, mask_BT = where

    def take(values: Tensor) -> Tensor:
        return torch.gather(values, 1, position_BT.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    keys = torch.stack([take(capture.keys[name]) for name in names])
    grads = torch.stack([take(capture.value_grads[name]) for name in names])
    return Written(keys, grads, role_BT, mask_BT, *contrast, answer_BD)


@torch.no_grad()
def answer_embedding(embedding: nn.Module, labels_N: Tensor, owner_N: Tensor, count: int) -> Tensor:
    """Mean input embedding of each edit's answer tokens (count × D, float32)."""
    vectors_ND = embedding(labels_N).float()
    total = torch.zeros(count, vectors_ND.shape[-1], device=vectors_ND.device).index_add(0, owner_N, vectors_ND)
    number = torch.zeros(count, device=vectors_ND.device).index_add(0, owner_N, torch.ones_like(owner_N).float())
    return total / number.clamp_min(1.0).unsqueeze(-1)
