"""UltraEdit against its formulas as they stand, on tiny random models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import make_tiny
from tests.test_tuning import ARCHITECTURES, FACTS

from ibke.edit import Edit, EditInfo
from ibke.editors.row_statistics import RowStatistics
from ibke.editors.ultraedit import UltraEdit, UltraEditSettings
from ibke.errors import FormatError
from ibke.frames import encode_pair
from ibke.session import EditSession


def features(lm, editor, requests):
    """Keys and gradients by plain hooks and whole rows: module name to (N × I, N × O), double precision."""
    model = copy.deepcopy(lm.model).double()
    found = {name: ([], []) for name in editor.modules}
    for request in requests:
        pair = encode_pair(request.prompt, request.target_new, "bare", lm.tokenizer)
        seen = {}

        def look(name, seen=seen):
            def hook(_, args, out):
                out = out if out.requires_grad else out.detach().requires_grad_()
                out.retain_grad()
                seen[name] = (args[0], out)
                return out

            return hook

        handles = [model.get_submodule(name).register_forward_hook(look(name)) for name in editor.modules]
        logits = model(input_ids=torch.tensor([pair.fed]), use_cache=False).logits[0, len(pair.prompt) - 1 :]
        F.cross_entropy(logits, torch.tensor(pair.answer), reduction="sum").backward()
        for name, (keys, out) in seen.items():
            # OPT hands its MLP rows without a batch dimension.
            keys, grads = (tensor.reshape(len(pair.fed), -1)[len(pair.prompt) - 1 :] for tensor in (keys, out.grad))
            found[name][0].append(keys.detach())
            found[name][1].append(grads)
        for handle in handles:
            handle.remove()
    return {name: (torch.cat(keys), torch.cat(grads)) for name, (keys, grads) in found.items()}


def dense_ultraedit(taken, earlier, rate):
    """The paper's formulas as they stand: statistics of all rows of modules of one shape, then a dense ridge solve."""
    rows = {}
    for turn in (*earlier, taken):
        for keys, grads in turn.values():
            rows.setdefault((keys.shape[1], grads.shape[1]), []).append(torch.cat([keys, grads], dim=1))
    updates = {}
    for name, (keys, grads) in taken.items():
        seen = torch.cat(rows[keys.shape[1], grads.shape[1]])
        normal = (torch.cat([keys, grads], dim=1) - seen.mean(0)) / seen.std(0)
        h, g = normal.split([keys.shape[1], grads.shape[1]], dim=1)
        values = -rate * h.square().sum(1, keepdim=True) * g
        gram = keys.T @ keys + torch.eye(keys.shape[1], dtype=keys.dtype)
        updates[name] = torch.linalg.solve(gram, keys.T @ values).T
    return updates


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("many", [1, 20])
def test_ultraedit_is_the_dense_formula(architecture, many):
    lm = make_tiny(architecture)
    editor = UltraEdit(lm, UltraEditSettings(1e-2, gate_layers=(1,), value_layers=(2,)))
    edit = editor.edit(FACTS * many)
    taken = features(lm, editor, FACTS * many)
    tokens = len(next(iter(taken.values()))[0])
    assert edit.rank == min(tokens, 32)
    for name, wanted in dense_ultraedit(taken, [], 1e-2).items():
        assert (edit.delta(name) - wanted).norm() < 2e-4 * wanted.norm(), name
    assert edit.info.refine_steps == 0 and edit.info.achieved is None


def test_ultraedit_remembers_turns_and_nothing_else(tmp_path):
    lm = make_tiny("llama")
    editor = UltraEdit(lm, UltraEditSettings(1e-2))
    first = editor.edit(FACTS[:2])
    with EditSession(lm).attach(first):
        knows = editor.after(first)
        second = knows.edit(FACTS[2:])
        loaded = editor.after(Edit.load(first.save(tmp_path / "first"))).edit(FACTS[2:])
    assert editor.history == {}
    tokens = [len(encode_pair(r.prompt, r.target_new, "bare", lm.tokenizer).answer) for r in FACTS]
    assert knows.history["32x64"].count == sum(tokens[:2]) * len(editor.modules)
    assert knows.after(second).history["32x64"].count == sum(tokens) * len(editor.modules)
    turn_1 = features(lm, editor, FACTS[:2])
    with EditSession(lm).merge(first):
        turn_2 = features(lm, editor, FACTS[2:])
    for name, wanted in dense_ultraedit(turn_2, [turn_1], 1e-2).items():
        assert (second.delta(name) - wanted).norm() < 5e-4 * wanted.norm(), name
        assert torch.equal(loaded.delta(name), second.delta(name))
    again = editor.edit(FACTS[:2])
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in first.tensors().items())


def test_ultraedit_cannot_go_on_from_what_it_did_not_make():
    editor = UltraEdit(make_tiny("llama"))
    made = editor.edit(FACTS[:1])
    for edit in (made.compose(made), Edit({}, (), EditInfo("ibke", "f", latent={"z": torch.zeros(3)}))):
        with pytest.raises(FormatError, match="does not carry the statistics"):
            editor.after(edit)


def test_ultraedit_changes_gate_and_value_where_there_are_both():
    names = list(UltraEdit(make_tiny("llama"), UltraEditSettings(gate_layers=(1,), value_layers=(2,))).modules)
    assert [name.split("layers.")[1] for name in names] == ["1.mlp.gate_proj", "2.mlp.up_proj"]
    names = list(UltraEdit(make_tiny("gpt2"), UltraEditSettings(gate_layers=(1,), value_layers=(1, 2))).modules)
    assert [name.split("h.")[1] for name in names] == ["1.mlp.c_fc", "2.mlp.c_fc"]


def test_statistics_of_parts_are_those_of_all_rows():
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 100
    one, *others = (RowStatistics.of(part) for part in rows.split([1, 19, 30]))
    known = one
    for other in others:
        known = known.join(other)
    torch.testing.assert_close(known.mean_F, rows.mean(0))
    torch.testing.assert_close(known.normalise(rows), (rows - rows.mean(0)) / rows.std(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(one.normalise(rows[:1]), torch.zeros(1, 6, dtype=torch.float64))
