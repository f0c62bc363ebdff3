"""What making edits took, and which of them could not be made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

import torch

from ibke.edit import Edit
from ibke.editors.base import Editor
from ibke.errors import (
    CaptureError,
    FingerprintMismatchError,
    IBKEError,
    MissingPackageError,
    ModelError,
    ModuleNotEditableError,
    RequestError,
    SettingError,
    TrainingError,
)
from ibke.evaluation.machine import ExtraMemory, peak_memory_mb
from ibke.evaluation.metrics import proportion, quantile
from ibke.request import EditRequest

FAILURES = (IBKEError, torch.linalg.LinAlgError)
"""How a method says that it cannot compute an edit: a loss or factors that are not finite, an unsolvable system."""
OF_ONE = (RequestError, CaptureError, torch.linalg.LinAlgError)
"""Those that concern one request alone, so that others of a file need not wait for it."""
FAULTS = (
    FingerprintMismatchError,
    MissingPackageError,
    ModelError,
    ModuleNotEditableError,
    RequestError,
    SettingError,
    TrainingError,
)
"""Those of them that are no failure of the method: what it was given is wrong, and would be for every edit alike."""


@dataclass(frozen=True)
class Attempt:
    """One edit of some requests, made or not.

    Args:
        count: of the requests.
        seconds: what it took, a failure's too.
        memory_mb: the most memory it needed above what the process held before.
        edit_bytes: the edit's own; None where it was not made.
        shared_bytes: what it holds and all edits of the method have in common.
        steps, rate_nats, achieved: of the edit; None where it was not made, or has none.
        why: it was not made; None where it was.
    """

    count: int
    seconds: float
    memory_mb: float | None = None
    edit_bytes: int | None = None
    shared_bytes: int = 0
    steps: int | None = None
    rate_nats: float | None = None
    achieved: bool | None = None
    why: str | None = None


class Costs:
    """What making the edits took; what a group of requests took together is shared out among them."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.editing_mb: float | None = None

    @property
    def tried(self) -> int:
        """How many requests an edit was tried for."""
        return sum(attempt.count for attempt in self.attempts)

    @property
    def made(self) -> list[bool]:
        """Whether each attempt came to an edit, in order."""
        return [attempt.why is None for attempt in self.attempts]

    def make(self, editor: Editor, requests: Sequence[EditRequest]) -> Edit | None:
        """Make one edit of some requests and keep its figures; None where it cannot be computed.

        Raises:
            IBKEError: the requests or the settings are to blame.
        """
        edit, error = None, None
        with ExtraMemory(editor.lm.device) as memory:
            start = time.perf_counter()
            try:
                edit = editor.edit(requests)
            except FAILURES as failure:
                error = failure
            seconds = time.perf_counter() - start
        self.attempts.append(Attempt(len(requests), seconds, memory.mb))
        if edit is None:
            assert error
            self.unmake(error)
            return None
        info, shared = edit.info, sum(part.shared_nbytes for part in edit.parts.values())
        self._note(edit_bytes=_bytes(edit) - shared, shared_bytes=shared)
        self._note(steps=info.refine_steps, rate_nats=info.rate_nats, achieved=info.achieved)
        return edit

    def after(self, editor: Editor, edit: Edit) -> Editor:
        """The editor for what follows the last edit; what it has to learn of it is part of that edit's time."""
        start = time.perf_counter()
        following = editor.after(edit)
        self._note(seconds=self.attempts[-1].seconds + time.perf_counter() - start)
        return following

    def unmake(self, error: Exception) -> None:
        """Have the last edit count as not made.

        Raises:
            IBKEError: the same, where the requests or the settings are to blame.
        """
        if isinstance(error, FAULTS):
            raise error
        last = self.attempts[-1]
        said = " ".join((str(error) if isinstance(error, IBKEError) else f"{type(error).__name__}: {error}").split())
        self.attempts[-1] = Attempt(last.count, last.seconds, last.memory_mb, why=said)

    def note_memory(self) -> None:
        """Remember the peak before anything has been asked."""
        if self.editing_mb is None:
            self.editing_mb = peak_memory_mb()

    def report(self) -> dict[str, Any]:
        """The part of a report on costs: time of all attempts, everything else of the edits that were made."""
        made = [attempt for attempt in self.attempts if attempt.why is None]
        whys = [attempt.why for attempt in self.attempts if attempt.why is not None]
        seconds = [each for a in self.attempts for each in [a.seconds / a.count] * a.count]
        rated = [(a.rate_nats, a.count) for a in made if a.rate_nats is not None]
        memory = _spread([a.memory_mb for a in made if a.memory_mb is not None])
        return {
            "not_made": self.tried - sum(attempt.count for attempt in made),
            "not_made_why": whys[0] if whys else None,
            "rate_nats": _per_request(rated),
            "seconds_per_edit": fmean(seconds),
            "bytes_per_edit": _per_request([(a.edit_bytes, a.count) for a in made if a.edit_bytes is not None]),
            "shared_bytes": max((a.shared_bytes for a in made), default=None),
            # Not the mean: what is taken once for a model, as statistics, would be of the first edit and so of all.
            "memory_per_edit_mb": memory["median"],
            "memory_mb": memory,
            "seconds": _spread(seconds),
            "steps": _spread([a.steps for a in made if a.steps is not None]),
            "achieved": asdict(proportion([float(a.achieved) for a in made if a.achieved is not None])),
            "peak_memory_editing_mb": self.editing_mb,
        }

    def _note(self, **figures: Any) -> None:
        self.attempts[-1] = replace(self.attempts[-1], **figures)


def _bytes(edit: Edit) -> int:
    """What is kept of an edit: what goes into the model, and what its gates are found from again beside other edits.

    An update of full rank need be no more than its matrix.
    """
    size = sum(part.nbytes for part in edit.parts.values())
    for some in edit.neurons.values():
        size += sum(tensor.nbytes for tensor in some.tensors().values())
        size += sum(tensor.nbytes for tensor in some.told.tensors().values()) if some.told else 0
    for a_RI, b_OR in edit.factors.values():
        size += min(a_RI.nbytes + b_OR.nbytes, a_RI.shape[1] * b_OR.shape[0] * a_RI.element_size())
    return size


def _per_request(groups: Sequence[tuple[float, int]]) -> float | None:
    """Mean over requests of what groups of them have together."""
    return sum(value for value, _ in groups) / sum(count for _, count in groups) if groups else None


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "median": None, "p95": None}
    return {"mean": fmean(values), "median": median(values), "p95": quantile(values, 0.95)}
