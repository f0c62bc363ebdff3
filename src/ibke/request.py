"""What somebody asks for: one fact to correct, validated before anything is computed."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ibke.errors import RequestError
from ibke.subjects import place_of, subject_of


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer is watched, with the answer expected there when one is known.

    Args:
        prompt: text asked of the model.
        target: the answer wanted (portability) or believed true (locality); None where only
            agreement with the unedited model counts.
        family: what the probe is about, e.g. ``same_subject``, ``same_relation``, ``unrelated``, ``one_hop``.

    Raises:
        RequestError: an empty prompt, a field that is no text, or half a character.

    Letters with marks are kept as one character each (NFC), here and in requests, however they were typed.
    """

    prompt: str
    target: str | None = None
    family: str = "unrelated"

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise RequestError("a probe has an empty prompt.", "probe", "Give it a text, or leave it out.")
        for name, kinds in (("target", str | None), ("family", str)):
            if not isinstance(value := getattr(self, name), kinds):
                what = f"a probe's `{name}` is no text but {type(value).__name__}."
                raise RequestError(what, "probe", "Write it as a text, or leave it out.")
        _refuse_halves("probe", self.prompt, self.target, self.family)
        for name in ("prompt", "target"):
            object.__setattr__(self, name, (text := getattr(self, name)) and composed(text))

    @property
    def answer(self) -> str:
        """The target without the space around it; empty where none is known."""
        return (self.target or "").strip()


@dataclass(frozen=True)
class EditRequest:
    """One correction: asked ``prompt``, the model shall answer ``target_new``.

    Args:
        prompt: a statement to complete or a question.
        target_new: the answer wanted, without leading space.
        subject: the thing the fact is about, as it stands in the prompt; optional.
        target_true: what the model says, or the world says, today; optional.
        rephrase_prompts: other wordings that must give the new answer too.
        locality: probes whose answers must stay as they are.
        portability: probes whose answers must follow from the new fact.
        case: what requests that belong together have in common; they stand in the order in which they are to be made.

    Raises:
        RequestError: empty prompt or target, a field that is no text, a subject that does not occur in the prompt, or
            half a character.
    """

    prompt: str
    target_new: str
    subject: str | None = None
    target_true: str | None = None
    rephrase_prompts: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = field(default=())
    portability: tuple[Probe, ...] = field(default=())
    case: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rephrase_prompts, str) or not isinstance(self.rephrase_prompts, Iterable):
            raise RequestError("`rephrase_prompts` must be a list of texts.", "edit request", EXPECTED)
        object.__setattr__(self, "rephrase_prompts", tuple(self.rephrase_prompts))
        for name in ("prompt", "target_new", "subject", "target_true", "case"):
            object.__setattr__(self, name, _text(getattr(self, name), name, name in ("prompt", "target_new")))
        texts = (_text(text, f"rephrase_prompts[{at}]", True) for at, text in enumerate(self.rephrase_prompts))
        object.__setattr__(self, "rephrase_prompts", tuple(texts))
        # What is blank says nothing, and a space at a subject's end would move where it ends.
        object.__setattr__(self, "subject", (self.subject or "").strip() or None)
        object.__setattr__(self, "target_true", self.target_true if (self.target_true or "").strip() else None)
        if self.subject is not None and not place_of(self.subject, self.prompt):
            raise RequestError(
                f"the subject {self.subject!r} does not occur in the prompt {self.prompt!r}.",
                "edit request",
                "Write it as it stands in the prompt, or leave `subject` out.",
            )
        for name in ("locality", "portability"):
            probes = tuple(_probe(item, name) for item in _as_list(getattr(self, name), name))
            object.__setattr__(self, name, probes)

    @cached_property
    def about(self) -> str:
        """The subject, or what is guessed to be it."""
        return subject_of(self.prompt, self.subject, self.rephrase_prompts)

    def for_editor(self) -> EditRequest:
        """What an editor is shown when it is examined: paraphrases and probes are for the examination."""
        return EditRequest(self.prompt, self.target_new, self.subject, self.target_true)

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON-ready values; fields left empty are left out."""
        return {key: value for key, value in asdict(self).items() if value not in (None, (), [])}

    @classmethod
    def from_dict(cls, record: Any) -> EditRequest:
        """Build a request from a parsed JSON object.

        Raises:
            RequestError: not an object, an unknown or missing field, or a field of the wrong type.
        """
        if not isinstance(record, dict):
            raise RequestError(f"expected an object, got {type(record).__name__}.", "edit request", EXPECTED)
        unknown = set(record) - set(cls.__dataclass_fields__)
        if unknown:
            raise RequestError(f"unknown field {sorted(unknown)[0]!r}.", "edit request", EXPECTED)
        missing = {"prompt", "target_new"} - set(record)
        if missing:
            raise RequestError(f"field {sorted(missing)[0]!r} is missing.", "edit request", EXPECTED)
        rephrases = record.get("rephrase_prompts") or ()
        if not isinstance(rephrases, list | tuple):
            raise RequestError("`rephrase_prompts` must be a list of texts.", "edit request", EXPECTED)
        return cls(**record | {"rephrase_prompts": tuple(rephrases)})


EXPECTED = (
    "A request has `prompt`, `target_new`, and optionally `subject`, `target_true`, `rephrase_prompts`, "
    "`locality`, `portability`, `case`."
)


def composed(text: str) -> str:
    """A text with each letter and its marks as one character (NFC), as tokenizers have mostly met them."""
    return unicodedata.normalize("NFC", text)


def _text(value: Any, name: str, needed: bool) -> str | None:
    """A field's text.

    Raises:
        RequestError: it is none, or blank where one is needed, or holds half a character.
    """
    if value is not None and not isinstance(value, str):
        raise RequestError(f"`{name}` is no text but {type(value).__name__}.", "edit request", "Write it as a text.")
    if needed and not (value or "").strip():
        todo = "Remove it." if name.endswith("]") else f"Give `{name}` a text."
        raise RequestError(f"`{name}` is empty.", "edit request", todo)
    _refuse_halves("edit request", value)
    return value and composed(value)


def _refuse_halves(where: str, *texts: str | None) -> None:
    """Refuse half a surrogate pair, of which tokenizers and files make nothing.

    Raises:
        RequestError: a text has one.
    """
    try:
        for text in texts:
            (text or "").encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise RequestError(f"it is no valid Unicode: {half!r} is half a character.", where, "Write it whole.") from None


def _as_list(value: Any, name: str) -> list[Any] | tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise RequestError(f"`{name}` must be a list.", "edit request", EXPECTED)
    return value


def _probe(item: Any, name: str) -> Probe:
    if isinstance(item, Probe):
        return item
    record = {"prompt": item} if isinstance(item, str) else item
    if isinstance(record, dict) and "prompt" in record and set(record) <= {"prompt", "target", "family"}:
        try:
            return Probe(**record)
        except RequestError as error:
            raise RequestError(f"`{name}`: {error.what}", "edit request", error.todo) from None
    raise RequestError(
        f"an entry of `{name}` is neither a text nor an object with `prompt`, `target`, `family`.",
        "edit request",
        "Write a prompt, or {'prompt': …, 'target': …, 'family': …}.",
    )


def read_requests(path: str | Path) -> Iterator[EditRequest]:
    """Stream edit requests from a JSON Lines file, one a line.

    Raises:
        RequestError: the file cannot be read, or a line is not a valid request; names file and line.
    """
    return (request for _, request in placed_requests(path))


def placed_requests(path: str | Path) -> Iterator[tuple[str, EditRequest]]:
    """What :func:`read_requests` reads, each with the file and line where it stands.

    Raises:
        RequestError: as there.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    why = getattr(error, "msg", "nested too deeply, or a number too long")
                    raise RequestError(f"not valid JSON ({why}).", where, "Write one object a line.") from None
                try:
                    yield where, EditRequest.from_dict(record)
                except RequestError as error:
                    raise RequestError(error.what, where, error.todo) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot be read ({error}).", str(path), "Check the path and that it is UTF-8.") from None


def normal_form(request: EditRequest) -> tuple[str, str]:
    """Prompt and target as they are compared: without case, spare space, and what ends the target.

    Of the same prompt two requests with different targets contradict each other.
    """
    return plain(request.prompt), plain(request.target_new).rstrip(".!?")


def plain(text: str) -> str:
    """A text as it is compared: without case and spare space."""
    return " ".join(text.split()).casefold()


def refuse_contradictions(requests: Iterable[EditRequest], where: str = "requests") -> int:
    """Of one prompt only one target can come; returns how many requests there are.

    Only a hash of each prompt and target is kept, so a file of any length may be passed through.

    Raises:
        RequestError: two requests say different things; names both.
    """
    known: dict[int, tuple[int, int, str]] = {}
    count = 0
    for count, request in enumerate(requests, start=1):
        # Of the same target in another spelling both can come.
        prompt, target = normal_form(request)
        first, said, shown = known.setdefault(hash(prompt), (count, hash(target), request.target_new[:60]))
        if said != hash(target):
            raise RequestError(
                f"requests {first} and {count} say different things, {shown!r} and {request.target_new[:60]!r}.",
                f"{where}, prompt {request.prompt[:60]!r}",
                "Leave one of them out.",
            )
    return count
