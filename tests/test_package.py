from __future__ import annotations

import subprocess
import sys

import pytest

import ibke


def test_import_is_light_and_names_come_when_asked_for():
    code = "import ibke, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in ibke.__all__:
        assert getattr(ibke, name).__name__ == name
        assert name in dir(ibke)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ibke.nonsense
