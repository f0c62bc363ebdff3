"""What a result was measured on."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import ibke


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, device and versions of what computes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ibke": ibke.__version__,
    }


def peak_memory_mb() -> float:
    """Largest resident memory this process has had so far (MB)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024), _PEAK.before_mb)


@dataclass
class _Peak:
    """What the system has forgotten: it counts a peak anew from each :class:`ExtraMemory` on."""

    before_mb: float = 0.0


_PEAK = _Peak()


class ExtraMemory:
    """Measures the most memory that something needs above what the process holds when it begins (MB).

    On a GPU it is memory of that GPU. Elsewhere it is resident memory, with what the allocator kept of freed memory
    handed back first: else whoever comes second would seem to need none. ``mb`` is None before the end, and where the
    system cannot count a peak anew (it is Linux that can).

    Args:
        device: what computes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.mb: float | None = None
        self._held = 0.0

    def __enter__(self) -> ExtraMemory:
        gc.collect(1)  # the young ones: going through all that a process has loaded takes half a second
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._held = torch.cuda.memory_allocated(self.device) / 1e6
            return self
        _trim()
        _PEAK.before_mb = peak_memory_mb()
        self._held = _reset_peak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.mb = torch.cuda.max_memory_allocated(self.device) / 1e6 - self._held
        elif self._held:
            self.mb = max(0.0, _status_mb("VmHWM") - self._held)


def _reset_peak() -> float:
    """Have the system count the process's peak anew; returns what is resident now (MB), 0 where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_mb("VmRSS")
    except OSError:
        return 0.0


def _status_mb(name: str) -> float:
    """A size out of the process's status, which the system gives in KiB (MB)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:")), 0.0)


def _trim() -> None:
    """Have the C library hand back what it keeps of freed memory, where it is one that can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
