"""Second moments of generic keys, C₀ = E[k kᵀ]: what a linear map is fed by running text.

ROME, MEMIT and AlphaEdit weigh an update against them, so that it changes least where generic keys are. They belong to
a model and a text alone; they are taken once, kept in the cache folder, and checked when they are read.

Shape suffixes: R rows, T tokens, N keys, I d_in.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from ibke.batch import Batch, Pair, collate
from ibke.errors import SettingError
from ibke.files import cache_folder, find_file, write_atomically
from ibke.models import LanguageModel
from ibke.modules import in_out
from ibke.partial import taking_input

CHUNK = 64  # tokens of running text seen at a time
LAYOUT = 1  # of the files kept; raised when what is computed changes


class Moments:
    """First and second moment of keys that come in parts, summed in double precision."""

    def __init__(self) -> None:
        self.count = 0
        self._sum_I: Tensor | float = 0.0
        self._sum_II: Tensor | float = 0.0

    def add(self, keys_NI: Tensor) -> None:
        """Take some keys into account."""
        keys_NI = keys_NI.float()
        self.count += len(keys_NI)
        self._sum_I = self._sum_I + keys_NI.sum(0).cpu().double()
        self._sum_II = self._sum_II + (keys_NI.T @ keys_NI).cpu().double()

    @property
    def first(self) -> Tensor:
        """E[k] (I, float64); not a number where no key was added."""
        return torch.as_tensor(self._sum_I, dtype=torch.float64) / self.count

    @property
    def second(self) -> Tensor:
        """E[k kᵀ] (I × I, float64); not a number where no key was added."""
        return torch.as_tensor(self._sum_II, dtype=torch.float64) / self.count


def words_of(batch: Batch) -> Tensor:
    """Which tokens say something of generic keys (R × T): real ones, but not the first of a row.

    A first position holds a massive activation that belongs to no word and would outweigh all others.
    """
    words_RT = batch.attention_RT.bool().clone()
    words_RT[:, 0] = False
    return words_RT


def ending_in(batch: Batch) -> Tensor:
    """The token before each and the token itself (R × T × 2); what is before a row's first says nothing."""
    return torch.stack([batch.ids_RT.roll(1, dims=1), batch.ids_RT], dim=-1)


def key_moments(
    lm: LanguageModel, modules: Mapping[str, nn.Module], text: str = "", tokens: int = 50_000
) -> dict[str, Tensor]:
    """C₀ of each module (I × I, float64, on the CPU), from the cache folder where it has been taken before.

    A file there counts only if it says of itself that it is of this model, dtype, module and text; any other is taken
    anew and replaced. The model must be the pristine one: detach edits first.

    Args:
        lm: the model.
        modules: linear modules by name, in the order in which they are run.
        text: a file of running text, as it is or relative to the data folder; empty takes our own, some 7,000 tokens.
        tokens: most tokens read. SmolLM2-135M takes about a minute for the default on one core.

    Raises:
        SettingError: the text cannot be read, or is shorter than ``CHUNK`` tokens.
    """
    rows = list(text_rows(lm.tokenizer, lines_of(text), tokens))
    if not rows:
        raise SettingError(
            f"the text and the budget of {tokens} tokens give not even one row of {CHUNK}.",
            text or "key statistics",
            "Name a longer text, or raise `tokens`.",
        )
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    identity = {
        name: {
            "layout": LAYOUT,
            "model": lm.fingerprint,
            "dtype": str(lm.dtype),
            "module": name,
            "tokens": digest,
        }
        for name in modules
    }
    found = {name: _read(_path(identity[name]), identity[name], in_out(modules[name])[0]) for name in modules}
    missing = {name: module for name, module in modules.items() if found[name] is None}
    if missing:
        taken = second_moments(lm, missing, row_batches(rows, lm.tokenizer, lm.device))
        for name, moment_II in taken.items():
            _keep(_path(identity[name]), identity[name], moment_II)
        found |= taken
    return {name: moment_II.double() for name, moment_II in found.items() if moment_II is not None}


@torch.no_grad()
def second_moments(lm: LanguageModel, modules: Mapping[str, nn.Module], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """E[k kᵀ] of each module's inputs over some batches (I × I, float32); nothing after the last module is run."""
    moments = {name: Moments() for name in modules}
    last = list(modules)[-1]
    for batch in batches:
        with ExitStack() as stack:
            taken = {
                name: stack.enter_context(taking_input(module, last=name == last)) for name, module in modules.items()
            }
            lm.model.base_model(input_ids=batch.ids_RT, attention_mask=batch.attention_RT, use_cache=False)
        words_RT = words_of(batch)
        for name, (keys, *_) in taken.items():
            # Some models flatten rows and tokens before a linear module.
            moments[name].add(keys.reshape(*words_RT.shape, -1)[words_RT])
    return {name: some.second.float() for name, some in moments.items()}


def text_rows(tokenizer: Any, texts: Iterable[str], tokens: int) -> Iterator[list[int]]:
    """Running text in rows of ``CHUNK`` tokens, ``tokens`` of it at most; what does not fill a row is left out."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) >= tokens:
            break
    for begin in range(0, min(len(ids), tokens) - CHUNK + 1, CHUNK):
        yield ids[begin : begin + CHUNK]


def row_batches(rows: Sequence[list[int]], tokenizer: Any, device: torch.device) -> Iterator[Batch]:
    """Rows of tokens as batches."""
    yield from pair_batches([Pair(row, row[:1], (0, len(row))) for row in rows], tokenizer, device)


def text_batches(tokenizer: Any, texts: Iterable[str], tokens: int, device: torch.device) -> Iterator[Batch]:
    """Running text as batches of rows of ``CHUNK`` tokens."""
    yield from row_batches(list(text_rows(tokenizer, texts, tokens)), tokenizer, device)


def pair_batches(pairs: Sequence[Pair], tokenizer: Any, device: torch.device) -> Iterator[Batch]:
    """Prompts of like length together."""
    ordered = iter(sorted(pairs, key=len))
    while some := list(islice(ordered, 32)):
        yield collate(some, tokenizer.pad_token_id, device)


def lines_of(text: str) -> Iterator[str]:
    """The lines of a text file, or the longest text of each record of a JSON list; our own text where none is named.

    Raises:
        SettingError: it cannot be read.
    """
    place = find_file(text) if text else files("ibke.data").joinpath("text.txt")
    try:
        with place.open(encoding="utf-8-sig") as lines:
            if place.name.endswith(".json"):
                for record in json.load(lines):
                    yield max((value for value in record.values() if isinstance(value, str)), key=len) + "\n"
            else:
                yield from lines
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise SettingError(
            f"the text cannot be read ({error}).",
            str(place),
            "Name a text file in UTF-8, or a JSON list of records that hold texts.",
        ) from None


def _path(identity: Mapping[str, Any]) -> Path:
    name = re.sub(r"[^\w.-]", "_", identity["module"])
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return cache_folder() / "statistics" / identity["model"] / f"{name}-{digest}.safetensors"


def _read(path: Path, identity: Mapping[str, Any], size: int) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            moment_II = file.get_tensor("moment")
            mine = json.loads((file.metadata() or {})["identity"]) == identity
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    fits = mine and moment_II.shape == (size, size) and bool(torch.isfinite(moment_II).all())
    return moment_II if fits else None


def _keep(path: Path, identity: Mapping[str, Any], moment_II: Tensor) -> None:
    data = serialise({"moment": moment_II.contiguous()}, {"identity": json.dumps(identity)})
    # A cache that cannot be written costs time and nothing else.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
