"""SERAC: a classifier that is what it says, and who is told what."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F

from ibke.batch import Pair
from ibke.context import PLACE
from ibke.data.readers import read
from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor
from ibke.editors.fine_tuning import FineTuning, FineTuningSettings
from ibke.editors.ike import IKE
from ibke.editors.serac.editor import SERAC, ScopedFacts
from ibke.editors.serac.scope import Scope, ScopeSettings, fit, layer_of, represent, scope_for, training_requests
from ibke.errors import CaptureError, FormatError, IBKEError, TrainingError
from ibke.evaluation.generate import edited_rows, generate
from ibke.evaluation.protocols import evaluate
from ibke.evaluation.scoring import score
from ibke.request import EditRequest
from ibke.session import EditSession
from ibke.training.run import draw_episodes
from ibke.training.settings import RunSettings

ONE = EditRequest("The capital of France is", "Canberra")
TWO = EditRequest("Who wrote the play?", "Paris")


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """An empty cache folder, and no data."""
    monkeypatch.setenv("IBKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IBKE_DATA", str(tmp_path / "data"))
    return tmp_path / "cache" / "scope"


def scope_of(lm, bias, layer=1) -> Scope:
    """A classifier that compares states as they are."""
    width = lm.model.get_input_embeddings().weight.shape[-1]
    return Scope(layer, torch.zeros(width), torch.ones(width), torch.eye(width), torch.tensor(bias))


def facts_of(lm, bias, *requests) -> Edit:
    scope = scope_of(lm, bias)
    edits = scope.embed(
        represent(lm, layer_of(lm, 1), [lm.tokenizer(request.prompt).input_ids for request in requests])
    )
    part = ScopedFacts(scope, edits, tuple(r.prompt for r in requests), tuple(r.target_new for r in requests))
    return Edit({}, tuple(requests), EditInfo("test", lm.fingerprint), parts={PLACE: part})


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3"])
def test_a_text_is_the_mean_of_its_words(tiny_model, model_type):
    lm = tiny_model(model_type)
    rows = [lm.tokenizer(text).input_ids for text in (ONE.prompt, TWO.prompt, "Paris")] + [[5]]
    means = represent(lm, layer_of(lm, 2), rows)
    for row, mean in zip(rows, means, strict=True):
        seen = []
        layer = lm.model.get_submodule(f"{lm.architecture.layers}.2")
        handle = layer.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        lm.model(torch.tensor([row]))
        handle.remove()
        words = seen[0][0][1:] if len(row) > 1 else seen[0][0]
        torch.testing.assert_close(mean, words.mean(0), rtol=1e-3, atol=1e-4)


def test_odds_are_those_of_the_formula(tiny_model):
    draw = torch.Generator().manual_seed(0)
    scope = Scope(0, *(torch.rand(size, generator=draw) + 0.5 for size in ((6,), (6,), (4, 6), ())))
    asked, edits = torch.randn(3, 6, generator=draw), torch.randn(2, 6, generator=draw)
    odds = scope.log_odds(scope.embed(asked), scope.embed(edits))
    for row in range(3):
        for column in range(2):
            one, two = (
                F.normalize((some - scope.mean_D) / scope.spread_D, dim=0) for some in (asked[row], edits[column])
            )
            distance = (scope.projection_KD @ one - scope.projection_KD @ two).square().sum()
            assert float(odds[row, column]) == pytest.approx(float(scope.bias - distance), rel=1e-4, abs=1e-4)


def test_fitting_tells_what_is_in_scope(tiny_model):
    """Requests differ in some directions, which are drowned in others that say nothing."""
    draw = torch.Generator().manual_seed(0)

    def some(count, kind):
        return torch.cat(
            [kind + 0.3 * torch.randn(count, 8, generator=draw), 3 * torch.randn(count, 24, generator=draw)], 1
        )

    kinds = 2 * torch.randn(80, 8, generator=draw)
    edits, own, others = some(80, kinds), some(80, kinds), some(80, kinds.roll(1, 0))
    inside = torch.arange(160) < 80
    settings = ScopeSettings(steps=400, width=16)
    scope = fit(0, edits[:60], torch.cat([own[:60], others[:60]]), torch.arange(60).repeat(2), inside[20:140], settings)
    odds = scope.log_odds(scope.embed(torch.cat([own[60:], others[60:]])), scope.embed(edits[60:]))
    right = odds[:20].diagonal(), odds[20:].diagonal()
    assert (right[0] > 0).float().mean() > 0.8 and (right[1] < 0).float().mean() > 0.8
    before = F.normalize(edits[60:], dim=-1) @ F.normalize(own[60:], dim=-1).T
    assert (odds[:20].argmax(0) == torch.arange(20)).sum() > (before.argmax(0) == torch.arange(20)).sum()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3"])
def test_a_question_is_told_the_likeliest_fact_or_none(tiny_model, model_type):
    lm = tiny_model(model_type)
    ids = [lm.tokenizer(text).input_ids for text in (ONE.prompt, TWO.prompt, "The author of the play is known.")]
    edit = facts_of(lm, 0.01, ONE, TWO)
    told = [
        generate(lm, [row], [IKE(lm).edit([request])], max_new_tokens=4)[0]
        for row, request in zip(ids, (ONE, TWO), strict=False)
    ]
    wanted = [*told, generate(lm, ids[2:], max_new_tokens=4)[0]]
    with EditSession(lm).attach(edit):
        assert generate(lm, ids, max_new_tokens=4) == wanted
    edits = [edit, facts_of(lm, 0.01, ONE), None]
    assert generate(lm, ids, edits, max_new_tokens=4) == [told[0], *generate(lm, ids[1:], max_new_tokens=4)]
    # Where everything is in scope, the nearest is told.
    everything = generate(lm, ids[:2], [facts_of(lm, 99.0, TWO, ONE)] * 2, max_new_tokens=4)
    assert everything == told


def test_the_classifier_is_no_edits_own(tiny_model):
    """Kept once for all edits, it does not count for each."""
    lm = tiny_model("llama")

    class Remembering(Editor):
        name = "remembering"

        def edit(self, requests):
            return facts_of(lm, 0.01, *requests)

    report = evaluate(lm, Remembering(lm), [ONE, TWO])
    parts = [facts_of(lm, 0.01, request).parts[PLACE] for request in (ONE, TWO)]
    shared = sum(tensor.nbytes for tensor in scope_of(lm, 0.01).tensors().values())
    assert report["shared_bytes"] == shared == 4 * (32 * 32 + 32 + 32 + 1)
    assert report["bytes_per_edit"] == pytest.approx(fmean(part.nbytes for part in parts) - shared)
    own = [part.edits_NK.nbytes + len(part.prompts[0]) + len(part.targets[0]) for part in parts]
    assert fmean(own) < report["bytes_per_edit"] < fmean(own) + 100


def test_out_of_scope_not_a_bit_changes(tiny_model):
    lm = tiny_model("llama")
    ids = torch.tensor([lm.tokenizer("The author of the play").input_ids])
    before = lm.model(ids).logits
    edit = facts_of(lm, 0.01, ONE)
    with EditSession(lm).attach(edit):
        assert torch.equal(lm.model(ids).logits, before)
    with edited_rows(lm, [edit]):
        assert torch.equal(lm.model(ids).logits, before)


def test_of_one_prompt_the_last_fact_counts_and_classifiers_must_be_one(tiny_model):
    lm = tiny_model("llama")
    first, later = facts_of(lm, 0.01, ONE, TWO), facts_of(lm, 0.01, replace(ONE, target_new="Rome"))
    whole = first.compose(later).parts[PLACE]
    assert dict(zip(whole.prompts, whole.targets, strict=True)) == {ONE.prompt: "Rome", TWO.prompt: "Paris"}
    with pytest.raises(FormatError, match="classifiers differ"):
        first.compose(facts_of(lm, 0.02, TWO))
    with pytest.raises(FormatError, match="different kinds"):
        first.compose(IKE(lm).edit([ONE]))


def test_a_method_that_runs_the_model_in_parts_says_why_it_cannot_follow(tiny_model):
    lm = tiny_model("llama")
    tuning = FineTuning(lm, FineTuningSettings(epochs=1, layer=2))
    with EditSession(lm).attach(facts_of(lm, 99.0, ONE)), pytest.raises(CaptureError, match="in front of the question"):
        tuning.edit([TWO])
    with EditSession(lm).attach(facts_of(lm, 0.01, ONE)), pytest.raises(CaptureError, match="in parts"):
        tuning.edit([TWO])


def test_a_classifier_is_trained_once_and_found_again(tiny_model, no_cache, data_folder, monkeypatch):
    lm, settings = tiny_model("llama"), ScopeSettings(requests=12, steps=5, width=8)
    with pytest.raises(TrainingError, match="ibke data fetch lre pararel"):
        SERAC(lm, settings)
    monkeypatch.setenv("IBKE_DATA", str(data_folder))
    first = SERAC(lm, settings)
    (file,) = no_cache.rglob("*.safetensors")
    monkeypatch.setenv("IBKE_DATA", str(no_cache))
    again = SERAC(lm, settings)
    assert again.scope.same(first.scope)
    assert again.mark == first.mark
    other = SERAC.__new__(SERAC)
    other.lm, other.settings, other.scope = lm, settings, replace(first.scope, bias=first.scope.bias + 1)
    assert other.mark != first.mark  # another classifier's edits are others
    assert again.training_seconds == first.training_seconds and first.training_seconds and first.training_seconds > 0
    edit = first.edit([ONE, ONE])
    assert edit.parts[PLACE].prompts == (ONE.prompt,)
    for bad in (b"", file.read_bytes()[:-9], file.read_bytes().replace(b'\\"layout\\": 1', b'\\"layout\\": 0')):
        file.write_bytes(bad)
        with pytest.raises(TrainingError, match="no facts"):
            scope_for(lm, settings)


def test_other_data_make_another_classifier(tiny_model, no_cache, monkeypatch):
    """Under the same names of tables and files."""
    lm, settings, asked = tiny_model("llama"), ScopeSettings(steps=2, width=4), [ONE, TWO]
    monkeypatch.setattr("ibke.editors.serac.scope.training_requests", lambda settings: asked)
    first = scope_for(lm, settings)
    assert scope_for(lm, settings).same(first)
    asked[1] = replace(TWO, prompt=f"Say: {TWO.prompt}")
    second = scope_for(lm, settings)
    assert not second.same(first)
    assert scope_for(lm, settings).same(second)


def test_what_is_trained_on_leaves_out_the_hard_split_and_what_is_excluded(data_folder, monkeypatch):
    monkeypatch.setenv("IBKE_DATA", str(data_folder))
    settings = ScopeSettings(requests=40, sources=("lre",))
    requests = training_requests(settings)
    assert len(requests) == 40 and all(len(request.rephrase_prompts) and request.locality for request in requests)
    assert training_requests(settings) == requests
    name = "counterfact/counterfact-val.json"
    theirs = {request.subject for request in read(data_folder / name, "counterfact", [])}
    more = replace(settings, requests=300)
    assert theirs & {request.subject for request in training_requests(more)}
    apart = {request.subject for request in training_requests(replace(more, exclude=(f"counterfact:{name}",)))}
    assert apart and not theirs & apart
    with pytest.raises(TrainingError, match="no two requests"):
        training_requests(replace(settings, held_out=1.0))


def test_it_is_trained_on_what_hypernetworks_are_trained_on(data_folder, monkeypatch):
    """The same edits of the same sources, by share."""
    monkeypatch.setenv("IBKE_DATA", str(data_folder))
    sources, path = ("facts=1", "pararel=2", "counterfact:counterfact/counterfact-train.json=1"), "counterfact-val.json"
    exclude = (f"counterfact:counterfact/{path}",)
    requests = training_requests(ScopeSettings(requests=40, sources=sources, exclude=exclude, seed=3))
    run = RunSettings("", sources, seed=3, episodes=30, validation=10, exclude=exclude)
    training, validation = draw_episodes(run)
    theirs = {(one.subject, one.edit.prompt, one.edit.target) for one in (*training, *validation)}
    assert {(one.subject, one.prompt, one.target_new) for one in requests} == theirs and len(requests) == 40
    assert sum(one.source == "counterfact" for one in (*training, *validation)) == 10


def test_other_sources_make_another_classifier(tiny_model, no_cache, data_folder, monkeypatch):
    """Each is kept beside the other, in a file of its own."""
    monkeypatch.setenv("IBKE_DATA", str(data_folder))
    lm, settings = tiny_model("llama"), ScopeSettings(requests=12, steps=5, width=8)
    mixed = replace(settings, sources=("lre=3", "counterfact:counterfact/counterfact-train.json"))
    first, second = scope_for(lm, settings), scope_for(lm, mixed)
    assert not second.same(first) and len(list(no_cache.rglob("*.safetensors"))) == 2
    assert scope_for(lm, settings).same(first) and scope_for(lm, mixed).same(second)
    monkeypatch.setenv("IBKE_DATA", str(no_cache))
    with pytest.raises(TrainingError, match="ibke data fetch lre counterfact"):
        scope_for(lm, replace(mixed, seed=1))


def test_what_is_none_is_refused(tiny_model):
    lm = tiny_model("llama")
    good = facts_of(lm, 0.5, ONE).parts[PLACE]
    assert ScopedFacts.read(good.tensors(), good.record()).targets == ("Canberra",)
    tensors, record = good.tensors(), good.record()
    for broken, other in (
        ({}, record),
        ({"edits_NK": tensors["edits_NK"]}, record),
        (tensors, {}),
        (tensors, {**record, "layer": "1"}),
        (tensors, {**record, "targets": []}),
        (tensors, {**record, "prompts": [1]}),
        (tensors, {**record, "prompts": ["a", "b"], "targets": ["a", "b"]}),
        ({**tensors, "bias": torch.ones(2)}, record),
        ({**tensors, "edits_NK": torch.full((1, 32), torch.nan)}, record),
        ({**tensors, "mean_D": torch.ones(3)}, record),
    ):
        with pytest.raises(FormatError, match="scope"):
            ScopedFacts.read(broken, other)
    other_size = tiny_model("llama", hidden_size=64)
    other_size.fingerprint = lm.fingerprint
    with pytest.raises(FormatError, match="width 32"):
        EditSession(other_size).attach(facts_of(lm, 0.5, ONE))
    with pytest.raises(FormatError, match="in front of the question"):
        good.check(lm, "model.layers.1.mlp.down_proj")
    for sources in (("nothing",), ()):
        with pytest.raises(TrainingError, match="unknown data source"):
            ScopeSettings(sources=sources)
    with pytest.raises(IBKEError, match="`width` is below 1"):
        ScopeSettings(width=0)


def test_given_answers_are_scored_as_they_would_be_generated(tiny_model):
    """What a row is told hangs on its question, whatever answer stands behind it."""
    lm = tiny_model("llama")
    ids = lm.tokenizer(ONE.prompt).input_ids
    edit = facts_of(lm, 0.01, ONE)
    made = generate(lm, [ids], [edit], max_new_tokens=6)[0].ids
    (scored,) = score(lm, [Pair(ids, [*made, 5, 9, 11], (0, 1))], [edit])
    assert scored.predicted[: len(made)] == tuple(made)
    other = score(lm, [Pair(ids, [7, 7, 7, 7], (0, 1)), Pair(ids, [*made, 5, 9, 11], (0, 1))], [edit, edit])
    assert other[1] == scored and other[0].predicted[0] == made[0]
