"""Files of records: which are read, and as what."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.reader_records import RECORDS

from ibke.data.readers import Skipped, read

ZSRE = RECORDS["zsre"]["MEND"]
DOCS = Path(__file__).parents[1] / "docs" / "data.md"


def write(folder: Path, text: str, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_json_lines_of_a_benchmark(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, f"{json.dumps(ZSRE)}\n\nno JSON\n{json.dumps(ZSRE)}\n", name)
    skipped: list[Skipped] = []
    assert len(list(read(path, "zsre", skipped))) == 2
    assert skipped == [(f"{path}, line 3", "line", "`line` is not valid JSON.")]


@pytest.mark.parametrize("head", ["", '{"src": ,}', "   "])
def test_json_lines_whose_first_line_is_none_are_lines_all_the_same(tmp_path: Path, head: str) -> None:
    path = write(tmp_path, f"{head}\n{json.dumps(ZSRE)}\n{json.dumps(ZSRE)}\n", "data.json")
    skipped: list[Skipped] = []
    assert len(list(read(path, "zsre", skipped))) == 2
    assert [one.where for one in skipped] == ([f"{path}, line 1"] if head.strip() else [])


def test_copies_and_leftovers_in_a_folder_are_not_read(tmp_path: Path) -> None:
    for name in ("data.json", "data.json.bak", ".data.json-x1"):
        write(tmp_path, json.dumps([ZSRE]), name)
    assert len(list(read(tmp_path, "zsre"))) == 1


def test_the_example_of_faults_prints_what_it_says(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.+?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setenv("IBKE_DATA", str(data_folder))
    exec(block, {})
    wanted = re.findall(r"  # (.+)", block)
    printed = capsys.readouterr().out.replace(str(data_folder), "…").splitlines()
    assert printed == wanted and len(wanted) == 2
