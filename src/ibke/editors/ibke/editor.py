"""The Information Bottleneck Knowledge Editor (arXiv 2512.16227): request → capture → code → refine → Edit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibke.batch import Pair, collate, written_positions
from ibke.capture import capture
from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor, Progress
from ibke.editors.ibke.bottleneck import Bottleneck, Code, answer_embedding, select
from ibke.editors.ibke.contrast import contrast_keys, guess_subject
from ibke.editors.ibke.probes import ProbeBank
from ibke.editors.ibke.refine import Refined, Refiner, RefineSettings
from ibke.editors.ibke.shipped import load_editor, shipped_folder
from ibke.errors import RequestError
from ibke.frames import FRAMES, Frame, encode_pair
from ibke.models import LanguageModel
from ibke.modules import resolve
from ibke.partial import PartialModel
from ibke.request import EditRequest
from ibke.rows import EDIT, RowGroup, build_groups

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
        self.part = PartialModel(lm.model, lm.architecture.layers, network.config.layers[0])
        self.modules = resolve(lm.model, network.names)
        self.probes = ProbeBank(lm, self.part)

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
        editor = cls(lm, network, replace(refine, **settings), frame)
        if editor.settings.steps:
            editor.probes.prepare()
        return editor

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

    def encode(self, requests: Sequence[EditRequest]) -> tuple[Code, Tensor]:
        """The codes of some requests and the targets' NLL on the base (nats)."""
        pairs = [
            self._pair(request.prompt, request.target_new, self.frame, request.subject or guess_subject(request.prompt))
            for request in requests
        ]
        device = self.lm.device
        batch = collate(pairs, self.lm.tokenizer.pad_token_id, device)
        taken = capture(self.part, self.modules, self.part.prefix(batch), batch)
        config = self.network.config
        where = written_positions(pairs, last=config.write_last, answer=config.write_answer)
        with torch.no_grad():
            asked = [(request.prompt, request.subject) for request in requests]
            contrast, mask = contrast_keys(self.part, self.modules, self.lm.tokenizer, asked)
            position, role, real = (tensor.to(device) for tensor in where)
            embedding = self.lm.model.get_input_embeddings()
            written = select(
                taken,
                self.network.names,
                (position, role, real),
                (contrast.to(device), mask.to(device)),
                answer_embedding(embedding, batch.labels_N, batch.row_N, batch.rows),
            )
            return self.network.encode(written), taken.nll_B

    def _make(self, requests: Sequence[EditRequest], joint: bool) -> list[Edit]:
        began = time.perf_counter()
        code, nll_B = self.encode(requests)
        refined = self._refine(code, requests, joint)
        z_BTZ = refined.z_BTZ if refined else code.mean
        with torch.no_grad():
            factors = self.network.decode(z_BTZ, code.written, joint=joint)
            rate_B = self.network.rate(Code(z_BTZ, code.log_variance, code.written))
        seconds = time.perf_counter() - began
        if joint:
            everything = slice(None)
            latent = {"z": z_BTZ, "mask": code.written.mask_BT}
            info = self._info(everything, refined, rate_B, nll_B, seconds, latent)
            return [Edit({name: (a[0], b[0].T) for name, (a, b) in factors.items()}, tuple(requests), info)]
        edits = []
        for row, (request, mask_T) in enumerate(zip(requests, code.written.mask_BT, strict=True)):
            # Each edit of a batch took its share of the time.
            latent = {"z": z_BTZ[row][mask_T]}
            info = self._info(slice(row, row + 1), refined, rate_B, nll_B, seconds / len(requests), latent)
            mine = {name: (a[row][mask_T], b[row][mask_T].T) for name, (a, b) in factors.items()}
            edits.append(Edit(mine, (request,), info))
        return edits

    def _info(
        self,
        rows: slice,
        refined: Refined | None,
        rate_B: Tensor,
        nll_B: Tensor,
        seconds: float,
        latent: dict[str, Tensor],
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
            latent=latent,
        )

    def _refine(self, code: Code, requests: Sequence[EditRequest], joint: bool) -> Refined | None:
        if not self.settings.steps:  # the bare network: nobody asks whether the target comes
            return None
        refiner = Refiner(self.network, self.part, self.modules, self.settings, joint)
        return refiner.refine(
            code, self._targets(requests, joint), lambda: self.probes.rows(requests, self.settings, joint)
        )

    def _targets(self, requests: Sequence[EditRequest], joint: bool) -> list[RowGroup]:
        """The target in several frames of the request and in the wordings given with it."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            asked = [(request.prompt, frame) for frame in FRAMES]
            asked += [(text, "bare") for text in request.rephrase_prompts]
            pairs += [self._pair(text, request.target_new, frame) for text, frame in asked]
            owners += [0 if joint else owner] * len(asked)
        return build_groups(self.part, pairs, [EDIT] * len(pairs), owners, self.lm.tokenizer.pad_token_id)

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
