"""The bottleneck's parts: priors, keys through the code, roles, contrast, refining."""

import pytest
import torch
from tests.conftest import make_tiny

from ibke.batch import ANSWER, PROMPT, SUBJECT, written_positions
from ibke.edit import Edit
from ibke.editors.ibke.bottleneck import Bottleneck
from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.ibke.contrast import contrast_keys, guess_subject, swapped
from ibke.editors.ibke.editor import IBKEEditor
from ibke.editors.ibke.network import rate
from ibke.editors.ibke.objective import BetaSchedule
from ibke.editors.ibke.refine import Refiner, RefineSettings
from ibke.editors.ibke.statistics import KeySpectrum, joint_direction, whitening
from ibke.errors import FormatError
from ibke.frames import encode_pair
from ibke.modules import in_out, resolve, target_modules
from ibke.request import EditRequest

REQUESTS = [
    EditRequest("The capital of Borduria is", "Rome", subject="Borduria"),
    EditRequest("Who wrote the play Maskenball?", "Ann", subject="Maskenball"),
]
SMALL = {"layers": (1, 2), "content_dim": 10, "context_dim": 6, "key_rank": 12, "width": 16, "depth": 1}


def make_editor(refine=None, model="llama", **config):
    """An editor with random linear maps on a tiny model."""
    lm = make_tiny(model)
    settings = IBKEConfig(**{**SMALL, **config})
    names = target_modules(lm, lm.architecture, settings.layers)
    d_in, d_out = in_out(next(iter(resolve(lm.model, names).values())))
    generator = torch.Generator().manual_seed(5)
    keys, grads = (torch.randn(2, 80, size, generator=generator) for size in (d_in, d_out))
    basis = torch.linalg.qr(torch.randn(d_in, settings.key_rank, generator=generator))[0]
    spectra = [KeySpectrum(basis, torch.linspace(2, 1, settings.key_rank), 0.5) for _ in names]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = Bottleneck(settings, names, d_in, d_out)
    network.initialise(list(keys), grads, spectra, torch.ones(2))
    return IBKEEditor(lm, network.requires_grad_(False), refine or RefineSettings(steps=6, learning_rate=0.3))


@pytest.mark.parametrize("prior", ["standard", "diagonal", "ceb"])
@pytest.mark.parametrize("keys", ["address", "code"])
def test_every_prior_and_key_variant_gives_a_gradient(prior, keys):
    editor = make_editor(prior=prior, keys=keys)
    network = editor.network.requires_grad_(True)
    code, _ = editor.encode(REQUESTS)
    code = network.encode(code.written)
    rates = network.rate(code)
    factors = network.decode(code.sample(torch.Generator().manual_seed(0)), code.written)
    (sum((a.sum() + b.square().sum()) for a, b in factors.values()) + rates.sum()).backward()
    assert rates.shape == (2,) and (rates > 0).all()
    named = dict(network.named_parameters())
    wanted = ["log_gamma", "encoder.mean.weight", "decoder.value.weight"] + [
        n for n in named if n.startswith("prior.mean")
    ]
    for name in wanted:
        assert named[name].grad is not None and named[name].grad.abs().sum() > 0, name


def test_the_rate_is_the_divergence_of_gaussians():
    mean, log_variance = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    prior = (torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    r = torch.distributions.Normal(prior[0], (0.5 * prior[1]).exp())
    wanted = (torch.distributions.kl_divergence(q, r).sum(-1) * mask).sum(-1)
    torch.testing.assert_close(rate(mean, log_variance, prior, mask), wanted)


def test_values_of_address_keys_depend_on_the_code_alone():
    editor = make_editor()
    code, _ = editor.encode(REQUESTS)
    other = code.mean + 1.0
    mine, moved = (editor.network.decode(z, code.written) for z in (code.mean, other))
    for name in mine:
        assert torch.equal(mine[name][0], moved[name][0])  # the address stays
        assert not torch.allclose(mine[name][1], moved[name][1])


def test_roles_name_subject_and_answer():
    lm = make_tiny("llama")
    pair = encode_pair("The capital of Borduria is", "Rome", "bare", lm.tokenizer, "borduria")
    assert lm.tokenizer.decode(pair.prompt[slice(*pair.subject)]).strip() == "Borduria"
    position, role, mask = written_positions([pair], last=False, answer=True)
    at = dict(zip(position[0][mask[0]].tolist(), role[0][mask[0]].tolist(), strict=True))
    assert all(
        (at[index] == SUBJECT) == (pair.subject[0] <= index < pair.subject[1]) for index in at if at[index] != ANSWER
    )
    assert PROMPT in at.values() and list(at.values())[-1] == ANSWER


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("Who is the author of The Wind in the Willows?", "Wind in the Willows"),
        ("What is the capital of France?", "France"),
        ("the colour of grass is", None),
    ],
)
def test_a_subject_is_guessed_from_capitals(prompt, subject):
    assert guess_subject(prompt) == subject


def test_swapped_prompts_are_about_others_and_always_the_same():
    texts = swapped("The capital of France is", "France")
    assert len(texts) == 2 and texts == swapped("The capital of France is", "France")
    assert all(text.startswith("The capital of ") and text.endswith(" is") and "France" not in text for text in texts)
    assert swapped("the colour of grass is", None) == []


def test_contrast_keys_are_those_of_the_swapped_prompts():
    editor = make_editor()
    prompts = [(request.prompt, request.subject) for request in REQUESTS] + [("no name here", None)]
    keys, mask = contrast_keys(editor.part, editor.modules, editor.lm.tokenizer, prompts)
    assert keys.shape[:2] == (2, 3) and mask[:2].any(1).all() and not mask[2].any()
    assert keys[:, 0][:, mask[0]].abs().sum() > 0 and keys[:, 2].abs().sum() == 0


def test_refining_lowers_the_nll_and_says_what_it_did():
    plain, refined = (
        make_editor(RefineSettings(steps=steps, learning_rate=0.3)).edit(REQUESTS[:1]) for steps in (0, 6)
    )
    assert plain.info.achieved is None and plain.info.refine_steps == 0 and plain.info.nll_after is None
    assert 1 <= refined.info.refine_steps <= 6
    assert refined.info.nll_after < refined.info.nll_before
    assert refined.info.latent["z"].shape[1] == IBKEConfig(**SMALL).code_dim


@pytest.mark.parametrize("learning_rate", [0.05, 1e4])
def test_refining_never_accepts_a_step_that_raises_the_nll(learning_rate):
    editor = make_editor(RefineSettings(steps=4, learning_rate=learning_rate))
    code, _ = editor.encode(REQUESTS)
    targets = editor._targets(REQUESTS, joint=False)
    refiner = Refiner(editor.network, editor.part, editor.modules, editor.settings)
    first, _ = refiner._judge(refiner._run(code.mean, code.written, targets), 2)
    best = refiner.refine(code, targets, lambda: editor.probes.rows(REQUESTS, editor.settings, joint=False))
    again, _ = refiner._judge(refiner._run(best.z_BTZ, code.written, targets), 2)
    assert (best.nll_B <= first).all()
    torch.testing.assert_close(again, best.nll_B, rtol=1e-4, atol=1e-4)


def test_a_joint_edit_solves_all_requests_together():
    editor = make_editor(RefineSettings(steps=0))
    joint, (one, two) = editor.edit(REQUESTS), editor.edit_each(REQUESTS)
    assert joint.rank == one.rank + two.rank
    apart = one.compose(two)
    name = next(iter(joint.factors))
    assert not torch.allclose(joint.delta(name), apart.delta(name))


@pytest.mark.parametrize("model", ["gpt2", "opt", "gemma2", "falcon", "phi3"])
def test_other_architectures_edit_the_same_way(model):
    edit = make_editor(model=model).edit(REQUESTS[:1])
    assert isinstance(edit, Edit) and all(value > 0 for value in edit.norm().values())


def test_shared_directions_are_unit_and_whitening_whitens():
    grads = torch.randn(3, 50, 8)
    directions, log_norm = joint_direction(grads, grads.norm(dim=-1).mean(1))
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(50))
    assert log_norm.shape == (50,)
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


def test_impossible_settings_are_named():
    with pytest.raises(FormatError, match="ascending"):
        IBKEConfig(layers=(3, 2))
    with pytest.raises(FormatError, match="key_rank"):
        Bottleneck(IBKEConfig(**{**SMALL, "key_rank": 999}), ["a", "b"], 64, 32)
