from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibke.edit import Edit, EditInfo, dense_factors
from ibke.edit_folder import INDEX
from ibke.errors import FingerprintMismatchError, FormatError
from ibke.request import EditRequest, Probe

REQUEST = EditRequest(
    "The capital of Australia is",
    "Perth",
    subject="Australia",
    rephrase_prompts=("Australia's capital is",),
    locality=(Probe("The capital of France is", "Paris", "same_relation"),),
)


def make_edit(rank: int = 3, seed: int = 0, names: tuple[str, ...] = ("a.down", "b.down"), **info) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: (torch.randn(rank, 11, generator=generator), torch.randn(7, rank, generator=generator)) for name in names
    }
    latent = {"z": torch.randn(2, 5, generator=generator)}
    details = {"refine_steps": 4, "rate_nats": 41.7, "achieved": True, "seconds": 0.1, "nll_before": 9.5}
    return Edit(factors, (REQUEST,), EditInfo("ibke", "f" * 32, "tiny", **{**details, "latent": latent, **info}))


def dense(edit: Edit) -> dict[str, torch.Tensor]:
    return {name: edit.delta(name).double() for name in edit.factors}


def test_save_and_load_is_exact(tmp_path):
    edit = make_edit()
    loaded = Edit.load(edit.save(tmp_path / "edits" / "perth"))
    assert loaded.requests == edit.requests
    assert list(loaded.factors) == list(edit.factors)
    for name, pair in edit.factors.items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(pair, loaded.factors[name], strict=True))
    assert torch.equal(loaded.info.latent.pop("z"), edit.info.latent.pop("z"))
    assert loaded.info == edit.info


def test_saving_twice_gives_the_same_bytes_and_replaces_the_old_edit(tmp_path):
    first = {path.name: path.read_bytes() for path in make_edit().save(tmp_path / "one").iterdir()}
    make_edit(seed=1).save(tmp_path / "two")
    second = {path.name: path.read_bytes() for path in make_edit().save(tmp_path / "two").iterdir()}
    assert first == second
    assert len(first) == 2


def test_interrupted_save_keeps_the_old_edit(tmp_path, monkeypatch):
    old = make_edit()
    old.save(tmp_path)

    def fail(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ibke.files.os.fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        make_edit(seed=1).save(tmp_path)
    assert torch.equal(Edit.load(tmp_path).delta("a.down"), old.delta("a.down"))
    assert len(list(tmp_path.iterdir())) == 2


def test_factors_that_share_memory_are_saved(tmp_path):
    shared = torch.randn(4, 4)
    edit = Edit({"m": (shared, shared)}, (), EditInfo("x", "f"))
    assert torch.equal(Edit.load(edit.save(tmp_path)).delta("m"), edit.delta("m"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / INDEX).unlink(), "no edit here"),
        (lambda folder: (folder / INDEX).write_text("{"), "not valid JSON"),
        (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe"), "not valid JSON"),
        (lambda folder: (folder / INDEX).write_text("[]"), "not an edit"),
        (lambda folder: (folder / INDEX).write_text('{"format": "other"}'), "not an edit"),
        (lambda folder: rewrite(folder, version=99), "format version 99"),
        (lambda folder: rewrite(folder, tensors="missing.safetensors"), "cannot be read"),
        (lambda folder: rewrite(folder, requests=[{"prompt": ""}]), "not complete"),
        (lambda folder: rewrite(folder, info={}), "not complete"),
        (lambda folder: tensors(folder).write_bytes(tensors(folder).read_bytes()[:-9]), "truncated"),
        (lambda folder: tensors(folder).unlink(), "cannot be read"),
    ],
)
def test_damaged_folder_is_refused(tmp_path, damage, message):
    make_edit().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(FormatError, match=message) as caught:
        Edit.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_index_cannot_lead_out_of_its_folder(tmp_path):
    folder = make_edit().save(tmp_path / "edit")
    data = tensors(folder)
    data.rename(tmp_path / data.name)
    rewrite(folder, tensors=f"../{data.name}")
    with pytest.raises(FormatError, match="cannot be read"):
        Edit.load(folder)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="cannot be written"):
        make_edit().save(tmp_path / "file")


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(2, 5), torch.ones(4, 3), r"A \[2, 5\], B \[4, 3\]"),
        (torch.ones(5), torch.ones(4, 1), "do not fit"),
        (torch.full((1, 5), torch.nan), torch.ones(4, 1), "not finite"),
        (torch.ones(1, 5), torch.full((4, 1), torch.inf), "not finite"),
    ],
)
def test_bad_factors_are_refused(a, b, message):
    with pytest.raises(FormatError, match=message):
        Edit({"m": (a, b)}, (), EditInfo("x", "f"))


def test_norm_and_rank_from_the_factors():
    edit = make_edit(rank=4)
    assert edit.rank == 4
    for name, norm in edit.norm().items():
        assert norm == pytest.approx(dense(edit)[name].norm().item(), rel=1e-6)
    with pytest.raises(FormatError, match=r"a\.down, b\.down"):
        edit.delta("c.down")


def test_compose_adds_updates():
    one, two = make_edit(names=("a.down", "b.down")), make_edit(rank=2, seed=1, names=("b.down", "c.down"))
    both = one.compose(two)
    expected = {"a.down": dense(one)["a.down"], "c.down": dense(two)["c.down"]}
    expected["b.down"] = dense(one)["b.down"] + dense(two)["b.down"]
    assert dense(both).keys() == expected.keys()
    for name, delta in dense(both).items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=1e-5)
    assert both.factors["b.down"][0].shape[0] == 5
    assert both.requests == one.requests + two.requests
    assert (both.info.rate_nats, both.info.refine_steps, both.info.method) == (83.4, 8, "ibke")
    assert both.info.achieved is None
    assert both.info.latent == {}


def test_compose_refuses_other_models_and_shapes():
    with pytest.raises(FingerprintMismatchError, match=f"{'f' * 32} and {'e' * 32}"):
        make_edit().compose(Edit({}, (), EditInfo("x", "e" * 32)))
    other = Edit({"a.down": (torch.ones(1, 3), torch.ones(7, 1))}, (), EditInfo("x", "f" * 32))
    with pytest.raises(FormatError, match="shapes differ"):
        make_edit().compose(other)


@settings(deadline=None, max_examples=30)
@given(ranks=st.tuples(*[st.integers(1, 9)] * 3))
def test_compose_is_associative(ranks):
    one, two, three = (make_edit(rank=rank, seed=seed) for seed, rank in enumerate(ranks))
    left, right = one.compose(two).compose(three), one.compose(two.compose(three))
    for name in left.factors:
        assert torch.equal(left.delta(name), right.delta(name))


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 20), target=st.integers(1, 12))
def test_compress_is_the_best_approximation_and_knows_its_error(rank, target):
    edit = make_edit(rank=rank)
    small, error = edit.compress(target)
    before, after = dense(edit), dense(small)
    assert small.rank <= target
    lost = sum((before[name] - after[name]).square().sum() for name in before)
    total = sum(delta.square().sum() for delta in before.values())
    assert error == pytest.approx((lost / total).sqrt().item(), abs=1e-6)
    best = sum(torch.linalg.svdvals(delta)[target:].square().sum() for delta in before.values())
    assert error == pytest.approx((best / total).sqrt().item(), abs=1e-6)


def test_compress_of_nothing_and_to_nothing():
    empty = Edit({"m": (torch.zeros(2, 5), torch.zeros(4, 2))}, (), EditInfo("x", "f"))
    assert empty.compress(1)[1] == 0.0
    with pytest.raises(FormatError, match="rank 0"):
        empty.compress(0)


def rewrite(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, **changes}))


def tensors(folder):
    return next(folder.glob("*.safetensors"))


def test_a_dense_update_is_an_edit_to_the_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 9), (9, 5), (6, 6)):
        delta = torch.randn(shape, generator=generator)
        edit = Edit({"m": dense_factors(delta)}, (), EditInfo("x", "f"))
        assert edit.rank == min(shape)
        assert torch.equal(edit.delta("m"), delta)
        folder = edit.save(tmp_path / f"{shape[0]}")
        assert torch.equal(Edit.load(folder).delta("m"), delta)
        assert next(folder.glob("*.safetensors")).stat().st_size < 4 * delta.numel() + 200
    both = Edit({"m": (torch.eye(4), torch.eye(4))}, (), EditInfo("x", "f"))
    assert torch.equal(Edit.load(both.save(tmp_path / "eye")).delta("m"), torch.eye(4))
