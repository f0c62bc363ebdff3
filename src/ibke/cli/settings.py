"""Settings given on the command line as NAME=VALUE, read by the dataclass that has them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from ibke.errors import IBKEError

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Another setting of the method, as in steps=20. Repeat."),
]


def parse(texts: Sequence[str], *kinds: type) -> list[dict[str, Any]]:
    """Sort settings to the dataclasses they belong to; the first that has one of that name takes it.

    Args:
        texts: each NAME=VALUE.
        kinds: dataclasses; fields without a default are not settings.

    Returns:
        for each dataclass, the values given, of the kind its fields are.

    Raises:
        IBKEError: an unknown name, with the nearest one, or a value of the wrong kind.
    """
    known = [{item.name: item for item in fields(kind) if _default(item) is not MISSING} for kind in kinds]
    hints = [get_type_hints(kind) for kind in kinds]
    names = [name for some in known for name in some]
    chosen: list[dict[str, Any]] = [{} for _ in kinds]
    for text in texts:
        name, _, value = text.partition("=")
        owner = next((number for number, some in enumerate(known) if name in some), None)
        if owner is None:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise IBKEError(f"there is no setting {name!r}.", "--set", f"{hint}Known: {', '.join(names) or 'none'}.")
        chosen[owner][name] = _value(name, value, _default(known[owner][name]), hints[owner][name])
    return chosen


def _default(item: Field[Any]) -> Any:
    return item.default


def _value(name: str, text: str, default: Any, hint: Any) -> Any:
    """A setting's value, of the kind its type hint says."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    if NoneType in get_args(hint) and text.lower() == "none":
        return None
    kind = kinds[0]
    if get_origin(kind) is Literal and text not in get_args(kind):
        raise IBKEError(f"{text!r} is no value for {name!r}.", "--set", f"Known: {', '.join(get_args(kind))}.")
    try:
        if get_origin(kind) is Literal:
            return text
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if get_origin(kind) is tuple:
            parts = [part.strip() for part in text.split(",") if part.strip()]
            return tuple(get_args(kind)[0](part) for part in parts)
        value = kind(text)
        if value != value:  # no field may be not-a-number; infinity is for the dataclass to judge
            raise ValueError
        return value
    except (KeyError, ValueError):
        raise IBKEError(f"{text!r} is no value for {name!r}.", "--set", f"It is {default!r} if left out.") from None
