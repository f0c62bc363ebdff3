"""The command line: exit codes, one message for each wrong input, and the commands on the real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gradient_editor import GradientEditor
from tests.commands import NEW, OLD, PROMPT, Run, refused

from ibke.cli.console import Bars
from ibke.cli.main import SPINS
from ibke.cli.output import shorten
from ibke.edit import Edit
from ibke.edit_folder import INDEX
from ibke.editors import base
from ibke.editors.ibke.shipped import MANIFEST, SHIPPED


@pytest.fixture
def shipped() -> None:
    """Skips as long as no trained editor ships with the package."""
    if not list(SHIPPED.glob(f"*/{MANIFEST}")):
        pytest.skip(f"no trained editor ships yet (none in {SHIPPED})")


@pytest.fixture(scope="module")
def saved_edit(smollm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edit of the real model, on disk."""
    from ibke.request import EditRequest

    edit = GradientEditor(smollm).edit([EditRequest(PROMPT, NEW)])
    return edit.save(tmp_path_factory.mktemp("edits") / "ankara")


# --- help and listings


def test_help_is_quick_and_loads_nothing_heavy():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "ibke", "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0  # on an idle machine a third of a second
    code = "import ibke.cli.main, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert done.returncode == 0
    for command in ("demo", "edit", "ask", "train", "eval", "bench", "ls", "data"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "command", [["demo"], ["edit"], ["ask"], ["train"], ["eval"], ["bench"], ["ls"], ["data", "fetch"]]
)
def test_every_command_explains_itself_and_takes_json(run: Run, command: list[str]):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_version_and_bare_command(run: Run):
    import ibke

    assert run("--version").stdout.strip() == f"ibke {ibke.__version__}"
    assert "Usage" in run().output


def test_ls_models(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("IBKE_CACHE", str(tmp_path))
    (row,) = json.loads(run("ls", "models", "--json").stdout)
    assert row["name"] == "smollm2-135m"
    assert row["here"] is False
    assert row["folder"] == str(tmp_path / "smollm2-135m")
    assert "smollm2-135m" in run("ls", "models").stdout


def test_ls_methods(run: Run):
    rows = {row["name"]: row["what"] for row in json.loads(run("ls", "methods", "--json").stdout)}
    assert rows["gradient"] == "Moves low-rank factors down the target's gradient."
    assert set(rows) == set(base.METHODS)
    assert all(rows.values())


def test_ls_refuses_an_unknown_kind(run: Run):
    result = run("ls", "metods")
    assert result.exit_code == 2
    assert "methods" in result.stderr


# --- what cannot be used, without a model


def test_empty_prompt_and_target(run: Run):
    refused(run("edit", " ", NEW), "`prompt` is empty")
    refused(run("edit", PROMPT, ""), "`target_new` is empty")
    refused(run("edit"), "`prompt` is empty")
    refused(run("ask", "  "), "the prompt is empty")
    refused(run("edit", PROMPT, NEW, "--keep", " "), "a probe has an empty prompt")


def test_subject_that_is_not_in_the_prompt(run: Run):
    refused(run("edit", PROMPT, NEW, "--subject", "France"), "'France'", PROMPT)


def test_invalid_line_of_a_request_file(run: Run, tmp_path: Path):
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps({"prompt": PROMPT, "target_new": NEW}) + '\n{"prompt": \n')
    refused(run("edit", "--requests", file, "--out", tmp_path / "out"), str(file), "line 2", "not valid JSON")
    refused(run("eval", "--data", file), str(file), "line 2")


def test_data_are_looked_for_in_the_data_folder_too(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IBKE_DATA", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/facts.jsonl").write_text("nothing\n")
    refused(run("eval", "--data", "mine/facts.jsonl"), str(tmp_path / "mine/facts.jsonl"), "line 1")
    refused(run("eval", "--data", "mine/none.jsonl"), str(tmp_path / "mine/none.jsonl"))


def test_an_edit_goes_to_a_ledger_or_to_a_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = ("--out", tmp_path / "out", "--ledger", tmp_path / "ledger")
    refused(run("edit", PROMPT, NEW, *folders), "--out", str(tmp_path / "ledger"))
    monkeypatch.setenv("IBKE_LEDGER", str(tmp_path / "ledger"))
    refused(run("edit", PROMPT, NEW, "--out", tmp_path / "out"), "--out", str(tmp_path / "ledger"))
    assert not (tmp_path / "ledger").exists()
    assert not (tmp_path / "out").exists()


def test_requests_and_a_request_at_once_or_nowhere_to_save(run: Run, tmp_path: Path):
    file = tmp_path / "requests.jsonl"
    file.write_text("\n")
    refused(run("edit", PROMPT, NEW, "--requests", file, "--out", tmp_path), "were given")
    refused(run("edit", "--requests", file), "--out FOLDER")
    refused(run("edit", "--requests", file, "--out", tmp_path), "there is no request")
    refused(run("eval", "--data", file), "there is no request")


def test_eval_refuses_what_it_does_not_know(run: Run, tmp_path: Path):
    file = tmp_path / "data.json"
    file.write_text("[1]")
    refused(run("eval", "--data", file, "--format", "zsr"), "Did you mean 'zsre'?")
    requests = tmp_path / "requests.jsonl"
    requests.write_text(json.dumps({"prompt": PROMPT, "target_new": NEW}))
    refused(run("eval", "--data", requests, "--protocol", "batches"), "'batches'", "single, batch, sequential")
    refused(run("eval", "--data", requests, "--protocol", "batch"), "--group 100")
    refused(run("eval", "--data", requests, "--group", 2), "group of one")
    refused(run("eval", "--data", requests, "--order", "up"), "file or random")
    refused(run("eval", "--data", file, "--format", "zsre"), "no record has the shape")
    refused(run("eval", "--data", file, "--json", tmp_path / "none" / "out.json"), "cannot be written")
    refused(run("eval", "--data", tmp_path / "none.json", "--format", "zsre"), "cannot be read")


def test_unknown_method_and_model_name_the_nearest(run: Run):
    refused(run("edit", PROMPT, NEW, "--method", "ibek"), "'ibek'", "Did you mean 'ibke'?")
    refused(run("edit", PROMPT, NEW, "--method", "gradient", "--no-refine"), "nothing to refine")
    refused(run("ask", PROMPT, "--model", "smolm2-135m"), "'smolm2-135m'", "Did you mean 'smollm2-135m'?")


def test_model_files_that_cannot_be_read(run: Run, tmp_path: Path):
    broken = tmp_path / "model.gguf"
    broken.write_bytes(b"GGUF but not really")
    refused(run("ask", PROMPT, "--model", broken), str(broken))
    refused(run("ask", PROMPT, "--model", tmp_path), "config.json")
    refused(run("ask", PROMPT, "--model", tmp_path / "none"), "no such file")


def test_folder_without_an_edit(run: Run, tmp_path: Path):
    refused(run("ask", PROMPT, "--edit", tmp_path), str(tmp_path), "no edit here")


# --- on the real model


def test_module_that_does_not_exist(run: Run):
    result = run("ask", PROMPT, "--module", "model.layers.3.mlp.down_prj")
    refused(result, "down_prj", "Did you mean 'model.layers.3.mlp.down_proj'?")


def test_ask_with_an_edit_and_without(run: Run, saved_edit: Path):
    assert run("ask", PROMPT).stdout == f"{OLD}.\n"
    assert run("ask", PROMPT, "--edit", saved_edit).stdout == f"{NEW}\n"
    document = json.loads(run("ask", "What is the capital of Turkey?", "--chat", "--max-tokens", 3, "--json").stdout)
    assert document["frame"] == "chat"
    assert document["tokens"] <= 3
    assert document["answer"] and document["edits"] == []


def test_ask_refuses_an_edit_of_another_model(run: Run, saved_edit: Path, tmp_path: Path):
    edit = Edit.load(saved_edit)
    own = edit.info.fingerprint
    edit.info.fingerprint = "0" * 32
    refused(run("ask", PROMPT, "--edit", edit.save(tmp_path / "foreign")), "0" * 32, own)


def test_prompt_longer_than_the_window(run: Run):
    refused(run("ask", "word " * 9000), "window")


def test_edit_that_takes(run: Run, tmp_path: Path):
    result = run("edit", PROMPT, NEW, "--method", "gradient", "--out", tmp_path / "ankara", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert (document["achieved"], document["already"], document["subject"]) == (True, False, "Turkey")
    assert [a["role"] for a in document["answers"]] == ["prompt"]
    assert document["answers"][0]["before"].startswith(OLD)
    assert document["answers"][0]["after"] == NEW
    assert document["seconds"] > 0
    assert Edit.load(document["folder"]).requests[0].target_new == NEW
    assert NEW in result.stderr and "taken to be about “Turkey”" in result.stderr  # for people


def test_edit_with_settings(run: Run):
    result = run("edit", PROMPT, NEW, "--method", "rome", "--set", "steps=3", "--set", "layer=4", "--json")
    document = json.loads(result.stdout)
    assert document["method"] == "rome" and document["refine_steps"] == 2
    assert document["nll_after"] < document["nll_before"]


def test_edit_that_does_not_take(run: Run, tmp_path: Path):
    result = run("edit", PROMPT, NEW, "--rephrase", "Turkey's capital is", "--method", "idle", "--out", tmp_path / "x")
    assert result.exit_code == 1
    assert "The target is not generated." in result.stdout
    assert (tmp_path / "x" / INDEX).exists()


def test_target_that_the_model_answers_already(run: Run, tmp_path: Path):
    result = run("edit", PROMPT, OLD, "--method", "idle", "--out", tmp_path / "x")
    assert result.exit_code == 0
    assert "answers this already" in result.stdout
    assert not (tmp_path / "x").exists()
    forced = run("edit", PROMPT, OLD, "--method", "gradient", "--out", tmp_path / "x", "--force", "--json")
    assert json.loads(forced.stdout)["already"] is False
    assert (tmp_path / "x" / INDEX).exists()


def test_edits_of_a_file(run: Run, tmp_path: Path):
    file, out = tmp_path / "requests.jsonl", tmp_path / "out"
    requests = [
        {"prompt": PROMPT, "target_new": NEW, "locality": ["The capital of Japan is"]},
        {"prompt": PROMPT, "target_new": OLD},
        {"prompt": "word " * 9000, "target_new": NEW},
    ]
    file.write_text("\n".join(map(json.dumps, requests)))
    result = run("edit", "--requests", file, "--out", out, "--method", "gradient", "--json")
    assert result.exit_code == 2  # one of them cannot be used; the others are made all the same
    document = json.loads(result.stdout)
    assert (document["n"], document["achieved"], document["unusable"]) == (3, 2, 1)
    first, second, third = document["edits"]
    assert first["folder"] == str(out / "0001")
    assert [a["role"] for a in first["answers"]] == ["prompt", "keep"]
    assert second["already"] is True
    assert "window" in third["error"]
    assert sorted(path.name for path in out.iterdir()) == ["0001"]


def test_a_file_of_edits_goes_on_where_it_was_left(run: Run, tmp_path: Path):
    file, out = tmp_path / "requests.jsonl", tmp_path / "out"
    requests = [{"prompt": PROMPT, "target_new": NEW}, {"prompt": "The sky is", "target_new": "green"}]
    command = ("edit", "--requests", file, "--out", out, "--method", "gradient")
    file.write_text("\n".join(map(json.dumps, requests)))
    assert json.loads(run(*command, "--json").stdout)["there"] == 0
    (out / "0002" / INDEX).unlink()  # as if it had been stopped
    before = (out / "0001" / INDEX).stat().st_mtime_ns
    again = json.loads(run(*command, "--json").stdout)
    assert (again["n"], again["there"]) == (2, 1)
    assert again["edits"][0]["there"] and again["edits"][0]["prompt"] == PROMPT and "there" not in again["edits"][1]
    assert again["edits"][0]["achieved"] is True  # of the prompt, as when it was made
    assert (out / "0001" / INDEX).stat().st_mtime_ns == before and (out / "0002" / INDEX).exists()
    file.write_text("\n".join(map(json.dumps, [{**requests[0], "subject": "Turkey"}, requests[1]])))
    more = run(*command)
    assert "1 were there already" in more.stdout
    assert Edit.load(out / "0001").requests[0].subject == "Turkey"
    (out / "0001" / "notes.txt").write_text("mine")
    others = [{"prompt": PROMPT, "target_new": OLD}, {"prompt": " a" * 9000, "target_new": NEW}]
    file.write_text("\n".join(map(json.dumps, others)))
    assert "1 could not be used" in run(*command).stdout
    assert [str(path.relative_to(out)) for path in out.rglob("*")] == ["0001", "0001/notes.txt"]  # no old edit is left


def test_a_file_of_edits_under_other_settings_is_made_again(run: Run, tmp_path: Path):
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps({"prompt": PROMPT, "target_new": NEW}))
    command = ("edit", "--requests", file, "--out", tmp_path / "out", "--method", "ft", "--json")
    there = [json.loads(run(*command, "--set", f"epochs={epochs}").stdout)["there"] for epochs in (1, 1, 2, 1)]
    assert there == [0, 1, 0, 0]


def test_a_file_of_edits_says_what_did_not_follow_and_what_changed(run: Run, tmp_path: Path):
    file = tmp_path / "requests.jsonl"
    request = {"prompt": PROMPT, "target_new": NEW, "rephrase_prompts": ["Two and two make"]}
    file.write_text(json.dumps({**request, "locality": [PROMPT]}))
    said = run("edit", "--requests", file, "--out", tmp_path / "out", "--method", "gradient").stdout
    assert "wordings that follow 0 of 1 · answers kept 0 of 1" in " ".join(said.split())


def test_where_there_is_no_terminal_time_left_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys):
    now = [0.0]
    monkeypatch.setattr("ibke.cli.console.time.monotonic", lambda: now[0])
    with Bars() as tick:
        tick("Editing", 0, 100)
        now[0] = 60.0
        tick("Editing", 25, 100)
    assert "Editing … 25% (0:03:00 left)" in capsys.readouterr().err


def test_eval_writes_and_prints_its_report(run: Run, tmp_path: Path):
    file, report = tmp_path / "requests.jsonl", tmp_path / "report.json"
    record = {
        "prompt": PROMPT,
        "target_new": NEW,
        "rephrase_prompts": ["Turkey's capital is"],
        "locality": ["The capital of Japan is"],
    }
    file.write_text("\n".join(json.dumps({**record, "target_new": name}) for name in (NEW, "Izmir", "Bursa")))
    command = ("eval", "--data", file, "--method", "gradient", "--limit", 1, "--seed", 1, "--frames", "bare, chat")
    result = run(*command, "--json", report)
    assert result.exit_code == 0
    assert "reliability" in result.stdout and str(report) in result.stdout.replace("\n", "")
    written = json.loads(report.read_text())
    assert (written["n"], written["protocol"]) == (1, "single")
    assert written["by_frame"]["bare"]["metrics"]["generation"]["reliability"]["mean"] == 1.0
    assert written["by_frame"]["bare"]["base"]["generation"]["reliability"]["mean"] == 0.0
    assert written["config"]["seed"] == 1 and written["config"]["method"] == "gradient"
    printed = json.loads(run("eval", "--data", file, "--method", "idle", "--limit", 1, "--json", "-").stdout)
    assert (printed["n"], printed["metrics"]["generation"]["locality"]["mean"]) == (1, 1.0)
    text, suite = tmp_path / "text.txt", tmp_path / "boolq.jsonl"
    text.write_text("Boats leave the harbour before sunrise. " * 8)
    suite.write_text('{"question": "is it wet", "answer": true, "passage": "It rains."}\n')
    result = run(*command, "--json", report, "--text", text, "--abilities", suite)
    effects = json.loads(report.read_text())["side_effects"]
    assert "Side effects (1 looked at): perplexity" in result.stdout
    assert (effects["n"], effects["abilities"]["boolq"]["n"]) == (1, 1)
    assert effects["perplexity"]["ratio"]["mean"] != 1.0
    refused(run(*command, "--text", tmp_path / "none.txt"), "cannot be read", "none.txt")
    refused(run(*command, "--abilities", text), "its fields are none of those known")
    refused(run(*command[:-1], "chats"), "'chats'")
    file.write_text("\n".join(json.dumps({"prompt": PROMPT, "target_new": name}) for name in (NEW, f"{NEW}\nor so")))
    said = run("eval", "--data", file, "--method", "idle").stdout.replace("\n", " ")
    assert "1 targets are longer than 40 tokens or of several lines: no answer can be one" in said
    file = tmp_path / "benchmark.json"
    file.write_text(json.dumps([{"prompt": PROMPT, "target_new": NEW, "subject": "Turkey"}, {"prompt": PROMPT}]))
    result = run("eval", "--data", file, "--format", "knowedit", "--method", "idle", "--json", "-")
    config, why = json.loads(result.stdout)["config"], "`target_new` is missing."
    assert config["skipped_reasons"] == {why: 1}
    assert config["skipped_records"] == [{"where": f"{file}, record 1", "field": "target_new", "why": why}]
    assert "1 × `target_new` is missing." in result.stderr and f"{file}, record 1" in result.stderr.replace("\n", "")


# --- with the editor that ships


def test_demo(run: Run, shipped: None):
    result = run("demo", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert len(document["edits"]) == 3
    for edit in document["edits"]:
        roles = [answer["role"] for answer in edit["answers"]]
        assert roles == ["prompt", "wording", "wording", "chat", "keep", "keep"]
        assert edit["achieved"] and edit["answers"][0]["before"] != edit["answers"][0]["after"]
        assert edit["rate_nats"] > 0 and edit["seconds"] > 0
    assert "3 of 3 facts corrected" in result.stderr


def test_edit_with_the_shipped_editor(run: Run, shipped: None, tmp_path: Path):
    result = run("edit", PROMPT, NEW, "--subject", "Turkey", "--out", tmp_path / "ankara")
    assert result.exit_code == 0
    assert "nats" in result.stdout
    assert run("ask", PROMPT, "--edit", tmp_path / "ankara").stdout == f"{NEW}\n"
    bare = run("edit", PROMPT, NEW, "--no-refine", "--json")
    assert json.loads(bare.stdout)["refine_steps"] == 0


# --- small things


def test_shorten():
    assert shorten("short", 10) == "short"
    cut = shorten("the capital of the country of Myanmar", 20)
    assert cut == "the capital of the…"
    assert len(shorten("x" * 50, 20)) == 20


@pytest.mark.parametrize(("given", "used"), [(None, SPINS), ("7", "7")])
def test_threads_stop_spinning_early_unless_told_otherwise(
    run: Run, monkeypatch: pytest.MonkeyPatch, given: str | None, used: str
):
    monkeypatch.setenv("GOMP_SPINCOUNT", given or "")  # which is undone in the end
    if given is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    run("ls", "methods", "--json")
    assert os.environ["GOMP_SPINCOUNT"] == used
