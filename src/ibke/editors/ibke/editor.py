"""The Information Bottleneck Knowledge Editor (arXiv 2512.16227): request → capture → code → refine → Edit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ibke.batch import Pair, coded_positions, collate
from ibke.capture import capture
from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor, Progress
from ibke.editors.ibke.address import About, Addresser, first_open
from ibke.editors.ibke.bottleneck import Bottleneck, Code, answer_embedding, select
from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.ibke.refine import Refined, Refiner, RefineSettings
from ibke.editors.ibke.relay import Listening, relay_rate
from ibke.editors.ibke.shipped import load_editor, shipped_folder
from ibke.editors.ibke.watch import Opened, watched_rows
from ibke.errors import ModuleNotEditableError
from ibke.frames import FRAMES, Frame
from ibke.gates import Told
from ibke.models import LanguageModel
from ibke.modules import target_modules
from ibke.neurons import Site
from ibke.partial import PartialModel
from ibke.prefixes import Prefixes, frame_prefixes
from ibke.request import EditRequest
from ibke.rows import EDIT, RowGroup, build_groups
from ibke.subjects import subject_of

GROUP = 16  # independent edits made in one pass


class IBKEEditor(Editor):
    """Corrects facts with a trained bottleneck.

    Args:
        lm: the model; its fingerprint has been checked against the network's.
        network: the trained bottleneck.
        refine: how the code is refined after the encoder's first guess; ``steps=0`` shows the bare network.
        frame: how the request itself is worded to the model when it is captured.
    """

    name: ClassVar[str] = "ibke"
    Settings: ClassVar[type | None] = RefineSettings
    Config: ClassVar[type | None] = IBKEConfig
    trained_by = "ibke.training.trainer"

    def __init__(
        self, lm: LanguageModel, network: Bottleneck, refine: RefineSettings | None = None, frame: Frame = "bare"
    ):
        super().__init__(lm)
        self.network, self.frame = network, frame
        self.settings = refine or RefineSettings()
        config = network.config
        self.part = PartialModel(lm.model, lm.architecture.layers, config.layer)
        self.site = Site.find(lm.model, network.name)
        self.addresser = Addresser(
            self.part,
            self.site.entrance,
            lm.tokenizer,
            network.spectrum,
            network.common,
            network.shut_D,
            gamma=config.gamma,
            ridge=config.ridge,
            alike=config.alike,
        )

    @cached_property
    def listening(self) -> Listening | None:
        """The relay in its place, where the network has one."""
        if self.network.relay is None:
            return None
        layer = self.network.config.relay_layer
        names = target_modules(self.lm, self.lm.architecture, [layer])
        if not names:
            raise ModuleNotEditableError(
                f"none of the named modules is in layer {layer}, where this editor's relay is.",
                "modules",
                "Name the output projection of that layer's MLP too.",
            )
        site = Site.find(self.lm.model, names[0])
        return Listening(self.network.relay, PartialModel(self.lm.model, self.lm.architecture.layers, layer), site)

    @cached_property
    def prefixes(self) -> Prefixes:
        """What stands before a prompt in each frame, run once."""
        return frame_prefixes(self.part, self.lm.tokenizer)

    @classmethod
    def for_model(cls, lm: LanguageModel, path: str | Path | None = None, **settings: Any) -> IBKEEditor:
        """The editor for a model.

        Args:
            lm: the model.
            path: folder of a trained editor; None takes the one that ships for this model.
            settings: ``refine=False`` for the bare network, ``frame``, or any field of :class:`RefineSettings`.

        Raises:
            FormatError: none ships for this model, or the folder holds none.
            FingerprintMismatchError: it was trained for other weights.
        """
        folder = Path(path) if path else shipped_folder(lm)
        network, manifest = load_editor(folder, lm)
        frame = settings.pop("frame", "bare")
        refine = RefineSettings(**manifest.get("refine", {}))
        if not settings.pop("refine", True):
            settings["steps"] = 0
        return cls(lm, network, replace(refine, **settings), frame)

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit that makes all requests true together, by one joint solve.

        Raises:
            RequestError: no request, one longer than the model's window, or the same prompt with two targets.
            CaptureError: a gradient is not finite.
        """
        return self._make(requests, joint=len(requests) > 1)[0]

    def edit_each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[Edit]:
        """Independent Edits, one a request, made in batches; each as if made alone on the pristine model."""
        edits: list[Edit] = []
        for begin in range(0, len(requests), GROUP):
            edits += self._make(requests[begin : begin + GROUP], joint=False)
            if progress:
                progress(len(edits), len(requests))
        return edits

    def encode(self, requests: Sequence[EditRequest]) -> tuple[Code, Tensor]:
        """The codes of some requests and the targets' NLL on the base (nats).

        Args:
            requests: the edits.

        Raises:
            RequestError: no request, or one longer than the model's window.
            CaptureError: a gradient is not finite.
        """
        return self._encode(requests)[:2]

    def _encode(self, requests: Sequence[EditRequest]) -> tuple[Code, Tensor, tuple[Tensor, ...]]:
        """As :meth:`encode`, and the keys at which each request is in its own words (T × D)."""
        pairs = self.pairs(requests, self.frame)
        device = self.lm.device
        batch = collate(pairs, self.lm.tokenizer.pad_token_id, device)
        asked = [
            About(request.prompt, subject_of(request.prompt, request.subject), request.rephrase_prompts)
            for request in requests
        ]
        address_BD, own, read = self.addresser.beside(pairs, asked)
        hidden_BTD = pad_sequence([reading.entering_TD for reading in read], batch_first=True)
        taken = capture(self.part, self.site.ends, hidden_BTD, batch)
        with torch.no_grad():
            position, role, real = (tensor.to(device) for tensor in coded_positions(pairs))
            written = select(
                taken,
                self.site,
                (position, role, real),
                address_BD.to(device),
                answer_embedding(self.lm.model.get_input_embeddings(), batch.labels_N, batch.row_N, batch.rows),
            )
            return self.network.encode(written), taken.nll_B, own

    def _make(self, requests: Sequence[EditRequest], joint: bool) -> list[Edit]:
        began = time.perf_counter()
        code, nll_B, own = self._encode(requests)
        told = self._told(code, own)
        if joint and told:  # in force together from the first
            address_BD = Told.join(told).addresses(self.network.constant_D.cpu()).to(self.lm.device)
            code = replace(code, written=replace(code.written, address_BD=address_BD))
        refined = self._refine(code, requests, joint)
        z_BZ = refined.z_BZ if refined else code.mean
        with torch.no_grad():
            made = self.network.decode(z_BZ, code.written, self.site)
            rate_B = self.network.rate(Code(z_BZ, code.log_variance, code.written))
            sets = {self.network.name: made.by_edit(told, joint=joint)}
            if refined and refined.relay_BD is not None and refined.listens_BD is not None and self.listening:
                relay, site = self.listening.relay, self.listening.site
                made = relay.decode(refined.relay_BD, refined.listens_BD, site)
                sets[site.out] = made.by_edit(refined.told_B, joint=joint)
                rate_B = rate_B + relay_rate(refined.relay_BD)
                z_BZ = torch.cat([z_BZ, refined.relay_BD], dim=-1)
        seconds = time.perf_counter() - began
        edits = []
        for row, asked in enumerate([requests] if joint else [[request] for request in requests]):
            mine = slice(None) if joint else slice(row, row + 1)
            info = EditInfo(
                method=self.name,
                fingerprint=self.lm.fingerprint,
                model=self.lm.name,
                refine_steps=int(refined.steps_B[mine].max()) if refined else 0,
                rate_nats=float(rate_B[mine].sum()),
                achieved=bool(refined.achieved_B[mine].all()) if refined else None,
                # Each edit of a batch took its share of the time.
                seconds=seconds * len(asked) / len(requests),
                nll_before=float(nll_B[mine].mean()),
                nll_after=float(refined.nll_B[mine].mean()) if refined else None,
                latent={"z": z_BZ[mine]},
            )
            edits.append(Edit({}, tuple(asked), info, {name: some[row] for name, some in sets.items()}))
        return edits

    def _told(self, code: Code, own: Sequence[Tensor]) -> list[Told]:
        """What tells each edit's first gate from others'; nothing, where addresses move with the code."""
        if self.network.config.keys == "code" or not all(len(keys_TD) for keys_TD in own):
            return []
        return self.network.told(code.written.address_BD, own)

    def _refine(self, code: Code, requests: Sequence[EditRequest], joint: bool) -> Refined | None:
        if not self.settings.steps:  # the bare network: nobody asks whether the target comes
            return None
        opened = self._opened(code)
        refiner = Refiner(self.network, self.part, self.site, self.settings, joint, self.listening)
        return refiner.refine(
            code,
            self._targets(requests, opened),
            lambda: watched_rows(self.part, self.prefixes, self.lm.tokenizer, requests, opened),
        )

    def _opened(self, code: Code) -> Opened:
        """Tells where the edits of some codes may be in force."""

        def opened(pairs: Sequence[Pair], owners: Sequence[int]) -> Sequence[int | None]:
            if self.network.config.keys == "code":  # an address that moves may come to reach anything
                return [0] * len(pairs)
            gate_RD = code.written.address_BD[list(owners)] - self.network.shut_D
            return first_open(self.part, self.site.entrance, pairs, gate_RD)

        return opened

    def _targets(self, requests: Sequence[EditRequest], opened: Opened) -> list[RowGroup]:
        """The target in several frames of the request and in the wordings given with it."""
        asked: list[Pair] = []
        about: list[int] = []
        for owner, request in enumerate(requests):
            subject = subject_of(request.prompt, request.subject)
            # An address is silent before the subject's last token of its own request, in every frame.
            asked += [self.pair(request.prompt, request.target_new, frame, subject) for frame in FRAMES]
            about += [owner] * len(FRAMES)
        worded = [(owner, text) for owner, request in enumerate(requests) for text in request.rephrase_prompts]
        pairs = [self.pair(text, requests[owner].target_new, "bare") for owner, text in worded]
        if pairs:
            places = opened(pairs, [owner for owner, _ in worded])
            asked += [pair.reached(place) for pair, place in zip(pairs, places, strict=True)]
            about += [owner for owner, _ in worded]
        if self.network.config.keys == "code":
            asked = [pair.reached(0) for pair in asked]
        pad_id = self.lm.tokenizer.pad_token_id
        return build_groups(self.part, asked, [EDIT] * len(asked), about, pad_id, prefixes=self.prefixes)
