"""The whole map from a capture to an edit's neurons, through the code Z.

Shape suffixes: B edits, T tokens, D width of the residual stream, Z code, C content, X context, E eigen-directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibke.capture import Capture
from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.ibke.keys import KEYS, Keys
from ibke.editors.ibke.network import CLAMP, AnswerPrior, Decoder, DiagonalPrior, Encoder, StandardPrior, rate
from ibke.editors.ibke.relay import Relay
from ibke.editors.ibke.statistics import COMMON, Common, Grounded, direction, whitening
from ibke.errors import FormatError
from ibke.gates import Gate, Told
from ibke.neurons import Neurons, Site


@dataclass
class Written:
    """What an edit is made from, as far as the editor may know it.

    Args:
        keys_BTD: what the MLP sees at the coded tokens, the written one (the subject's last) first.
        grads_BTD: value gradients of the same tokens.
        role_BT: what each token is (``ibke.batch``: ``SUBJECT``, ``LAST``, ``ANSWER``).
        mask_BT: True where a token is real.
        address_BD: where the edit applies (see :mod:`ibke.editors.ibke.address`).
        answer_BD: mean input embedding of each edit's answer, which a CEB prior is conditioned on.
    """

    keys_BTD: Tensor
    grads_BTD: Tensor
    role_BT: Tensor
    mask_BT: Tensor
    address_BD: Tensor
    answer_BD: Tensor


@dataclass
class Code:
    """q(z | e) of a batch of edits: mean and log-variance (B × Z), with what they were made from."""

    mean: Tensor
    log_variance: Tensor
    written: Written

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw z = μ + σ ε."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
        return self.mean + noise * (0.5 * self.log_variance).exp()


class Bottleneck(Grounded):
    """Encoder, prior and decoder for one model's layer, and what sets an edit's neurons.

    Args:
        config: settings.
        name: dotted name of the output projection of the edited MLP.
        d_out: width of the residual stream.
    """

    content_basis_CD: Tensor
    content_scale_C: Tensor
    context_basis_DX: Tensor
    context_scale_X: Tensor
    length_stats: Tensor
    common_SD: Tensor
    common_ids_S2: Tensor

    def __init__(self, config: IBKEConfig, name: str, d_out: int):
        super().__init__(d_out)
        self.config, self.name = config, name
        content, context = config.content_dim, config.context_dim
        if max(content, context) > d_out:
            raise FormatError(
                f"content_dim {content} and context_dim {context} may not exceed the model's width {d_out}.",
                "IBKE config",
                "Lower them.",
            )
        self.encoder = Encoder(config, d_out)
        self.decoder = Decoder(config, d_out)
        self.prior: nn.Module = {
            "standard": lambda: StandardPrior(),
            "diagonal": lambda: DiagonalPrior(config),
            "ceb": lambda: AnswerPrior(config, d_out),
        }[config.prior]()
        self.relay = Relay(config, d_out) if config.relay_layer else None
        for buffer, shape in {
            "content_basis_CD": (content, d_out),
            "content_scale_C": (content,),
            "context_basis_DX": (d_out, context),
            "context_scale_X": (context,),
            "length_stats": (2,),
            "common_SD": (COMMON, d_out),
        }.items():
            self.register_buffer(buffer, torch.zeros(shape))
        self.register_buffer("common_ids_S2", torch.full((COMMON, 2), -1))

    @property
    def common(self) -> Common:
        """Words of running text that an edit must not answer to."""
        return Common(self.common_SD, self.common_ids_S2)

    @property
    def shut_D(self) -> Tensor:
        """θ c, which an address has to exceed for its edit to be in force."""
        return self.config.threshold * self.constant_D

    @torch.no_grad()
    def know(self, common: Common) -> None:
        """Set the words that an edit must not answer to; what is missing of ``COMMON`` stays zero and never answers."""
        size = min(COMMON, len(common.keys_SD))
        keys_SD, ids_S2 = common.keys_SD[:size].clone(), common.ids_S2[:size].clone()  # they may be ours
        self.common_SD.zero_()[:size] = keys_SD
        self.common_ids_S2.fill_(-1)[:size] = ids_S2

    @torch.no_grad()
    def initialise(self, grads_TD: Tensor, address_BD: Tensor) -> None:
        """Set the code's linear maps from gradients and addresses of training edits."""
        unit_TD, log_norm_T = direction(grads_TD)
        self.length_stats.copy_(torch.stack([log_norm_T.mean(), log_norm_T.std()]))
        basis, scale = whitening(unit_TD, self.config.content_dim)
        self.content_basis_CD.copy_(basis.T)
        self.content_scale_C.copy_(scale)
        basis, scale = whitening(address_BD, self.config.context_dim)
        self.context_basis_DX.copy_(basis)
        self.context_scale_X.copy_(scale)

    @property
    def keys(self) -> Keys:
        """Where addresses come from."""
        return KEYS[self.config.keys]

    @property
    def gate(self) -> Gate:
        """When an edit is in force."""
        return Gate(self.config.threshold, self.config.sharpness, self.config.ramp)

    def scalars(self) -> list[nn.Parameter]:
        """The few parameters that set sizes; they want larger steps than weights do."""
        return [self.decoder.log_step, self.encoder.log_gain]

    def start(self, written: Written) -> Tensor:
        """Whitened features of the written token, which the code begins as (B × Z)."""
        unit_BD, log_norm_B = direction(written.grads_BTD[:, 0])
        content = unit_BD @ self.content_basis_CD.T / self.content_scale_C
        context = written.address_BD @ self.context_basis_DX / self.context_scale_X
        return torch.cat([content, context, self._length(log_norm_B)], dim=-1).clamp(-CLAMP, CLAMP)

    def features(self, written: Written) -> Tensor:
        """Gradient, key and gradient length of every coded token, each of unit variance or so (B × T × F)."""
        unit_BTD, log_norm_BT = direction(written.grads_BTD)
        white = (written.keys_BTD @ self.key_basis_DE) / (self.key_values_E + 0.01 * self.key_values_E.mean()).sqrt()
        return torch.cat([unit_BTD * self.d_out**0.5, white, self._length(log_norm_BT)], dim=-1).clamp(-CLAMP, CLAMP)

    def _length(self, log_norm: Tensor) -> Tensor:
        return ((log_norm - self.length_stats[0]) / self.length_stats[1]).unsqueeze(-1)

    def encode(self, written: Written) -> Code:
        """q(z | e): one code an edit."""
        start = self.start(written)
        mean, log_variance = self.encoder(start, self.features(written), written.role_BT, written.mask_BT)
        return Code(mean, log_variance, written)

    def rate(self, code: Code) -> Tensor:
        """R of each edit in nats (B): KL( q(z|e) ‖ r(z) ), arXiv 2512.16227's bound on I(E; Z)."""
        return rate(code.mean, code.log_variance, self.prior(code.mean, code.written.answer_BD))

    def decode(self, z_BZ: Tensor, written: Written, site: Site) -> Neurons:
        """Neurons from codes (B × K × D).

        Args:
            z_BZ: codes.
            written: what they were made from; the address is taken from there, or from the code (``keys``).
            site: the edited MLP.
        """
        basis_CD = self.content_scale_C[:, None] * self.content_basis_CD
        values_BD = self.decoder(z_BZ, basis_CD) * self.output_scale
        return site.neurons(self.keys.address(self, z_BZ, written), self.constant_D, values_BD, self.gate)

    def told(self, address_BD: Tensor, own: Sequence[Tensor]) -> list[Told]:
        """What keeps each edit from answering for others that come to stand beside it (B).

        Args:
            address_BD: their addresses.
            own: for each, keys of its own request (T × D).
        """
        pull = self.spectrum.inverse(self.config.gamma, self.config.ridge)
        found = []
        for address_D, keys_TD in zip(address_BD.float().cpu(), own, strict=True):
            keys_TD = keys_TD.float().cpu()
            owner_T = torch.zeros(len(keys_TD), dtype=torch.long)
            pulled_TD = pull(keys_TD.double()).float()
            found.append(Told(keys_TD, keys_TD[:0], pulled_TD, owner_T, self.gate, address_D[None]))
        return found


def select(
    capture: Capture,
    site: Site,
    where: tuple[Tensor, Tensor, Tensor],
    address_BD: Tensor,
    answer_BD: Tensor,
) -> Written:
    """Gather what the editor may know of a capture.

    Args:
        capture: gradients and keys of every token.
        site: the edited MLP.
        where: positions, roles and mask from :func:`ibke.batch.coded_positions`.
        address_BD: where each edit applies.
        answer_BD: mean input embedding of its answer.
    """
    position_BT, role_BT, mask_BT = where
    keys, grads = (
        torch.gather(values, 1, position_BT.unsqueeze(-1).expand(-1, -1, values.shape[-1])) * mask_BT.unsqueeze(-1)
        for values in (capture.keys[site.gate.name], capture.value_grads[site.out])
    )
    return Written(keys, grads, role_BT, mask_BT, address_BD, answer_BD)


@torch.no_grad()
def answer_embedding(embedding: nn.Module, labels_N: Tensor, owner_N: Tensor, count: int) -> Tensor:
    """Mean input embedding of each edit's answer tokens (count × D, float32)."""
    vectors_ND = embedding(labels_N).float()
    total = torch.zeros(count, vectors_ND.shape[-1], device=vectors_ND.device).index_add(0, owner_N, vectors_ND)
    number = torch.zeros(count, device=vectors_ND.device).index_add(0, owner_N, torch.ones_like(owner_N).float())
    return total / number.clamp_min(1.0).unsqueeze(-1)
