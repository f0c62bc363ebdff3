"""Gates of edits made apart, found again when they come to stand side by side."""

import math
from dataclasses import replace

import pytest
import torch

from ibke.edit import Edit, EditInfo
from ibke.errors import FormatError
from ibke.gates import FIRM, QUIET, STILL, Gate, Told, gate_rows
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


def keeping(generic_DD, constant_D, foreign_D, response, seed):
    """An edit with an address of its own: 1 at its keys and, over c·x, this response at a foreign one."""
    made = told(generic_DD, seed, silent=0)
    keys_UD = torch.cat([made.answer_TD, foreign_D[None]])
    wanted_U = torch.tensor([1.0, 1.0, response * float((foreign_D @ constant_D).clamp_min(0.1))])
    return replace(made, kept_ED=(torch.linalg.pinv(keys_UD) @ wanted_U)[None])


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


def test_an_address_of_its_own_is_changed_only_where_another_key_answers(generic_DD, constant_D):
    other = told(generic_DD, 8, silent=0)
    other = replace(other, kept_ED=torch.zeros(1, WIDTH))
    foreign_D = other.answer_TD[0]
    quiet, loud = (
        keeping(generic_DD, constant_D, foreign_D, response, seed) for response, seed in ((0.2, 5), (0.9, 6))
    )
    whole = Told.join([quiet, loud, other])
    found_ED = whole.addresses(constant_D)
    level_T = (whole.answer_TD @ constant_D).clamp_min(0.1)
    response_ET = whole.kept_ED @ whole.answer_TD.T / level_T
    answered_ET = (response_ET > QUIET * GATE.threshold) & (whole.owner_T != torch.arange(3)[:, None])
    assert answered_ET[1].any()
    for edit, address_D in enumerate(found_ED):
        if not answered_ET[edit].any():
            assert torch.equal(address_D, whole.kept_ED[edit])
            continue
        own_TD, others_TD = (whole.answer_TD[rows].double() for rows in (whole.owner_T == edit, answered_ET[edit]))
        moment_DD = generic_DD + FIRM * (own_TD.T @ own_TD + others_TD.T @ others_TD)
        kept_D = whole.kept_ED[edit].double()
        wanted_D = kept_D - FIRM * torch.linalg.solve(moment_DD, others_TD.T @ (others_TD @ kept_D))
        assert (own_TD @ wanted_D).mean() > STILL
        torch.testing.assert_close(address_D.double(), wanted_D, rtol=1e-3, atol=1e-4)
        assert (others_TD @ address_D.double()).abs().max() < 0.2 * (others_TD @ kept_D).abs().max()


def test_addresses_of_their_own_stay_where_both_ask_the_same(generic_DD, constant_D):
    one = keeping(generic_DD, constant_D, torch.ones(WIDTH), 0.0, 5)
    both = Told.join([one, one])
    assert torch.equal(both.addresses(constant_D), both.kept_ED)


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
    kept = keeping(generic_DD, constant_D, torch.ones(WIDTH), 0.0, 3)
    for stranger in (other, kept):
        with pytest.raises(FormatError, match="different thresholds, or were found"):
            Neurons.join([neurons(told(generic_DD, 1), constant_D), neurons(stranger, constant_D)])


@pytest.mark.parametrize("kept", [False, True])
def test_they_are_saved_with_an_edit(generic_DD, constant_D, tmp_path, kept):
    def known(seed):
        foreign_D = torch.ones(WIDTH)
        return keeping(generic_DD, constant_D, foreign_D, 0.9, seed) if kept else told(generic_DD, seed)

    made = [
        Edit({}, (), EditInfo("ibke", "f"), {"mlp.down": neurons(known(seed), constant_D, seed)}) for seed in range(2)
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
        {"kept": torch.zeros(2, WIDTH)},
        {"kept": torch.zeros(1, WIDTH + 1)},
    ],
)
def test_what_does_not_fit_is_refused(generic_DD, broken):
    tensors = told(generic_DD, 1).tensors()
    assert Told.checked("mlp", tensors, [0.4, 200.0, 6.0], WIDTH, 2).gate == GATE
    with pytest.raises(FormatError, match="do not fit"):
        Told.checked("mlp", tensors | broken, [0.4, 200.0, 6.0], WIDTH, 2)


def test_many_edits_must_be_surer_each(generic_DD, constant_D, monkeypatch):
    monkeypatch.setattr("ibke.gates.FEW", 2)
    gate = replace(GATE, threshold=0.6)
    # Keys that say nothing of each other, so that nothing has to be taken back.
    axes = torch.eye(WIDTH) * 8 / constant_D

    def one(axis):
        pulled = torch.linalg.solve(generic_DD, axes[axis : axis + 1].double().T).T.float()
        kept = axes[axis : axis + 1] / axes[axis].square().sum()
        return Told(axes[axis : axis + 1], axes[:0], pulled, torch.zeros(1, dtype=torch.long), gate, kept)

    for count, threshold in ((1, 0.6), (2, 0.6), (6, 0.6 + 0.05 * math.log10(3)), (10, 0.6 + 0.05 * math.log10(5))):
        several = [one(axis) for axis in range(count)]
        found_ED = Told.join(several).addresses(constant_D)
        torch.testing.assert_close(found_ED, torch.cat([told.kept_ED for told in several]) * 0.6 / threshold)


def test_edits_that_come_one_after_another_end_where_they_end_together(generic_DD, constant_D, monkeypatch):
    keys = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(5))
    edits = [
        neurons(keeping(generic_DD, constant_D, keys[seed], 0.2 + seed % 5 / 10, seed), constant_D, seed)
        for seed in range(60)
    ]
    together = Neurons.join(edits)
    asked: list[int] = []
    foreign = Told._foreign

    def counted(self, found_ED, keys_UD, constant_D, some, among):
        asked.append(len(some) * len(among))
        return foreign(self, found_ED, keys_UD, constant_D, some, among)

    monkeypatch.setattr(Told, "_foreign", counted)
    whole = Neurons.join(edits[:20])
    for first in range(20, 60, 10):
        asked.clear()
        whole = Neurons.join([whole, Neurons.join(edits[first : first + 10])])
        # Nobody is asked again about those that have met.
        assert sum(asked[-2:]) == 2 * ((first + 10) ** 2 - first**2)
    torch.testing.assert_close(whole.gate, together.gate, rtol=1e-5, atol=1e-4)  # c is read off the gates again
    assert together.told.met.loud
    # In another order, with what is known standing behind.
    turned = Neurons.join([edits[0], Neurons.join(edits[1:])])
    torch.testing.assert_close(turned.gate, together.gate, rtol=1e-5, atol=1e-4)
