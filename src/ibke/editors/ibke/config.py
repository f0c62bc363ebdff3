"""Every setting of the Information Bottleneck Knowledge Editor, one dataclass."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ibke.editors.settings import refuse_below, refuse_not_finite, refuse_not_positive
from ibke.errors import FormatError

HEADS = 4  # of attention over an edit's tokens


@dataclass(frozen=True)
class IBKEConfig:
    """Settings of the editor's network and objective.

    Args:
        layer: the layer whose MLP is edited.
        content_dim: code dimensions that start as the whitened direction of the value gradients.
        context_dim: code dimensions that start as whitened coordinates of the address.
        width: hidden width of encoder and decoder.
        depth: attention blocks over an edit's tokens in the encoder.
        keys: ``address`` takes the edit's address as it is, ``code`` decodes it from Z too.
        threshold: response of the address, 1 at the subject, from which on an edit is in force (ratio 0–1).
        sharpness: pre-activation per unit of response; with ``ramp`` it sets how wide the threshold is.
        ramp: pre-activation over which an edit goes from out of force to fully in force.
        gamma: against how many generic keys an edit's own stand in the closed form.
        ridge: λ in units of C₀'s mean eigenvalue.
        alike: cosine from which on a built-in question about the subject counts as asking what the request asks, and
            does not silence it (ratio 0–1).
        relay_layer: the later layer that repeats the edit where it is read (see ``relay.py``); 0 is none.
        relay_threshold: response from which on the relay writes (ratio 0–1).
        relay_gamma: against how many generic keys a relay's own stand in its closed form.
        prior: r(z): ``standard`` N(0, I), ``diagonal`` learned, ``ceb`` conditioned on the answer.
        beta: weight of the rate R (per nat).
        beta_schedule: ``fixed``; ``anneal`` from 0 over the first tenth of training; ``target`` steers
            beta so that the rate meets ``target_rate``.
        target_rate: nats per edit wanted under ``target``.
        lambda_il: weight of independence (IL) against sufficiency (SG).
        noise: sample z in training; off only for ablations.
    """

    layer: int = 16
    content_dim: int = 256
    context_dim: int = 64
    width: int = 384
    depth: int = 2
    keys: Literal["address", "code"] = "address"
    threshold: float = 0.65
    sharpness: float = 200.0
    ramp: float = 6.0
    gamma: float = 300.0
    ridge: float = 0.01
    alike: float = 0.6
    relay_layer: int = 20
    relay_threshold: float = 0.4
    relay_gamma: float = 3000.0
    prior: Literal["standard", "diagonal", "ceb"] = "standard"
    beta: float = 1e-3
    beta_schedule: Literal["fixed", "anneal", "target"] = "anneal"
    target_rate: float = 100.0
    lambda_il: float = 0.1
    noise: bool = True

    def __post_init__(self) -> None:
        refuse_not_finite(self)
        if self.layer < 0:
            raise FormatError(f"layer {self.layer} does not exist.", "IBKE config", "Layers are counted from 0.")
        if self.relay_layer and self.relay_layer <= self.layer:
            raise FormatError(
                f"the relay's layer {self.relay_layer} is not after the edited layer {self.layer}.",
                "IBKE config",
                "Choose a later one, or 0 for no relay.",
            )
        refuse_not_positive(self, "content_dim", "width", "gamma", "ridge", "relay_gamma", "target_rate")
        refuse_below(self, 0, "context_dim", "depth", "relay_layer", "beta", "lambda_il")
        if self.width % HEADS:
            raise FormatError(
                f"`width` is {self.width}, which {HEADS} attention heads cannot share.",
                "IBKE config",
                f"Choose a multiple of {HEADS}.",
            )
        if not (0 < self.threshold < 1 and 0 < self.relay_threshold < 1) or self.sharpness <= 0 or self.ramp <= 0:
            raise FormatError(
                "the gate needs a threshold between 0 and 1 and a positive sharpness and ramp.",
                "IBKE config",
                "The defaults are a safe choice.",
            )

    @property
    def code_dim(self) -> int:
        """Dimensions of the code: content, context and the log-norm of the gradient."""
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
        return cls(**record)
