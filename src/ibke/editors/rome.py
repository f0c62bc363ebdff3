"""ROME: one fact as a rank-one update of one layer's down-projection.

Meng, Bau, Andonian, Belinkov: Locating and Editing Factual Associations in GPT, 2022 (arXiv 2202.05262), eq. 2:

    ΔW = (v* − W k) (C₀⁻¹ k)ᵀ / (kᵀ C₀⁻¹ k)

with C₀ the second moment of generic keys. It is the update that changes W least where generic keys are, among those
with (W + ΔW) k = v*. The k of C₀⁻¹ k is a mean over contexts. The other two are the bare prompt's own key in the
authors' code, so that v* comes exactly there; in r-ROME (Gupta, Baskaran, Anumanchipalli: Rebuilding ROME, 2024, arXiv
2403.07175) they are the mean too, since with two different keys some edits of a long sequence disabled the model.

Shape suffixes: B requests, I d_in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from ibke.edit import Edit
from ibke.editors.locate import LocateEditor, LocateSettings
from ibke.models import LanguageModel
from ibke.modules import by_depth
from ibke.request import EditRequest
from ibke.session import EditSession


@dataclass(frozen=True)
class ROMESettings(LocateSettings):
    """Settings of ROME.

    Args:
        layer: whose down-projection is changed; None is as deep as layer 5 of Llama-2-7B's 32. Published: 5 there and
            in GPT-J's 28, 17 of GPT-2 XL's 48.
        bare_share: see :class:`~ibke.editors.locate.LocateSettings`.
        exact_at: the key that is mapped to v* exactly: the bare prompt's, or their mean. Published: bare, r-ROME mean.
    """

    layer: int | None = None
    bare_share: float = 1 / 21
    exact_at: Literal["bare", "mean"] = "bare"


class ROMEEditor(LocateEditor):
    """Rewrites one MLP's value at the subject's last token by a rank-one update (ROME).

    Args:
        lm: the pristine model.
        settings: of the method.
    """

    name: ClassVar[str] = "rome"
    Settings: ClassVar[type | None] = ROMESettings
    settings: ROMESettings

    def __init__(self, lm: LanguageModel, settings: ROMESettings | None = None):
        settings = settings or ROMESettings()
        layers = by_depth(lm, (5,), of=32)[:1] if settings.layer is None else (settings.layer,)
        super().__init__(lm, settings, layers)

    @property
    def place(self) -> nn.Module:
        """The down-projection itself."""
        return next(iter(self.modules.values()))

    def addresses(self, name: str, keys_BI: Tensor) -> Tensor:
        """(C₀⁻¹ k)ᵀ / (kᵀ C₀⁻¹ k) of each key (B × I, float64)."""
        pulled_BI = self.pull(name, keys_BI)
        return pulled_BI / (pulled_BI * keys_BI).sum(-1, keepdim=True)

    def scaled(self, a_BI: Tensor, bare_BI: Tensor) -> Tensor:
        """So that the key that v* is to come at exactly answers 1."""
        return a_BI / (a_BI * bare_BI).sum(-1, keepdim=True) if self.settings.exact_at == "bare" else a_BI

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit: a rank-one update a request, each made with those before it in force.

        Raises:
            RequestError: no request, or one longer than the model's window.
        """
        if len(requests) < 2:
            return super().edit(requests)
        began = time.perf_counter()
        located = self.located(requests)
        before_B, _ = self.outcome(located)
        with EditSession(self.lm) as session:
            whole = super().edit(requests[:1])
            for request in requests[1:]:
                session.detach().attach(whole)
                whole = whole.compose(super().edit([request]))
            session.detach().attach(whole)
            nll_B, comes_B = self.outcome(located)
        whole.info = replace(
            whole.info,
            achieved=bool(comes_B.all()),
            seconds=time.perf_counter() - began,
            nll_before=float(before_B.mean()),
            nll_after=float(nll_B.mean()),
        )
        return whole
