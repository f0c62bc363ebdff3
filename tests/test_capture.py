"""Keys and value gradients against autograd, and the split forward pass against the whole one."""

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import make_tiny

from ibke.batch import ANSWER, LAST, SUBJECT, Pair, coded_positions, collate
from ibke.capture import capture
from ibke.errors import CaptureError
from ibke.frames import FRAMES, encode_pair
from ibke.modules import ARCHITECTURES, resolve, target_modules, weight_OI
from ibke.neurons import Neurons, Site
from ibke.partial import PartialModel, row_updates
from ibke.prefixes import SHARED, Prefixes, Row, frame_prefixes
from ibke.rows import EDIT, INSIDE, OUTSIDE, build_groups, merge, run_rows

EVERY = sorted(ARCHITECTURES)
FIRST = 2


def some_batch(lm):
    """Three rows of different lengths, answers of one to three tokens."""
    tokenizer = lm.tokenizer
    facts = [("The capital of France is", "Rome"), ("Who?", "B"), ("The author of the play", "is known")]
    pairs = [encode_pair(prompt, target, "bare", tokenizer) for prompt, target in facts]
    return pairs, collate(pairs, tokenizer.pad_token_id)


def split(lm, layers=(FIRST, FIRST + 1)):
    modules = resolve(lm.model, target_modules(lm, lm.architecture, layers))
    return PartialModel(lm.model, lm.architecture.layers, layers[0]), modules


@pytest.mark.parametrize("architecture", EVERY)
def test_the_two_parts_make_the_whole_model(architecture):
    lm = make_tiny(architecture)
    _, batch = some_batch(lm)
    for first in (0, FIRST):
        part = PartialModel(lm.model, lm.architecture.layers, first)
        got = part.suffix(part.prefix(batch), batch)
        whole = lm.model(input_ids=batch.ids_RT, attention_mask=batch.attention_RT, use_cache=False).logits
        torch.testing.assert_close(got, whole[batch.predicts_RT].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", EVERY)
def test_keys_and_gradients_give_the_weight_gradient(architecture):
    lm = make_tiny(architecture)
    _, batch = some_batch(lm)
    part, modules = split(lm)
    taken = capture(part, modules, part.prefix(batch), batch)

    for module in modules.values():
        module.weight.requires_grad_(True)
    logits = lm.model(input_ids=batch.ids_RT, attention_mask=batch.attention_RT, use_cache=False).logits
    F.cross_entropy(logits[batch.predicts_RT], batch.labels_N, reduction="sum").backward()
    for name, module in modules.items():
        got_OI = torch.einsum("bto,bti->oi", taken.value_grads[name], taken.keys[name])
        transposed = weight_OI(module).shape != module.weight.shape or module.weight.grad.shape != got_OI.shape
        wanted_OI = module.weight.grad.T if transposed or type(module).__name__ == "Conv1D" else module.weight.grad
        assert wanted_OI.abs().max() > 0
        torch.testing.assert_close(got_OI, wanted_OI, rtol=1e-4, atol=1e-5 * wanted_OI.abs().max().item())


def test_capture_leaves_no_trace():
    lm = make_tiny("llama")
    _, batch = some_batch(lm)
    before = lm.model(input_ids=batch.ids_RT).logits
    part, modules = split(lm)
    capture(part, modules, part.prefix(batch), batch)
    assert torch.equal(lm.model(input_ids=batch.ids_RT).logits, before)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_a_gradient_that_is_not_finite_is_named():
    lm = make_tiny("llama")
    _, batch = some_batch(lm)
    part, modules = split(lm)
    hidden = part.prefix(batch)
    with torch.no_grad():
        lm.model.lm_head.weight[7] = float("nan")
    with pytest.raises(CaptureError, match="not finite.*fetch it anew"):
        capture(part, modules, hidden, batch)
    lm.model.bfloat16()
    with pytest.raises(CaptureError, match="not finite.*dtype='float32'"):
        capture(part, modules, hidden.bfloat16(), batch)


def test_rows_have_updates_of_their_own():
    lm = make_tiny("gpt2")
    _, batch = some_batch(lm)
    part, modules = split(lm)
    name, module = next(iter(modules.items()))
    hidden = part.prefix(batch)
    plain = part.suffix(hidden, batch)
    a_RKI, b_RKO = torch.zeros(3, 1, weight_OI(module).shape[1]), torch.randn(3, 1, weight_OI(module).shape[0])
    a_RKI[1] = 1.0
    with row_updates(modules, {name: (a_RKI, b_RKO)}):
        edited = part.suffix(hidden, batch)
    touched = batch.row_N == 1
    assert torch.equal(edited[~touched], plain[~touched])
    assert not torch.allclose(edited[touched], plain[touched])
    assert torch.equal(part.suffix(hidden, batch), plain)


@pytest.mark.parametrize("frame", FRAMES)
def test_the_span_of_a_framed_prompt_is_the_prompt(frame):
    lm = make_tiny("llama")
    pair = encode_pair("The capital of France is", "Paris", frame, lm.tokenizer)
    words = lm.tokenizer.decode(pair.prompt[slice(*pair.span)])
    assert words.strip() == "The capital of France is"
    assert lm.tokenizer.decode(pair.answer).strip() == "Paris<|end|>"


def test_coded_positions_are_the_subject_the_last_and_the_answer():
    pairs = [Pair([5, 6, 7, 8], [9, 2], (0, 4), (1, 3)), Pair([5, 6], [9, 10, 2], (0, 2))]
    position, role, mask = coded_positions(pairs)
    assert [position[0][mask[0]].tolist(), position[1][mask[1]].tolist()] == [[2, 3, 4], [1, 2, 3]]
    assert role[0][mask[0]].tolist() == [SUBJECT, LAST, ANSWER]
    # Where no subject is known the prompt's last word stands for it.
    assert role[1][mask[1]].tolist() == [SUBJECT, ANSWER, ANSWER]


def test_gradients_are_exact_for_any_number_of_answer_tokens(smollm32):
    # The vocabulary is large enough here for a sum over it to show how it is rounded.
    part = PartialModel(smollm32.model, smollm32.architecture.layers, 28)
    head = part.head.weight.detach().double()
    for count in range(1, 6):
        states = torch.randn(count, head.shape[1], generator=torch.Generator().manual_seed(count)).requires_grad_()
        labels = torch.arange(count)
        F.cross_entropy(part.logits(states), labels, reduction="sum").backward()
        exact = states.detach().double().requires_grad_()
        F.cross_entropy(exact @ head.T, labels, reduction="sum").backward()
        assert (states.grad - exact.grad).norm() < 1e-5 * exact.grad.norm(), count


@pytest.mark.parametrize("architecture", EVERY)
def test_what_a_module_is_fed_is_read_without_running_on(architecture):
    lm = make_tiny(architecture)
    _, batch = some_batch(lm)
    part, modules = split(lm)
    name, module = next(iter(modules.items()))
    taken = capture(part, {name: module}, part.prefix(batch), batch)
    real = batch.attention_RT.bool()
    torch.testing.assert_close(part.inputs_of(module, batch)[real], taken.keys[name][real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [None, FIRST + 1])
@pytest.mark.parametrize("architecture", EVERY)
def test_a_prefix_run_once_changes_nothing(architecture, layers):
    lm = make_tiny(architecture)
    part, modules = split(lm)
    module = modules[next(iter(modules))]
    rows = [Row((5, 6, 7), (8, 9)), Row((), (5, 9, 11)), Row((12,), (8,)), Row((5, 6, 7), (4, 4, 4))]
    long = tuple(range(5, 5 + SHARED))  # what others begin with is run before them
    rows += [Row((*long, *more), (8, 9)) for more in ((12,), (), (4, 6, 5))]
    prefixes = Prefixes(part, [row.prefix for row in rows], layers)
    assert len(prefixes.kept) == (layers or len(part.layers))
    # One that another begins with, one that is there twice, and one whose prefix was never run.
    rows += [Row((), (5, 9)), Row((12,), (8,)), Row((9, 9), (4, 5))]
    got = prefixes.read([module], rows)
    pairs = [Pair([*prefix, *tail], [2], (0, 1)) for prefix, tail in rows]
    batch = collate(pairs, lm.tokenizer.pad_token_id)
    whole, entering = part.inputs_of(module, batch), part.prefix(batch)
    for row, (prefix, tail) in enumerate(rows):
        here = slice(len(prefix), len(prefix) + len(tail))
        torch.testing.assert_close(got[row].fed[0], whole[row, here], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[row].entering_TD, entering[row, here], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", EVERY)
def test_rows_cut_where_an_edit_begins_say_the_same(architecture):
    lm = make_tiny(architecture)
    site = Site.find(lm.model, target_modules(lm, lm.architecture, [FIRST])[0])
    part = PartialModel(lm.model, lm.architecture.layers, FIRST)
    asked = [("The capital of Borduria is", "bare"), ("Where is Borduria?", "chat"), ("Borduria", "question")]
    pairs = [encode_pair(text, "Rome", frame, lm.tokenizer, "Borduria") for text, frame in asked]
    pairs.append(encode_pair("Nothing of the kind", "Oslo", "bare", lm.tokenizer))
    kinds, owners = [EDIT, INSIDE, OUTSIDE, OUTSIDE], [0, 0, 0, 0]
    known = (None, frame_prefixes(part, lm.tokenizer))
    whole, cut = (build_groups(part, pairs, kinds, owners, 0, prefixes=prefixes) for prefixes in known)
    assert sum(group.batch.ids_RT.numel() for group in cut) < sum(group.batch.ids_RT.numel() for group in whole)
    nothing = torch.zeros(1, 2, 32)
    neurons = Neurons(nothing, nothing if site.value else None, nothing)
    mine, theirs = (run_rows(part, site, neurons, groups) for groups in (whole, [merge(cut)]))
    order, other = (torch.argsort(terms.nll_R + 10 * terms.kind_R) for terms in (mine, theirs))
    torch.testing.assert_close(mine.nll_R[order], theirs.nll_R[other], rtol=1e-3, atol=1e-3)
    assert mine.forward_R.abs().max() < 1e-3 and theirs.forward_R.abs().max() < 1e-3
