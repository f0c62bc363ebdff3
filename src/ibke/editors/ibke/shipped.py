"""A trained editor on disk: safetensors beside a JSON manifest; and which one ships for which model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise
from torch import Tensor

from ibke.editors.ibke.bottleneck import Bottleneck
from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.ibke.statistics import Common, packed, unpacked
from ibke.errors import FormatError
from ibke.files import write_atomically
from ibke.fingerprint import check_fingerprint
from ibke.models import LanguageModel
from ibke.quantised import quantise, restore

MANIFEST, WEIGHTS, VERSION = "editor.json", "editor.safetensors", 8
WORDS = "common_SD"  # the tensor that is kept as bytes
BASIS = "key_basis_DE"  # orthonormal ones, which bytes would round too much
SHIPPED = Path(__file__).parent / "shipped"


def save_editor(folder: Path, network: Bottleneck, lm: LanguageModel, about: dict[str, Any]) -> None:
    """Write weights, matrices as bytes, and a manifest; each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor for name, tensor in network.state_dict().items() if name != WORDS}
    bases = {name: tensor.half() for name, tensor in state.items() if name.endswith(BASIS)}
    matrices = {name for name, tensor in state.items() if tensor.is_floating_point() and tensor.dim() >= 2} - set(bases)
    tensors = quantise(state, matrices) | bases
    tensors = {name: tensor.int() if tensor.dtype == torch.int64 else tensor for name, tensor in tensors.items()}
    tensors[WORDS] = packed(network.common_SD, network.spectrum)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    manifest = {
        "format": "ibke-editor",
        "version": VERSION,
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "module": network.name,
        "d_out": network.d_out,
        "config": json.loads(network.config.to_json()),
        **about,
    }
    for name, data in (
        (WEIGHTS, serialise(tensors)),
        (MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()),
    ):
        write_atomically(folder / name, data)


def _orthonormal(basis_DE: Tensor) -> Tensor:
    """The orthonormal matrix nearest to one that is so up to half precision, by two steps of Newton's method."""
    basis_DE = basis_DE.double()
    for _ in range(2):
        basis_DE = 1.5 * basis_DE - 0.5 * basis_DE @ (basis_DE.T @ basis_DE)
    return basis_DE.float()


def load_editor(folder: Path, lm: LanguageModel) -> tuple[Bottleneck, dict[str, Any]]:
    """Read an editor for a model.

    Raises:
        FormatError: no editor there, or a damaged one.
        FingerprintMismatchError: it was trained for other weights.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        raw = (folder / WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise FormatError(
            f"there is no editor here ({error}).", str(folder), "Train one with `ibke train`, or check the path."
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != "ibke-editor" or manifest.get("version") != VERSION:
        raise FormatError("this is not an editor of this version.", str(folder / MANIFEST), "Train it again.")
    try:
        check_fingerprint(manifest["fingerprint"], lm, f"the editor in {folder}")
        network = Bottleneck(IBKEConfig.from_dict(manifest["config"]), manifest["module"], manifest["d_out"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"the manifest is damaged ({type(error).__name__}: {error}).", str(folder / MANIFEST), "Train it again."
        ) from None
    try:
        tensors = restore(parse_tensors(raw))
        bases = {name: _orthonormal(tensor) for name, tensor in tensors.items() if name.endswith(BASIS)}
        network.load_state_dict(tensors | bases)
        network.know(Common(unpacked(network.common_SD, network.spectrum), network.common_ids_S2))
    except (SafetensorError, RuntimeError) as error:
        raise FormatError(
            f"the weights are damaged ({error}).", str(folder / WEIGHTS), "Fetch or train the editor again."
        ) from None
    return network.requires_grad_(False).eval().to(lm.device), manifest


def shipped_folder(lm: LanguageModel) -> Path:
    """Where the editor that ships for a model is.

    Raises:
        FormatError: none ships for these weights.
    """
    for path in sorted(SHIPPED.glob(f"*/{MANIFEST}")):
        if json.loads(path.read_bytes())["fingerprint"] == lm.fingerprint:
            return path.parent
    names = ", ".join(path.parent.name for path in SHIPPED.glob(f"*/{MANIFEST}")) or "none"
    raise FormatError(
        f"no trained editor ships for this model (fingerprint {lm.fingerprint}).",
        lm.name,
        f"Train one with `ibke train --model {lm.name}` and pass its folder. Shipped: {names}.",
    )
