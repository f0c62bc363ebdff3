"""Read a GGUF file into an ordinary transformers model."""

from __future__ import annotations

import io
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
        ModelError: not a GGUF file.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError("this is not a GGUF file.", str(path), "Give a GGUF file, a model folder or a hub id.")
    # Converting draws a progress bar of its own, with no switch to turn it off.
    with redirect_stderr(io.StringIO()):
        return _load(path, dtype)


def _load(path: Path, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Without `dequantize` the weights may stay packed in their blocks, where no edit can be folded into them.
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, quantization_config=GgufConfig(dequantize=True))
    return model, tokenizer
