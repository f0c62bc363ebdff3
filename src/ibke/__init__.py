"""IBKE corrects facts in a causal language model without retraining it (arXiv 2512.16227).

The names below are imported when first used, so that ``import ibke`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibke.edit import Edit, EditInfo
    from ibke.editors.base import editor_for
    from ibke.errors import IBKEError
    from ibke.models import LanguageModel, load_model
    from ibke.request import EditRequest, Probe, read_requests
    from ibke.session import EditSession

__version__ = "0.1.0"

_HOMES = {
    "Edit": "ibke.edit",
    "EditInfo": "ibke.edit",
    "EditRequest": "ibke.request",
    "EditSession": "ibke.session",
    "IBKEError": "ibke.errors",
    "LanguageModel": "ibke.models",
    "Probe": "ibke.request",
    "editor_for": "ibke.editors.base",
    "load_model": "ibke.models",
    "read_requests": "ibke.request",
}

__all__ = [
    "Edit",
    "EditInfo",
    "EditRequest",
    "EditSession",
    "IBKEError",
    "LanguageModel",
    "Probe",
    "editor_for",
    "load_model",
    "read_requests",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ibke' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
