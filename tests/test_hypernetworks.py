"""MEND, MALMEN and RLEdit against their formulas as they stand, on tiny random models."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import make_tiny
from tests.hypernetworks import briefly_trained, stir
from tests.test_tuning import ARCHITECTURES, FACTS, dense_loss

from ibke.edit import Edit
from ibke.editors.base import method_class
from ibke.editors.hypernetwork.editor import ScaleSettings
from ibke.editors.malmen import MALMEN, ridge_rows
from ibke.editors.mend import MEND, MENDConfig
from ibke.editors.rledit import RLEdit
from ibke.errors import FingerprintMismatchError, FormatError, IBKEError, ModuleNotEditableError
from ibke.frames import encode_pair
from ibke.request import EditRequest
from ibke.session import EditSession

KINDS = [MEND, MALMEN, RLEdit]
EARLIER = [EditRequest("The play is known to", "Paris"), EditRequest("Question: Who?", "Canberra is")]


def plain_tokens(lm, names, requests):
    """By module, keys, gradients and whether they predict the answer, by hooks on whole rows in double precision."""
    model = copy.deepcopy(lm.model).double()
    found = {name: [] for name in names}
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

        handles = [model.get_submodule(name).register_forward_hook(look(name)) for name in names]
        logits = model(input_ids=torch.tensor([pair.fed]), use_cache=False).logits[0, len(pair.prompt) - 1 :]
        F.cross_entropy(logits, torch.tensor(pair.answer), reduction="sum").backward()
        answers = torch.arange(len(pair)) >= len(pair.prompt) - 1
        for name, (keys, out) in seen.items():
            # OPT hands its MLP rows without a batch dimension.
            found[name].append((keys.detach().reshape(len(pair), -1), out.grad.reshape(len(pair), -1), answers))
        for handle in handles:
            handle.remove()
    return {name: [torch.cat(some) for some in zip(*rows, strict=True)] for name, rows in found.items()}


def chosen(rows, answers_only):
    keys, grads, answers = rows
    kept = answers if answers_only else (grads != 0).any(1)
    return keys[kept], grads[kept]


def dense_blocks(transform, features, module, film_first):
    """The blocks' formula, row by row."""
    out = []
    for y in features:
        for block in transform.blocks:
            x = block.u_FR.double() @ (block.v_RF.double() @ y) + block.bias_F
            scale, shift = block.scale_MF[module], block.shift_MF[module]
            y = y + (torch.relu(scale * x + shift) if film_first else scale * torch.relu(x) + shift)
        out.append(y)
    return torch.stack(out)


def pseudo(network, name, taken, seen):
    """k̃ and g̃, and the keys as they are; normalised by what was seen of all modules of the shape."""
    keys, grads = taken
    rows = torch.cat([torch.cat(some, 1) for other, some in seen if network.shapes[other] == network.shapes[name]])
    normal = (torch.cat([keys, grads], 1) - rows.mean(0)) / rows.std(0)
    shape = network.shapes[name]
    made = dense_blocks(network.transforms[shape], normal, network.names[shape].index(name), network.film_first)
    return made[:, : keys.shape[1]], made[:, keys.shape[1] :]


def features(lm, network, requests):
    return {
        name: chosen(rows, network.answers_only) for name, rows in plain_tokens(lm, network.sizes, requests).items()
    }


def grounded(kind, lm, **config):
    """An editor with stirred weights, whose statistics are of ``EARLIER``, and those keys and gradients."""
    network = kind.untrained(lm, kind.Config(**{"layers": (1, 2), "rank": 8, "step_size": 1e-2, **config}))
    stir(network)
    editor = kind(lm, network.requires_grad_(False))
    from ibke.editors.hypernetwork.tokens import take_tokens

    network.observe(
        take_tokens(editor.part, editor.modules, list(editor._rows(EARLIER)), answers_only=network.answers_only)[0]
    )
    return editor, list(features(lm, network, EARLIER).items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mend_is_the_dense_formula(architecture):
    lm = make_tiny(architecture)
    editor, seen = grounded(MEND, lm)
    edit = editor.edit(FACTS)
    for place, (name, taken) in enumerate(features(lm, editor.network, FACTS).items()):
        keys, grads = pseudo(editor.network, name, taken, seen)
        step = editor.network.log_step[place].exp()
        wanted = -step * sum(torch.outer(g, k) for k, g in zip(keys, grads, strict=True))
        assert (edit.delta(name) - wanted).norm() < 5e-4 * wanted.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_as_much_of_the_networks_own_as_is_wanted(kind):
    editor, _ = grounded(kind, make_tiny("llama"))
    whole, half = editor.edit(FACTS), kind(editor.lm, editor.network, ScaleSettings(0.5)).edit(FACTS)
    for name in whole.factors:
        assert (half.delta(name) - whole.delta(name) / 2).norm() < 1e-5 * whole.delta(name).norm()


def test_mend_untrained_and_unnormalised_is_a_step_down_the_gradient():
    lm = make_tiny("llama")
    network = MEND.untrained(lm, MENDConfig(layers=(2,), step_size=1e-2))
    for transform in network.transforms.values():
        transform.count.fill_(1e9)
        transform.square_F.fill_(1e9)
    request = FACTS[0]
    edit = MEND(lm, network.requires_grad_(False)).edit([request])
    name = next(iter(network.sizes))
    model = copy.deepcopy(lm.model)
    weight = model.get_submodule(name).weight.requires_grad_(True)
    # The loss of a request is a mean over its tokens; here it is summed.
    tokens = len(encode_pair(request.prompt, request.target_new, "bare", lm.tokenizer).answer)
    (grad,) = torch.autograd.grad(dense_loss(model, lm, [request]) * tokens, weight)
    torch.testing.assert_close(edit.delta(name), -1e-2 * grad, rtol=1e-3, atol=1e-6)


def test_mend_takes_only_tokens_with_a_gradient():
    lm = make_tiny("llama")
    editor, _ = grounded(MEND, lm, layers=(1, 3))
    edit = editor.edit(FACTS[:1])
    pair = encode_pair(FACTS[0].prompt, FACTS[0].target_new, "bare", lm.tokenizer)
    # What a token writes in the last layer is read at that token alone.
    # Both ways into each of two MLPs, and the way out.
    assert [len(a) for a, _ in edit.factors.values()] == [len(pair), len(pair.answer)] * 3


@pytest.mark.parametrize("kind", [MALMEN, RLEdit])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("many", [1, 20])
def test_malmen_and_rledit_are_the_dense_formula(kind, architecture, many):
    lm = make_tiny(architecture)
    editor, seen = grounded(kind, lm)
    edit = editor.edit(FACTS * many)
    taken = features(lm, editor.network, FACTS * many)
    for place, (name, (k, g)) in enumerate(taken.items()):
        keys, grads = pseudo(editor.network, name, (k, g), [*seen, *taken.items()])
        values = -editor.network.log_step[place].exp() * (k * keys).sum(1, keepdim=True) * grads
        ridge = editor.network.log_ridge[place].exp() * torch.eye(k.shape[1], dtype=k.dtype)
        wanted = torch.linalg.solve(k.T @ k + ridge, k.T @ values).T
        assert (edit.delta(name) - wanted).norm() < 5e-4 * wanted.norm(), name
    assert edit.rank == min(len(k), 32)


def test_both_systems_of_the_ridge_are_the_same():
    keys = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    ridge = torch.tensor(0.3)
    wanted = torch.linalg.solve(keys.T @ keys + ridge * torch.eye(7), keys.T).T
    torch.testing.assert_close(ridge_rows(keys, ridge), wanted)
    few = torch.linalg.solve(keys[:4].T @ keys[:4] + ridge * torch.eye(7), keys[:4].T).T
    torch.testing.assert_close(ridge_rows(keys[:4], ridge), few)


def test_malmen_goes_on_with_what_it_has_seen_and_mend_does_not(tmp_path):
    lm = make_tiny("llama")
    editor, seen = grounded(MALMEN, lm)
    first = editor.edit(FACTS[:2])
    before = features(lm, editor.network, FACTS[:2])
    with EditSession(lm).attach(first):
        knows = editor.after(first)
        second = knows.edit(FACTS[2:])
        again = editor.after(Edit.load(first.save(tmp_path / "first"))).edit(FACTS[2:])
    with EditSession(lm).merge(first):
        taken = features(lm, editor.network, FACTS[2:])
    for place, (name, (k, g)) in enumerate(taken.items()):
        keys, grads = pseudo(editor.network, name, (k, g), [*seen, *before.items(), *taken.items()])
        values = -editor.network.log_step[place].exp() * (k * keys).sum(1, keepdim=True) * grads
        ridge = editor.network.log_ridge[place].exp() * torch.eye(k.shape[1], dtype=k.dtype)
        wanted = torch.linalg.solve(k.T @ k + ridge, k.T @ values).T
        assert (second.delta(name) - wanted).norm() < 1e-3 * wanted.norm(), name
        assert torch.equal(again.delta(name), second.delta(name))
    assert editor.history == {}
    with pytest.raises(FormatError, match="does not carry the statistics"):
        editor.after(first.compose(first))
    mend, _ = grounded(MEND, lm)
    assert mend.after(mend.edit(FACTS[:1])) is mend


def test_layers_are_as_deep_as_published():
    smollm_like = make_tiny("llama", num_hidden_layers=30)

    def layers(kind):
        return sorted({int(name.split(".")[2]) for name in kind.targets(smollm_like, kind.Config())})

    assert (layers(MEND), layers(MALMEN)) == ([27, 28, 29], [24, 25, 26, 27, 28, 29])
    assert layers(RLEdit) == list(range(21, 29))
    names = RLEdit.targets(smollm_like, RLEdit.Config(layers=(3,)))
    assert names == ["model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"]
    with pytest.raises(ModuleNotEditableError, match="layer 9 does not exist"):
        MEND.untrained(make_tiny("llama"), MENDConfig(layers=(9,)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_editor_comes_back_as_it_was(kind, tmp_path):
    lm = make_tiny("llama")
    folder = briefly_trained(kind, lm, tmp_path / "trained")
    editor = kind.for_model(lm, folder)
    copied = kind.for_model(lm, editor.save(tmp_path / "copy"))
    one, two = (some.edit(FACTS).tensors() for some in (editor, copied))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert editor.network.config == copied.network.config


@pytest.mark.parametrize("kind", KINDS)
def test_what_keeps_an_editor_from_loading_is_named(kind, tmp_path, monkeypatch):
    lm = make_tiny("llama")
    monkeypatch.setattr("ibke.editors.hypernetwork.storage.cache_folder", lambda: tmp_path / "cache")
    with pytest.raises(FormatError, match=f"`ibke train --method {kind.name} --model tiny-llama"):
        kind.for_model(lm)
    with pytest.raises(FormatError, match="no trained editor here"):
        kind.for_model(lm, tmp_path)
    editor = kind(lm, kind.untrained(lm, kind.Config(rank=4)))
    folder = editor.save(tmp_path / "cache" / "editors" / lm.fingerprint / kind.name / "editor")
    assert kind.for_model(lm).network.sizes == editor.network.sizes  # found where training leaves it
    with pytest.raises(IBKEError, match="no setting 'rate'"):
        kind.for_model(lm, rate=1)
    with pytest.raises(FingerprintMismatchError):
        kind.for_model(make_tiny("llama", seed=1), folder)
    other = next(some for some in KINDS if some is not kind)
    with pytest.raises(FormatError, match=f"of the method '{kind.name}'"):
        other.for_model(lm, folder)
    manifest = json.loads((folder / "editor.json").read_text())
    (folder / "editor.json").write_text(json.dumps(manifest | {"config": {"rank": 5}}))
    with pytest.raises(FormatError, match="damaged"):
        kind.for_model(lm, folder)
    (folder / "editor.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(FormatError, match="not a hypernetwork of this version"):
        kind.for_model(lm, folder)
    (folder / "editor.json").write_text(json.dumps(manifest))
    raw = (folder / "editor.safetensors").read_bytes()
    (folder / "editor.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(FormatError, match="damaged"):
        kind.for_model(lm, folder)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "`rank` is below 1"),
        ({"step_size": 0.0}, "`step_size` is not positive"),
        ({"penalty": -1.0}, "`penalty` is below 0"),
        ({"turns": 0}, "`turns` is below 1"),
    ],
)
def test_a_wrong_configuration_is_named(wrong, message):
    for kind in KINDS:
        with pytest.raises(IBKEError, match=message):
            kind.Config(**wrong)


def test_mend_is_not_trained_on_sequences():
    with pytest.raises(IBKEError, match="`turns`"):
        MENDConfig(turns=2)


def test_methods_are_registered():
    assert [method_class(kind.name) for kind in KINDS] == KINDS
