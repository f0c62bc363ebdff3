"""What the unedited model says, kept on disk: every method on the same edits is compared with the same answers."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ibke.files import cache_folder, digest, write_atomically
from ibke.models import LanguageModel

LAYOUT = 1  # of what is kept; a new one makes the old unseen, never misread


class Baseline:
    """Remembers what a model that nothing has changed since it was loaded answered to the very same batches.

    While edits are merged into its weights it knows nothing and keeps nothing.

    Batches and the machine's number format decide how sums are rounded, so another model, dtype, device, number of
    threads or release of PyTorch finds nothing here.

    Args:
        lm: the model as loaded.
        folder: where answers are kept; None keeps none.
    """

    def __init__(self, lm: LanguageModel, folder: Path | None = None):
        self.lm, self.folder = lm, folder
        kind = type(lm.model.get_output_embeddings()).__name__
        self.about = [LAYOUT, lm.fingerprint, str(lm.dtype), str(lm.device), kind, torch.__version__]

    @classmethod
    def in_cache(cls, lm: LanguageModel) -> Baseline:
        """One that keeps what it is told in the cache folder."""
        return cls(lm, cache_folder() / "answers")

    def recall(self, asked: Any) -> Any:
        """What was answered before; None where nothing is known.

        Args:
            asked: JSON-ready, everything that decides the answer besides the model.
        """
        try:
            return json.loads(self._place(asked).read_bytes()) if self.folder and not self.lm.merged else None
        except (OSError, ValueError):  # not there, or damaged
            return None

    def keep(self, asked: Any, answered: Any) -> None:
        """Keep an answer, JSON-ready."""
        if self.folder and not self.lm.merged:
            # A cache that cannot be written costs time and nothing else.
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self._place(asked), json.dumps(answered).encode())

    def _place(self, asked: Any) -> Path:
        assert self.folder
        return self.folder / f"{digest([*self.about, torch.get_num_threads(), asked])}.json"
