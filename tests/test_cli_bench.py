"""``ibke bench``: killed and resumed in earnest, with a method that fails, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_tiny
from tests.commands import Run, refused

from ibke.bench.cell import evaluate_cell
from ibke.bench.plan import Cell, Conditions, Contender, DataSet, Stage

RECORDS = [
    {
        "prompt": f"The capital of Land{i} is",
        "target_new": "Canberra",
        "subject": f"Land{i}",
        "rephrase_prompts": [f"Land{i} is ruled from"],
        "locality": ["The author of the play is"],
    }
    for i in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, requests, and text for key statistics."""
    folder = tmp_path_factory.mktemp("bench")
    lm = make_tiny("llama")
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    (folder / "towns.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    (folder / "text.txt").write_text("The capital of France is Paris. Who wrote the play? The author is known.\n" * 60)
    return folder


def command(folder: Path) -> list[str]:
    settings = [f"steps=2,layer=1,tokens=600,text={folder / 'text.txt'}".split(","), ["layer=99"]]
    named = [f"{label}.{text}" for label, texts in zip(("rome", "broken"), settings, strict=True) for text in texts]
    return [
        *(sys.executable, "-m", "ibke", "bench", "--methods", "rome,broken=rome", "--seeds", "0,1", "--limit", "2"),
        *("--data", f"towns={folder / 'towns.jsonl'}:jsonl", "--protocols", "single"),
        *("--model", str(folder / "model"), "--out", str(folder / "out"), "--json"),
        *("--text", str(folder / "text.txt"), "--abilities", "own", "--questions", "3", "--looks", "1"),
        *(part for text in named for part in ("--set", text)),
    ]


def test_a_killed_bench_goes_on_and_loses_no_finished_cell(folder: Path) -> None:
    cells = folder / "out" / "cells"
    environment = {**os.environ, "IBKE_CACHE": str(folder / "cache")}
    process = subprocess.Popen(command(folder), start_new_session=True, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (kept := list(cells.glob("*.rome.*.json")) if cells.exists() else []):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept}
    while group_lives(process.pid):  # whatever it had started ends with it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (folder / "out" / "summary.json").exists()

    part = subprocess.run([*command(folder), "--finished"], env=environment, capture_output=True, text=True)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in cells.iterdir()} == before
    assert json.loads(part.stdout)["cells"] == len(before)
    assert [row["n"] for row in json.loads(part.stdout)["rows"]] == [2]

    done = subprocess.run(command(folder), env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == was for path, was in before.items())
    summary = json.loads(done.stdout)
    assert summary == json.loads((folder / "out" / "summary.json").read_text())
    assert len(list(cells.iterdir())) == summary["cells"] == 4
    good, bad = summary["rows"][:2]
    assert (good["method"], good["n"], good["seeds"]) == ("rome", 4, [0, 1])
    assert good["seconds_per_edit"] > 0 and good["bytes_per_edit"] == 4 * (64 + 32)  # one layer, rank one
    assert [name for name, found in good["effects"].items() if found is None] == ["tasks_change"]
    assert set(bad["effects"].values()) == {None}
    assert bad["n"] == 0 and len(summary["failed"]) == 2
    assert all("99" in one["why"] for one in summary["failed"])
    assert "Failed: broken, towns, single, seed 0" in done.stderr
    report = json.loads((cells / good["files"][0]).read_text())
    assert report["protocol"] == "single" and report["config"]["settings"]["layer"] == 1
    assert report["peak_memory_mb"] < 4000
    assert report["side_effects"]["abilities"]["own"]["n"] == 3 and report["side_effects"]["n"] == 1


def test_a_cell_names_what_it_left_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBKE_CACHE", str(tmp_path))
    file = tmp_path / "towns.json"
    file.write_text(
        json.dumps([{key: RECORDS[0][key] for key in ("prompt", "target_new", "subject")}, {"prompt": "A"}])
    )
    data, stage = DataSet("towns", str(file), "knowedit"), Stage.parse("single", None)
    cell = Cell(Contender("ike", "ike"), data, stage, 0, Conditions(str(folder / "model"), "cpu"))
    config = evaluate_cell(cell, lambda *_: None)["config"]
    assert [record["where"] for record in config["skipped_records"]] == [f"{file}, record 1"]


def group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def test_bench_refuses_what_cannot_be_run(run: Run, tmp_path: Path) -> None:
    file, out = tmp_path / "towns.jsonl", tmp_path / "out"
    file.write_text(json.dumps(RECORDS[0]))
    data = f"towns={file}:jsonl"

    def bench(methods: str = "idle", *more: str, data: str = data) -> object:
        return run("bench", "--methods", methods, "--data", data, "--out", out, *more)

    refused(bench("rom"), "Did you mean 'rome'?")
    refused(bench("idle,idle"), "'idle' is in it twice")
    refused(bench("rome", "--set", "rome.layr=3"), "Did you mean 'layer'?")
    refused(bench("rome", "--set", "memit.steps=3"), "belongs to no method")
    refused(bench("rome", "--set", "rome@batch:2.steps=3"), "belongs to no method")
    refused(bench("rome", "--set", "rome@single.layr=3"), "Did you mean 'layer'?")
    refused(bench("rome", "--protocols", "sequential", "--set", "rome@sequential.layr=3"), "Did you mean 'layer'?")
    refused(bench("idle", "--set", "idle.steps=3"), "has no settings")
    refused(bench("rome", "--set", "rome.steps=0"), "`steps` is below 1")
    refused(bench("rome", "--set", "rome.learning_rate=inf"), "`learning_rate` is inf")
    refused(bench("rome", "--set", "rome.learning_rate=nan"), "'nan' is no value")
    refused(bench("idle", "--editor", "ibke=folder"), "belongs to no method")
    refused(bench("idle", "--editor", f"idle={tmp_path}"), "'idle' has no trained weights")
    refused(bench("ibke", "--editor", f"ibke={tmp_path / 'none'}"), "no such folder", "ibke=")
    refused(bench("ibke-gated", "--editor", f"ibke-gated={tmp_path / 'none'}"), "no such folder", "ibke-gated=")
    refused(bench("idle", "--model", "smolm2-135m"), "Did you mean 'smollm2-135m'?")
    refused(bench("idle", "--protocols", "batch"), "needs a size")
    refused(bench("idle", "--protocols", "single,serial:2"), "'serial'")
    refused(bench("idle", "--seeds", "0,x"), "'x' is no seed")
    refused(bench("idle", "--frames", "poem"), "'poem'")
    refused(bench("idle", "--edit-frame", "chat"), "'chat'")
    refused(bench("idle", "--against", "rome"), "'rome' is not among")
    refused(bench("idle", "--text", str(tmp_path / "none.txt")), "cannot be read")
    refused(bench("idle", "--abilities", str(file)), "none of those known")
    refused(bench(data="towns.jsonl"), "NAME=FILE:FORMAT")
    refused(bench(data=f"towns={tmp_path / 'none'}:jsonl"), "cannot be read")
    refused(bench(data=f"towns={file}:jsnl"), "Did you mean 'jsonl'?")
    refused(bench("idle", "--dtype", "float3"), "unknown dtype 'float3'")
    refused(bench("idle", "--device", "abacus"), "unknown device 'abacus'")
    file.write_text(f'{json.dumps(RECORDS[0])}\n{{"prompt": "A"}}\n')
    refused(bench(), "line 2", "'target_new' is missing")
    rows = tmp_path / "towns.csv"
    rows.write_text("prompt,target_new\nA,B\nA,\n")
    refused(bench(data=f"towns={rows}:csv"), "row 3", "'target_new' is missing")
    file.write_text(json.dumps(RECORDS[0]))
    assert not out.exists()
    out.write_text("a file")
    refused(bench(), "Choose another folder")
