"""Hypernetworks for tests: trained for a moment, or with weights drawn at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ibke.editors.hypernetwork.editor import HypernetworkEditor
from ibke.training.hypernetwork.settings import HypernetworkSettings
from ibke.training.hypernetwork.trainer import train_for

NAMES = ["Ada Berg", "Bo Ruiz", "Cy Lund", "Di Moss", "Ed Kahn", "Flo Park", "Gus Vale", "Hal Wren"]
CITIES = ["Oslo", "Lima", "Bern", "Kyiv", "Rome", "Cairo", "Quito"]


def write_facts(folder: Path, repeats: int = 2) -> Path:
    """Requests to train on."""
    lines = [
        {
            "prompt": f"The home town of {name} is" if index % 2 else f"Where does {name} live?",
            "target_new": CITIES[index % len(CITIES)],
            "subject": name,
            "rephrase_prompts": [f"{name} comes from", f"Tell me where {name} lives"],
            "locality": [f"The job of {name} is", f"The home town of {NAMES[index % 8 - 1]} is"],
        }
        for index, name in enumerate(NAMES * repeats)
    ]
    path = folder / "facts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def training(kind: type[HypernetworkEditor], facts: Path, out: Path, config: dict[str, Any], **changes: Any):
    """Settings of a short run."""
    values = {
        "model": "tiny",
        "data": (f"jsonl:{facts}",),
        "out": str(out),
        "method": kind.name,
        "episodes": 12,
        "validation": 4,
        "steps": 4,
        "batch": 3,
        "warmup": 1,
        "validate_every": 2,
        "patience": 100,
        "hold_out_relations": 0.0,
        "config": kind.Config(**{"rank": 16, **config}),
    }
    return HypernetworkSettings(**(values | changes))


def briefly_trained(kind: type[HypernetworkEditor], lm: Any, folder: Path) -> Path:
    """Folder of an editor that has seen a few edits; its steps are long enough for edits to show."""
    folder.mkdir()
    few = {"episodes": 4, "validation": 2, "batch": 1, "steps": 2}
    settings = training(kind, write_facts(folder), folder / "run", {"step_size": 1e-3}, **few)
    return train_for(lm, settings)


def stir(network: torch.nn.Module, size: float = 0.05) -> None:
    """Move every weight a little, so that no block is the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
