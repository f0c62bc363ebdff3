"""What a bench is to measure: methods × data sets × protocols × seeds, a cell each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ibke.errors import IBKEError, RequestError
from ibke.evaluation.protocols import Protocol
from ibke.evaluation.side_effects import Beside
from ibke.files import digest

NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Contender:
    """A method under a name of its own, so that one method can compete with itself under other settings.

    Args:
        label: the name.
        method: of the method.
        settings: those that differ from the method's own.
        editor: folder of trained weights; None takes what ships.
        under: settings that differ from these in turn, by protocol; what suits a single edit need not suit hundreds.
    """

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    editor: str | None = None
    under: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name(self.label, "--methods")

    def at(self, protocol: Protocol) -> Contender:
        """The same with what is set of it for one protocol."""
        return replace(self, settings={**self.settings, **self.under.get(str(protocol), {})}, under={})


@dataclass(frozen=True)
class DataSet:
    """A file, or folder, of requests.

    Args:
        name: by which results go.
        path: where it is, as it is or in :func:`~ibke.files.data_folder`; kept as given, so that a cell is the same one
            wherever data sets are.
        format: a key of ``READERS``.
    """

    name: str
    path: str
    format: str

    def __post_init__(self) -> None:
        _check_name(self.name, "--data")

    @classmethod
    def parse(cls, text: str) -> DataSet:
        """A data set written as ``NAME=FILE:FORMAT``.

        Raises:
            IBKEError: it is not written like that.
        """
        name, equals, rest = text.partition("=")
        path, colon, format = rest.rpartition(":")
        if not (equals and colon and name and path and format):
            raise IBKEError(f"{text!r} is no data set.", "--data", "Write NAME=FILE:FORMAT.")
        return cls(name, path, format)


@dataclass(frozen=True)
class Stage:
    """A protocol, and how many edits it gets.

    Args:
        protocol: how edits are made.
        limit: at most so many are drawn; None takes all.
    """

    protocol: Protocol
    limit: int | None

    @classmethod
    def parse(cls, text: str, limit: int | None) -> Stage:
        """A protocol, with a number of edits of its own after a slash where it has one: ``sequential:100/500``.

        Raises:
            RequestError: it is not written like that.
        """
        protocol, slash, own = text.partition("/")
        if slash and (not own.isdecimal() or int(own) < 1):
            raise RequestError(f"{own!r} is no number of edits.", text, "Write it as in sequential:100/500.")
        return cls(Protocol.parse(protocol), int(own) if slash else limit)


@dataclass(frozen=True)
class Conditions:
    """What is the same in every cell: the model, how it is asked, and what is put to it beside the edits' questions."""

    model: str
    device: str = "auto"
    dtype: str = "float32"
    modules: tuple[str, ...] = ()
    frames: tuple[str, ...] = ("bare",)
    edit_frame: str = "bare"
    beside: Beside | None = None


@dataclass(frozen=True)
class Cell:
    """One evaluation."""

    contender: Contender
    data: DataSet
    stage: Stage
    seed: int
    conditions: Conditions

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.contender.label}, {self.data.name}, {self.stage.protocol}, seed {self.seed}"

    @property
    def spec(self) -> dict[str, Any]:
        """All that decides its result, JSON-ready."""
        contender = self.contender.at(self.stage.protocol)
        known = {name: value for name, value in asdict(contender).items() if name != "under"}
        return {
            "contender": {**known, "settings": _plain(contender.settings)},
            "data": asdict(self.data),
            "protocol": str(self.stage.protocol),
            "limit": self.stage.limit,
            "seed": self.seed,
            # Left out where it is nothing, so that cells from before it could be asked for are still found.
            "conditions": {k: v for k, v in _plain(asdict(self.conditions)).items() if k != "beside" or v},
        }

    @property
    def file(self) -> str:
        """Its file's name; the label in it is not all that tells it from others, so cells of other settings stay."""
        protocol = str(self.stage.protocol).replace(":", "-")
        return f"{self.data.name}.{protocol}.{self.contender.label}.{self.seed}.{digest(self.spec)[:8]}.json"


@dataclass(frozen=True)
class Plan:
    """All cells of a bench.

    Raises:
        IBKEError: nothing to compare, or the same name twice.
    """

    contenders: Sequence[Contender]
    data: Sequence[DataSet]
    stages: Sequence[Stage]
    seeds: Sequence[int]
    conditions: Conditions

    def __post_init__(self) -> None:
        parts: dict[str, list[Any]] = {
            "--methods": [contender.label for contender in self.contenders],
            "--data": [data.name for data in self.data],
            "--protocols": [str(stage.protocol) for stage in self.stages],
            "--seeds": list(self.seeds),
        }
        for option, names in parts.items():
            if not names:
                raise IBKEError("there is nothing in it.", option, "Name at least one.")
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise IBKEError(f"{twice!r} is in it twice.", option, "Name each once.")

    @property
    def cells(self) -> list[Cell]:
        """In the order in which they are run: all methods on the same edits before the next edits."""
        return [
            Cell(contender.at(stage.protocol), data, stage, seed, self.conditions)
            for seed in self.seeds
            for data in self.data
            for stage in self.stages
            for contender in self.contenders
        ]


def _check_name(name: str, option: str) -> None:
    if not NAME.fullmatch(name):
        raise IBKEError(f"{name!r} is no name.", option, "Use letters, digits, dots, dashes and underscores.")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same as JSON gives it back."""
    return {name: _as_json(value) for name, value in values.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _plain(value)
    if isinstance(value, tuple | list):
        return [_as_json(item) for item in value]
    # JSON knows no infinity, and a cell is found again by what is written of it.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
