"""GRACE against a plain dense computation, the rules of its codebook, and bad files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor
from ibke.editors.descent import Lessons
from ibke.editors.grace import GRACE, Codebook, GRACESettings, place
from ibke.errors import FormatError, IBKEError
from ibke.evaluation.generate import edited_rows
from ibke.evaluation.sequence import InSequence
from ibke.request import EditRequest
from ibke.session import EditSession

ONE = EditRequest("The capital of France is", "Canberra")
TWO = EditRequest("Who wrote the play?", "Paris")


def book(*rows: tuple[float, float, str]) -> Codebook:
    """Entries at a place on a line, with a radius and a label; values tell them apart."""
    keys = torch.tensor([[at, 0.0] for at, _, _ in rows])
    values = torch.arange(1.0, len(rows) + 1)[:, None].expand(-1, 3).contiguous()
    return Codebook(keys, values, torch.tensor([radius for _, radius, _ in rows]), tuple(label for *_, label in rows))


def logits(lm, ids):
    with torch.no_grad():
        return lm.model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_a_value_is_that_of_plain_gradient_descent(tiny_model, model_type):
    lm = tiny_model(model_type)
    editor = GRACE(lm, GRACESettings(epochs=4, layer=2, learning_rate=0.3))
    edit = editor.edit([ONE])
    (pair,) = editor.pairs([ONE])
    last, ids = len(pair.prompt) - 1, torch.tensor([pair.fed])
    seen: list[torch.Tensor] = []
    handle = editor.module.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    lm.model(ids)
    handle.remove()
    key, value = (tensor.reshape(len(pair), -1)[last].detach().clone() for tensor in seen)
    value.requires_grad_()

    def put(_, __, out):
        rows = out.reshape(len(pair), -1)
        return torch.cat([rows[:last], value[None], rows[last + 1 :]]).view_as(out)

    adam = torch.optim.Adam([value], lr=0.3)
    for _ in range(4):
        handle = editor.module.register_forward_hook(put)
        out = lm.model(ids).logits[0, last:]
        handle.remove()
        adam.zero_grad()
        F.cross_entropy(out, torch.tensor(pair.answer)).backward()
        adam.step()
    entries = edit.parts[editor.place]
    torch.testing.assert_close(entries.keys[0], key, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entries.values[0], value.detach(), rtol=1e-3, atol=1e-3)
    assert edit.info.refine_steps == 4 and entries.labels == ("Canberra",)
    handle = editor.module.register_forward_hook(put)
    wanted = logits(lm, pair.fed)
    handle.remove()
    before = logits(lm, pair.fed)
    with EditSession(lm).attach(edit):
        torch.testing.assert_close(logits(lm, pair.fed), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(lm, pair.fed), before)


def test_the_nearest_entry_answers_within_its_radius_only(tiny_model):
    lm = tiny_model("llama")
    (name, module), *_ = [(n, m) for n, m in lm.model.named_modules() if n.endswith("1.mlp.down_proj")]
    x = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0))
    values = torch.tensor([1.0, 2.0])[:, None].expand(-1, 32)
    near = Codebook(x[0, 1:3].clone(), values, torch.tensor([0.5, 0.5]), ("a", "b"))
    other = Codebook(x[2, :1] + 0.1, torch.full((1, 32), 3.0), torch.tensor([0.1]), ("c",))
    plain = module(x)

    def edit(part):
        return Edit({}, (), EditInfo("test", lm.fingerprint), parts={name: part})

    with edited_rows(lm, [edit(near), None, edit(other)]):
        rows = module(x)
    wanted = plain.clone()
    wanted[0, 1], wanted[0, 2] = 1.0, 2.0
    assert torch.equal(rows, wanted)  # the third is 0.8 away, and its radius 0.1
    with EditSession(lm).attach(edit(near)).attach(edit(other)):
        assert torch.equal(module(x), wanted)
        assert torch.equal(module(x[0]), wanted[0])
    assert torch.equal(module(x), plain)


def test_rules_of_the_codebook():
    value = torch.full((3,), 9.0)

    def put(at, label, radius=1.0):
        return place(book((0.0, 1.0, "a"), (10.0, 1.0, "b")), torch.tensor([at, 0.0]), value, label, radius)

    far, fresh, touched = put(5.0, "a")
    assert far.radii.tolist() == [1, 1, 1] and far.labels == ("a", "b", "a") and (fresh, touched) == ({2}, set())
    wide, fresh, touched = put(1.5, "a")
    assert wide.radii.tolist() == [1.5, 1] and len(wide.labels) == 2 and (fresh, touched) == ({0}, set())
    split, fresh, touched = put(1.5, "c")
    assert split.radii.tolist() == [0.75, 1, 0.75] and (fresh, touched) == ({2}, {0})
    again, fresh, touched = put(10.001, "c")
    assert again.labels == ("a", "c") and again.radii.tolist() == [1, 1] and (fresh, touched) == ({1}, set())


def test_of_one_key_the_last_entry_counts():
    joined = Codebook.join([book((0.0, 1.0, "a"), (5.0, 1.0, "b")), book((0.0, 0.5, "c"))])
    assert joined.keys[:, 0].tolist() == [5, 0] and joined.radii.tolist() == [1, 0.5] and joined.labels == ("b", "c")
    with pytest.raises(FormatError, match="widths"):
        Codebook.join([book((0.0, 1.0, "a")), Codebook(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1), ("a",))])


def test_a_sequence_splits_entries_in_force_and_goes_on_with_answers_it_has(tiny_model):
    lm = tiny_model("llama")
    editor = GRACE(lm, GRACESettings(epochs=3, layer=1, radius=1e3))
    first = editor.edit([ONE])
    with EditSession(lm).attach(first) as session:
        later = editor.after(first)
        second = later.edit([TWO])
        session.attach(second)
        keys, radii = second.parts[editor.place].keys, second.parts[editor.place].radii
        half = float((keys[0] - keys[1]).norm()) / 2
        assert radii.tolist() == pytest.approx([half, half])
        known = later.after(second).edit([ONE])
        assert known.info.nll_after < known.info.nll_before
        (label,) = known.parts[editor.place].labels
        assert label == "Canberra"
    whole = first.compose(second).parts[editor.place]
    assert sorted(whole.labels) == ["Canberra", "Paris"] and editor.known is None


def test_a_value_is_learned_under_the_radii_that_come_into_force(tiny_model):
    lm = tiny_model("llama")
    first, second = EditRequest("The capital of France is", "a"), EditRequest("The capital of Peru is", "b")
    plain = GRACE(lm, GRACESettings(layer=1))
    keys_BI, _ = plain._look(plain.pairs([first, second]))
    radius = 1.2 * float((keys_BI[0] - keys_BI[1]).norm())  # so that the second splits what the first has taken
    editor: Editor = GRACE(lm, GRACESettings(layer=1, radius=radius, epochs=30))
    with InSequence(lm) as sequence:
        for request in (first, second):
            edit = editor.edit([request])
            sequence.add(edit)
            editor = editor.after(edit)
        nll, _ = Lessons(plain.part, plain.pairs([second]), lm.tokenizer.pad_token_id).judge()
    assert edit.info.nll_after == pytest.approx(nll, abs=1e-4)


def test_a_codebook_that_is_none_is_refused(tiny_model, tmp_path):
    good = book((0.0, 1.0, "a"))
    assert Codebook.read(good.tensors(), good.record()).labels == ("a",)
    for tensors, record in (
        ({}, good.record()),
        (good.tensors(), {}),
        (good.tensors(), {"labels": ["a", "b"]}),
        (good.tensors(), {"labels": [1]}),
        ({**good.tensors(), "radii": torch.ones(1, 1)}, good.record()),
        ({**good.tensors(), "values": torch.full((1, 3), torch.nan)}, good.record()),
    ):
        with pytest.raises(FormatError, match="codebook"):
            Codebook.read(tensors, record)
    lm = tiny_model("llama")
    name = "model.layers.1.mlp.down_proj"
    misfit = Edit({}, (), EditInfo("test", lm.fingerprint), parts={name: good})
    with pytest.raises(FormatError, match="2 inputs and 3 outputs"):
        EditSession(lm).attach(misfit)
    folder = misfit.save(tmp_path / "edit")
    index = folder / "edit.json"
    index.write_text(index.read_text().replace('"codebook"', '"cookbook"'))
    with pytest.raises(FormatError, match="no kind of part 'cookbook'"):
        Edit.load(folder)


def test_settings_out_of_range_are_named():
    with pytest.raises(IBKEError, match="`radius` is not positive"):
        GRACESettings(radius=0)
