"""Every setting of the Information Bottleneck Knowledge Editor, one dataclass."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ibke.errors import FormatError


@dataclass(frozen=True)
class IBKEConfig:
    """Settings of the editor's network and objective.

    Args:
        layers: indices of the layers whose MLP output projection is edited.
        content_dim: code dimensions that start as the whitened direction of the value gradients.
        context_dim: code dimensions that start as whitened key features.
        key_rank: eigen-directions kept of the generic keys' second moment C₀ (the rest is isotropic).
        width: hidden width of encoder and decoder.
        depth: attention blocks over an edit's tokens in the encoder.
        readout: layers from here on start out writing where the answer is read out (its own positions and the last of
            the prompt), those below where the subject is named; only a start, the gate is learned.
        write_last: may the last prompt position, where the answer is first read out, be written to.
        write_answer: may positions of the answer's own tokens be written to.
        keys: ``address`` takes the written tokens' keys as they are, ``code`` decodes them from Z too.
        prior: r(z): ``standard`` N(0, I), ``diagonal`` learned, ``ceb`` conditioned on the answer.
        beta: weight of the rate R (per nat).
        beta_schedule: ``fixed``; ``anneal`` from 0 over the first tenth of training; ``target`` steers
            beta so that the rate meets ``target_rate``.
        target_rate: nats per edit wanted under ``target``.
        lambda_il: weight of independence (IL) against sufficiency (SG).
        noise: sample z in training; off only for ablations.
    """

    layers: tuple[int, ...] = (20, 21, 22, 23, 24)
    content_dim: int = 192
    context_dim: int = 64
    key_rank: int = 256
    width: int = 384
    depth: int = 2
    readout: int = 16
    write_last: bool = False
    write_answer: bool = True
    keys: Literal["address", "code"] = "address"
    prior: Literal["standard", "diagonal", "ceb"] = "standard"
    beta: float = 2e-4
    beta_schedule: Literal["fixed", "anneal", "target"] = "anneal"
    target_rate: float = 200.0
    lambda_il: float = 3.0
    noise: bool = True

    def __post_init__(self) -> None:
        if list(self.layers) != sorted(set(self.layers)) or not self.layers:
            what = f"layers {list(self.layers)} are not in ascending order."
            raise FormatError(what, "IBKE config", "List each once, lowest first.")

    @property
    def code_dim(self) -> int:
        """Dimensions of one token's code: content, context and the log-norm of its gradient."""
        return self.content_dim + self.context_dim + 1

    def to_json(self) -> str:
        """The settings as JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> IBKEConfig:
        """Read settings back; an unknown field is an error, so that a newer file is never half understood.

        Raises:
            FormatError: an unknown field.
        """
        unknown = set(record) - {item.name for item in fields(cls)}
        if unknown:
            raise FormatError(
                f"unknown setting {sorted(unknown)[0]!r}.", "IBKE config", "Update ibke, or check the file."
            )
        return cls(**{**record, "layers": tuple(record.get("layers", cls.layers))})
