"""Checkpoints that a killed run goes on from exactly, and the finished editor's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ibke.errors import TrainingError
from ibke.files import write_atomically


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document in one step."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors atomically."""
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def save_checkpoint(
    path: Path, network: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write weights, averaged weights, optimiser moments, random states and counters as one file.

    Args:
        path: the file.
        network: weights in training.
        averaged: their running average.
        optimizer: AdamW.
        state: JSON-ready counters; ``generator``, if there is one, is a random generator's state (uint8 tensor).
    """
    state = dict(state)
    tensors = {f"network/{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"averaged/{name}": tensor.clone() for name, tensor in averaged.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in slots.items()}
    if "generator" in state:
        tensors["generator"] = state.pop("generator")
    write_tensors(path, {name: tensor.clone() for name, tensor in tensors.items()}, {"state": json.dumps(state)})


def load_checkpoint(
    path: Path, network: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Read a checkpoint into existing objects; returns the counters.

    Raises:
        TrainingError: the file is damaged or belongs to other settings.
    """
    from safetensors import safe_open

    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = json.loads(file.metadata()["state"])
        network.load_state_dict(_under(tensors, "network/"))
        averaged.load_state_dict(_under(tensors, "averaged/"))
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise TrainingError(
            f"the checkpoint cannot be used ({error}).", str(path), "Delete it to start anew, or restore its settings."
        ) from None
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, "optimizer/").items():
        index, _, slot = name.partition("/")
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    if "generator" in tensors:
        state["generator"] = tensors["generator"]
    return state


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
