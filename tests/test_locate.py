"""ROME, MEMIT and AlphaEdit against plain dense formulas on a tiny random model, and what they share."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import make_tiny
from tests.locating import EDITORS, FAST, REQUESTS, close, floored, key_at_subject, make_editor, mean_key, noted_values

from ibke.editors.alphaedit import AlphaEditSettings, null_space
from ibke.editors.base import method_class
from ibke.editors.memit import MEMITEditor, MEMITSettings
from ibke.editors.rome import ROMEEditor, ROMESettings
from ibke.errors import IBKEError, ModuleNotEditableError, RequestError
from ibke.evaluation.generate import generate
from ibke.fingerprint import fingerprint
from ibke.modules import architecture_of, by_depth, target_modules, weight_OI
from ibke.request import EditRequest
from ibke.session import EditSession

pytestmark = pytest.mark.usefixtures("statistics_folder")


@pytest.mark.parametrize("exact_at", ["bare", "mean"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "gptj", "opt", "gemma3_text"])
def test_rome_is_the_dense_formula(model, exact_at, monkeypatch):
    editor = make_editor("rome", model, exact_at=exact_at)
    (name, module), request = next(iter(editor.modules.items())), REQUESTS[0]
    key = mean_key(editor, module, request)
    exact = key_at_subject(editor, module, request) if exact_at == "bare" else key
    deltas = noted_values(monkeypatch)
    edit = editor.edit([request])
    inverse = torch.linalg.inv(floored(editor.moments[name]))
    wanted = torch.outer(deltas[0][0].double(), inverse @ key) / (exact @ inverse @ key)
    close(edit.delta(name), wanted)
    assert edit.rank == 1


@pytest.mark.parametrize(("exact_at", "key_of"), [("bare", key_at_subject), ("mean", mean_key)])
def test_rome_maps_its_key_to_the_value(exact_at, key_of, monkeypatch):
    editor = make_editor("rome", exact_at=exact_at)
    (name, module), request = next(iter(editor.modules.items())), REQUESTS[0]
    key, weight = key_of(editor, module, request), weight_OI(module).double()
    deltas = noted_values(monkeypatch)
    changed = weight + editor.edit([request]).delta(name).double()
    close(changed @ key, weight @ key + deltas[0][0].double(), 1e-6)


def test_rome_makes_several_edits_one_after_another():
    editor = make_editor("rome")
    whole = editor.edit(REQUESTS)
    with EditSession(editor.lm) as session:
        first = editor.edit(REQUESTS[:1])
        session.attach(first)
        second = editor.edit(REQUESTS[1:2])
        session.attach(second)
        third = editor.edit(REQUESTS[2:])
    (name,) = whole.factors
    close(whole.delta(name), first.delta(name) + second.delta(name) + third.delta(name))
    assert whole.rank == 3 and whole.requests == tuple(REQUESTS) and whole.info.method == "rome"
    assert whole.info.achieved is not None and whole.info.nll_before != whole.info.nll_after


def dense_memit(editor, name, keys):
    weight = editor.settings.moment_weight * len(keys)
    return keys.T @ torch.linalg.inv(weight * floored(editor.moments[name]) + keys @ keys.T)


def dense_alphaedit(editor, name, keys, history=0.0):
    values, vectors = torch.linalg.eigh(editor.moments[name])
    free = vectors[:, values < editor.settings.threshold]
    projector, eye = free @ free.T, torch.eye(len(keys), dtype=torch.float64)
    left = projector @ (keys @ keys.T + history) + editor.settings.ridge * eye
    return torch.linalg.solve(left, projector @ keys).T


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize(("method", "dense"), [("memit", dense_memit), ("alphaedit", dense_alphaedit)])
def test_a_spread_is_the_dense_formula_layer_by_layer(method, dense, model, monkeypatch):
    editor = make_editor(method, model)
    names, lm = list(editor.modules), editor.lm

    def states():
        """What leaves the last edited layer at the token written, in bare prompts."""
        found = []
        for request in REQUESTS:
            pair = editor.pair(request.prompt, request.target_new, subject=request.subject)
            hidden = lm.model(torch.tensor([pair.prompt]), output_hidden_states=True).hidden_states
            found.append(hidden[editor.upper.first + 1][0, pair.place])
        return torch.stack(found).double()

    def keys(name):
        return torch.stack([mean_key(editor, editor.modules[name], request) for request in REQUESTS], dim=1)

    deltas = noted_values(monkeypatch)
    edit = editor.edit(REQUESTS)
    with torch.no_grad():
        target = states() + deltas[0].double()
        first = ((target - states()) / 2).T @ dense(editor, names[0], keys(names[0]))
        close(edit.delta(names[0]), first)
        with EditSession(lm).attach(type(edit)({names[0]: edit.factors[names[0]]}, (), edit.info)):
            second = (target - states()).T @ dense(editor, names[1], keys(names[1]))
        close(edit.delta(names[1]), second)
        with EditSession(lm).attach(edit):
            assert (target - states()).norm() < 0.9 * deltas[0].norm()
    assert edit.rank == len(REQUESTS)


def test_alphaedit_leaves_projected_out_keys_where_they_are():
    editor = make_editor("alphaedit")
    edit = editor.edit(REQUESTS)
    for name, moment_II in editor.moments.items():
        values, vectors = torch.linalg.eigh(moment_II)
        kept = vectors[:, values >= editor.settings.threshold]
        assert 0 < kept.shape[1] < len(values)
        update = edit.delta(name).double()
        assert (update @ kept).norm() < 1e-6 * update.norm()


def test_alphaedit_remembers_what_it_is_told():
    editor = make_editor("alphaedit")
    names = list(editor.modules)
    with EditSession(editor.lm) as session:
        edit = editor.edit(REQUESTS[:2])
        session.attach(edit)
        knows = editor.after(edit)
        keys = {
            name: torch.stack([mean_key(editor, module, request) for request in REQUESTS[:2]], dim=1)
            for name, module in editor.modules.items()
        }
        new = {name: mean_key(editor, editor.modules[name], REQUESTS[2])[:, None] for name in names}
        more = knows.after(edit)
    assert editor.history == {} and set(knows.history) == set(names)
    for name in names:
        history = keys[name] @ keys[name].T
        close(knows.addresses(name, new[name].T), dense_alphaedit(editor, name, new[name], history))
        close(more.addresses(name, new[name].T), dense_alphaedit(editor, name, new[name], 2 * history))
        old = keys[name].T
        plain, remembering = (one.addresses(name, new[name].T) @ old.T for one in (editor, knows))
        assert remembering.norm() < plain.norm()


def test_other_methods_are_after_an_edit_what_they_were():
    editor = make_editor("memit")
    assert editor.after(editor.edit(REQUESTS[:1])) is editor


def test_null_space_needs_a_direction():
    with pytest.raises(IBKEError, match=r"least eigenvalue of C₀ is 1.*Raise `threshold`"):
        null_space(torch.eye(4, dtype=torch.float64), 0.5, "m")


# --- all of them


@pytest.mark.parametrize("method", EDITORS)
@pytest.mark.parametrize("model", ["llama", "gpt2", "falcon"])
def test_an_edit_says_what_it_took_and_leaves_the_model_alone(method, model):
    editor = make_editor(method, model, steps=30)
    before = {name: tensor.clone() for name, tensor in editor.lm.model.state_dict().items()}
    info = editor.edit(REQUESTS[:1]).info
    assert info.nll_after != info.nll_before and info.achieved is False
    assert 0 < info.refine_steps < 30 and info.seconds > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in editor.lm.model.state_dict().items())
    assert fingerprint(editor.lm.model) == editor.lm.fingerprint


def test_rome_corrects_a_fact_of_the_real_model(smollm32):
    request = EditRequest("The profession of Arun Nehru is", "actor", subject="Arun Nehru")
    edit = ROMEEditor(smollm32, ROMESettings(layer=3, learning_rate=1.0)).edit([request])
    prompt = smollm32.tokenizer(request.prompt).input_ids
    before, after = generate(smollm32, [prompt, prompt], [None, edit])
    assert (before.text != "actor", after.text, edit.info.achieved) == (True, "actor", True)


@pytest.mark.parametrize("method", EDITORS)
def test_an_edit_that_fails_half_way_leaves_the_model_alone(method, monkeypatch):
    editor = make_editor(method)
    before = editor.lm.model(torch.tensor([[5, 6, 7]])).logits
    outcome, calls = editor.outcome, []

    def fail_with_the_edit_in_force(located):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return outcome(located)

    monkeypatch.setattr(editor, "outcome", fail_with_the_edit_in_force)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(REQUESTS[:1])
    assert torch.equal(editor.lm.model(torch.tensor([[5, 6, 7]])).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in editor.lm.model.modules())


@pytest.mark.parametrize("method", EDITORS)
def test_edits_in_force_are_taken_into_account(method):
    editor = make_editor(method)
    alone = editor.edit(REQUESTS[:1])
    with EditSession(editor.lm).attach(editor.edit(REQUESTS[1:])):
        after = editor.edit(REQUESTS[:1])
    again = editor.edit(REQUESTS[:1])
    assert alone.info.nll_before != after.info.nll_before
    for name, tensor in alone.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
        # Values differ; the first layer's keys know nothing of what is written there.
        assert name.endswith("/A") or not torch.equal(tensor, after.tensors()[name])


def test_a_subject_is_guessed_and_one_at_the_very_beginning_is_written_behind():
    editor = make_editor("rome")
    named, guessed = (
        editor.located([EditRequest("The capital of Borduria is", "Rome", subject=subject)])[0]
        for subject in ("Borduria", None)
    )
    assert [pair.place for pair in named.asked] == [pair.place for pair in guessed.asked]
    (first,) = editor.located([EditRequest("B is the capital of", "Rome", subject="B")])
    bare, *others = first.asked
    assert bare.place == 1
    words = {editor.lm.tokenizer.decode(pair.prompt[pair.place :]) for pair in first.asked}
    assert len(words) == 1 and all(pair.place > 1 for pair in others)


def test_layers_are_as_deep_as_published_unless_they_are_named():
    assert by_depth(make_tiny("llama", num_hidden_layers=32), (4, 8), of=32) == (4, 5, 6, 7, 8)
    assert by_depth(make_tiny("llama", num_hidden_layers=16), (4, 8), of=32) == (2, 3, 4)
    lm = make_tiny("llama")
    names = target_modules(lm, lm.architecture, (1, 3))
    lm.architecture = architecture_of(lm.model, names)
    assert list(MEMITEditor(lm, MEMITSettings(**FAST)).modules) == names
    assert list(ROMEEditor(lm, ROMESettings(**FAST)).modules) == names[:1]
    with pytest.raises(IBKEError, match="none of the named modules is in a layer"):
        ROMEEditor(lm, ROMESettings(layer=2))


@pytest.mark.parametrize("method", EDITORS)
def test_bad_input(method):
    editor = make_editor(method)
    with pytest.raises(RequestError, match="no request"):
        editor.edit([])
    with pytest.raises(RequestError, match="window"):
        editor.edit([EditRequest("word " * 200, "x")])
    with pytest.raises(IBKEError, match=r"no setting 'step'.*Did you mean 'steps'"):
        method_class(method).for_model(editor.lm, step=3)
    for settings, message in (
        ({"steps": 0}, "`steps` is below 1"),
        ({"clamp": 0.0}, "`clamp` is not positive"),
        ({"kl_weight": -1.0}, "`kl_weight` is below 0"),
        ({"bare_share": 1.5}, "`bare_share` is not between 0 and 1"),
        ({"tokens": 3}, "not even one row"),
    ):
        with pytest.raises(IBKEError, match=message):
            method_class(method).for_model(editor.lm, **settings)


def test_bad_layers():
    lm = make_tiny("llama")
    with pytest.raises(ModuleNotEditableError, match="layer 9 does not exist"):
        ROMEEditor(lm, ROMESettings(layer=9))
    with pytest.raises(IBKEError, match="no layers in ascending order"):
        MEMITEditor(lm, MEMITSettings(layers=(2, 1)))
    with pytest.raises(IBKEError, match="`moment_weight` is not positive"):
        MEMITSettings(moment_weight=0.0)
    with pytest.raises(IBKEError, match="`ridge` is not positive"):
        AlphaEditSettings(ridge=-1.0)
