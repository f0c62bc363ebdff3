"""Where the command line writes to: links, pipes and devices stay what they are, and nothing made is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Thread

import pytest
from tests.commands import NEW, OLD, PROMPT, Run, refused

from ibke.cli import eval as evaluating
from ibke.cli.output import check_writable, screen, write_json
from ibke.edit import Edit
from ibke.edit_folder import INDEX
from ibke.errors import IBKEError
from ibke.files import is_special, is_there, write_atomically


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[str] = []
    reader = Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    check_writable(pipe)
    write_json({"n": 1}, pipe)
    reader.join(10)
    assert json.loads(found[0]) == {"n": 1}
    assert is_special(pipe) and [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_file_is_no_folder_to_write_to(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "report.json", tmp_path / "none" / "report.json"):
        with pytest.raises(IBKEError, match="cannot be written"):
            check_writable(place)


def test_a_device_is_written_to_and_stays_one():
    check_writable(Path(os.devnull))
    write_atomically(Path(os.devnull), b"nothing")
    assert is_special(Path(os.devnull))


def test_a_link_is_followed(tmp_path: Path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "there" / "report.json")
    check_writable(link)
    write_json({"n": 1}, link)
    assert link.is_symlink() and json.loads((tmp_path / "there" / "report.json").read_text()) == {"n": 1}


def test_what_is_in_a_closed_folder_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def closed(path: Path) -> bool:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "exists", closed)
    assert not is_there(tmp_path) and not is_special(tmp_path)


def test_a_report_that_cannot_be_written_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(document: object, path: Path) -> None:
        raise IBKEError("it cannot be written.", str(path), "Choose another file.")

    monkeypatch.setattr(evaluating, "write_json", full)
    with pytest.raises(IBKEError):
        evaluating._hand_over({"n": 1}, str(tmp_path / "report.json"), screen())
    assert json.loads(capsys.readouterr().out) == {"n": 1}


def test_an_edit_that_is_not_needed_leaves_no_other_in_its_folder(run: Run, tmp_path: Path):
    command = ("edit", "--method", "gradient", "--out", tmp_path / "x")
    assert run(*command, PROMPT, NEW).exit_code == 0
    assert Edit.load(tmp_path / "x").requests[0].target_new == NEW
    result = run(*command, PROMPT, OLD)
    assert result.exit_code == 0 and "is deleted" in result.stdout
    assert not (tmp_path / "x" / INDEX).exists()


def test_what_would_be_ignored_is_refused(run: Run, tmp_path: Path):
    folders, file = ("--ledger", tmp_path / "ledger", "--no-guard"), tmp_path / "none.txt"
    refused(run("edit", PROMPT, NEW, *folders, "--probes", file), "--probes", "without the guard")
    refused(run("edit", PROMPT, NEW, *folders, "--limits", file), "--limits", "without the guard")
    refused(run("edit", PROMPT, NEW, "--out", tmp_path / "x", "--group", 4), "--group", "without a ledger")
    refused(run("train", "--model", "smollm2-135m", "--data", "lre:facts.json", "--out", tmp_path / "y"), "csv:FILE")


def test_numbers_and_columns_that_cannot_be_read(run: Run, tmp_path: Path):
    (tmp_path / "big.jsonl").write_text(f'{{"prompt": "a", "target_new": {"1" * 5000}}}\n')
    refused(run("eval", "--data", tmp_path / "big.jsonl"), "line 1", "not valid JSON")
    (tmp_path / "twice.csv").write_text("prompt,target_new,rephrase_prompts,rephrase_prompts\na,b,c,d\n")
    refused(run("eval", "--data", tmp_path / "twice.csv", "--format", "csv"), "two columns 'rephrase_prompts'")
