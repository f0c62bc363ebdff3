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

from ibke.batch import Pair, coded_positions, collate
from ibke.capture import capture
from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor, Progress
from ibke.editors.ibke.address import Addresser, first_open, subject_of
from ibke.editors.ibke.bottleneck import Bottleneck, Code, Written, answer_embedding, select
from ibke.editors.ibke.refine import Refined, Refiner, RefineSettings
from ibke.editors.ibke.shipped import load_editor, shipped_folder
from ibke.editors.ibke.watch import watched_rows
from ibke.errors import RequestError
from ibke.frames import FRAMES, Frame, encode_pair
from ibke.models import LanguageModel
from ibke.neurons import PER_EDIT, Site, choose
from ibke.partial import PartialModel, Prefixes
from ibke.request import EditRequest
from ibke.rows import EDIT, RowGroup, build_groups, frame_prefixes

SPARE = 192  # neurons an edit may be moved to
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

    def __init__(
        self, lm: LanguageModel, network: Bottleneck, refine: RefineSettings | None = None, frame: Frame = "bare"
    ):
        super().__init__(lm)
        self.network, self.frame = network, frame
        self.settings = refine or RefineSettings()
        config = network.config
        self.part = PartialModel(lm.model, lm.architecture.layers, config.layer)
        self.site = Site.find(lm.model, network.name)
        self.modules = self.site.modules
        self.addresser = Addresser(
            self.part,
            self.site.entrance,
            lm.tokenizer,
            network.spectrum,
            gamma=config.gamma,
            ridge=config.ridge,
            alike=config.alike,
        )

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
        if not requests:
            raise RequestError("there is no request.", "edit", "Pass at least one EditRequest.")
        return self._make(requests, joint=len(requests) > 1)[0]

    def edit_each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[Edit]:
        """Independent Edits, one a request, made in batches; each as if made alone on the pristine model."""
        edits: list[Edit] = []
        for begin in range(0, len(requests), GROUP):
            edits += self._make(requests[begin : begin + GROUP], joint=False)
            if progress:
                progress(len(edits), len(requests))
        return edits

    def encode(self, requests: Sequence[EditRequest], joint: bool = False) -> tuple[Code, Tensor]:
        """The codes of some requests and the targets' NLL on the base (nats).

        Args:
            requests: the edits.
            joint: they shall stand side by side in one update, so no two may take the same neuron.

        Raises:
            RequestError: a request longer than the model's window, or more requests than one update has room for.
            CaptureError: a gradient is not finite.
        """
        subjects = [subject_of(request.prompt, request.subject) for request in requests]
        pairs = [
            self._pair(request.prompt, request.target_new, self.frame, subject)
            for request, subject in zip(requests, subjects, strict=True)
        ]
        device = self.lm.device
        batch = collate(pairs, self.lm.tokenizer.pad_token_id, device)
        taken = capture(self.part, self.site.ends, self.part.prefix(batch), batch)
        asked = [(request.prompt, subject) for request, subject in zip(requests, subjects, strict=True)]
        with torch.no_grad():
            position, role, real = (tensor.to(device) for tensor in coded_positions(pairs))
            written = select(
                taken,
                self.site,
                (position, role, real),
                self.addresser(asked).to(device),
                self.neurons([request.prompt for request in requests], joint).to(device),
                answer_embedding(self.lm.model.get_input_embeddings(), batch.labels_N, batch.row_N, batch.rows),
            )
            return self.network.encode(written), taken.nll_B

    def neurons(self, prompts: Sequence[str], joint: bool) -> Tensor:
        """Which neurons each request takes over (B × K), drawn by its own text so that the same edit comes out again.

        Raises:
            RequestError: more requests than one update has room for.
        """
        pool, among = self.network.pool_P, self.network.config.pool
        if not joint:
            return torch.stack([choose(pool, prompt, PER_EDIT, among) for prompt in prompts])
        if len(prompts) * PER_EDIT > len(pool):
            raise RequestError(
                f"{len(prompts)} requests are more than one joint edit has room for ({len(pool) // PER_EDIT}).",
                self.network.name,
                "Split them into several edits, each for its own session.",
            )
        return choose(pool, "\n".join(prompts), len(prompts) * PER_EDIT, among).view(len(prompts), PER_EDIT)

    def _make(self, requests: Sequence[EditRequest], joint: bool) -> list[Edit]:
        began = time.perf_counter()
        code, nll_B = self.encode(requests, joint)
        refined = self._refine(code, requests, joint)
        z_BZ = refined.z_BZ if refined else code.mean
        with torch.no_grad():
            factors = self.network.decode(z_BZ, code.written, self.site, joint=joint)
            rate_B = self.network.rate(Code(z_BZ, code.log_variance, code.written))
        seconds = time.perf_counter() - began
        latent = {"z": z_BZ}
        if joint:
            info = self._info(slice(None), refined, rate_B, nll_B, seconds, latent, code.written)
            return [Edit({name: (a[0], b[0].T) for name, (a, b) in factors.items()}, tuple(requests), info)]
        edits = []
        for row, request in enumerate(requests):
            # Each edit of a batch took its share of the time.
            mine = {name: tensor[row : row + 1] for name, tensor in latent.items()}
            info = self._info(slice(row, row + 1), refined, rate_B, nll_B, seconds / len(requests), mine, code.written)
            edits.append(Edit({name: (a[row], b[row].T) for name, (a, b) in factors.items()}, (request,), info))
        return edits

    def _info(
        self,
        rows: slice,
        refined: Refined | None,
        rate_B: Tensor,
        nll_B: Tensor,
        seconds: float,
        latent: dict[str, Tensor],
        written: Written,
    ) -> EditInfo:
        return EditInfo(
            method=self.name,
            fingerprint=self.lm.fingerprint,
            model=self.lm.name,
            refine_steps=int(refined.steps_B[rows].max()) if refined else 0,
            rate_nats=float(rate_B[rows].sum()),
            achieved=bool(refined.achieved_B[rows].all()) if refined else None,
            seconds=seconds,
            nll_before=float(nll_B[rows].mean()),
            nll_after=float(refined.nll_B[rows].mean()) if refined else None,
            neurons={self.network.name: written.neurons_BK[rows].flatten().tolist()},
            latent={**latent, "spare": self.network.pool_P[:SPARE].int(), "constant": self.network.constant_D},
        )

    def _refine(self, code: Code, requests: Sequence[EditRequest], joint: bool) -> Refined | None:
        if not self.settings.steps:  # the bare network: nobody asks whether the target comes
            return None
        refiner = Refiner(self.network, self.part, self.site, self.settings, joint)
        return refiner.refine(
            code,
            self._targets(requests, joint),
            lambda: self._watched(code, requests, joint),
        )

    def _watched(self, code: Code, requests: Sequence[EditRequest], joint: bool) -> list[RowGroup]:
        """What must stay while a code moves, as far as the edit reaches it."""

        def opened(pairs: Sequence[Pair], owners: Sequence[int]) -> Sequence[int | None]:
            if self.network.config.keys == "code":  # an address that moves may come to reach anything
                return [0] * len(pairs)
            address_RD = code.written.address_BD[list(owners)]
            return first_open(self.part, self.site.entrance, pairs, address_RD, self.network.config.threshold)

        return watched_rows(self.part, self.prefixes, self.lm.tokenizer, requests, opened, joint)

    def _targets(self, requests: Sequence[EditRequest], joint: bool) -> list[RowGroup]:
        """The target in several frames of the request and in the wordings given with it."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            asked = [(request.prompt, frame) for frame in FRAMES]
            asked += [(text, "bare") for text in request.rephrase_prompts]
            subject = subject_of(request.prompt, request.subject)
            pairs += [self._pair(text, request.target_new, frame, subject) for text, frame in asked]
            owners += [0 if joint else owner] * len(asked)
        pad_id = self.lm.tokenizer.pad_token_id
        return build_groups(self.part, pairs, [EDIT] * len(pairs), owners, pad_id, prefixes=self.prefixes)

    def _pair(self, prompt: str, target: str, frame: Frame, subject: str | None = None) -> Pair:
        pair = encode_pair(prompt, target, frame, self.lm.tokenizer, subject)
        window = getattr(self.lm.model.config.get_text_config(), "max_position_embeddings", None)
        if window and len(pair) > window:
            raise RequestError(
                f"prompt and target are {len(pair)} tokens, the model's window is {window}.",
                f"prompt {prompt[:60]!r}…",
                "Shorten the prompt.",
            )
        return pair
