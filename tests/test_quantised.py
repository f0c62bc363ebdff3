"""Matrices as bytes."""

from __future__ import annotations

import torch

from ibke.editors.ibke.shipped import SHIPPED, load_editor, shipped_folder
from ibke.quantised import SCALE, quantise, restore


def test_no_more_than_half_a_unit_of_a_row_is_lost():
    torch.manual_seed(0)
    rows = torch.randn(3, 4, 8) * 10.0 ** torch.arange(-3, 1).view(1, 4, 1)
    kept = quantise({"rows": rows, "rest": rows[0, 0]}, {"rows"})
    assert kept["rows"].dtype == torch.int8 and torch.equal(kept["rest"], rows[0, 0])
    found = restore(kept)
    unit = rows.abs().amax(-1, keepdim=True) / 127
    assert set(found) == {"rows", "rest"} and ((found["rows"] - rows).abs() <= 0.5001 * unit).all()


def test_rows_of_nothing_stay_nothing():
    found = restore(quantise({"rows": torch.zeros(2, 3)}, {"rows"}))
    assert torch.equal(found["rows"], torch.zeros(2, 3))


def test_what_has_been_rounded_is_not_rounded_again():
    once = quantise({"rows": torch.randn(5, 7)}, {"rows"})
    twice = quantise(restore(once), {"rows"})
    assert torch.equal(once["rows"], twice["rows"]) and torch.allclose(once["rows" + SCALE], twice["rows" + SCALE])


def test_what_ships_is_small_and_its_bases_are_orthonormal(smollm32):
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*.safetensors")) < 15e6
    network, _ = load_editor(shipped_folder(smollm32), smollm32)
    assert network.relay is not None
    for basis_DE in (network.key_basis_DE, network.relay.key_basis_DE):
        apart = basis_DE.T.double() @ basis_DE.double() - torch.eye(len(basis_DE))
        assert apart.abs().max() < 1e-6
