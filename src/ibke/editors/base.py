"""What every editing method has in common, and the registry that finds them."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from ibke.errors import IBKEError, RequestError

if TYPE_CHECKING:
    from ibke.batch import Pair
    from ibke.edit import Edit
    from ibke.frames import Frame
    from ibke.models import LanguageModel
    from ibke.request import EditRequest

# One line a method: its name and where its class is. Nothing is imported until it is asked for.
METHODS: dict[str, str] = {
    "ibke": "ibke.editors.ibke.editor:IBKEEditor",
    "ibke-gated": "ibke.editors.gated.editor:GatedIBKE",
    "rome": "ibke.editors.rome:ROMEEditor",
    "memit": "ibke.editors.memit:MEMITEditor",
    "alphaedit": "ibke.editors.alphaedit:AlphaEditEditor",
    "ft": "ibke.editors.fine_tuning:FineTuning",
    "ft-l": "ibke.editors.fine_tuning:BoundedFineTuning",
    "lora": "ibke.editors.lora:LoRA",
    "ultraedit": "ibke.editors.ultraedit:UltraEdit",
    "mend": "ibke.editors.mend:MEND",
    "malmen": "ibke.editors.malmen:MALMEN",
    "rledit": "ibke.editors.rledit:RLEdit",
    "grace": "ibke.editors.grace:GRACE",
    "wise": "ibke.editors.wise.editor:WISE",
    "serac": "ibke.editors.serac.editor:SERAC",
    "ike": "ibke.editors.ike:IKE",
    "ike-retrieval": "ibke.editors.ike:IKERetrieval",
}

Progress = Callable[[int, int], None]


class Editor(ABC):
    """Turns edit requests into an :class:`~ibke.edit.Edit` without touching the model.

    Args:
        lm: the model to be corrected.
    """

    name: ClassVar[str]
    Settings: ClassVar[type | None] = None
    """Dataclass of the method's settings, of which the constructor takes one; the command line's ``--set`` reads it."""
    Config: ClassVar[type | None] = None
    """Dataclass of what is settled when the method is trained, for methods that are."""
    trained_by: ClassVar[str] = ""
    """Module whose ``train`` makes the method's weights, with ``Settings`` of a run; empty where there are none."""
    quick: ClassVar[Mapping[str, Any]] = {}
    """Settings under which the method is rough and fast, for tests of what holds whatever the settings are."""

    training_seconds: float | None = None
    """What training took up to the weights in use, wall-clock, caching included; None for methods without."""

    def __init__(self, lm: LanguageModel):
        self.lm = lm

    @property
    def mark(self) -> str:
        """What tells this editor's edits from those of another: a digest of method, settings and trained weights."""
        from ibke.fingerprint import mark

        network = getattr(self, "network", None)
        return mark(repr((self.name, getattr(self, "settings", None))), network.state_dict() if network else {})

    @classmethod
    def for_model(cls, lm: LanguageModel, path: str | None = None, **settings: Any) -> Editor:
        """An editor ready for use with a model.

        Args:
            lm: the model.
            path: folder of trained weights, for methods that have them; None takes what ships for this model.
            settings: method settings that differ from the defaults.

        Raises:
            IBKEError: a setting that the method has not, with the nearest one, or a folder for one without weights.
        """
        if path is not None:
            raise IBKEError(f"it has no trained weights to read from {str(path)!r}.", cls.name, "Name no folder.")
        return cls(lm, **settings) if cls.Settings is None else cls(lm, cls._settings(settings))  # type: ignore[call-arg]

    @classmethod
    def _settings(cls, given: Mapping[str, Any]) -> Any:
        assert cls.Settings is not None
        known = [item.name for item in fields(cls.Settings)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                raise IBKEError(f"there is no setting {name!r}.", cls.name, f"{hint}Known: {', '.join(known)}.")
        return cls.Settings(**given)

    @abstractmethod
    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """One Edit that makes all requests true together.

        The model is taken as it is, edits that are attached to it included, so a sequence is: edit, attach or merge,
        :meth:`after`, and again.

        Raises:
            RequestError: no request, or one that does not fit the model's window.
        """

    def edit_each(self, requests: Sequence[EditRequest], progress: Progress | None = None) -> list[Edit]:
        """Independent Edits, one a request, each made alone on the model as it is."""
        edits = []
        for index, request in enumerate(requests):
            edits.append(self.edit([request]))
            if progress:
                progress(index + 1, len(requests))
        return edits

    def rebuild(self, edit: Edit) -> Edit | None:
        """An edit of this method once more from its requests and its code; None where it is no function of these.

        Raises:
            IBKEError: it is not of this editor.
        """
        del edit
        return None

    def after(self, edit: Edit) -> Editor:
        """The editor for what follows, once an edit is in force on the model to stay (attached or merged).

        Methods that have to know of earlier edits return one that does, and are themselves as before; for all others
        nothing changes. What they have to know is in the edit or in the model, so a saved sequence can go on::

            with EditSession(lm) as session:
                for group in groups:
                    edit = editor.edit(group)
                    session.attach(edit)
                    editor = editor.after(edit)
        """
        del edit
        return self

    def pairs(self, requests: Sequence[EditRequest], frame: Frame = "bare") -> list[Pair]:
        """Tokenise the prompts and new targets of some requests; each pair knows where its subject is.

        Raises:
            RequestError: no request, or one that does not fit the model's window, its wordings and probes included.
        """
        if not requests:
            raise RequestError("there is no request.", "edit", "Pass at least one EditRequest.")
        for request in requests:  # what may be asked beside it has to fit, too
            for text in (*request.rephrase_prompts, *(probe.prompt for probe in request.locality)):
                self.pair(text, "-", frame)
        return [self.pair(request.prompt, request.target_new, frame, request.about) for request in requests]

    def pair(
        self, prompt: str, target: str, frame: Frame = "bare", subject: str | None = None, context: str = ""
    ) -> Pair:
        """Tokenise a prompt and its answer as :func:`~ibke.frames.encode_pair` does.

        Raises:
            RequestError: they do not fit the model's window.
        """
        from ibke.frames import encode_pair

        pair = encode_pair(prompt, target, frame, self.lm.tokenizer, subject, context)
        if (window := self.lm.window) and len(pair) > window:
            raise RequestError(
                f"prompt and target are {len(pair)} tokens, the model's window is {window}.",
                f"prompt {prompt[:60]!r}…",
                "Shorten the prompt.",
            )
        return pair


def editor_for(lm: LanguageModel, method: str = "ibke", path: str | None = None, **settings: Any) -> Editor:
    """An editor for a model, by the method's name.

    Args:
        lm: the model.
        method: as `ibke ls methods` has it.
        path: folder of trained weights; None takes what ships for this model.
        settings: that differ from the method's defaults.

    Raises:
        IBKEError: no such method or setting, with the nearest one, or nothing trained for this model.
    """
    return method_class(method).for_model(lm, path, **settings)


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
