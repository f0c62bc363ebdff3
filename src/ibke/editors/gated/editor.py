"""IBKE with a second gate: an edit speaks only where its own question is asked.

IBKE's gates look at the subject, where nothing yet says what is asked of it, so other questions about an edited subject
may change too. Here an edit keeps beside its neurons what its own question looks like at the prompt's end
(:mod:`ibke.editors.gated.question`), and its neurons are silent in rows that ask something else
(:mod:`ibke.editors.gated.memory`). That acts while the model runs, so such an edit cannot be merged into weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from ibke.batch import by_length, collate
from ibke.edit import Edit
from ibke.editors.gated.memory import GatedNeurons
from ibke.editors.gated.question import QuestionGate, entrance, load_gate, prompt_states
from ibke.editors.gated.sentence import named_afar
from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.ibke.editor import IBKEEditor
from ibke.editors.ibke.encoding import Encoded
from ibke.editors.ibke.refine import mean_by_owner
from ibke.editors.ibke.shipped import shipped_folder
from ibke.errors import FormatError
from ibke.fingerprint import mark
from ibke.frames import FRAMES, Frame
from ibke.models import LanguageModel
from ibke.partial import answer_states
from ibke.request import EditRequest
from ibke.session import EditSession

THRESHOLD = 0.6  # of gates at the subject
SLACK = 0.02  # cosine by which an edit's own prompt is above its level, so that no rounding shuts it


class GatedIBKE(IBKEEditor):
    """IBKE's edits, each with a gate at the prompt's end."""

    name: ClassVar[str] = "ibke-gated"
    trained_by = ""
    again: ClassVar[int] = 0  # models that these edits are attached to cannot be run in parts, as making one does
    gate: QuestionGate

    @classmethod
    def for_model(cls, lm: LanguageModel, path: str | Path | None = None, **settings: Any) -> GatedIBKE:
        """The editor for a model; arguments as for IBKE's.

        Raises:
            FormatError: none ships for this model, or the folder holds none, or none with a gate.
            FingerprintMismatchError: it was trained for other weights.
        """
        try:
            folder = Path(path) if path else shipped_folder(lm)
        except FormatError as error:
            raise FormatError(error.what, error.where, "Use the method `ibke`, with an editor of your own.") from error
        editor = super().for_model(lm, folder, **settings)
        assert isinstance(editor, GatedIBKE)
        editor.gate = load_gate(folder, lm)
        if editor.training_seconds is not None:
            editor.training_seconds += editor.gate.training_seconds or 0.0
        return editor

    @classmethod
    def adapted(cls, config: IBKEConfig) -> IBKEConfig:
        """Gates at the subject may open more easily, where another one stands behind them."""
        return replace(config, threshold=THRESHOLD)

    @property
    def mark(self) -> str:
        """See :attr:`Editor.mark`; the maps count too."""
        return mark(repr((super().mark, self.gate.name)), {})

    @torch.no_grad()
    def _together(self, edits: Sequence[Edit]) -> tuple[torch.Tensor, torch.Tensor]:
        """As IBKE's, but of passes of the whole model, where it is decided what is asked."""
        asked, owners = self._asked([edit.requests[0] for edit in edits])
        nll_R, right_R = torch.empty(len(asked)), torch.empty(len(asked))
        with EditSession(self.lm).attach(self._joined(edits)):
            for rows in by_length([len(pair) for pair in asked]):
                batch = collate([asked[row] for row in rows], self.lm.tokenizer.pad_token_id, self.lm.device)
                nll, right = batch.score(self.part.logits(answer_states(self.lm.model, batch)))
                nll_R[rows], right_R[rows] = nll.cpu(), right.float().cpu()
        owner_R = torch.tensor(owners)
        return mean_by_owner(nll_R, owner_R, len(edits)), mean_by_owner(right_R, owner_R, len(edits)) == 1.0

    def _noted(self, requests: Sequence[EditRequest]) -> Mapping[int, torch.nn.Module]:
        """Without refining no pass is made for the question; it is what the edit's own pass leaves behind.

        Where other wordings are given with a request, all of them have to be read.
        """
        if self.settings.steps or all(request.rephrase_prompts for request in requests):
            return {}
        return {layer: entrance(self.lm, layer) for layer in self.gate.config.layers}

    def _finished(self, edits: list[Edit], encoded: Encoded) -> list[Edit]:
        """The edits with their neurons behind a gate at the prompt's end."""
        place, found = self.gate.place(self.lm), []
        ends_BLD, requests = encoded.ends_BLD, [edit.requests[0] for edit in edits]
        read = [row for row, one in enumerate(requests) if ends_BLD is None or one.rephrase_prompts]
        noted = [row for row in range(len(requests)) if row not in read]
        asked = [self._questions([requests[row] for row in read])] if read else []
        asked += [self._questions_as_asked(ends_BLD[noted])] if ends_BLD is not None and noted else []
        keys_BK, level_B = (torch.cat(some) for some in zip(*asked, strict=True))
        order = torch.tensor([*read, *noted]).argsort()
        for edit, one, key_K, level in zip(edits, requests, keys_BK[order], level_B[order], strict=True):
            part = GatedNeurons(
                self.gate.name,
                key_K[None],
                level[None],
                edit.neurons,
                {name: torch.zeros(some.count, dtype=torch.long) for name, some in edit.neurons.items()},
                torch.tensor([named_afar(one.about, [one.prompt, *one.rephrase_prompts])]),
            )
            found.append(replace(edit, neurons={}, parts={place: part}))
        return found

    def _questions(self, requests: Sequence[EditRequest]) -> tuple[torch.Tensor, torch.Tensor]:
        """What each request's question looks like (B × K), and the cosine above which it counts as asked (B).

        An edit is asked about by its own prompt and the wordings given with it, in every frame, whatever the level of
        all others.
        """
        asked: list[tuple[str, Frame]] = [(request.prompt, frame) for request in requests for frame in FRAMES]
        worded = [(row, text) for row, request in enumerate(requests) for text in request.rephrase_prompts]
        asked += [(text, frame) for _, text in worded for frame in FRAMES]
        pairs = [self.pair(text, "-", frame) for text, frame in asked]
        states_RLD = prompt_states(self.lm, self.gate.config.layers, pairs, self.prefixes)
        own = len(FRAMES) * len(requests)
        rows = [*range(len(requests)), *(row for row, _ in worded)]
        owner_R = torch.tensor(rows).repeat_interleave(len(FRAMES))
        return self._keys(states_RLD[:own].unflatten(0, (-1, len(FRAMES))), states_RLD, owner_R)

    @torch.no_grad()
    def _questions_as_asked(self, ends_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`_questions`, of each request in the one frame it was captured in, which stands for the others."""
        return self._keys(ends_BLD[:, None].expand(-1, len(FRAMES), -1, -1), ends_BLD, torch.arange(len(ends_BLD)))

    def _keys(
        self, states_BFLD: torch.Tensor, asked_RLD: torch.Tensor, owner_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, and levels under which none of what must count as asked falls."""
        keys_BK, level_B = self.gate.keys(states_BFLD)
        query_RK, lean_R = self.gate.queries(asked_RLD)
        owner_R = owner_R.to(keys_BK.device)
        cosine_R = (query_RK * keys_BK[owner_R]).sum(-1) + lean_R
        return keys_BK.cpu(), level_B.scatter_reduce(0, owner_R, cosine_R - SLACK, "amin").cpu()
