"""Load a causal language model by bundled name, folder, ``.gguf`` file or hub id, and fingerprint it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ibke.bundled import BUNDLED, MANIFEST, Progress, ensure
from ibke.errors import IBKEError, ModelError, RequestError
from ibke.fingerprint import check_fingerprint, fingerprint
from ibke.frames import Frame, encode_pair
from ibke.gguf import complete, read_gguf
from ibke.greedy import Stops, greedy
from ibke.linear import speed_up
from ibke.modules import Architecture, architecture_of, end_tokens

__all__ = ["LanguageModel", "check_fingerprint", "load_model"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LanguageModel:
    """A frozen model and what is needed to edit it.

    Args:
        model: the transformers model, in evaluation mode, without gradients for its weights.
        tokenizer: its tokenizer, with a padding token.
        name: what it was loaded as.
        architecture: where its editable modules are.
        fingerprint: hash of its weights (see ``ibke.fingerprint``).
        sessions: those that have edits attached to it (see ``ibke.session``).
        merged: those that have edits merged into it; its fingerprint is still that of the weights before.
    """

    model: Any
    tokenizer: Any
    name: str
    architecture: Architecture
    fingerprint: str
    sessions: list[Any] = field(default_factory=list, repr=False, compare=False)
    merged: list[Any] = field(default_factory=list, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.model.parameters()).dtype

    @property
    def window(self) -> int | None:
        """How many tokens it can be fed; None where nothing bounds them."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def refuse_beyond_window(self, asked: int, max_new_tokens: int) -> None:
        """Refuse what it cannot be fed.

        Args:
            asked: length of the longest prompt (tokens).
            max_new_tokens: of the longest answer (tokens).

        Raises:
            RequestError: both together are longer than its window.
        """
        if self.window and asked + max_new_tokens > self.window:
            raise RequestError(
                f"a prompt of {asked} tokens and an answer of {max_new_tokens} exceed the model's window of "
                f"{self.window}.",
                self.name,
                "Shorten the prompt." if asked > max_new_tokens else "Ask for a shorter answer.",
            )

    @property
    def stops(self) -> Stops:
        """What ends an answer of it."""
        return Stops(end_tokens(self.model, self.tokenizer), self.tokenizer)

    def answer(self, prompt: str, frame: Frame = "bare", max_new_tokens: int = 40) -> str:
        """The model's greedy answer, edits that are attached included, up to its end token or a new line.

        Args:
            prompt: what is asked.
            frame: how it is put to the model.
            max_new_tokens: the longest answer (tokens).

        Raises:
            RequestError: a blank prompt, or one that does not fit the model's window with its answer.
        """
        if not prompt.strip():
            raise RequestError("the prompt is empty.", self.name, "Give it a text.")
        asked, stops = encode_pair(prompt, "-", frame, self.tokenizer).prompt, self.stops
        self.refuse_beyond_window(len(asked), max_new_tokens)
        (made,) = greedy(self.model, [asked], self.tokenizer.pad_token_id, stops, max_new_tokens)
        return stops.answer(made).text


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    progress: Progress | None = None,
    modules: Iterable[str] | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a model for editing.

    Args:
        name_or_path: a bundled name (``smollm2-135m``), a folder, a ``.gguf`` file, or a hub id.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: bfloat16 on a CPU with ``avx512_bf16`` or
            ``amx_bf16`` and on a GPU that computes in it, else float32.
        device: e.g. ``cpu`` or ``cuda``; ``auto`` takes the GPU if there is one.
        progress: told about downloads, as (what, bytes done, bytes in all).
        modules: full dotted names of the modules to edit, for an architecture that is not in the table.
        trust_remote_code: whether code that comes with a hub model may run.

    Raises:
        ModelError: the model cannot be found, fetched or read.
        ModuleNotEditableError: a name in ``modules`` does not exist or is not linear.
    """
    place, wanted = place_and_dtype(device, dtype)
    name = str(name_or_path)
    try:
        with _quiet():
            if name in BUNDLED:
                model, tokenizer, mark = _load_bundled(name, wanted, progress)
            else:
                model, tokenizer = _load_any(name, wanted, trust_remote_code)
                mark = fingerprint(model)
    except (IBKEError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # a damaged file makes transformers, gguf and safetensors raise all sorts of things
        raise ModelError(
            f"it cannot be loaded ({type(error).__name__}: {_first_line(error)}).", name, _todo(name)
        ) from error
    # A float16 model is fingerprinted as stored and rounded only now; buffers such as rotary frequencies keep theirs.
    for parameter in model.parameters():
        if parameter.is_floating_point() and wanted == torch.float16:
            parameter.data = parameter.data.to(wanted)
    model.eval().requires_grad_(False).to(place)
    speed_up(model)
    _feed_head_contiguous(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LanguageModel(model, tokenizer, name, architecture_of(model, modules), mark)


def _feed_head_contiguous(model: Any) -> None:
    # `generate` hands the output embedding a strided slice (the last position of each row). PyTorch's bfloat16 product
    # falls off its fast path on that: 20 s instead of 14 ms for 96 rows on two AMX cores.
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))


def _load_bundled(name: str, dtype: torch.dtype, progress: Progress | None) -> tuple[Any, Any, str]:
    folder = ensure(BUNDLED[name], progress)
    advice = f"Delete the folder {folder} and load the model again."
    try:
        model, tokenizer = _load_folder(str(folder), dtype)
        expected = json.loads((folder / MANIFEST).read_text())["fingerprint"]
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(f"the cached copy is damaged ({_first_line(error)}).", str(folder), advice) from error
    mark = fingerprint(model)
    if mark != expected:
        raise ModelError("the weights of the cached copy have changed.", str(folder), advice)
    return model, tokenizer, mark


def _load_any(name: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Any]:
    path = Path(name).expanduser()
    if path.is_file():
        return read_gguf(path, torch.float32 if dtype == torch.float16 else dtype)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError("the folder holds no config.json.", str(path), "Give a folder saved by transformers.")
        return _load_folder(str(path), dtype, trust_remote_code)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise ModelError("there is no such file or folder.", name, "Check the path.")
    return _load_folder(name, dtype, trust_remote_code)


def _load_folder(source: str, dtype: torch.dtype, trust_remote_code: bool = False) -> tuple[Any, Any]:
    # Weights in safetensors only: other formats are pickles, which can run code.
    loaded = AutoModelForCausalLM.from_pretrained(
        source,
        dtype="auto" if dtype == torch.float16 else dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    return complete(loaded, source), AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def place_and_dtype(device: str | torch.device, dtype: str | torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Where a model would go and in which numbers, without loading it; as for :func:`load_model`.

    Raises:
        ModelError: there is no such device here, or no such dtype.
    """
    place = _device(device)
    return place, _dtype(dtype, place)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}.", "device", "Use auto, cpu or cuda.") from error
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = here is not None and place.type == here.type and (place.index or 0) < torch.accelerator.device_count()
    if place.type != "cpu" and not there:
        raise ModelError(f"there is no device {str(device)!r} here.", "device", "Use auto or cpu.")
    return place


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if _computes_bfloat16(device) else torch.float32
    if dtype not in _DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}.", "dtype", f"Use auto, {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Without these instructions bfloat16 is emulated, slower than float32. Linux tells; elsewhere stay with float32.
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return device.type == "cpu" and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' own progress bars; the caller has ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _todo(name: str) -> str:
    if Path(name).expanduser().exists():
        return "Check that it is complete, and a causal language model in safetensors or GGUF."
    return f"Check the name and the network. Models known by name: {', '.join(BUNDLED)}."
