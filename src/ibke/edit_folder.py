"""The folder an edit is kept in: a JSON record, and a safetensors file that the record names by its hash.

The record is replaced last, so whoever looks sees the old edit or the new one, also after an interruption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise
from torch import Tensor

from ibke.errors import FormatError
from ibke.files import write_atomically

FORMAT, VERSION = "ibke-edit", 4
READABLE = (2, 3, 4)  # 2 knows of no parts, 3 of no gates to be told apart
INDEX = "edit.json"


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file; the same ones are the same bytes."""
    # Copied, since safetensors refuses views and tensors that share memory.
    whole = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    return serialise(whole)


def write_folder(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an edit's record and tensors.

    Raises:
        FormatError: the folder cannot be written.
    """
    raw = to_bytes(tensors)
    digest = hashlib.sha256(raw).hexdigest()
    data = f"edit-{digest[:16]}.safetensors"
    index = {"format": FORMAT, "version": VERSION, "tensors": data, "sha256": digest, **record}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / data, raw)
        write_atomically(folder / INDEX, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
        for old in folder.glob("edit-*.safetensors"):
            if old.name != data:
                old.unlink()
    except OSError as error:
        raise FormatError(f"the edit cannot be written ({error}).", str(folder), "Choose another folder.") from error


def read_folder(folder: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The record and the tensors of an edit.

    Raises:
        FormatError: there is no edit, it is truncated or changed, of a newer format, or not an edit at all.
    """
    index = _read_index(folder)
    return index, _read_tensors(folder, index)


def clear_folder(folder: Path) -> bool:
    """Take an edit out of its folder, which goes too where nothing else is in it; any other folder is left alone.

    Returns:
        whether there was one.

    Raises:
        FormatError: it cannot be deleted.
    """
    try:
        _read_index(folder)
    except FormatError:
        return False
    try:
        (folder / INDEX).unlink()
        for data in folder.glob("edit-*.safetensors"):
            data.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise FormatError(f"the edit cannot be deleted ({error}).", str(folder), "Delete the folder.") from error
    return True


def _read_index(folder: Path) -> Mapping[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(
            f"there is no edit here ({error}).", str(folder), "Give a folder that holds an edit."
        ) from None
    except ValueError as error:
        raise FormatError(f"this is not valid JSON ({error}).", str(path), "Make the edit again.") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise FormatError("this is not an edit.", str(path), f"Its `format` should be {FORMAT!r}.")
    if index.get("version") not in READABLE:
        raise FormatError(
            f"format version {index.get('version')!r} is not the one understood here, {VERSION}.",
            str(path),
            "Use the version of ibke that wrote it, or a newer one.",
        )
    return index


def _read_tensors(folder: Path, index: Mapping[str, Any]) -> dict[str, Tensor]:
    # Only the bare name counts: an index from elsewhere must not lead out of its folder.
    path = folder / Path(str(index.get("tensors"))).name
    try:
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != index.get("sha256"):
            raise FormatError("the file is truncated or was changed.", str(path), "Make the edit again.")
        return parse_tensors(raw)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"the factors cannot be read ({error}).", str(path), "Make the edit again.") from None
