"""Read a GGUF file into an ordinary transformers model."""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from ibke.errors import ModelError


def read_gguf(path: Path, dtype: Any) -> tuple[Any, Any]:
    """De-quantise a GGUF file.

    Args:
        path: the file.
        dtype: torch dtype of the weights; they are de-quantised in float32 and rounded once.

    Returns:
        (model, tokenizer)

    Raises:
        ModelError: not a GGUF file, or weights are missing.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError("this is not a GGUF file.", str(path), "Give a GGUF file, a model folder or a hub id.")
    # transformers mixes in whatever tokenizer or configuration files lie beside the GGUF file: show it the file alone.
    # Converting draws a progress bar of its own, with no switch to turn it off.
    with tempfile.TemporaryDirectory() as alone, redirect_stderr(io.StringIO()):
        link = Path(alone) / path.name
        link.symlink_to(path.resolve())
        return _load(link, str(path), dtype)


def _load(path: Path, name: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Without `dequantize` the weights may stay packed in their blocks, where no edit can be folded into them.
    loaded = AutoModelForCausalLM.from_pretrained(
        **source, dtype=dtype, quantization_config=GgufConfig(dequantize=True), output_loading_info=True
    )
    return complete(loaded, name), tokenizer


def complete(loaded: tuple[Any, dict[str, Any]], source: str) -> Any:
    """The model out of ``from_pretrained(..., output_loading_info=True)``, where no weight was left to chance.

    Raises:
        ModelError: weights are missing, which transformers would fill with random numbers.
    """
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{len(missing)} weights are missing, {missing[0]} among them.", source, "Fetch or save the model again."
        )
    return model
