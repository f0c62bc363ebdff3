"""The Information Bottleneck Knowledge Editor (arXiv 2512.16227): request → capture → code → refine → Edit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ibke.batch import Pair
from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor, Progress
from ibke.editors.ibke.address import Addresser, first_open
from ibke.editors.ibke.bottleneck import Bottleneck, Code
from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.ibke.encoding import Encoded, RequestEncoder
from ibke.editors.ibke.refine import Refined, Refiner, RefineSettings, mean_by_owner
from ibke.editors.ibke.relay import Listening, relay_rate
from ibke.editors.ibke.shipped import load_editor, shipped_folder
from ibke.editors.ibke.watch import Opened, watched_rows
from ibke.errors import FormatError, IBKEError
from ibke.fingerprint import mark
from ibke.frames import FRAMES, Frame
from ibke.gates import Told
from ibke.models import LanguageModel
from ibke.neurons import Neurons, Site
from ibke.partial import PartialModel
from ibke.prefixes import Prefixes, frame_prefixes
from ibke.request import EditRequest, refuse_contradictions
from ibke.rows import EDIT, RowGroup, build_groups, row_terms
from ibke.session import EditSession, set_aside

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
    again: ClassVar[int] = 2  # times that requests are made again which do not hold beside others
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
        site = Site.in_layer(self.lm, layer, "where this editor's relay is")
        return Listening(self.network.relay, PartialModel(self.lm.model, self.lm.architecture.layers, layer), site)

    @cached_property
    def encoder(self) -> RequestEncoder:
        """What makes codes of requests."""
        return RequestEncoder(self.lm, self.network, self.addresser, self.site)

    @cached_property
    def prefixes(self) -> Prefixes:
        """What stands before a prompt in each frame, run once."""
        return frame_prefixes(self.part, self.lm.tokenizer)

    @property
    def mark(self) -> str:
        """See :attr:`Editor.mark`; where an edit applies depends on what addresses are told of, too."""
        return mark(repr((self.name, self.settings, self.addresser.identity)), self.network.state_dict())

    @classmethod
    def adapted(cls, config: IBKEConfig) -> IBKEConfig:
        """The settings of a trained network as this method uses them; a variant may change what was not learned."""
        return config

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
            IBKEError: a setting that there is not, with the nearest one, or a value that it cannot have.
        """
        folder = Path(path) if path else shipped_folder(lm)
        network, manifest = load_editor(folder, lm)
        network.config = cls.adapted(network.config)
        frame = settings.pop("frame", "bare")
        if frame not in FRAMES:
            raise IBKEError(f"there is no frame {frame!r}.", cls.name, f"Known: {', '.join(FRAMES)}.")
        if not settings.pop("refine", True):
            settings["steps"] = 0
        editor = cls(lm, network, cls._settings({**manifest.get("refine", {}), **settings}), frame)
        editor.training_seconds = manifest.get("seconds")
        return editor

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit that makes all requests true together.

        Each is made alone, and gates are told apart as edits come together (:mod:`ibke.gates`). Those whose targets
        then come no more are made again beside the others. What is attached to the model already counts if
        :attr:`RefineSettings.base` says so.

        Raises:
            RequestError: no request, one longer than the model's window, or the same prompt with two targets.
            CaptureError: a gradient is not finite.
        """
        began = time.perf_counter()
        self.pairs(requests)  # refuses what cannot be edited before anything is made
        refuse_contradictions(requests)
        with self._base():
            whole = self._edit(requests)
        whole.info.seconds = time.perf_counter() - began
        return whole

    def _base(self) -> AbstractContextManager[None]:
        """What is attached to the model counts while edits are made, or does not."""
        return set_aside(self.lm) if self.settings.base == "pristine" else nullcontext()

    def _edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit of all requests, on the model as it is."""
        edits = self._each(requests)
        if len(edits) == 1:
            return edits[0]
        if not self.settings.steps:  # the bare network: nobody asks whether the targets come
            return self._joined(edits)
        nll_B, achieved_B = self._together(edits)
        for _ in range(self.again):
            missed = (~achieved_B).nonzero().flatten().tolist()
            if not missed:
                break
            with EditSession(self.lm) as session:
                if rest := [edit for row, edit in enumerate(edits) if row not in missed]:
                    session.attach(self._joined(rest))
                made = self._each([requests[row] for row in missed])
            for row, edit in zip(missed, made, strict=True):
                edits[row] = edit
            nll_B, achieved_B = self._together(edits)
        whole = self._joined(edits)
        whole.info.nll_after = float(nll_B.mean())
        whole.info.achieved = bool(achieved_B.all())
        return whole

    def edit_each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[Edit]:
        """Independent Edits, one a request, made in batches; each alone. On what model: see :meth:`edit`."""
        with self._base():
            return self._each(requests, progress)

    def _each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[Edit]:
        edits: list[Edit] = []
        for begin in range(0, len(requests), GROUP):
            edits += self._make(requests[begin : begin + GROUP])
            if progress:
                progress(len(edits), len(requests))
        return edits

    def _finished(self, edits: list[Edit], encoded: Encoded) -> list[Edit]:
        """Independent Edits as they are handed over; a variant may change what puts their neurons in force."""
        del encoded
        return edits

    def encode(self, requests: Sequence[EditRequest]) -> tuple[Code, Tensor]:
        """The codes of some requests and the targets' NLL on the base (nats).

        Args:
            requests: the edits.

        Raises:
            RequestError: no request, or one longer than the model's window.
            CaptureError: a gradient is not finite.
        """
        encoded = self._encode(requests)
        return encoded.code, encoded.nll_B

    def _encode(self, requests: Sequence[EditRequest]) -> Encoded:
        # The bare network is to cost little more than a pass.
        alike = self.settings.steps > 0
        return self.encoder(self.pairs(requests, self.frame), requests, self._noted(requests), alike=alike)

    def _noted(self, requests: Sequence[EditRequest]) -> Mapping[int, nn.Module]:
        """By layer, modules whose inputs where questions end a variant wants to know."""
        del requests
        return {}

    def _make(self, requests: Sequence[EditRequest]) -> list[Edit]:
        """An Edit a request, each as if alone."""
        began = time.perf_counter()
        encoded = self._encode(requests)
        code = encoded.code
        refined = self._refine(code, requests)
        z_BZ = refined.z_BZ if refined else code.mean
        relay = None
        if refined and refined.relay_BD is not None and refined.listens_BD is not None:
            relay = (refined.relay_BD, refined.listens_BD, refined.told_B)
        sets, rate_B, whole_BZ = self._written(code, encoded.own, z_BZ, relay)
        seconds = (time.perf_counter() - began) / len(requests)
        edits = []
        for row, request in enumerate(requests):
            info = EditInfo(
                method=self.name,
                fingerprint=self.lm.fingerprint,
                model=self.lm.name,
                refine_steps=int(refined.steps_B[row]) if refined else 0,
                rate_nats=float(rate_B[row]),
                achieved=bool(refined.achieved_B[row]) if refined else None,
                seconds=seconds,
                already=bool(encoded.already_B[row]),
                nll_before=float(encoded.nll_B[row]),
                nll_after=float(refined.nll_B[row]) if refined else None,
                latent={"z": whole_BZ[row : row + 1]},
            )
            edits.append(Edit({}, (request,), info, {name: some[row] for name, some in sets.items()}))
        return self._finished(edits, encoded)

    @torch.no_grad()
    def _written(
        self,
        code: Code,
        own: Sequence[Tensor],
        z_BZ: Tensor,
        relay: tuple[Tensor, Tensor, Sequence[Told]] | None,
    ) -> tuple[dict[str, list[Neurons]], Tensor, Tensor]:
        """What codes are decoded into.

        Args:
            code: the encoder's.
            own: keys at which each request is in its own words.
            z_BZ: the first write's code.
            relay: its part of the code (B × D), where it listens (B × D), and what that was found from.

        Returns:
            each edit's neurons by MLP, its nats (B), and the whole code.
        """
        made = self.network.decode(z_BZ, code.written, self.site)
        rate_B = self.network.rate(Code(z_BZ, code.log_variance, code.written))
        sets = {self.network.name: made.by_edit(self._told(code, own))}
        if relay is None or self.listening is None:
            return sets, rate_B, z_BZ
        relay_BD, listens_BD, told_B = relay
        site = self.listening.site
        sets[site.out] = self.listening.relay.decode(relay_BD, listens_BD, site).by_edit(told_B)
        return sets, rate_B + relay_rate(relay_BD), torch.cat([z_BZ, relay_BD], dim=-1)

    def rebuild(self, edit: Edit) -> Edit:
        """An edit again from its request and its code alone; what refining found is not looked for again.

        One of the bare network is made as that makes it, whatever this editor's settings, and the other way about.

        Raises:
            FormatError: it has not one request and a code of this editor.
            CaptureError: a gradient is not finite.
        """
        z_BZ = edit.info.latent.get("z")
        where = f"edit by {edit.info.method}"
        if len(edit.requests) != 1 or z_BZ is None:
            raise FormatError("it has not one request and a code.", where, "Make it again.")
        # Where an edit applies is made otherwise for the bare network, which asks nobody what comes.
        if (refined := edit.info.nll_after is not None) != (self.settings.steps > 0):
            maker = copy(self)
            maker.settings = replace(self.settings, steps=int(refined))
            return maker.rebuild(edit)
        encoded = self._encode(edit.requests)
        code = encoded.code
        z_BZ, relayed_BD = z_BZ.to(code.mean.device).tensor_split([code.mean.shape[-1]], dim=-1)
        relay = None
        if self.listening and relayed_BD.shape[-1]:
            with torch.no_grad():
                neurons = self.network.decode(z_BZ, code.written, self.site)
            targets = self._targets(edit.requests, self._opened(code))
            _, told_B = self.listening.told(self.part, self.site, neurons, targets, 1)
            relay = (relayed_BD, self.listening.relay.addresses(told_B), told_B)
        if z_BZ.shape != code.mean.shape or relayed_BD.shape[-1] not in (0, self.network.d_out):
            raise FormatError("its code is not of this editor's size.", where, "Use the editor that made it.")
        sets, _, _ = self._written(code, encoded.own, z_BZ, relay)
        rebuilt = Edit({}, edit.requests, edit.info, {name: some[0] for name, some in sets.items()})
        return self._finished([rebuilt], encoded)[0]

    @torch.no_grad()
    def _together(self, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
        """With all edits in force, each one's NLL of its target (nats) and whether it comes, in all frames (B)."""
        requests = [edit.requests[0] for edit in edits]
        targets = self._targets(requests, lambda pairs, _: [0] * len(pairs))
        with EditSession(self.lm).attach(self._joined(edits)):
            terms = [row_terms(self.part.suffix(group.hidden_RTD, group.batch, group.past), group) for group in targets]
        owner_R, nll_R, right_R = (
            torch.cat([getattr(some, name) for some in terms]) for name in ("owner_R", "nll_R", "right_R")
        )
        return mean_by_owner(nll_R, owner_R, len(edits)), mean_by_owner(right_R.float(), owner_R, len(edits)) == 1.0

    def _joined(self, edits: Sequence[Edit]) -> Edit:
        """Several as one, with their codes."""
        infos = [edit.info for edit in edits]
        info = EditInfo(
            method=self.name,
            fingerprint=self.lm.fingerprint,
            model=self.lm.name,
            refine_steps=max(info.refine_steps for info in infos),
            rate_nats=sum(info.rate_nats or 0.0 for info in infos),
            already=all(info.already for info in infos),
            nll_before=fmean(info.nll_before or 0.0 for info in infos),
            latent={"z": torch.cat([info.latent["z"] for info in infos])},
        )
        return replace(Edit.join(edits), info=info)

    def _told(self, code: Code, own: Sequence[Tensor]) -> list[Told]:
        """What tells each edit's first gate from others'; nothing, where addresses move with the code."""
        if self.network.keys.moving or not all(len(keys_TD) for keys_TD in own):
            return []
        return self.network.told(code.written.address_BD, own)

    def _refine(self, code: Code, requests: Sequence[EditRequest]) -> Refined | None:
        if not self.settings.steps:  # the bare network: nobody asks whether the target comes
            return None
        opened = self._opened(code)
        refiner = Refiner(self.network, self.part, self.site, self.settings, self.listening)
        return refiner.refine(
            code,
            self._targets(requests, opened),
            lambda: watched_rows(self.part, self.prefixes, self.lm.tokenizer, requests, opened),
        )

    def _opened(self, code: Code) -> Opened:
        """Tells where the edits of some codes may be in force."""

        def opened(pairs: Sequence[Pair], owners: Sequence[int]) -> Sequence[int | None]:
            if self.network.keys.moving:  # an address that moves may come to reach anything
                return [0] * len(pairs)
            gate_RD = code.written.address_BD[list(owners)] - self.network.shut_D
            return first_open(self.part, self.site.entrance, pairs, gate_RD)

        return opened

    def _targets(self, requests: Sequence[EditRequest], opened: Opened) -> list[RowGroup]:
        """The target in several frames of the request and in the wordings given with it."""
        asked, about = self._asked(requests)
        # An address is silent before the subject's last token of its own request, in every frame.
        worded = range(len(FRAMES) * len(requests), len(asked))
        places = opened([asked[row] for row in worded], [about[row] for row in worded])
        for row, place in zip(worded, places, strict=True):
            asked[row] = asked[row].reached(place)
        if self.network.keys.moving:
            asked = [pair.reached(0) for pair in asked]
        pad_id = self.lm.tokenizer.pad_token_id
        return build_groups(self.part, asked, [EDIT] * len(asked), about, pad_id, prefixes=self.prefixes)

    def _asked(self, requests: Sequence[EditRequest]) -> tuple[list[Pair], list[int]]:
        """Every request in all frames, then the wordings given with them, each with its target; and whose they are."""
        asked: list[Pair] = []
        about: list[int] = []
        for owner, request in enumerate(requests):
            asked += [self.pair(request.prompt, request.target_new, frame, request.about) for frame in FRAMES]
            about += [owner] * len(FRAMES)
        for owner, request in enumerate(requests):
            asked += [self.pair(text, request.target_new, "bare") for text in request.rephrase_prompts]
            about += [owner] * len(request.rephrase_prompts)
        return asked, about
