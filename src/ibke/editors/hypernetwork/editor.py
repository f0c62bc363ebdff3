"""Editing with a trained hypernetwork: request → keys and gradients → network → Edit."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibke.batch import Batch, by_length, collate
from ibke.edit import Edit, EditInfo, Factors, dense_factors
from ibke.editors.base import Editor
from ibke.editors.hypernetwork.network import Hypernetwork, HypernetworkConfig
from ibke.editors.hypernetwork.storage import kept_folder, read_folder, write_folder
from ibke.editors.hypernetwork.tokens import take_tokens
from ibke.editors.row_statistics import History, from_latent, joined, to_latent
from ibke.editors.settings import refuse_not_positive
from ibke.errors import FormatError
from ibke.models import LanguageModel
from ibke.modules import first_layer, in_out, resolve
from ibke.partial import PartialModel
from ibke.request import EditRequest


@dataclass(frozen=True)
class ScaleSettings:
    """All that can be set once a network is trained.

    Args:
        scale: what its updates are multiplied by. Published: none has it, so 1; it is there to be tuned, as training
            anew for every number of edits at once is not.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        refuse_not_positive(self, "scale")


class HypernetworkEditor(Editor):
    """Makes an update from keys and gradients by a trained network.

    What a method knows of earlier edits, where it does, is in ``history``.

    Args:
        lm: the model.
        network: trained for it.
        settings: see :class:`ScaleSettings`.
    """

    Settings: ClassVar[type[Any]] = ScaleSettings
    Config: ClassVar[type[HypernetworkConfig]]
    Network: ClassVar[type[Hypernetwork]]
    trained_by = "ibke.training.hypernetwork.trainer"

    def __init__(self, lm: LanguageModel, network: Hypernetwork, settings: ScaleSettings | None = None):
        super().__init__(lm)
        self.network, self.settings = network, settings or ScaleSettings()
        self.modules = resolve(lm.model, network.sizes)
        self.part = PartialModel(lm.model, lm.architecture.layers, first_layer(network.sizes))
        self.history: History = {}

    @classmethod
    @abstractmethod
    def targets(cls, lm: LanguageModel, config: HypernetworkConfig) -> list[str]:
        """Dotted names of the modules that are changed, in the order in which they are run.

        Raises:
            ModuleNotEditableError: the model has no such layer, or an unknown architecture.
        """

    @classmethod
    def untrained(cls, lm: LanguageModel, config: HypernetworkConfig | None = None, seed: int = 0) -> Hypernetwork:
        """A network as training begins with it: it leaves keys and gradients as they are."""
        config = config or cls.Config()
        modules = resolve(lm.model, cls.targets(lm, config))
        first_layer(modules)
        return cls.Network(config, {name: in_out(module) for name, module in modules.items()}, seed).to(lm.device)

    @classmethod
    def for_model(cls, lm: LanguageModel, path: str | Path | None = None, **settings: Any) -> HypernetworkEditor:
        """The editor for a model.

        Args:
            lm: the model.
            path: folder of a trained editor; None takes the one in the cache folder.
            settings: see :class:`ScaleSettings`.

        Raises:
            IBKEError: a setting that there is not, or a scale that is not positive.
            FormatError: none has been trained for this model, or the folder holds none.
            FingerprintMismatchError: it was trained for other weights.
        """
        chosen = cls._settings(settings)
        folder = Path(path) if path else kept_folder(lm, cls.name)
        manifest, tensors = read_folder(folder, lm, cls.name)
        try:
            config = cls.Config(**{name: _setting(value) for name, value in manifest["config"].items()})
            network = cls.Network(config, {name: (d_in, d_out) for name, (d_in, d_out) in manifest["modules"].items()})
            network.load_state_dict(tensors)
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"the editor is damaged ({error}).", str(folder), "Train it again.") from None
        editor = cls(lm, network.requires_grad_(False).eval().to(lm.device), chosen)
        editor.training_seconds = manifest.get("seconds")
        return editor

    def save(self, folder: Path, about: dict[str, Any] | None = None) -> Path:
        """Write the network for :meth:`for_model`; returns the folder.

        Args:
            folder: where to.
            about: what else the manifest shall say.
        """
        described = {"modules": self.network.sizes, "config": asdict(self.network.config)}
        write_folder(folder, self.network.state_dict(), self.lm, self.name, {**described, **(about or {})})
        return folder

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit that makes all requests true together.

        Where statistics go on after training its ``info.latent`` holds those of its own keys and gradients, which
        :meth:`after` reads.

        Raises:
            RequestError: no request, or one longer than the model's window.
            CaptureError: a gradient is not finite.
        """
        began = time.perf_counter()
        tokens, nll_B = take_tokens(
            self.part, self.modules, list(self._rows(requests)), answers_only=self.network.answers_only
        )
        known = joined(self.network.statistics, self.history)
        own = self.network.statistics_of(tokens) if self.network.goes_on else {}
        with torch.no_grad():
            made = self.network(tokens, joined(known, own))
        info = EditInfo(
            self.name,
            self.lm.fingerprint,
            self.lm.name,
            seconds=time.perf_counter() - began,
            nll_before=float(nll_B.mean()),
            latent=to_latent(own),
        )
        scaled = {name: _factors(a_NI, self.settings.scale * b_NO) for name, (a_NI, b_NO) in made.items()}
        return Edit(scaled, tuple(requests), info)

    def after(self, edit: Edit) -> HypernetworkEditor:
        """The editor for what follows; it knows the statistics of the edit, where these go on after training.

        Raises:
            FormatError: the edit has none: another method made it, or it is a composition of several.
        """
        if not self.network.goes_on:
            return self
        knows = copy(self)
        knows.history = joined(self.history, from_latent(edit, self.name))
        return knows

    def _rows(self, requests: Sequence[EditRequest]) -> Iterator[tuple[Tensor, Batch, Tensor]]:
        """States, tokens and edits of rows of like length."""
        pairs = self.pairs(requests)
        for rows in by_length([len(pair) for pair in pairs]):
            batch = collate([pairs[row] for row in rows], self.lm.tokenizer.pad_token_id, self.lm.device)
            yield self.part.prefix(batch), batch, torch.tensor(rows, device=self.lm.device)


def _setting(value: Any) -> Any:
    """A setting as it was before JSON made a list of a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _factors(a_NI: Tensor, b_NO: Tensor) -> Factors:
    """As an Edit holds them: of full rank where there are more tokens than dimensions."""
    if len(a_NI) > min(a_NI.shape[1], b_NO.shape[1]):
        return dense_factors((b_NO.T @ a_NI).float())
    return a_NI.float(), b_NO.T.float()
