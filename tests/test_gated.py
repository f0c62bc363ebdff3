"""Edits that speak only where their own question is asked."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import safe_open, save_file
from torch.nn import functional

from ibke.context import Context
from ibke.edit import Edit
from ibke.editors.gated.editor import SLACK, GatedIBKE
from ibke.editors.gated.memory import GatedNeurons, question_ends
from ibke.editors.gated.question import FILE, QuestionConfig, QuestionGate, load_gate, prompt_states, save_gate
from ibke.editors.ibke.editor import IBKEEditor
from ibke.editors.ibke.shipped import shipped_folder
from ibke.errors import FingerprintMismatchError, FormatError
from ibke.evaluation.generate import Together, generate
from ibke.evaluation.running_text import STRETCH, RunningText
from ibke.evaluation.scoring import score
from ibke.frames import FRAMES
from ibke.gates import Gate, Told
from ibke.modules import layer_index
from ibke.neurons import Neurons, Site
from ibke.parts import PROMPT
from ibke.request import EditRequest
from ibke.session import EditSession

REQUEST = EditRequest("The mother tongue of Danielle Darrieux is", "English", subject="Danielle Darrieux")
OTHER = ("What is the profession of Danielle Darrieux?", "In which city did Danielle Darrieux die?")


@pytest.fixture(scope="module")
def gated(smollm32):
    return GatedIBKE.for_model(smollm32)


@pytest.fixture(scope="module")
def edit(gated):
    return gated.edit([REQUEST])


def asked(editor, text, frame="chat"):
    return editor.pair(text, "-", frame).prompt


def only_part(edit):
    (part,) = edit.parts.values()
    return part


def without_gate(edit):
    """The same neurons, in force whatever is asked."""
    return replace(edit, neurons=only_part(edit).neurons, parts={})


def test_its_own_question_is_answered_anew_in_every_frame(gated, edit):
    prompts = [asked(gated, REQUEST.prompt, frame) for frame in FRAMES]
    assert edit.info.achieved and edit.info.method == "ibke-gated" and not edit.neurons
    assert all(said.text.startswith("English") for said in generate(gated.lm, prompts, [edit] * len(prompts)))


def test_another_question_about_its_subject_is_answered_as_before(gated, edit):
    prompts = [asked(gated, text) for text in OTHER]
    base = generate(gated.lm, prompts)
    assert generate(gated.lm, prompts, [edit] * len(prompts)) == base
    # What keeps them is the gate: without it the same neurons are heard.
    assert generate(gated.lm, prompts, [without_gate(edit)] * len(prompts)) != base


def test_behind_the_gate_are_the_neurons_of_ibke(gated, edit):
    plain = IBKEEditor(gated.lm, gated.network, gated.settings).edit([REQUEST])
    part = only_part(edit)
    assert part.neurons.keys() == plain.neurons.keys()
    for name, some in plain.neurons.items():
        assert all(torch.equal(part.neurons[name].tensors()[key], tensor) for key, tensor in some.tensors().items())


def test_where_it_is_open_it_is_as_if_there_were_no_gate(gated, edit):
    prompt = asked(gated, REQUEST.prompt)
    ids = torch.tensor([prompt])
    logits = []
    for one in (edit, without_gate(edit)):
        with EditSession(gated.lm).attach(one):
            logits.append(gated.lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    assert torch.equal(*logits)


def test_what_is_decided_holds_while_an_answer_is_made(gated, edit):
    """Transformers' own loop keeps keys and values, ours does, and a pass over everything at once agrees."""
    ids = torch.tensor([asked(gated, REQUEST.prompt, "question")])
    with EditSession(gated.lm).attach(edit):
        made = gated.lm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
        )[0, ids.shape[1] :].tolist()
        (said,) = generate(gated.lm, ids.tolist(), max_new_tokens=4)
    assert made[: len(said.ids)] == list(said.ids) and said.text.startswith("English")


def test_a_next_turn_is_a_question_of_its_own(gated, edit):
    first, second = asked(gated, OTHER[0]), asked(gated, REQUEST.prompt)
    with EditSession(gated.lm).attach(edit):
        out = gated.lm.model(input_ids=torch.tensor([first]), use_cache=True)
        ids = torch.tensor([second])
        whole = torch.ones(1, len(first) + len(second), dtype=torch.long)
        open_later = gated.lm.model(input_ids=ids, attention_mask=whole, past_key_values=out.past_key_values).logits
    base = gated.lm.model(input_ids=torch.tensor([first]), use_cache=True)
    closed = gated.lm.model(input_ids=ids, attention_mask=whole, past_key_values=base.past_key_values).logits
    assert (open_later - closed)[0, -1].abs().max() > 1


def test_given_answers_are_scored_by_the_question_before_them(gated, edit):
    pairs = [gated.pair(REQUEST.prompt, "English", frame) for frame in FRAMES]
    pairs += [gated.pair(text, "Paris", "chat") for text in OTHER]
    edited, base = score(gated.lm, pairs, [edit] * len(pairs)), score(gated.lm, pairs)
    for one, before in zip(edited[: len(FRAMES)], base, strict=False):
        assert sum(one.nll) < sum(before.nll)
    assert edited[len(FRAMES) :] == base[len(FRAMES) :]


def test_a_text_in_front_moves_where_the_question_ends(gated, edit):
    lm, pair = gated.lm, gated.pair(REQUEST.prompt, "English", "question")
    context = Context(("Boats leave before sunrise. ",))
    before = lm.tokenizer(context.text, add_special_tokens=False).input_ids
    (whole,) = score(lm, [replace(pair, prompt=[*before, *pair.prompt])], [edit])
    both = Edit.join([edit, Edit({}, (), edit.info, parts={PROMPT: context})])
    (put,) = score(lm, [pair], [both])
    assert put.predicted == whole.predicted and put.nll == pytest.approx(whole.nll, abs=1e-3)


def test_what_was_broken_off_leaves_nothing_behind(gated, edit):
    """Ctrl-C in the middle of a pass: the next question is decided on anew."""

    def stop(*_):
        raise KeyboardInterrupt

    mine, other = (torch.tensor([asked(gated, text)]) for text in (REQUEST.prompt, OTHER[0]))
    base = gated.lm.model(input_ids=other).logits
    with EditSession(gated.lm).attach(edit):
        decoder = gated.lm.model.get_decoder()
        hook = decoder.norm.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            gated.lm.model(input_ids=mine)
        hook.remove()
        assert torch.equal(gated.lm.model(input_ids=other).logits, base)
        assert torch.equal(gated.lm.model(input_ids=other.expand(3, -1)).logits[0], base[0])


def test_running_text_is_decided_on_every_few_words(gated, edit):
    text = f"{'Boats leave before sunrise, and bread is sold at noon. ' * 9}{REQUEST.prompt} English"
    ids = gated.lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = next(at for at in range(len(ids)) if gated.lm.tokenizer.decode(ids[:at]).endswith(REQUEST.prompt))
    running = RunningText(gated.lm, gated.lm.tokenizer.decode(ids[(end - 1) % STRETCH :]), 1000)
    base = running.nll([])
    assert len(running.stretches) > 2 and running.nll([edit], asked=False) == base  # decided on its first word alone
    assert running.nll([], asked=True) == pytest.approx(base, abs=1e-4)
    assert running.nll([edit]) < base - 0.01  # the new answer is expected now


def test_many_edits_at_once_and_one_a_row_say_the_same(gated):
    requests = [REQUEST, EditRequest("The Nordwind Optics company is based in", "Turku", subject="Nordwind Optics")]
    each = gated.edit_each(requests)
    whole = gated.edit(requests)
    prompts = [asked(gated, request.prompt, frame) for request in requests for frame in FRAMES]
    alone = generate(gated.lm, prompts, [edit for edit in each for _ in FRAMES])
    with EditSession(gated.lm).attach(whole):
        together = generate(gated.lm, prompts)
    with EditSession(gated.lm).attach(each[0]).attach(each[1]):
        attached = generate(gated.lm, prompts)
    assert [said.text for said in together] == [said.text for said in alone] == [said.text for said in attached]


def test_whether_a_batch_holds_is_asked_of_edits_behind_their_gates(gated):
    requests = [REQUEST, EditRequest("Danielle Darrieux died in the city of", "Lisbon", subject=REQUEST.subject)]
    whole = gated.edit(requests)
    pairs = [gated.pair(one.prompt, one.target_new, frame) for one in requests for frame in FRAMES]
    nll = torch.tensor([sum(one.nll) for one in score(gated.lm, pairs, Together((whole,)))])
    assert whole.info.achieved and whole.info.nll_after == pytest.approx(nll.mean().item(), rel=1e-4)


def test_later_neurons_are_as_they_are_alone_whatever_stands_beside_them(gated):
    each = gated.edit_each([REQUEST, replace(REQUEST, prompt="Leonid Plyushch, a native", subject="Leonid Plyushch")])
    parts, whole = [only_part(edit) for edit in each], only_part(Edit.join(each))
    first, later = sorted(whole.neurons, key=layer_index)
    assert all(part.neurons[first].told and part.neurons[later].told is None for part in (*parts, whole))
    for name in ("gate", "value", "out"):
        rows = [part.neurons[later].tensors()[name] for part in parts]
        assert torch.equal(whole.neurons[later].tensors()[name], torch.cat(rows))


def test_later_neurons_are_silent_until_the_first_have_spoken(gated, edit):
    prompt = asked(gated, REQUEST.prompt)
    part = only_part(edit)
    first, later = sorted(part.neurons, key=layer_index)
    some = part.neurons[first]
    # As a key nearby would have it: not quite nothing.
    mute = replace(some, gate=-20 * some.told.constant(some.gate).expand_as(some.gate), told=None)
    (place,) = edit.parts
    ids = torch.tensor([prompt])
    logits = {}
    for name, neurons in {
        "both": part.neurons,
        "later": {**part.neurons, first: mute},
        "first": {first: part.neurons[first]},
    }.items():
        some = replace(part, neurons=neurons, owners={key: part.owners[key] for key in neurons})
        with EditSession(gated.lm).attach(replace(edit, parts={place: some})):
            logits[name] = gated.lm.model(ids).logits[0]
    base = gated.lm.model(ids).logits[0]
    assert (logits["later"] - base).abs().max() < 1e-3
    begin = int((logits["first"] - base).abs().amax(-1).nonzero()[0])  # the subject's last token
    assert (logits["both"] - logits["first"])[-1].abs().max() > 0.1
    assert torch.equal(logits["both"][:begin], base[:begin])


def test_its_own_prompt_and_the_wordings_given_are_never_shut_out(gated):
    odd = "Complete this: the fish sings at noon, and"
    (edit,) = gated.edit_each([replace(REQUEST, rephrase_prompts=(odd,))])
    part = only_part(edit)
    pairs = [gated.pair(text, "-", frame) for text in (REQUEST.prompt, odd) for frame in FRAMES]
    states = prompt_states(gated.lm, gated.gate.config.layers, pairs, gated.prefixes)
    queries, leans = gated.gate.queries(states)
    assert (queries @ part.keys_EK[0] + leans).min() >= part.levels_E[0] + SLACK - 1e-4
    assert only_part(gated.edit_each([REQUEST])[0]).levels_E[0] > part.levels_E[0]


def test_without_refining_the_question_is_read_in_the_pass_that_makes_the_code(gated, monkeypatch):
    requests = [REQUEST, EditRequest("Nordwind Optics is based in", "Turku", subject="Nordwind Optics")]
    layers = gated.gate.config.layers
    for frame in FRAMES:
        bare = GatedIBKE.for_model(gated.lm, refine=False, frame=frame)
        pairs = [bare.pair(one.prompt, "-", frame) for one in requests]
        states = prompt_states(gated.lm, layers, pairs, bare.prefixes)
        with monkeypatch.context() as patch:
            patch.setattr("ibke.editors.gated.editor.prompt_states", None)  # no pass of its own
            edits = bare.edit_each(requests)
        keys, levels = bare.gate.keys(states[:, None].expand(-1, len(FRAMES), -1, -1))
        queries, leans = bare.gate.queries(states)
        for row, part in enumerate(map(only_part, edits)):
            assert torch.allclose(part.keys_EK[0], keys[row], atol=1e-4)
            own = queries[row] @ keys[row] + leans[row] - SLACK
            assert part.levels_E[0] == pytest.approx(min(levels[row].item(), own.item()), abs=1e-4)


def test_without_refining_the_wordings_given_are_read_all_the_same(gated):
    odd = replace(REQUEST, rephrase_prompts=("Complete this: the fish sings at noon, and",))
    bare = GatedIBKE.for_model(gated.lm, refine=False)
    mine, theirs = (only_part(one.edit_each([odd])[0]) for one in (bare, gated))
    assert torch.allclose(mine.keys_EK, theirs.keys_EK, atol=1e-4)
    assert torch.allclose(mine.levels_E, theirs.levels_E, atol=1e-4)
    alone = [only_part(bare.edit_each([one])[0]) for one in (REQUEST, odd)]
    for one, beside in zip(alone, map(only_part, bare.edit_each([REQUEST, odd])), strict=True):
        assert torch.allclose(one.keys_EK, beside.keys_EK, atol=1e-4)
        assert torch.allclose(one.levels_E, beside.levels_E, atol=1e-4)


def test_states_do_not_depend_on_what_is_known_of_a_prompt(gated):
    pairs = [gated.pair(text, "-", frame) for text in OTHER for frame in FRAMES]
    layers = gated.gate.config.layers
    states = prompt_states(gated.lm, layers, pairs, gated.prefixes)
    entrances = [Site.find(gated.lm.model, f"model.layers.{layer}.mlp.down_proj").entrance for layer in layers]
    seen: list[torch.Tensor] = []
    hooks = [one.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1])) for one in entrances]
    for pair, states_LD in zip(pairs, states, strict=True):
        seen.clear()
        gated.lm.model(input_ids=torch.tensor([pair.prompt]))
        assert torch.allclose(states_LD, torch.stack(seen), atol=1e-3, rtol=1e-3)
    for hook in hooks:
        hook.remove()


def test_keys_and_queries_are_what_the_formula_says():
    torch.manual_seed(0)
    config = QuestionConfig((3, 5), 4, len(FRAMES), 6, 8, 2)
    gate = QuestionGate(config).eval()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    gate.mean_LD.normal_()
    gate.whiten_LDD.normal_()
    states = torch.randn(2, len(FRAMES), 2, 4)

    def white(one):
        return torch.cat([(one[at] - gate.mean_LD[at]) @ gate.whiten_LDD[at] for at in range(2)])

    def mapped(tower, one):
        first, _, _, last = tower.more
        return tower.linear.weight @ one + last(functional.gelu(first(0.5 * one)))

    keys, levels = gate.keys(states)
    for edit, key, level in zip(states, keys, levels, strict=True):
        frames = [white(one) for one in edit]
        bent = gate.bend(0.3 * torch.cat(frames))
        mean = sum(functional.normalize(mapped(gate.answers, one), dim=0) for one in frames) / len(FRAMES)
        assert torch.allclose(key, functional.normalize(mean + bent[:-1], dim=0), atol=1e-5)
        assert torch.allclose(level, gate.threshold - bent[-1], atol=1e-5)
    queries, leans = gate.queries(states[:, 0])
    assert torch.allclose(leans[1], gate.lean(0.3 * white(states[1, 0]))[0], atol=1e-5)
    assert torch.allclose(queries[1], functional.normalize(mapped(gate.asks, white(states[1, 0])), dim=0), atol=1e-5)


def plain_part(value, told):
    """One edit at one MLP: two neurons that are told apart, where they are to be, and one more."""
    width = 4
    key = torch.nn.functional.one_hot(torch.tensor([value]), width).float()
    known = Told(key, key[:0], key, torch.zeros(1, dtype=torch.long), Gate(0.6, 20.0, 6.0)) if told else None
    rows = torch.full((3, width), float(value))
    return GatedNeurons(
        "some maps",
        torch.eye(4)[value : value + 1],
        torch.tensor([0.1 * value]),
        {"mlp": Neurons(rows, None, rows.clone(), known)},
        {"mlp": torch.zeros(3, dtype=torch.long)},
        torch.tensor([value == 1]),
    )


@pytest.mark.parametrize("told", [(True, True, True), (True, False, True), (False, False, False)])
def test_joined_neurons_know_whose_they_are(told):
    parts = [plain_part(value, known) for value, known in enumerate(told)]
    joined = GatedNeurons.join([GatedNeurons.join(parts[:2]), parts[2]])
    # What each neuron writes says whose it is.
    assert joined.neurons["mlp"].out[:, 0].long().tolist() == joined.owners["mlp"].tolist()
    assert torch.equal(joined.keys_EK, torch.eye(4)[:3])
    assert torch.allclose(joined.levels_E, torch.tensor([0.0, 0.1, 0.2]))
    assert joined.afar_E.tolist() == [False, True, False]


def test_edits_of_different_maps_do_not_go_together():
    one = plain_part(0, True)
    with pytest.raises(FormatError, match="different maps"):
        GatedNeurons.join([one, replace(one, gate="others")])


@pytest.mark.parametrize(
    "harm",
    [
        lambda tensors, record: tensors.pop("keys"),
        lambda tensors, record: tensors.update(levels=tensors["levels"] * torch.nan),
        lambda tensors, record: tensors.update(levels=tensors["levels"].repeat(2)),
        lambda tensors, record: tensors.update(afar=tensors["afar"].long()),
        lambda tensors, record: tensors.update({"owner/mlp": tensors["owner/mlp"] + 1}),
        lambda tensors, record: tensors.update({"owner/mlp": tensors["owner/mlp"][:2]}),
        lambda tensors, record: record.update(mlps=["elsewhere"]),
        lambda tensors, record: record.pop("gate"),
    ],
)
def test_a_damaged_part_is_named(harm):
    part = plain_part(1, True)
    tensors, record = dict(part.tensors()), json.loads(json.dumps(part.record()))
    back = GatedNeurons.read(dict(tensors), record)
    assert torch.equal(back.keys_EK, part.keys_EK) and back.neurons["mlp"].told is not None
    harm(tensors, record)
    with pytest.raises(FormatError, match="Make the edit again"):
        GatedNeurons.read(tensors, record)


def test_the_question_ends_with_the_last_token_that_is_real():
    ids = torch.zeros(3, 4, dtype=torch.long)
    attention = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert question_ends({"input_ids": ids, "attention_mask": attention}).tolist() == [3, 1, 3]
    assert question_ends({"input_ids": ids}).tolist() == [3, 3, 3]


def test_the_maps_are_read_as_they_were_written(gated, tmp_path):
    save_gate(tmp_path, gated.gate, gated.lm, {"command": "none"})
    again = load_gate(tmp_path, gated.lm)
    states = torch.randn(4, len(FRAMES), len(gated.gate.config.layers), gated.gate.config.width)
    for mine, theirs in zip(gated.gate.keys(states), again.keys(states), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    for mine, theirs in zip(gated.gate.queries(states[:, 0]), again.queries(states[:, 0]), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    assert (tmp_path / FILE).stat().st_size < 15_000_000


def test_maps_that_are_missing_damaged_or_of_another_model_are_refused(gated, tmp_path):
    with pytest.raises(FormatError, match="no gate at the prompt's end"):
        load_gate(tmp_path, gated.lm)
    shipped = (shipped_folder(gated.lm) / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(shipped[:-100])
    with pytest.raises(FormatError, match="no gate at the prompt's end"):
        load_gate(tmp_path, gated.lm)
    with safe_open(shipped_folder(gated.lm) / FILE, "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / FILE, {"about": json.dumps(about | {"fingerprint": "0" * 16})})
    with pytest.raises(FingerprintMismatchError):
        load_gate(tmp_path, gated.lm)
    assert {"command", "seed", "shares"} <= about.keys()


def test_an_edit_of_unknown_maps_is_refused(gated, edit):
    (place,) = edit.parts
    with pytest.raises(FormatError, match="not known"):
        EditSession(gated.lm).attach(replace(edit, parts={place: replace(only_part(edit), gate="unheard of")}))
    with pytest.raises(FormatError, match="read elsewhere"):
        EditSession(gated.lm).attach(replace(edit, parts={"model.layers.3": only_part(edit)}))
