"""Tells whether a prompt asks what an edit's prompt asks, from the states both leave behind.

At the subject nothing yet says what is asked of it; at the prompt's end it can be told. Two maps send what some MLPs
are fed at a prompt's last token to unit vectors: one makes the key of an edit, of its own prompt in every frame, the
other the query of a prompt that is asked. A prompt asks what the edit does where their cosine, with a little that
either side adds, is above a threshold. The maps are learned on questions about subjects of all kinds, and on places in
running text, where nothing is asked (``benchmarks/question_gate.py``). Those that ship have met every relation that
there are facts of; how they do on one they have not met is measured by the same maps without the held-out ones.

Shape suffixes: R rows, T tokens, F frames, S state (all layers that are read, side by side), K key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torch.nn import functional

from ibke.batch import Pair, by_length, collate
from ibke.editors.ibke.shipped import shipped_folder
from ibke.errors import CaptureError, FormatError
from ibke.files import write_atomically
from ibke.fingerprint import check_fingerprint, mark
from ibke.models import LanguageModel
from ibke.neurons import Site
from ibke.partial import taking_inputs
from ibke.prefixes import Prefixes
from ibke.quantised import quantise, restore

FILE, FORMAT = "question.safetensors", "ibke-question-gate-1"
WHITEN = "whiten_LDD"


@dataclass(frozen=True)
class QuestionConfig:
    """Sizes of the maps.

    Args:
        layers: whose MLPs' inputs are read, the last one last.
        width: of the residual stream.
        frames: in which an edit's prompt is read.
        size: K.
        hidden: hidden width; 0 leaves the maps linear.
        bend: hidden width of what looks at all frames together, and of what says how a prompt leans.
    """

    layers: tuple[int, ...]
    width: int
    frames: int
    size: int
    hidden: int
    bend: int


class Tower(nn.Module):
    """A map of states to keys or queries: linear, with a correction that is not, if wanted, and begins at 0.

    Args:
        config: sizes.
        drop: dropout within the correction, in training.
    """

    def __init__(self, config: QuestionConfig, drop: float = 0.0):
        super().__init__()
        width = config.width * len(config.layers)
        self.linear = nn.Linear(width, config.size, bias=False)
        nn.init.orthogonal_(self.linear.weight)
        self.more: nn.Module | None = None
        if config.hidden:
            last = _silent(config.hidden, config.size)
            self.more = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU(), nn.Dropout(drop), last)

    def forward(self, white_RS: Tensor) -> Tensor:
        """Keys or queries (R × K)."""
        out_RK = self.linear(white_RS)
        return out_RK if self.more is None else out_RK + self.more(0.5 * white_RS)


def _silent(width: int, size: int) -> nn.Linear:
    """A linear map that begins at 0."""
    layer = nn.Linear(width, size)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class QuestionGate(nn.Module):
    """Keys of edits, queries of prompts.

    Args:
        config: sizes.
        drop: dropout within the maps' corrections, in training.
    """

    def __init__(self, config: QuestionConfig, drop: float = 0.0):
        super().__init__()
        self.config = config
        self.training_seconds: float | None = None
        layers, width = len(config.layers), config.width
        self.register_buffer("mean_LD", torch.zeros(layers, width))
        self.register_buffer(WHITEN, torch.eye(width).repeat(layers, 1, 1))
        self.asks, self.answers = Tower(config, drop), Tower(config, drop)
        self.answers.load_state_dict(self.asks.state_dict())
        last = _silent(config.bend, config.size + 1)
        self.bend = nn.Sequential(nn.Linear(config.frames * layers * width, config.bend), nn.GELU(), last)
        self.lean = nn.Sequential(nn.Linear(layers * width, config.bend), nn.GELU(), _silent(config.bend, 1))
        self.threshold = nn.Parameter(torch.tensor(0.4))

    mean_LD: Tensor
    whiten_LDD: Tensor

    @cached_property
    def name(self) -> str:
        """What tells these maps from others: a digest of their weights and sizes, which stay as they are."""
        return mark(repr(self.config), self.state_dict())

    def place(self, lm: LanguageModel) -> str:
        """The layer at which all has been read that keys and queries are made of."""
        return f"{lm.architecture.layers}.{self.config.layers[-1]}"

    def white(self, states_RLD: Tensor) -> Tensor:
        """States without what they have in common, all layers side by side (R × S)."""
        return torch.einsum("rld,lde->rle", states_RLD - self.mean_LD, self.whiten_LDD).flatten(1)

    def queries(self, states_RLD: Tensor) -> tuple[Tensor, Tensor]:
        """What is asked (R × K, of unit length), and how much is added to its cosines (R).

        Args:
            states_RLD: states at prompts' last tokens.
        """
        return self.queries_of_white(self.white(states_RLD))

    def queries_of_white(self, white_RS: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`queries`, of states that :meth:`white` has seen."""
        return functional.normalize(self.asks(white_RS), dim=-1), self.lean(0.3 * white_RS)[:, 0]

    def keys(self, states_BFLD: Tensor) -> tuple[Tensor, Tensor]:
        """Each edit's question (B × K, of unit length), and the cosine above which it is asked (B).

        Args:
            states_BFLD: states at the last tokens of the edit's own prompt, in every frame.
        """
        return self.keys_of_white(self.white(states_BFLD.flatten(0, 1)).unflatten(0, states_BFLD.shape[:2]))

    def keys_of_white(self, white_BFS: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`keys`, of states that :meth:`white` has seen."""
        bent = self.bend(0.3 * white_BFS.flatten(1))
        mean_BK = functional.normalize(self.answers(white_BFS), dim=-1).mean(1)
        return functional.normalize(mean_BK + bent[:, :-1], dim=-1), self.threshold - bent[:, -1]


def save_gate(folder: Path, gate: QuestionGate, lm: LanguageModel, about: dict[str, Any]) -> None:
    """Write maps beside an editor; the file is whole or not at all.

    Matrices are bytes, which moves a cosine by .003 in the mean.
    """
    tensors = quantise(gate.state_dict(), {WHITEN, *_matrices(gate)})
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "fingerprint": lm.fingerprint, "config": asdict(gate.config), **about}
    write_atomically(folder / FILE, serialise(tensors, {"about": json.dumps(header, ensure_ascii=False)}))


def _matrices(gate: QuestionGate) -> set[str]:
    return {f"{name}.weight" for name, module in gate.named_modules() if isinstance(module, nn.Linear)}


def load_gate(folder: Path, lm: LanguageModel) -> QuestionGate:
    """Read maps that lie beside an editor; from then on edits of theirs can be attached.

    Raises:
        FormatError: there are none, or they are damaged.
        FingerprintMismatchError: they were trained for other weights.
    """
    return _read_gate(folder / FILE, lm)


def _read_gate(path: Path, lm: LanguageModel) -> QuestionGate:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["format"] != FORMAT:
            raise ValueError("another format")
        check_fingerprint(header["fingerprint"], lm, f"the gate in {path.parent}")
        gate = QuestionGate(QuestionConfig(**header["config"] | {"layers": tuple(header["config"]["layers"])}))
        gate.load_state_dict(restore(tensors))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FormatError(
            f"there is no gate at the prompt's end here ({error}).",
            str(path),
            "Use the method `ibke`, or a folder with a gate.",
        ) from None
    gate = gate.requires_grad_(False).eval().to(lm.device)
    gate.training_seconds = header.get("seconds")
    _KNOWN[gate.name] = gate
    _FILES[gate.name] = path
    return gate


_KNOWN: dict[str, QuestionGate] = {}
_FILES: dict[str, Path] = {}  # where maps are kept, those too that have not been read


def gate_file(name: str) -> Path | None:
    """Where the maps of a name are kept, if that is known."""
    return _FILES.get(name)


def offer_gate(name: str, path: Path) -> None:
    """Take note of where the maps of a name are kept, unless they are known to be somewhere else."""
    if name not in _FILES or not _FILES[name].exists():
        _FILES[name] = path


def question_gate(name: str, lm: LanguageModel) -> QuestionGate:
    """The maps of a name: those that ship for a model, have been loaded, or are kept with a ledger.

    Raises:
        FormatError: there are none of this name.
    """
    if name not in _KNOWN:
        with suppress(FormatError):
            load_gate(shipped_folder(lm), lm)
    if name not in _KNOWN and name in _FILES:
        _read_gate(_FILES[name], lm)
    if name not in _KNOWN:
        raise FormatError(
            f"the maps {name} that tell this edit's question are not known.",
            "gated neurons",
            "Load the editor that made the edit first (`ibke ask --editor FOLDER`), or make the edit again.",
        )
    return _KNOWN[name]


def prompt_states(lm: LanguageModel, layers: Sequence[int], pairs: Sequence[Pair], prefixes: Prefixes) -> Tensor:
    """What the MLPs of some layers are fed at each prompt's last token (R × L × D, float32).

    Args:
        lm: the model.
        layers: in order.
        pairs: prompts; what stands before their subjects may be known.
        prefixes: what is known.
    """
    entrances = [entrance(lm, layer) for layer in layers]
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    rows = [prefixes.split(pair.prompt, pair.span[0]) for pair in pairs]
    for group in by_length([len(row.tail) for row in rows]):
        batch = collate([Pair(list(rows[row].tail), [0], (0, 1)) for row in group], 0, lm.device)
        past = prefixes.past([rows[row].prefix for row in group])
        # Not called but its `forward`: what acts on questions hangs on the call, and the model is read as it is.
        run = partial(lm.model.get_decoder().forward, input_ids=batch.ids_RT, **prefixes.part.after(past, batch))
        for row, states_LD in zip(group, states_at(entrances, run, batch.question_ends_R), strict=True):
            found[row] = states_LD
    return torch.stack(found)


@torch.no_grad()
def states_at(entrances: Sequence[nn.Module], run: Callable[[], Any], ends_R: Tensor) -> Tensor:
    """What modules are fed in a column of each row (R × L × D, float32); nothing after the last of them is run.

    Args:
        entrances: the modules, in the order in which they are run.
        run: a forward pass of R rows.
        ends_R: the columns.

    Raises:
        CaptureError: the pass leaves one of them out.
    """
    with taking_inputs(entrances) as taken:
        run()
    if not all(taken):
        raise CaptureError(
            "an attached edit looks at the whole question, and this method runs the model in parts.",
            "question",
            "Detach that edit, make this one, and attach both.",
        )
    rows_R = torch.arange(len(ends_R), device=ends_R.device)
    # Some models flatten rows and tokens before a linear module.
    return torch.stack([one[0].float().reshape(len(ends_R), -1, one[0].shape[-1])[rows_R, ends_R] for one in taken], 1)


def entrance(lm: LanguageModel, layer: int) -> nn.Module:
    """The module of a layer's MLP that is fed first.

    Raises:
        ModuleNotEditableError: none of the named modules is in that layer.
    """
    return Site.in_layer(lm, layer, "where questions are read").entrance
