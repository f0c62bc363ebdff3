"""Second moments of generic keys: what they are, and when a cached file counts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load as parse
from safetensors.torch import save_file
from tests.conftest import make_tiny
from tests.random_editor import random_edit

from ibke.editors import key_statistics
from ibke.editors.key_statistics import CHUNK, key_moments, lines_of, text_rows
from ibke.editors.rome import ROMEEditor
from ibke.errors import FormatError
from ibke.modules import resolve, target_modules
from ibke.partial import taking_input
from ibke.session import EditSession

pytestmark = pytest.mark.usefixtures("statistics_folder")


def down(lm, *layers):
    return resolve(lm.model, target_modules(lm, lm.architecture, layers))


@pytest.mark.parametrize("model", ["llama", "gpt2", "opt"])
def test_statistics_are_the_mean_outer_product_without_first_positions(model, tmp_path):
    lm = make_tiny(model)
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. Who wrote the play?\n" * 20)
    modules = down(lm, 0, 2)
    found = key_moments(lm, modules, str(text))
    ids = lm.tokenizer(text.read_text(), add_special_tokens=False).input_ids
    rows = torch.tensor(ids[: len(ids) // CHUNK * CHUNK]).view(-1, CHUNK)
    for name, module in modules.items():
        with taking_input(module) as taken, torch.no_grad():
            lm.model(rows)
        keys = taken[0].reshape(*rows.shape, -1)[:, 1:].flatten(0, 1).double()
        torch.testing.assert_close(found[name], keys.T @ keys / len(keys), rtol=1e-4, atol=1e-7)


def test_statistics_come_from_the_cache_the_second_time(statistics_folder, monkeypatch):
    lm = make_tiny("llama")
    one = key_moments(lm, down(lm, 1), tokens=640)
    assert len(list(statistics_folder.glob(f"{lm.fingerprint}/*.safetensors"))) == 1

    def fail(*_):
        raise AssertionError("taken again")

    monkeypatch.setattr(key_statistics, "second_moments", fail)
    two = key_moments(lm, down(lm, 1), tokens=640)
    assert all(torch.equal(one[name], two[name]) for name in one)
    for changed in ({"modules": down(lm, 2), "tokens": 640}, {"modules": down(lm, 1), "tokens": 320}):
        with pytest.raises(AssertionError, match="taken again"):
            key_moments(lm, **changed)


@pytest.mark.parametrize("damage", ["another model's", "truncated", "not finite", "another shape"])
def test_a_cached_file_that_is_not_what_it_should_be_is_taken_anew(statistics_folder, damage):
    lm, other = make_tiny("llama"), make_tiny("llama", seed=1)
    right = key_moments(lm, down(lm, 1), tokens=640)
    wrong = key_moments(other, down(other, 1), tokens=640)
    (path,), (foreign,) = (list(statistics_folder.glob(f"{one.fingerprint}/*")) for one in (lm, other))
    assert not torch.allclose(*right.values(), *wrong.values())
    data = parse(path.read_bytes())
    identity = {"identity": json.dumps({"model": lm.fingerprint})}
    if damage == "another model's":
        path.write_bytes(foreign.read_bytes())
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "not finite":
        save_file({"moment": data["moment"] * float("nan")}, path, identity)
    else:
        save_file({"moment": data["moment"][:5]}, path, identity)
    again = key_moments(lm, down(lm, 1), tokens=640)
    assert all(torch.equal(right[name], again[name]) for name in right)
    assert torch.equal(parse(path.read_bytes())["moment"], data["moment"])


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(key_statistics, "cache_folder", lambda: tmp_path / "file")
    lm = make_tiny("llama")
    assert key_moments(lm, down(lm, 1), tokens=640)


def test_a_text_is_found_in_the_data_folder_and_must_be_long_enough(monkeypatch, tmp_path):
    monkeypatch.setenv("IBKE_DATA", str(tmp_path))
    (tmp_path / "long.txt").write_text("The capital of France. " * 30)
    (tmp_path / "short.txt").write_text("The capital")
    lm = make_tiny("llama")
    assert key_moments(lm, down(lm, 1), "long.txt")
    with pytest.raises(FormatError, match="not even one row"):
        key_moments(lm, down(lm, 1), "short.txt")
    with pytest.raises(FormatError, match=r"none\.txt.*cannot be read"):
        key_moments(lm, down(lm, 1), "none.txt")


def test_statistics_are_those_of_the_model_without_what_is_attached(tmp_path):
    lm = make_tiny("llama")
    kept = lambda: [path.read_bytes() for path in sorted((tmp_path / "cache").rglob("*.safetensors"))]  # noqa: E731
    with EditSession(lm).attach(random_edit(lm, 1, seed=0, layers=[0], scale=1.0)):
        ROMEEditor.for_model(lm, layer=1)
    attached = kept()
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.unlink()
    ROMEEditor.for_model(lm, layer=1)
    assert kept() == attached != []


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "text.txt").write_text("One line\n", encoding="utf-8-sig")
    assert list(lines_of(str(tmp_path / "text.txt"))) == ["One line\n"]


def test_rows_of_text_stop_at_the_budget():
    tokenizer = make_tiny("llama").tokenizer
    lines = ["The capital of France is Paris. "] * 50
    rows = list(text_rows(tokenizer, lines, 3 * CHUNK + 5))
    whole = [token for line in lines for token in tokenizer(line, add_special_tokens=False).input_ids]
    assert [token for row in rows for token in row] == whole[: 3 * CHUNK]
