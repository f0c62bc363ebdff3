"""A trained hypernetwork on disk: safetensors beside a JSON manifest; and where those of a model are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise
from torch import Tensor

from ibke.errors import FormatError
from ibke.files import cache_folder, write_atomically
from ibke.fingerprint import check_fingerprint
from ibke.models import LanguageModel

FORMAT, VERSION = "ibke-hypernetwork", 1
MANIFEST, WEIGHTS = "editor.json", "editor.safetensors"


def run_folder(lm: LanguageModel, method: str) -> Path:
    """Where a method is trained for a model unless told otherwise; the editor is in ``editor``."""
    return cache_folder() / "editors" / lm.fingerprint / method


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], lm: LanguageModel, method: str, about: Mapping[str, Any]
) -> None:
    """Write weights and their manifest, each file whole or not at all, the manifest last."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"format": FORMAT, "version": VERSION, "method": method, "model": lm.name, "fingerprint": lm.fingerprint}
    write_atomically(folder / WEIGHTS, serialise({name: tensor.contiguous() for name, tensor in tensors.items()}))
    text = json.dumps({**manifest, **about}, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / MANIFEST, text.encode())


def read_folder(folder: Path, lm: LanguageModel, method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the manifest and the weights of a trained editor.

    Raises:
        FormatError: no editor of that method there, or a damaged one.
        FingerprintMismatchError: it was trained for other weights.
    """
    todo = f"Train one with `{command(lm, method)}`, or check the path."
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        raw = (folder / WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise FormatError(f"there is no trained editor here ({error}).", str(folder), todo) from None
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise FormatError("this is not a hypernetwork of this version.", str(folder / MANIFEST), todo)
    if missing := {"method", "fingerprint"} - manifest.keys():
        raise FormatError(f"the manifest is damaged: it has no {min(missing)!r}.", str(folder / MANIFEST), todo)
    if manifest["method"] != method:
        raise FormatError(f"this editor is of the method {manifest['method']!r}.", str(folder), todo)
    check_fingerprint(manifest["fingerprint"], lm, f"the editor in {folder}")
    try:
        return manifest, parse_tensors(raw)
    except SafetensorError as error:
        raise FormatError(f"the weights are damaged ({error}).", str(folder / WEIGHTS), "Train it again.") from None


def kept_folder(lm: LanguageModel, method: str) -> Path:
    """The trained editor of a method for a model in the cache folder.

    Raises:
        FormatError: there is none; the message says how to train one.
    """
    folder = run_folder(lm, method) / "editor"
    if not (folder / MANIFEST).is_file():
        raise FormatError(
            f"{method} has not been trained for this model (fingerprint {lm.fingerprint}).",
            str(folder),
            f"Train it with `{command(lm, method)}`, or name the folder of one with --editor.",
        )
    return folder


def command(lm: LanguageModel, method: str) -> str:
    """What trains a method for a model."""
    return f"ibke train --method {method} --model {lm.name} --data facts"
