"""UltraEdit: a closed-form update from normalised keys and gradients, without any training.

Gu et al., "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models", TMLR 2026, arXiv
2505.14679: editing features, lifelong normalization, and the least-squares shift. At the tokens that predict an answer,
a module's key h and value gradient g are taken, for all requests of a turn together. Normalised by mean and deviation
of all turns so far, this one included, over all modules of the same shape, they are ĥ and ĝ. With

    v_i = −η ‖ĥ_i‖² ĝ_i      and      ΔWᵀ = (KᵀK + I)⁻¹ Kᵀ V,

where the rows of K are the keys as they are, the requests of a turn share one ridge regression. The push-through
identity gives ΔW = Vᵀ (KKᵀ + I)⁻¹ K, a system of the size of the tokens. A gradient is here of an answer's summed NLL;
another scale would be normalised away.

Shape suffixes: B requests, T tokens, N answer tokens of all requests, I d_in, O d_out, F = I + O.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibke.batch import by_length, collate
from ibke.capture import capture
from ibke.edit import Edit, EditInfo, Factors, dense_factors
from ibke.editors.aggregate import regress
from ibke.editors.base import Editor
from ibke.editors.row_statistics import History, RowStatistics, from_latent, joined, shape_of, to_latent
from ibke.editors.settings import refuse_not_positive
from ibke.models import LanguageModel
from ibke.modules import by_depth, first_layer, in_out, resolve, target_modules
from ibke.neurons import Site
from ibke.partial import PartialModel
from ibke.request import EditRequest


@dataclass(frozen=True)
class UltraEditSettings:
    """Settings of :class:`UltraEdit`.

    Args:
        learning_rate: η. Published: 1e-6, for models of 7 to 8 billion parameters. SmolLM2-135M needs some 1e-4.
        gate_layers: whose MLP's gate projection is changed (the input projection, where an MLP has no gate); empty is
            as deep as layers 18 to 26 of Qwen2.5-7B's 28, the published ones. Published for Llama-3-8B: 11 to 15 of 32.
        value_layers: the same for the projection the gate is multiplied with. Published for Llama-3-8B: 18 to 24 of 32.
            For Mistral-7B the output projections of layers 29 and 30 are changed instead; name them when loading the
            model.
    """

    learning_rate: float = 1e-6
    gate_layers: tuple[int, ...] = ()
    value_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        refuse_not_positive(self, "learning_rate")


class UltraEdit(Editor):
    """Closed-form update from normalised keys and gradients of several layers (UltraEdit).

    What it knows of earlier edits is in ``history``; :meth:`after` gives an editor that knows of one more.

    Args:
        lm: the model. Modules the caller named at loading are changed instead of the default ones.
        settings: see :class:`UltraEditSettings`.
    """

    name: ClassVar[str] = "ultraedit"
    Settings: ClassVar[type[Any]] = UltraEditSettings
    quick = {"learning_rate": 1e-4}

    def __init__(self, lm: LanguageModel, settings: UltraEditSettings | None = None):
        super().__init__(lm)
        self.settings: UltraEditSettings = settings or self.Settings()
        depth = by_depth(lm, (18, 26), of=28)
        layers = self.settings.gate_layers or depth, self.settings.value_layers or depth
        names = lm.architecture.modules or input_projections(lm, *layers)
        self.modules = resolve(lm.model, names)
        self.part = PartialModel(lm.model, lm.architecture.layers, first_layer(names))
        self.history: History = {}
        """Statistics of the edits in force; empty as long as there is none."""

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit that makes all requests true together: one turn of a sequence.

        Its ``info.latent`` holds the statistics of its own keys and gradients, which :meth:`after` reads.

        Raises:
            RequestError: no request, or one longer than the model's window.
            CaptureError: a gradient is not finite.
        """
        began = time.perf_counter()
        features, nll_B = self._features(requests)
        new: History = {}
        for name, module in self.modules.items():
            new = joined(new, {shape_of(module): RowStatistics.of(features[name])})
        known = joined(self.history, new)
        factors = {
            name: self._factors(features[name], known[shape_of(module)], *in_out(module))
            for name, module in self.modules.items()
        }
        info = EditInfo(
            self.name,
            self.lm.fingerprint,
            self.lm.name,
            seconds=time.perf_counter() - began,
            nll_before=float(nll_B.mean()),
            latent=to_latent(new),
        )
        return Edit(factors, tuple(requests), info)

    def after(self, edit: Edit) -> UltraEdit:
        """The editor for what follows: the statistics of the edit are in its ``history``.

        Raises:
            FormatError: the edit has none: another method made it, or it is a composition of several.
        """
        knows = copy(self)
        knows.history = joined(self.history, from_latent(edit, self.name))
        return knows

    def _features(self, requests: Sequence[EditRequest]) -> tuple[dict[str, Tensor], Tensor]:
        """By module, key and value gradient side by side at each answer token (N × F); NLL of the targets (B, nats)."""
        pairs = self.pairs(requests)
        taken: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        nll = []
        for rows in by_length([len(pair) for pair in pairs]):
            batch = collate([pairs[row] for row in rows], self.lm.tokenizer.pad_token_id, self.lm.device)
            seen = capture(self.part, self.modules, self.part.prefix(batch), batch)
            nll.append(seen.nll_B)
            for name, some in taken.items():
                both_BTF = torch.cat([seen.keys[name], seen.value_grads[name]], dim=-1)
                some.append(both_BTF[batch.predicts_RT])
        return {name: torch.cat(some) for name, some in taken.items()}, torch.cat(nll)

    def _factors(self, features_NF: Tensor, known: RowStatistics, d_in: int, d_out: int) -> Factors:
        """ΔW of one module, through whichever system is smaller."""
        normal_NF = known.normalise(features_NF)
        size_N1 = normal_NF[:, :d_in].square().sum(1, keepdim=True)
        values_NO = -self.settings.learning_rate * size_N1 * normal_NF[:, d_in:]
        keys_NI = features_NF[:, :d_in].double().cpu()
        if len(keys_NI) > min(d_in, d_out):
            gram_II = keys_NI.T @ keys_NI + torch.eye(d_in, dtype=torch.float64)
            return dense_factors(torch.linalg.solve(gram_II, keys_NI.T @ values_NO).T.float())
        return regress(keys_NI, lambda rows: rows).float(), values_NO.T.float()


def input_projections(lm: LanguageModel, gate_layers: Sequence[int], value_layers: Sequence[int]) -> list[str]:
    """Names of the projections into some layers' MLPs, those that go through the activation first.

    Args:
        lm: the model.
        gate_layers: whose projection into the activation is meant.
        value_layers: whose projection is meant that the gate is multiplied with; an MLP without gate has one for both.
    """
    found = []
    for layers, branch in ((gate_layers, "gate"), (value_layers, "value")):
        for out in target_modules(lm, lm.architecture, layers):
            site = Site.find(lm.model, out)
            found.append((getattr(site, branch) or site.gate).name)
    return list(dict.fromkeys(found))
