"""What every editing method has in common, and the registry that finds them."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from ibke.errors import IBKEError

if TYPE_CHECKING:
    from ibke.edit import Edit
    from ibke.models import LanguageModel
    from ibke.request import EditRequest

# One line a method: its name and where its class is. Nothing is imported until it is asked for.
METHODS: dict[str, str] = {
    "ibke": "ibke.editors.ibke.editor:IBKEEditor",
}

Progress = Callable[[int, int], None]


class Editor(ABC):
    """Turns edit requests into an :class:`~ibke.edit.Edit` without touching the model.

    Args:
        lm: the model to be corrected.
    """

    name: ClassVar[str]

    def __init__(self, lm: LanguageModel):
        self.lm = lm

    @classmethod
    def for_model(cls, lm: LanguageModel, path: str | None = None, **settings: Any) -> Editor:
        """An editor ready for use with a model.

        Args:
            lm: the model.
            path: folder of trained weights, for methods that have them; None takes what ships for this model.
            settings: method settings that differ from the defaults.
        """
        del path
        return cls(lm, **settings)

    @abstractmethod
    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit that makes all requests true together.

        Raises:
            RequestError: no request, or one that does not fit the model's window.
        """

    def edit_each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[Edit]:
        """Independent Edits, one a request, each as if made alone on the pristine model."""
        edits = []
        for index, request in enumerate(requests):
            edits.append(self.edit([request]))
            if progress:
                progress(index + 1, len(requests))
        return edits


def method_class(name: str) -> type[Editor]:
    """The class of a registered method.

    Raises:
        IBKEError: no such method; names the nearest one.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise IBKEError(f"there is no method {name!r}.", "method", f"{hint}Available: {', '.join(sorted(METHODS))}.")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
