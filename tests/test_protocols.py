"""Batches and sequences of edits: what is in force when, what each is asked, and how it is summed up."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_editor import REQUESTS, RandomEditor, random_edit

from ibke.edit import Edit
from ibke.editors.base import Editor, method_class
from ibke.errors import CaptureError, RequestError
from ibke.evaluation.generate import Together, generate
from ibke.evaluation.metrics import exact_match
from ibke.evaluation.protocols import Protocol, evaluate, sample
from ibke.evaluation.scoring import score
from ibke.evaluation.sequence import InSequence
from ibke.frames import encode_pair
from ibke.models import LanguageModel
from ibke.modules import target_modules
from ibke.neurons import Neurons
from ibke.request import EditRequest, Probe
from ibke.session import EditSession

MANY = tuple(
    EditRequest(f"The capital of land {i} is", f"Town {i}", None, None, (f"Land {i} is ruled from",), (other,))
    for i, other in enumerate(REQUESTS[0].locality[:1] * 7)
)


class Watcher(RandomEditor):
    """Notes how many hooks are on the model at each edit, and hands on a follower that knows how old it is."""

    def __init__(self, lm: LanguageModel, scale: float = 1.0):
        super().__init__(lm, scale)
        self.log: list[tuple[int, int, int]] = []
        self.generation, self.made = 0, list[Edit]()

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        hooks = sum(len(module._forward_hooks) for module in self.lm.model.modules())
        self.log.append((self.generation, len(requests), hooks))
        edit = super().edit(requests)
        self.made.append(edit)
        return edit

    def after(self, edit: Edit) -> Editor:
        assert edit is self.made[-1]
        follower = Watcher(self.lm, self.scale)
        follower.seen, follower.log, follower.made = self.seen, self.log, self.made
        follower.generation = self.generation + 1
        return follower


def says(lm: LanguageModel, prompt: str, edits: Sequence[Edit]) -> str:
    with EditSession(lm) as session:
        for edit in edits:
            session.attach(edit)
        return generate(lm, [encode_pair(prompt, "", "bare", lm.tokenizer).prompt])[0].text


def shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shape(member) for key, member in value.items()}
    return [shape(member) for member in value[:1]] if isinstance(value, list) else None


def test_a_batch_is_in_force_for_its_own_questions_only(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    editor = Watcher(lm, scale=0.3)
    report = evaluate(lm, editor, MANY, Protocol("batch", 3), batch_size=2)
    # Groups of 3, 3 and 1, each made on a model without hooks by the editor for the pristine model.
    assert editor.log == [(0, 3, 0), (0, 3, 0), (0, 1, 0)]
    expected = [
        exact_match(says(lm, r.locality[0].prompt, [editor.made[i // 3]]), says(lm, r.locality[0].prompt, []))
        for i, r in enumerate(MANY)
    ]
    assert report["scores"]["generation"]["locality"] == expected
    assert report["metrics"]["generation"]["locality"]["mean"] == pytest.approx(fmean(expected))
    assert (report["protocol"], report["group"], report["n"]) == ("batch", 3, 7)
    assert report["rate_nats"] == pytest.approx((10.0 * 3) / 7)  # ten nats a group
    sizes = [sum(t.nbytes for t in edit.tensors().values()) for edit in editor.made]
    assert report["bytes_per_edit"] == pytest.approx(sum(sizes) / 7)


def test_a_sequence_stays_and_is_asked_about_at_its_end(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("gpt2")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    ids = torch.tensor([encode_pair("Rain", "", "bare", lm.tokenizer).prompt])
    logits = lm.model(ids).logits
    editor = Watcher(lm, scale=0.2)
    report = evaluate(lm, editor, MANY, Protocol("sequential", 2))
    modules = len(editor.made[0].factors)
    # Edits in force are one, however many they are.
    assert editor.log == [(0, 2, 0), (1, 2, modules), (2, 2, modules), (3, 1, modules)]
    for index, request in enumerate(MANY):
        prompt = request.locality[0].prompt
        same = exact_match(says(lm, prompt, editor.made), says(lm, prompt, []))
        assert report["scores"]["generation"]["locality"][index] == same
    assert [(row["age_from"], row["age_to"], row["n"]) for row in report["by_age"]] == [
        (0, 0, 1),
        (1, 1, 2),
        (3, 3, 2),
        (5, 5, 2),
    ]
    assert torch.equal(lm.model(ids).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_edits_kept_as_one_are_those_side_by_side(tiny_model: Callable[..., LanguageModel], model_type: str) -> None:
    lm = tiny_model(model_type)
    name = target_modules(lm, lm.architecture, [1])[0]
    edits = [random_edit(lm, 20, seed, 0.1, layers) for seed, layers in enumerate(([1], [1, 2], [1], [2, 3]))]
    value = torch.randn(2, 32) if model_type == "llama" else None
    edits.append(Edit({}, (), edits[0].info, {name: Neurons(torch.randn(2, 32), value, 0.1 * torch.randn(2, 32))}))
    ids = torch.tensor([encode_pair("The author of the play is", "", "bare", lm.tokenizer).prompt])
    base = lm.model(ids).logits
    with EditSession(lm) as session:
        for edit in edits:
            session.attach(edit)
        expected = lm.model(ids).logits
    with InSequence(lm) as kept:
        for edit in edits:
            kept.add(edit)
        assert kept.whole and kept.whole.rank == 32  # 60 directions at a module of width 32
        for module in kept.whole.factors:
            total = sum(edit.delta(module) for edit in edits if module in edit.factors)
            torch.testing.assert_close(kept.whole.delta(module), total)
        torch.testing.assert_close(lm.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(lm.model(ids).logits, base) and not torch.allclose(expected, base)


def test_joining_those_before_it_is_part_of_an_edits_time(
    tiny_model: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, add, now = tiny_model("llama"), InSequence.add, [0.0]

    def slow(self: InSequence, edit: Edit) -> None:
        now[0] += 5000.0
        if self.whole is not None:
            raise CaptureError("their gates cannot be told apart.")
        add(self, edit)

    monkeypatch.setattr(InSequence, "add", slow)
    monkeypatch.setattr("ibke.evaluation.protocols.time", SimpleNamespace(perf_counter=lambda: now[0]))
    report = evaluate(lm, RandomEditor(lm), MANY[:2], Protocol("sequential"))
    assert report["not_made"] == 1  # whose time counts too
    assert report["seconds_per_edit"] >= 5000.0


@pytest.mark.parametrize("method", ["grace", "ike"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_edits_without_weights_stay_in_a_sequence(
    tiny_model: Callable[..., LanguageModel], method: str, model_type: str
) -> None:
    lm, requests = tiny_model(model_type), MANY[:2]
    kind = method_class(method)
    first = following = kind.for_model(lm, **kind.quick)
    edits = list[Edit]()
    with EditSession(lm) as session:
        for request in requests:
            edits.append(following.edit([request]))
            session.attach(edits[-1])
            following = following.after(edits[-1])
    pairs = [encode_pair(request.prompt, request.target_new, "bare", lm.tokenizer) for request in requests]
    base, expected = ([sum(one.nll) for one in score(lm, pairs, force)] for force in (None, Together(tuple(edits))))
    report = evaluate(lm, first, requests, Protocol("sequential", 1))
    assert report["nll_nats"]["edited"]["reliability"]["mean"] == pytest.approx(fmean(expected), rel=1e-4)
    assert report["nll_nats"]["base"]["reliability"]["mean"] == pytest.approx(fmean(base), rel=1e-4)
    assert expected != pytest.approx(base, rel=1e-3)
    for index, request in enumerate(requests):
        prompt = request.locality[0].prompt
        same = exact_match(says(lm, prompt, edits), says(lm, prompt, []))
        assert report["scores"]["generation"]["locality"][index] == same
    # A tiny codebook's entry is a key, a value and a radius; what is told is a text.
    sizes = [
        4 * sum(tensor.numel() for tensor in edit.tensors().values())
        + sum(len(json.dumps(part["record"])) for part in edit.records().values())
        for edit in edits
    ]
    assert report["bytes_per_edit"] == pytest.approx(fmean(sizes)) and min(sizes) > 40


def test_ages_are_those_of_the_scores(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    report = evaluate(lm, RandomEditor(lm, scale=0.2), MANY * 4, Protocol("sequential", 1))
    scores = report["scores"]["generation"]["locality"]
    assert len(report["by_age"]) == 10
    assert sum(row["n"] for row in report["by_age"]) == len(scores) == 28
    assert report["by_age"][0]["age_from"] == 0 and report["by_age"][-1]["age_to"] == 27
    for row in report["by_age"]:
        # The youngest edit was made last.
        of_age = scores[len(scores) - 1 - row["age_to"] : len(scores) - row["age_from"]]
        assert len(of_age) == row["n"] and row["locality"]["mean"] == pytest.approx(fmean(of_age))


def test_reports_of_all_protocols_have_one_shape(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    reports = [
        evaluate(lm, RandomEditor(lm), REQUESTS, protocol)
        for protocol in (Protocol(), Protocol("batch", 2), Protocol("sequential", 1), Protocol("sequential", 9))
    ]
    for report in reports:
        assert json.loads(json.dumps(report, allow_nan=False)) == report
        assert shape(report) == shape(reports[0])
        assert list(report["by_age"][0]) == ["age_from", "age_to", "n", "reliability", "generality", "locality"]
    assert reports[0]["by_age"][0]["n"] == len(REQUESTS)
    assert [(report["group"], report["groups"]) for report in reports] == [(1, 3), (2, 2), (1, 3), (3, 1)]
    assert [report["superseded"] for report in reports] == [0] * 4


def test_a_group_of_one_is_scored_as_a_single_edit(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    single = evaluate(lm, RandomEditor(lm, 0.3), REQUESTS, frames=("bare", "chat"))
    batch = evaluate(lm, RandomEditor(lm, 0.3), REQUESTS, Protocol("batch", 1), frames=("bare", "chat"))
    assert batch["metrics"] == single["metrics"] and batch["scores"] == single["scores"]
    assert batch["kl_nats"]["base_edited"]["mean"] == pytest.approx(single["kl_nats"]["base_edited"]["mean"], rel=1e-3)


def test_a_sequence_that_fails_leaves_the_model_alone(tiny_model: Callable[..., LanguageModel]) -> None:
    class Failing(RandomEditor):
        def edit(self, requests: Sequence[EditRequest]) -> Edit:
            if len(self.seen) >= 2:
                raise RequestError("no more.")
            return super().edit(requests)

    lm = tiny_model("llama")
    with pytest.raises(RequestError, match="no more"):
        evaluate(lm, Failing(lm), MANY, Protocol("sequential", 1))
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_requests_that_contradict_each_other_are_in_different_groups() -> None:
    def asked(*said: str) -> list[EditRequest]:
        return [EditRequest(text[0], text[1:]) for text in said]

    batch = Protocol("batch", 3)
    assert batch.groups(MANY) == [range(0, 3), range(3, 6), range(6, 7)]
    assert batch.groups(asked("Ax", "Ay", "Bx", "Az")) == [range(0, 1), range(1, 3), range(3, 4)]
    assert batch.groups(asked("Ax", "aX.", "Bx", "Ay")) == [range(0, 3), range(3, 4)]  # the same in other spellings
    assert batch.groups(asked("Ax", "Bx", "Cx", "Ay", "Ax")) == [range(0, 3), range(3, 4), range(4, 5)]
    assert Protocol().groups(asked("Ax", "Ay")) == [range(0, 1), range(1, 2)]


def test_what_a_sequence_overwrites_is_not_scored(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    back = [replace(MANY[0], target_new=target) for target in ("Elsewhere", "town 0.")]
    requests = [MANY[0], MANY[1], back[0], MANY[2], back[1]]  # changed, and changed back
    editor, seen = Watcher(lm, 0.2), list[tuple[str, int, int]]()
    report = evaluate(lm, editor, requests, Protocol("sequential", 4), progress=lambda *what: seen.append(what))
    assert [count for _, count, _ in editor.log] == [2, 2, 1] and (report["n"], report["groups"]) == (5, 3)
    assert report["superseded"] == 1 and seen[-1][1:] == (2 * 3 * 4, 2 * 3 * 4)
    for block in ("generation", "teacher_forced"):
        for name in ("reliability", "generality", "locality"):
            values = report["scores"][block][name]
            assert [value is None for value in values] == [False, False, True, False, False]
            assert report["metrics"][block][name]["mean"] == pytest.approx(
                fmean(value for value in values if value is not None), abs=1e-4
            )
    assert [(row["age_from"], row["n"]) for row in report["by_age"]] == [(0, 1), (1, 1), (3, 2)]
    # Each batch begins anew, and nothing is overwritten.
    batch = evaluate(lm, Watcher(lm, 0.2), requests, Protocol("batch", 4))
    assert batch["superseded"] == 0 and None not in batch["scores"]["generation"]["locality"]


def test_an_answer_is_not_to_stay_that_another_edit_in_force_changes(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    free, asks = Probe("The moon is made of"), Probe(f"  {MANY[1].prompt.upper()} ")
    requests = [replace(MANY[0], locality=(free, asks)), replace(MANY[1], locality=(free,))]
    counts = {}
    for protocol in (Protocol(), Protocol("batch", 1), Protocol("batch", 2), Protocol("sequential", 1)):
        seen = list[tuple[str, int, int]]()
        report = evaluate(lm, Watcher(lm, 0.2), requests, protocol, progress=lambda *what, to=seen: to.append(what))
        asked = 2 * (2 + sum(len(one.rephrase_prompts) for one in requests) + 3 - report["rewritten"])
        assert seen[-1][1:] == (asked, asked)
        counts[str(protocol)] = report["rewritten"]
    assert counts == {"single": 0, "batch:1": 0, "batch:2": 1, "sequential:1": 1}
    # What is not asked about has no probes to be left out.
    later = replace(MANY[0], target_new="Elsewhere", locality=(free,))
    seen.clear()
    report = evaluate(
        lm, Watcher(lm, 0.2), [*requests, later], Protocol("sequential"), progress=lambda *what: seen.append(what)
    )
    assert (report["superseded"], report["rewritten"]) == (1, 0) and seen[-1][1] == seen[-1][2]


def test_targets_that_no_answer_can_be_are_counted(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    targets = {  # of 40 tokens an answer may be
        "\x01" * 39: 0,  # and the space before it
        "\x01" * 40: 1,
        "\x01" * 39 + ".": 0,  # what ends a sentence does not count
        "one\ntwo": 1,
    }
    for target, beyond in targets.items():
        request = replace(REQUESTS[1], target_new=target)
        report = evaluate(lm, RandomEditor(lm), [REQUESTS[0], request], frames=("bare", "question"))
        assert report["unreachable"] == beyond, target
    # Of what is overwritten nothing is asked.
    twice = [replace(REQUESTS[1], target_new="one\ntwo"), REQUESTS[1]]
    assert evaluate(lm, RandomEditor(lm), twice, Protocol("sequential"))["unreachable"] == 0


@pytest.mark.parametrize("protocol", ["single", "sequential"])
@pytest.mark.parametrize(
    ("fields", "lengths"),
    [
        ({"locality": (Probe("\x00" * 100),)}, r"100 tokens in the frame 'bare'\) and an answer of 40"),
        ({"portability": (Probe("\x00", "\x00" * 150),)}, "answer of 151 tokens"),
        ({"target_new": "\x00" * 150}, "answer of 151 tokens"),
        ({"target_true": "\x00" * 150}, "answer of 151 tokens"),
    ],
    ids=["prompt", "answer to follow", "target", "old answer"],
)
def test_what_does_not_fit_the_window_is_refused_before_any_edit(
    tiny_model: Callable[..., LanguageModel], protocol: str, fields: dict[str, Any], lengths: str
) -> None:
    lm = tiny_model("gpt2")  # learned positions: there is none for a token beyond the window
    editor, last = RandomEditor(lm), replace(REQUESTS[2], **fields)
    with pytest.raises(RequestError, match=f"{lengths}.*window of 128") as caught:
        evaluate(lm, editor, [*REQUESTS[:2], last], Protocol.parse(protocol))
    assert caught.value.where == "request 'The sky is'" and not editor.seen


def test_cases_are_drawn_whole() -> None:
    pairs = [EditRequest(f"Number {i} is", str(i), case=str(i // 2)) for i in range(40)]
    alone = [EditRequest(f"Letter {i} is", str(i)) for i in range(20)]
    for requests, limit, least in ((pairs, 10, 10), (pairs, 7, 6), (pairs + alone, 7, 6), (pairs, 39, 38)):
        for seed in range(5):
            drawn = sample(requests, limit, seed)
            assert least <= len(drawn) <= limit and drawn == sorted(drawn, key=requests.index)
            for case in {request.case for request in drawn} - {None}:
                assert sum(request.case == case for request in drawn) == 2
    assert len({sample(pairs, 2, seed)[0].case for seed in range(20)}) > 5
    assert [len(sample(pairs, 1, seed)) for seed in range(3)] == [2, 2, 2]  # one case that is larger


def test_protocols_are_read_and_refused() -> None:
    for text in ("single", "batch:100", "sequential:1"):
        assert str(Protocol.parse(text)) == text
    assert Protocol.parse("sequential") == Protocol("sequential", 1)
    for text, message in (
        ("batch", "needs a size"),
        ("batch:0", "groups of 0"),
        ("batch:x", "no size of a group"),
        ("single:2", "group of one"),
        ("serial:3", "unknown protocol 'serial'"),
    ):
        with pytest.raises(RequestError, match=message):
            Protocol.parse(text)


def test_a_random_order_repeats_and_keeps_cases_in_order() -> None:
    requests = [EditRequest(f"Number {i} is", str(i), case=str(i // 2) if i < 20 else None) for i in range(40)]
    mixed = sample(requests, None, 3, "random")
    assert mixed == sample(requests, None, 3, "random") != sample(requests, None, 4, "random")
    assert sorted(int(r.target_new) for r in mixed) == list(range(40)) and mixed != requests
    places = {int(r.target_new): place for place, r in enumerate(mixed)}
    assert all(places[i] < places[i + 1] for i in range(0, 20, 2))
    some = sample(requests, 10, 3, "random")
    assert set(some) == set(sample(requests, 10, 3, "file")) and some != sample(requests, 10, 3)
    with pytest.raises(RequestError, match="Choose file or random"):
        sample(requests, 10, 3, "up")  # type: ignore[arg-type]
