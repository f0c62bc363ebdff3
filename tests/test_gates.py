"""Gates of edits made apart, found again when they come to stand side by side."""

from dataclasses import replace

import pytest
import torch

from ibke.edit import Edit, EditInfo
from ibke.errors import FormatError
from ibke.gates import QUIET, Gate, Told, gate_rows
from ibke.neurons import Neurons

GATE = Gate(0.4, 200.0, 6.0)
WIDTH = 12


@pytest.fixture
def generic_DD():
    """B: a moment of generic keys."""
    keys = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 0.1 * keys.T @ keys / len(keys)


@pytest.fixture
def constant_D():
    return torch.linspace(0.5, 1.5, WIDTH)


def told(generic_DD, seed, answers=2, silent=1, gate=GATE):
    """What one edit is told from others by."""
    keys_UD = torch.randn(answers + silent, WIDTH, generator=torch.Generator().manual_seed(seed))
    pulled_UD = torch.linalg.solve(generic_DD, keys_UD.double().T).T.float()
    return Told(keys_UD[:answers], keys_UD[answers:], pulled_UD, torch.zeros(answers, dtype=torch.long), gate)


def neurons(known, constant_D, seed=0):
    """Neurons of one edit, its gate found alone."""
    rows_KD = gate_rows(known.addresses(constant_D), constant_D, known.gate)[0]
    out_KD = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Neurons(rows_KD, constant_D.expand(2, -1), out_KD, known)


@pytest.mark.parametrize("edits", [1, 3, 9])  # 3, 9 and 27 keys in 12 dimensions: both ways of solving
def test_addresses_are_those_of_one_dense_solve(generic_DD, constant_D, edits):
    several = [told(generic_DD, seed) for seed in range(edits)]
    found_ED = Told.join(several).addresses(constant_D).double()
    keys_UD = torch.cat([torch.cat([one.answer_TD, one.silent_SD]) for one in several]).double()
    moment_DD = generic_DD + keys_UD.T @ keys_UD
    level_U = (keys_UD @ constant_D.double()).clamp_min(0.1)
    for edit, one in enumerate(several):
        mine_TD = one.answer_TD.double()
        plain_D = torch.linalg.solve(moment_DD, mine_TD.sum(0))
        plain_D = plain_D / (mine_TD @ plain_D).mean()
        response_U = keys_UD @ plain_D / level_U
        response_U[3 * edit : 3 * edit + 2] = 0
        plain_D = plain_D / (response_U.max() / (QUIET * GATE.threshold)).clamp_min(1.0)
        torch.testing.assert_close(found_ED[edit], plain_D, rtol=1e-4, atol=1e-5)


def test_the_order_of_composing_does_not_matter(generic_DD, constant_D):
    first, second, third = (neurons(told(generic_DD, seed), constant_D, seed) for seed in range(3))
    left = Neurons.join([Neurons.join([first, second]), third])
    right = Neurons.join([first, Neurons.join([second, third])])
    other = Neurons.join([third, first, second])
    torch.testing.assert_close(left.gate, right.gate, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left.gate, other.gate[[2, 3, 4, 5, 0, 1]], rtol=1e-4, atol=1e-4)
    assert torch.equal(left.out, right.out) and torch.equal(left.out, other.out[[2, 3, 4, 5, 0, 1]])
    # Alone each would have answered for the others; together none does.
    assert not torch.allclose(left.gate[:2], first.gate)


def test_an_edit_that_cannot_be_told_from_another_falls_silent(generic_DD, constant_D):
    same = told(generic_DD, 4)
    alone, both = same.addresses(constant_D), Told.join([same, same]).addresses(constant_D)
    level_T = (same.answer_TD @ constant_D).clamp_min(0.1)
    assert (same.answer_TD @ alone[0] / level_T).max() > GATE.threshold
    assert (same.answer_TD @ both.T / level_T[:, None]).max() <= QUIET * GATE.threshold * 1.001


def test_neurons_that_need_not_be_told_apart_stand_behind_unchanged(generic_DD, constant_D):
    plain = neurons(told(generic_DD, 1), constant_D, 1).map(lambda tensor: tensor)
    known = neurons(told(generic_DD, 2), constant_D, 2)
    assert plain.told is None
    whole = Neurons.join([plain, known])
    torch.testing.assert_close(whole.gate, torch.cat([known.gate, plain.gate]), rtol=1e-5, atol=1e-5)
    assert torch.equal(whole.out, torch.cat([known.out, plain.out])) and whole.told.count == 1
    again = Neurons.join([whole, neurons(told(generic_DD, 3), constant_D, 3)])
    assert again.told.count == 2 and torch.equal(again.gate[4:], plain.gate)


def test_gates_of_different_editors_are_not_told_apart(generic_DD, constant_D):
    other = told(generic_DD, 2, gate=replace(GATE, threshold=0.5))
    with pytest.raises(FormatError, match="different thresholds"):
        Neurons.join([neurons(told(generic_DD, 1), constant_D), neurons(other, constant_D)])


def test_they_are_saved_with_an_edit(generic_DD, constant_D, tmp_path):
    made = [
        Edit({}, (), EditInfo("ibke", "f"), {"mlp.down": neurons(told(generic_DD, seed), constant_D, seed)})
        for seed in range(2)
    ]
    read = [Edit.load(edit.save(tmp_path / str(number))) for number, edit in enumerate(made)]
    whole, again = made[0].compose(made[1]).neurons["mlp.down"], read[0].compose(read[1]).neurons["mlp.down"]
    assert torch.equal(whole.gate, again.gate) and again.told.gate == GATE
    for name, tensor in whole.told.tensors().items():
        assert torch.equal(tensor, again.told.tensors()[name])


@pytest.mark.parametrize(
    "broken",
    [
        {"answer": torch.zeros(2, WIDTH - 1)},
        {"pulled": torch.zeros(2, WIDTH)},
        {"owner": torch.tensor([0, 1])},
        {"owner": torch.tensor([0, -1])},
        {"owner": torch.zeros(2)},
        {"silent": torch.full((1, WIDTH), torch.nan)},
    ],
)
def test_what_does_not_fit_is_refused(generic_DD, broken):
    tensors = told(generic_DD, 1).tensors()
    assert Told.checked("mlp", tensors, [0.4, 200.0, 6.0], WIDTH, 2).gate == GATE
    with pytest.raises(FormatError, match="do not fit"):
        Told.checked("mlp", tensors | broken, [0.4, 200.0, 6.0], WIDTH, 2)
