"""The command line's settings, and an editor trained by it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from tests.commands import NEW, PROMPT, Run, refused

from ibke.editors.ibke.shipped import MANIFEST, WEIGHTS


def test_train_settings(run: Run, tmp_path: Path):
    command = ("train", "--data", "facts", "--out", tmp_path / "run")
    refused(run(*command, "--set", "lambda=1"), "'lambda'", "Did you mean 'lambda_il'?")
    refused(run(*command, "--set", "warmup=soon"), "'soon'", "'warmup'", "100")
    refused(run(*command, "--set", "prior=normal"), "'normal'", "diagonal")
    refused(run(*command, "--set", "beta=nan"), "'nan'", "'beta'")
    refused(run(*command, "--set", "beta=inf"), "`beta` is inf, no finite number")
    refused(run(*command, "--learning-rate", "nan"), "`learning_rate` is nan, no finite number")
    refused(run(*command, "--steps", "8", "--set", "steps=9"), "`steps` is given by an option already")
    refused(run(*command, "--set", "out=elsewhere"), "`out` is given by an option already")
    refused(
        run(*command, "--module", "model.layers.99.mlp.down_proj"), "model.layers.99.mlp.down_proj", "no such module"
    )
    refused(run(*command, "--set", "width=30"), "`width` is 30", "multiple of 4")
    refused(run(*command, "--set", "content_dim=-3"), "`content_dim` is not positive")
    refused(run("train", "--data", "facts=1.2.3", "--out", tmp_path / "run"), "unknown data source 'facts=1.2.3'")
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_is_refused_before_anything_is_written(run: Run, tiny_folder: Path, tmp_path: Path):
    data = f"jsonl:{tiny_folder / 'requests.jsonl'}"
    small = {"content_dim": 8, "context_dim": 4, "width": 16, "layer": 1, "relay_layer": 2}

    def command(data: str, out: Path, **sizes: int) -> list[object]:
        chosen = {**small, **sizes, "validation": 4, "hold_out_relations": 0}
        given = [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
        return ["train", "--model", tiny_folder, "--data", data, "--out", out, "--episodes", 12, *given]

    (tmp_path / "file").write_text("mine")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"')
    refused(run(*command(data, tmp_path / "file")), "no run can be kept here", str(tmp_path / "file"))
    refused(run(*command(data, Path("/proc/nowhere/run"))), "cannot be read or written", "/proc/nowhere")
    refused(run(*command(data, tmp_path / "run", content_dim=33)), "may not exceed the model's width 32")
    refused(run(*command(f"jsonl:{tmp_path / 'bad.jsonl'}", tmp_path / "run")), "bad.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_train_overrides_reach_the_settings():
    from ibke.cli.train import _overrides, _trainer

    given = ["layer=4", "noise=false", "warmup=7", "prior=ceb", "beta=0.5"]
    run_settings, config = _overrides(given, *_trainer("ibke"))
    assert run_settings == {"warmup": 7}
    assert (config.layer, config.noise, config.prior, config.beta) == (4, False, "ceb", 0.5)


def test_settings_are_of_the_kind_that_their_fields_are():
    from ibke.cli.settings import parse
    from ibke.editors.memit import MEMITSettings
    from ibke.editors.rome import ROMESettings

    rome, memit = parse(["layer=3", "layers=4, 5", "clamp=2", "text=a=b.txt"], ROMESettings, MEMITSettings)
    assert (rome, memit) == ({"layer": 3, "clamp": 2.0, "text": "a=b.txt"}, {"layers": (4, 5)})
    assert parse(["layer=none", "contexts=One.,Two."], ROMESettings) == [{"layer": None, "contexts": ("One.", "Two.")}]
    assert parse([]) == []


def test_settings_of_a_method(run: Run):
    refused(run("edit", PROMPT, NEW, "--method", "rome", "--set", "step=3"), "'step'", "Did you mean 'steps'?")
    refused(run("edit", PROMPT, NEW, "--method", "memit", "--set", "layers=4,five"), "'4,five'", "'layers'")
    refused(run("edit", PROMPT, NEW, "--method", "gradient", "--set", "steps=3"), "'steps'", "Known: none.")
    refused(run("edit", PROMPT, NEW, "--method", "rome", "--set", "steps=0"), "`steps` is below 1")


@pytest.fixture(scope="module")
def tiny_folder(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model on disk, with requests to train on beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    lm = tiny_model("llama")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    requests = [
        {
            "prompt": f"The capital of land {i} is",
            "target_new": f"city {i}",
            "rephrase_prompts": [f"Land {i} is ruled from"],
            "locality": [f"The king of land {i} is", f"The capital of isle {i} is"],
        }
        for i in range(16)
    ]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, requests)))
    return folder


def test_train_then_edit(run: Run, tiny_folder: Path, tmp_path: Path):
    sizes = ("layer=1", "relay_layer=2", "content_dim=8", "context_dim=4", "width=16")
    rest = ("validation=4", "validate_every=2", "hold_out_relations=0", *sizes)
    command = ["train", "--model", tiny_folder, "--data", f"jsonl:{tiny_folder / 'requests.jsonl'}"]
    command += ["--out", tmp_path / "run", "--episodes", 12, "--batch", 2, "--dtype", "float32"]
    command += [part for setting in rest for part in ("--set", setting)]
    document = json.loads(run(*command, "--steps", 2, "--json").stdout)
    editor = Path(document["editor"])
    assert (editor / MANIFEST).exists() and document["last"]["step"] == 2
    refused(run(*command, "--steps", 4), "a run is here already", "--resume")
    resumed = run(*command, "--steps", 4, "--resume")
    assert resumed.exit_code == 0 and str(editor) in resumed.stdout
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
    manifest = json.loads((editor / MANIFEST).read_text())
    told = shlex.split(manifest["command"].replace("FOLDER", str(tmp_path / "again")))[1:]
    again = Path(json.loads(run(*told, "--json").stdout)["editor"])
    assert (again / WEIGHTS).read_bytes() == (editor / WEIGHTS).read_bytes()
    assert json.loads((again / MANIFEST).read_text())["training"] == manifest["training"]

    done = run("edit", "The capital of land 3 is", "city 5", "--model", tiny_folder, "--editor", editor, "--json")
    answer = json.loads(done.stdout)
    assert done.exit_code == (0 if answer["achieved"] else 1)
    assert answer["rate_nats"] > 0 and answer["refine_steps"] > 0
    refused(run("edit", PROMPT, NEW, "--editor", editor), "made for", "fingerprint")
