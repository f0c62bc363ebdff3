from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ibke
from ibke.files import write_atomically


def test_import_is_light_and_names_come_when_asked_for():
    code = "import ibke, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in ibke.__all__:
        assert getattr(ibke, name).__name__ == name
        assert name in dir(ibke)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ibke.nonsense


def test_the_lines_of_python_in_the_readme_run(smollm, monkeypatch, capsys) -> None:
    """In the README as it is, which has five of them."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    block = text.partition("```python\n")[2].partition("```")[0]
    assert len([line for line in block.splitlines() if line]) == 5
    monkeypatch.setattr("ibke.models.load_model", lambda _: smollm)
    exec(block, {})
    assert capsys.readouterr().out.strip().rstrip(".") == "Ankara"


def test_new_files_are_for_whoever_may_read_such_files(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "data.json", b"{}")
    finally:
        os.umask(before)
    assert (tmp_path / "data.json").stat().st_mode & 0o777 == 0o644 and len(list(tmp_path.iterdir())) == 1
