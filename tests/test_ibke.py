"""The bottleneck's parts: priors, addresses, keys through the code, refining."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import make_tiny

from ibke.edit import Edit
from ibke.editors.ibke.bottleneck import Bottleneck
from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.ibke.contexts import OTHER, About, contexts_of
from ibke.editors.ibke.editor import IBKEEditor
from ibke.editors.ibke.network import rate
from ibke.editors.ibke.objective import BetaSchedule
from ibke.editors.ibke.refine import RELAY_MOST, Refiner, RefineSettings
from ibke.editors.ibke.shipped import MANIFEST, load_editor, shipped_folder
from ibke.editors.ibke.statistics import direction, whitening
from ibke.editors.ibke.watch import watched_rows
from ibke.editors.key_statistics import text_batches
from ibke.errors import CaptureError, FormatError, IBKEError
from ibke.evaluation.generate import generate
from ibke.frames import encode_pair
from ibke.gates import Told
from ibke.modules import in_out, target_modules
from ibke.neurons import Site
from ibke.partial import PartialModel
from ibke.request import EditRequest, Probe
from ibke.rows import run_rows
from ibke.session import EditSession
from ibke.training.statistics import layer_statistics

REQUESTS = [
    EditRequest("The capital of Borduria is", "Rome", subject="Borduria"),
    EditRequest("Who wrote the play Maskenball?", "Ann", subject="Maskenball"),
]
SMALL = {"layer": 1, "relay_layer": 2, "relay_gamma": 0.1, "content_dim": 10, "context_dim": 6, "width": 16, "depth": 1}
TEXT = ["The capital of France is Paris. Who wrote the play? Answer: the author of the play is known to all. " * 9]


APART = {
    "What is the capital of {}?": {
        "Peru": "Oslo",
        "Kenya": "Madrid",
        "Poland": "Tokyo",
        "Norway": "Lima",
        "Egypt": "Vienna",
        "Chile": "Dublin",
    },
    "Who wrote {}?": {
        "Hamlet": "Jane Austen",
        "Dracula": "Mark Twain",
        "Ulysses": "Agatha Christie",
        "Emma": "Leo Tolstoy",
        "Faust": "Charles Dickens",
        "Candide": "Virginia Woolf",
    },
    "Which instrument does {} play?": {
        "Miles Davis": "violin",
        "Keith Jarrett": "drums",
        "Ringo Starr": "flute",
        "Yo-Yo Ma": "trumpet",
        "Jimi Hendrix": "harp",
        "Stan Getz": "organ",
    },
    "In which city was {} born?": {
        "Marie Curie": "Cairo",
        "Albert Einstein": "Boston",
        "Isaac Newton": "Moscow",
        "Frida Kahlo": "Berlin",
        "Charles Darwin": "Athens",
        "Bob Dylan": "Seoul",
    },
}


def make_editor(refine=None, model="llama", **config):
    """An editor that was never trained, on a tiny model."""
    lm = make_tiny(model)
    settings = IBKEConfig(**{**SMALL, **config})

    def seen(layer):
        part = PartialModel(lm.model, lm.architecture.layers, layer)
        site = Site.find(lm.model, target_modules(lm, lm.architecture, [layer])[0])
        return site, layer_statistics(part, site, text_batches(lm.tokenizer, TEXT, 1000, lm.device))

    site, found = seen(settings.layer)
    generator = torch.Generator().manual_seed(5)
    grads, addresses = (torch.randn(80, 32, generator=generator) for _ in range(2))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = Bottleneck(settings, site.out, in_out(site.modules[site.out])[1])
    network.ground(found.spectrum, found.constant_D, torch.tensor(1.0))
    network.know(found.common)
    network.initialise(grads, addresses)
    if network.relay is not None:
        later = seen(settings.relay_layer)[1]
        network.relay.ground(later.spectrum, later.constant_D, torch.tensor(1.0))
    return IBKEEditor(lm, network.requires_grad_(False), refine or RefineSettings(steps=6, learning_rate=0.3))


@pytest.mark.parametrize("prior", ["standard", "diagonal", "ceb"])
@pytest.mark.parametrize("keys", ["address", "code"])
def test_every_prior_and_key_variant_gives_a_gradient(prior, keys):
    editor = make_editor(prior=prior, keys=keys)
    network = editor.network.requires_grad_(True)
    code, _ = editor.encode(REQUESTS)
    code = network.encode(code.written)
    rates = network.rate(code)
    neurons = network.decode(code.sample(torch.Generator().manual_seed(0)), code.written, editor.site)
    (neurons.gate.sum() + neurons.out.square().sum() + rates.sum()).backward()
    assert rates.shape == (2,) and (rates > 0).all()
    named = dict(network.named_parameters())
    wanted = ["decoder.log_step", "encoder.log_gain", "encoder.mean.weight", "decoder.value.weight"] + [
        n for n in named if n.startswith("prior.mean")
    ]
    for name in wanted:
        assert named[name].grad is not None and named[name].grad.abs().sum() > 0, name


def test_the_rate_is_the_divergence_of_gaussians():
    mean, log_variance = torch.randn(2, 4), torch.randn(2, 4)
    prior = (torch.randn(2, 4), torch.randn(2, 4))
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    r = torch.distributions.Normal(prior[0], (0.5 * prior[1]).exp())
    wanted = torch.distributions.kl_divergence(q, r).sum(-1)
    torch.testing.assert_close(rate(mean, log_variance, prior), wanted)


def test_what_is_written_depends_on_the_code_and_where_does_not():
    editor = make_editor()
    code, _ = editor.encode(REQUESTS)
    mine, moved = (editor.network.decode(z, code.written, editor.site) for z in (code.mean, code.mean + 1.0))
    assert torch.equal(mine.gate, moved.gate) and not torch.equal(mine.out, moved.out)


def test_an_address_knows_nothing_of_the_answer():
    editor = make_editor()
    # Of as many tokens, since the request is read in the same pass and its length decides how sums are rounded.
    answers = ("Oslo", "Athens")
    other = [EditRequest(r.prompt, answer, subject=r.subject) for r, answer in zip(REQUESTS, answers, strict=True)]
    one, two = editor.encode(REQUESTS)[0], editor.encode(other)[0]
    assert torch.equal(one.written.address_BD, two.written.address_BD)
    assert not torch.allclose(one.mean, two.mean)


def test_without_a_named_question_nothing_is_contrasted():
    kinds = [
        row.kind for row in contexts_of(About("Borduria has the capital", "Borduria"), make_tiny("llama").tokenizer)
    ]
    assert OTHER not in kinds and len(kinds) > 5


def test_refining_lowers_the_nll_and_says_what_it_did():
    plain, refined = (
        make_editor(RefineSettings(steps=steps, learning_rate=0.3)).edit(REQUESTS[:1]) for steps in (0, 6)
    )
    assert plain.info.achieved is None and plain.info.refine_steps == 0 and plain.info.nll_after is None
    assert 1 <= refined.info.refine_steps <= 6 + RELAY_MOST
    assert refined.info.nll_after < refined.info.nll_before
    assert refined.info.latent["z"].shape == (1, IBKEConfig(**SMALL).code_dim + 32)  # and the relay's


@pytest.mark.parametrize("learning_rate", [0.05, 1e4])
def test_refining_never_accepts_a_step_that_raises_the_nll(learning_rate):
    editor = make_editor(RefineSettings(steps=4, learning_rate=learning_rate))
    code, _ = editor.encode(REQUESTS)
    targets = editor._targets(REQUESTS, editor._opened(code))

    def nll(z_BZ):
        neurons = editor.network.decode(z_BZ, code.written, editor.site)
        rows = run_rows(editor.part, editor.site, neurons, targets)
        return torch.zeros(2).index_add(0, rows.owner_R, rows.nll_R) / 3  # frames

    alone, relayed = (
        Refiner(editor.network, editor.part, editor.site, editor.settings, listening=listening).refine(
            code, targets, lambda: []
        )
        for listening in (None, editor.listening)
    )
    assert (alone.nll_B <= nll(code.mean)).all()
    torch.testing.assert_close(nll(alone.z_BZ), alone.nll_B, rtol=1e-4, atol=1e-4)
    assert torch.equal(relayed.z_BZ, alone.z_BZ) and (relayed.nll_B <= alone.nll_B * (1 + 1e-4)).all()


def test_only_probes_that_an_edit_reaches_are_watched(smollm32):
    editor = IBKEEditor.for_model(smollm32)
    probes = ("I read about Myanmar and", "Seven plus five is")
    request = EditRequest("The capital of Myanmar is", "Lagos", subject="Myanmar", locality=tuple(map(Probe, probes)))
    code, _ = editor.encode([request])
    opened, watch = editor._opened(code), (editor.part, editor.prefixes, smollm32.tokenizer)
    reached = opened([encode_pair(text, "-", "bare", smollm32.tokenizer) for text in probes], [0, 0])
    assert reached[0] is not None and reached[1] is None
    (group,) = watched_rows(*watch, [request], opened)
    assert group.batch.rows == 1
    assert watched_rows(*watch, [replace(request, locality=request.locality[1:])], opened) == []


@pytest.mark.parametrize("joint", [False, True])
def test_a_relay_answers_to_the_first_write_alone(joint):
    relay, generator = make_editor().network.relay, torch.Generator().manual_seed(3)
    edited_TD, base_TD = (torch.randn(4, 32, generator=generator) for _ in range(2))
    owner_T = torch.tensor([0, 0, 1, 1])
    relay.key_values_E.mul_(1e-6)  # so few keys are met exactly where generic ones weigh nothing
    told = relay.told(edited_TD, base_TD, owner_T, 2)
    addresses = Told.join(told).addresses(relay.constant_D) if joint else relay.addresses(told)
    for edit, address_D in enumerate(addresses):
        mine = owner_T == edit
        torch.testing.assert_close(edited_TD[mine] @ address_D, torch.ones(2), rtol=1e-2, atol=1e-2)
        assert (base_TD[mine] @ address_D).abs().max() < 1e-2
        if joint:  # nor to another request of the same edit
            assert (edited_TD[~mine] @ address_D).abs().max() < 1e-2
    values_E, basis_DE = relay.key_values_E.double(), relay.key_basis_DE.double()
    generic_DD = (basis_DE * (values_E + relay.config.ridge * values_E.mean())) @ basis_DE.T
    rows_TD, silent_TD = (keys_TD.double() if joint else keys_TD[:2].double() for keys_TD in (edited_TD, base_TD))
    moment_DD = rows_TD.T @ rows_TD + silent_TD.T @ silent_TD + relay.config.relay_gamma * generic_DD
    wanted_D = torch.linalg.solve(moment_DD, rows_TD[:2].sum(0))
    wanted_D = wanted_D / (rows_TD[:2] @ wanted_D).mean()
    torch.testing.assert_close(addresses[0], wanted_D.float(), rtol=1e-4, atol=1e-5)


def test_a_relay_is_silent_where_nothing_was_written(smollm32):
    editor, tokenizer = IBKEEditor.for_model(smollm32), smollm32.tokenizer
    edit = editor.edit([EditRequest("The capital of Myanmar is", "Lagos", subject="Myanmar")])
    first, second = edit.neurons
    assert second == editor.listening.site.out
    alone = Edit({}, edit.requests, edit.info, {second: edit.neurons[second]})
    for text in ("The capital of Myanmar is", "The capital of Thailand is", "Seven plus five is"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            base = smollm32.model(ids).logits
            with EditSession(smollm32).attach(alone):
                assert torch.equal(smollm32.model(ids).logits, base)


def test_edits_made_apart_do_not_answer_for_each_other(smollm32):
    """A relay hears what other edits have written too; merely side by side, 7 of these 24 answered."""
    editor, tokenizer = IBKEEditor.for_model(smollm32), smollm32.tokenizer
    requests = [
        EditRequest(question.format(name), target, subject=name)
        for question, facts in APART.items()
        for name, target in facts.items()
    ]
    edits = editor.edit_each(requests)
    with EditSession(smollm32) as session:
        for edit in edits:
            session.attach(edit)
        answers = generate(smollm32, [tokenizer(request.prompt).input_ids for request in requests])
    right = [answer.text.startswith(request.target_new) for answer, request in zip(answers, requests, strict=True)]
    assert sum(right) >= 22, [answer.text for answer in answers]


def test_several_requests_are_those_made_alone_put_together():
    editor = make_editor(RefineSettings(steps=0))
    whole, alone = editor.edit(REQUESTS), editor.edit_each(REQUESTS)
    together = alone[0].compose(alone[1])
    assert whole.requests == together.requests and whole.info.achieved is None
    for name, some in together.tensors().items():
        assert torch.equal(whole.tensors()[name], some)
    assert torch.equal(whole.info.latent["z"], torch.cat([edit.info.latent["z"] for edit in alone]))


def test_what_does_not_hold_beside_others_is_made_again(monkeypatch):
    editor, made = make_editor(), []

    def make(self, requests, progress=None):
        made.append([request.prompt for request in requests])
        return IBKEEditor._make(self, requests)

    def together(self, edits):
        nll_B = torch.full((len(edits),), 1.0 + len(made))
        return nll_B, torch.tensor([True, len(made) > 2])

    monkeypatch.setattr(IBKEEditor, "_each", make)
    monkeypatch.setattr(IBKEEditor, "_together", together)
    edit = editor.edit(REQUESTS)
    assert made == [[request.prompt for request in REQUESTS]] + 2 * [[REQUESTS[1].prompt]]
    assert edit.info.achieved and edit.info.nll_after == 4.0 and edit.requests == tuple(REQUESTS)


def test_whether_targets_come_together_is_asked_of_the_edited_model(smollm32):
    editor = IBKEEditor.for_model(smollm32)
    request = EditRequest("The capital of Myanmar is", "Lagos", subject="Myanmar")
    (edit,) = editor.edit_each([request])
    nll_B, achieved_B = editor._together([edit])
    assert achieved_B.tolist() == [True] == [edit.info.achieved]
    torch.testing.assert_close(float(nll_B[0]), edit.info.nll_after, rtol=1e-2, atol=1e-3)
    shut = replace(edit, neurons={name: some.map(lambda t: t * 0) for name, some in edit.neurons.items()})
    nll_B, achieved_B = editor._together([shut])
    assert achieved_B.tolist() == [False] and float(nll_B[0]) > 5


@pytest.mark.parametrize("model", ["gpt2", "opt", "gemma2", "falcon", "phi3"])
def test_other_architectures_edit_the_same_way(model):
    edit = make_editor(model=model).edit(REQUESTS[:1])
    assert isinstance(edit, Edit) and all(value > 0 for value in edit.norm().values())


def test_directions_are_unit_and_whitening_whitens():
    grads = torch.randn(50, 8)
    directions, log_norm = direction(grads)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(50))
    torch.testing.assert_close(log_norm.exp(), grads.norm(dim=-1), rtol=1e-4, atol=1e-4)
    samples = torch.randn(4000, 6) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    basis, scale = whitening(samples, 4)
    coordinates = samples @ basis / scale
    torch.testing.assert_close(coordinates.square().mean(0), torch.ones(4), rtol=1e-3, atol=1e-3)


def test_beta_is_fixed_annealed_or_steered():
    assert BetaSchedule("fixed", 0.5, 10, 0).at(0, 100.0) == 0.5
    rising = BetaSchedule("anneal", 0.5, 10, 0)
    assert [rising.at(step, 0.0) for step in (0, 5, 20)] == [0.0, 0.25, 0.5]
    steered = BetaSchedule("target", 0.0, 1, 100.0)
    up = [steered.at(step, 200.0) for step in range(50)]
    down = [steered.at(step, 50.0) for step in range(50)]
    assert up == sorted(up) and up[-1] > up[0] > 0 and down == sorted(down, reverse=True)


def test_a_gradient_that_is_not_finite_leaves_the_model_as_it_was():
    editor = make_editor()
    with torch.no_grad():
        editor.lm.model.lm_head.weight[7] = float("nan")
    before = {name: tensor.clone() for name, tensor in editor.lm.model.state_dict().items()}
    with pytest.raises(CaptureError, match="the gradient of the answer is not finite"):
        editor.edit([EditRequest("The mother of Ada Berg is", "Oslo", subject="Ada Berg")])
    for name, tensor in editor.lm.model.state_dict().items():
        assert torch.equal(tensor, before[name]) or name.endswith("lm_head.weight")
    modules = list(editor.lm.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert editor.part.layers is editor.lm.model.model.layers


def test_settings_that_it_has_not_and_frames_that_are_none_are_named(smollm32):
    with pytest.raises(IBKEError, match="no setting 'step'.*Did you mean 'steps'"):
        IBKEEditor.for_model(smollm32, step=3)
    with pytest.raises(IBKEError, match="no frame 'poem'.*bare, question, chat"):
        IBKEEditor.for_model(smollm32, frame="poem")
    with pytest.raises(IBKEError, match="`steps` is below 0"):
        IBKEEditor.for_model(smollm32, steps=-1)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"fingerprint": None}, "the manifest is damaged"),
        ({"module": None}, "the manifest is damaged"),
        ({"config": 7}, "the manifest is damaged"),
        ({"config": {"layer": "one"}}, "the manifest is damaged"),
        ({"version": 1}, "not an editor of this version"),
    ],
)
def test_a_manifest_that_is_none_is_refused(smollm32, tmp_path, change, what):
    folder = Path(shutil.copytree(shipped_folder(smollm32), tmp_path / "editor"))
    manifest = json.loads((folder / MANIFEST).read_text())
    changed = {name: value for name, value in {**manifest, **change}.items() if value is not None}
    (folder / MANIFEST).write_text(json.dumps(changed))
    with pytest.raises(FormatError, match=what):
        load_editor(folder, smollm32)


def test_impossible_settings_are_named():
    with pytest.raises(FormatError, match="layer -1"):
        IBKEConfig(layer=-1)
    with pytest.raises(FormatError, match="relay's layer 16"):
        IBKEConfig(relay_layer=16)
    with pytest.raises(FormatError, match="threshold"):
        IBKEConfig(threshold=1.5)
    with pytest.raises(FormatError, match="content_dim"):
        Bottleneck(IBKEConfig(**{**SMALL, "content_dim": 999}), "a", 32)
