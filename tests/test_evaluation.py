"""Answers and scores of many edits at once are those of each edit alone, and reports say what they claim."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_editor import REQUESTS, RandomEditor, random_edit

from ibke.batch import Pair, collate
from ibke.edit import Edit, EditInfo
from ibke.editors.ibke.editor import IBKEEditor
from ibke.errors import RequestError
from ibke.evaluation import questions as questions_module
from ibke.evaluation.baseline import Baseline
from ibke.evaluation.generate import generate, stack_factors, stack_neurons
from ibke.evaluation.protocols import evaluate, sample
from ibke.evaluation.questions import Outcome, Question, judge, questions
from ibke.evaluation.scoring import Forced, divergence, score
from ibke.frames import FRAMES, encode_pair
from ibke.greedy import Answer
from ibke.models import LanguageModel
from ibke.modules import ARCHITECTURES, target_modules
from ibke.neurons import Neurons
from ibke.request import EditRequest, Probe
from ibke.session import EditSession

PROMPTS = ("The capital of France is", "Who wrote the play?", "Rain", "The author of the play about the capital is")


def encode(lm: LanguageModel, prompts: Sequence[str] = PROMPTS) -> list[list[int]]:
    return [encode_pair(prompt, "", "bare", lm.tokenizer).prompt for prompt in prompts]


def test_an_answer_ends_at_a_new_line_whoever_asks(smollm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, answer in (("\nAnkara is", ""), (" Ankara \n is", "Ankara")):
        chosen = smollm.tokenizer(text, add_special_tokens=False).input_ids
        for module in ("models", "evaluation.generate"):
            monkeypatch.setattr(f"ibke.{module}.greedy", lambda *_, chosen=chosen: [chosen])
        assert smollm.answer(PROMPTS[0]) == generate(smollm, encode(smollm)[:1])[0].text == answer


def test_what_cannot_be_asked_is_refused(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    with pytest.raises(RequestError, match="the prompt is empty"):
        lm.answer(" ")
    with pytest.raises(RequestError, match=r"exceed the model's window of 128\. Shorten the prompt"):
        lm.answer("word " * 100)
    with pytest.raises(RequestError, match="Ask for a shorter answer"):
        lm.answer("word", max_new_tokens=128)


# OPT flattens rows and tokens before its MLP, and per-row updates want them apart.
@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name != "opt"])
def test_batched_answers_are_those_of_one_prompt_and_one_edit(
    tiny_model: Callable[..., LanguageModel], model_type: str
) -> None:
    lm = tiny_model(model_type)
    prompts = encode(lm)
    edits = [None, *(random_edit(lm, rank, seed=rank) for rank in (1, 3, 2))]
    together = generate(lm, prompts, edits, max_new_tokens=12)
    for prompt, edit, answer in zip(prompts, edits, together, strict=True):
        with EditSession(lm) as session:
            if edit:
                session.attach(edit)
            assert generate(lm, [prompt], max_new_tokens=12) == [answer]
    unedited = generate(lm, prompts, max_new_tokens=12)
    assert together[0] == unedited[0]
    assert together[1:] != unedited[1:]


def test_answers_are_greedy_whatever_the_generation_settings_say(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    prompts = encode(lm)
    expected = generate(lm, prompts, max_new_tokens=12)
    step_by_step = list(prompts[0])
    for token in expected[0].ids:
        logits = lm.model(torch.tensor([step_by_step])).logits[0, -1]
        assert token == logits.argmax()
        step_by_step.append(token)
    lm.model.generation_config.repetition_penalty = 5.0
    lm.model.generation_config.suppress_tokens = list(expected[0].ids)
    assert generate(lm, prompts, max_new_tokens=12) == expected


def test_batches_and_order_do_not_matter(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("gpt2")
    prompts = encode(lm) * 2
    edits = [random_edit(lm, 2, seed) for seed in range(len(prompts))]
    counts: list[int] = []
    whole = generate(lm, prompts, edits, max_new_tokens=8)
    assert generate(lm, prompts, edits, max_new_tokens=8, batch_size=3, tick=counts.append) == whole
    assert counts == [3, 3, 2]
    assert generate(lm, prompts[::-1], edits[::-1], max_new_tokens=8) == whole[::-1]


def test_an_answer_ends_at_an_end_token_or_a_newline(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    prompts = encode(lm)
    free = generate(lm, prompts, max_new_tokens=12)
    assert all(len(answer.ids) <= 12 for answer in free)
    third = free[0].ids[2]
    lm.model.generation_config.eos_token_id = [2, third]
    ended = generate(lm, prompts, max_new_tokens=12)[0]
    assert ended.ids == free[0].ids[: free[0].ids.index(third) + 1]
    newline = lm.tokenizer("\n").input_ids[0]
    head = lm.model.get_output_embeddings()
    head.weight[newline] = 0.0
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features).index_fill(0, torch.tensor(newline), 1e4))
    assert [(answer.text, answer.ids) for answer in generate(lm, prompts)] == [("", (newline,))] * len(prompts)


def test_a_prompt_beyond_the_window_is_refused(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("gpt2")
    with pytest.raises(RequestError, match="window of 128"):
        generate(lm, [[5] * 100], max_new_tokens=40)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "gemma3"])
def test_scores_are_those_of_the_full_model(tiny_model: Callable[..., LanguageModel], model_type: str) -> None:
    lm = tiny_model(model_type)
    pairs = [encode_pair(prompt, target, "bare", lm.tokenizer) for prompt, target in zip(PROMPTS, "abcd", strict=True)]
    edits = [random_edit(lm, rank, seed=rank, scale=0.3) for rank in (1, 2, 3, 4)]
    scores, moved = score(lm, pairs, edits, batch_size=3), divergence(lm, pairs, edits, batch_size=3)
    for pair, edit, forced, found in zip(pairs, edits, scores, moved, strict=True):
        base = answer_log_probs(lm, pair)
        with EditSession(lm).attach(edit):
            edited = answer_log_probs(lm, pair)
        assert forced.predicted == tuple(edited.argmax(-1).tolist())
        expected = [-edited[i, token].item() for i, token in enumerate(pair.answer)]
        assert forced.nll == pytest.approx(expected, rel=1e-4)
        forward, backward = (base.exp() * (base - edited)).sum(-1), (edited.exp() * (edited - base)).sum(-1)
        assert found.forward == pytest.approx(forward.mean().item(), rel=1e-3, abs=1e-6)
        assert found.backward == pytest.approx(backward.mean().item(), rel=1e-3, abs=1e-6)
        assert found.same == (edited.argmax(-1).tolist() == list(pair.answer))


def test_answers_that_need_not_be_generated_are_the_generated_ones(
    tiny_model: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, asked = tiny_model("llama"), []
    plain, measure = questions_module.generate, questions_module.divergence

    def generate_and_count(lm: LanguageModel, prompts: Any, *edits: Any, **how: Any) -> Any:
        asked.append(len(prompts) if edits else 0)
        return plain(lm, prompts, *edits, **how)

    monkeypatch.setattr(questions_module, "generate", generate_and_count)
    quick = [evaluate(lm, RandomEditor(lm, scale=scale), REQUESTS)["scores"] for scale in (0.0, 0.05, 0.3)]
    spared = sum(asked)
    asked.clear()
    monkeypatch.setattr(
        questions_module,
        "divergence",
        lambda *given, **how: [replace(one, same=False) for one in measure(*given, **how)],
    )
    slow = [evaluate(lm, RandomEditor(lm, scale=scale), REQUESTS)["scores"] for scale in (0.0, 0.05, 0.3)]
    assert quick == slow and spared < sum(asked)


def answer_log_probs(lm: LanguageModel, pair: Pair) -> torch.Tensor:
    logits = lm.model(torch.tensor([pair.prompt + pair.answer])).logits[0].float()
    return logits[len(pair.prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("bos", [False, True], ids=["without BOS", "with BOS"])
@pytest.mark.parametrize("frame", FRAMES)
def test_labels_are_the_answer_and_nothing_else(
    tiny_model: Callable[..., LanguageModel], frame: Any, bos: bool
) -> None:
    lm = tiny_model("llama")
    tokenizer = lm.tokenizer
    if bos:
        tokenizer.bos_token, tokenizer.add_bos_token = "<|start|>", True
    for request in REQUESTS:
        for question in questions(request, 0, [frame], tokenizer):
            pair = question.pair
            batch = collate([Pair([7] * 60, [8, 9], (0, 60)), pair], tokenizer.pad_token_id)
            mine = batch.labels_N[batch.row_N == 1].tolist()
            assert mine == pair.answer
            assert mine[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(mine[:-1]).strip() == (question.target or "")
            positions = batch.predicts_RT[1].nonzero()[:, 0].tolist()
            assert positions == list(range(len(pair.prompt) - 1, len(pair)))
            # The token after each position that predicts is the label, so nothing is shifted.
            fed = [*batch.ids_RT[1].tolist(), tokenizer.eos_token_id]
            assert [fed[position + 1] for position in positions[:-1]] == mine[:-1]


def test_stacked_edits_are_padded_with_zeros(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    edits = [random_edit(lm, 1, 0, layers=[1]), None, random_edit(lm, 3, 1, layers=[1, 2])]
    stacked = stack_factors(edits)
    assert list(stacked) == target_modules(lm, lm.architecture, [1, 2])
    for name, (a_RKI, b_RKO) in stacked.items():
        for row, edit in enumerate(edits):
            wanted = edit.delta(name) if edit and name in edit.factors else torch.zeros(b_RKO.shape[2], a_RKI.shape[2])
            torch.testing.assert_close(b_RKO[row].T @ a_RKI[row], wanted)


def test_stacked_neurons_are_filled_up_with_silent_ones() -> None:
    one, two = (Neurons(torch.randn(count, 4), None, torch.randn(count, 4)) for count in (1, 3))
    edits = [Edit({}, (), EditInfo("x", "f"), {"m": one}), None, Edit({}, (), EditInfo("x", "f"), {"m": two})]
    stacked = stack_neurons(edits)["m"]
    assert stacked.value is None and stacked.gate.shape == (3, 3, 4)
    assert torch.equal(stacked.gate[0, :1], one.gate) and torch.equal(stacked.out[2], two.out)
    assert not stacked.out[1].any() and not stacked.out[0, 1:].any()


END = 2


def outcome(text: str, *predicted: int, nll: float = 1.0, old: float | None = None) -> Outcome:
    forced_old = None if old is None else Forced(predicted, (old,) * len(predicted))
    return Outcome(Answer(text, predicted), Forced(predicted, (nll,) * len(predicted)), forced_old)


def test_judging_an_edits_own_prompt() -> None:
    pair = Pair([5, 6], [7, 8, END], (0, 2))
    question = Question(0, "reliability", "bare", pair, "New Rome", old="Paris", old_pair=pair)
    base = outcome("Paris", 9, 9, 9)
    # The end token is wrong and does not count; one of two answer tokens is right.
    scores = judge(question, base, outcome("It is New Rome.", 7, 1, 3, nll=0.5, old=0.7))
    assert scores == {
        ("generation", "reliability"): 0.0,
        ("contains", "reliability"): 1.0,
        ("teacher_forced", "reliability"): 0.5,
        ("sequence_accuracy", "reliability"): 0.0,
        ("new_over_old", "reliability"): 1.0,
        ("nll_nats", "reliability"): 1.5,
    }
    assert judge(question, base, outcome("new  rome!", 7, 8, 3))["generation", "reliability"] == 1.0


def test_judging_locality_compares_with_the_base_and_not_with_the_truth() -> None:
    question = Question(0, "locality", "bare", Pair([5], [7, 8, END], (0, 1)), "Bonn", family="same_relation")
    base, edited = outcome("Berlin, and more", 4, 8, 3, 1), outcome("Berlin, and less", 4, 9, 3, 1)
    assert judge(question, base, base)["generation", "locality"] == 1.0
    scores = judge(question, base, edited)
    assert scores["generation", "locality"] == scores["generation", "locality_accuracy"] == 0.0
    assert scores["teacher_forced", "locality"] == 0.5
    assert scores["teacher_forced", "locality_accuracy"] == 0.0
    assert scores["locality_detail", "at_answer_length"] == 1.0
    assert scores["locality_detail", "shared_prefix"] == 0.25
    silent = judge(question, outcome("", END, 3, 3), outcome("", END, 3, 3))
    assert silent["generation", "locality"] == 1.0
    assert silent["locality_detail", "base_answers"] == 0.0
    assert ("locality_detail", "where_base_answers") not in silent


def test_report_has_the_agreed_shape_and_is_json(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    seen: list[tuple[str, int, int]] = []
    editor = RandomEditor(lm)
    report = evaluate(
        lm,
        editor,
        REQUESTS,
        frames=("bare", "chat"),
        batch_size=2,
        config={"seed": 7},
        progress=lambda *what: seen.append(what),
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["n"], report["protocol"]) == (3, "single")
    for state in ("metrics", "base"):
        for block in ("generation", "teacher_forced"):
            for name in ("reliability", "generality", "locality"):
                assert list(report[state][block][name]) == ["mean", "low", "high"]
                assert 0 <= report[state][block][name]["mean"] <= 1
    assert report["rate_nats"] == 10.0
    assert report["steps"] == {"mean": 2.0, "median": 2.0, "p95": 3.0}
    assert report["achieved"]["mean"] == pytest.approx(1 / 3)
    assert 0 < report["seconds_per_edit"] < 60
    assert 100 < report["peak_memory_editing_mb"] <= report["peak_memory_mb"]
    assert report["config"] == {**report["config"], "method": "random", "seed": 7, "frames": ["bare", "chat"]}
    # The editor is shown the request and none of the questions it is judged by.
    assert [(r.prompt, r.subject, r.target_true) for r in editor.seen] == [
        (r.prompt, r.subject, r.target_true) for r in REQUESTS
    ]
    assert not any(r.rephrase_prompts or r.locality or r.portability for r in editor.seen)
    assert [what for what in seen if what[0] == "edits"] == [("edits", i, 3) for i in (1, 2, 3)]
    # 10 prompts, two frames, two models.
    assert max(done for what, done, _ in seen if what == "answers") == 40 == seen[-1][2]
    for name, tensor in lm.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_has_no_answer_to_follow_is_not_asked(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    probes = (Probe("The capital's river is"), Probe("The capital's mayor is", " "))
    seen: list[tuple[str, int, int]] = []
    request = EditRequest("The capital of Peru is", "Quito", portability=probes)
    report = evaluate(lm, RandomEditor(lm), [request], progress=lambda *what: seen.append(what))
    assert seen[-1] == ("answers", 2, 2)  # the prompt, of two models
    assert report["portability"]["edited"]["generation"]["mean"] is None


def test_frames_are_averaged_and_reported_each(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    both = evaluate(lm, RandomEditor(lm), REQUESTS, frames=("bare", "chat"))
    for state in ("metrics", "base"):
        for block, metrics in both[state].items():
            for name, metric in metrics.items():
                each = [both["by_frame"][frame][state][block][name]["mean"] for frame in ("bare", "chat")]
                assert metric["mean"] == pytest.approx(sum(each) / 2)
    alone = evaluate(lm, RandomEditor(lm), REQUESTS, frames=("chat",))
    assert alone["metrics"] == both["by_frame"]["chat"]["metrics"]


def test_an_edit_that_does_nothing_changes_nothing(smollm: LanguageModel) -> None:
    report = evaluate(smollm, RandomEditor(smollm, scale=0.0), REQUESTS[:1])
    assert report["metrics"] == report["base"]
    for block in ("generation", "teacher_forced"):
        assert report["metrics"][block]["locality"]["mean"] == 1.0
    for direction in ("base_edited", "edited_base"):
        assert report["kl_nats"][direction]["mean"] == 0.0
    assert report["locality_detail"]["edited"]["shared_prefix"]["mean"] == 1.0
    assert report["base"]["teacher_forced"]["locality_accuracy"]["mean"] > 0.0


def test_what_forced_passes_foretell_is_what_would_be_said(
    smollm32: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    request = EditRequest(
        "The capital of Borduria is", "Szohod", "Borduria", rephrase_prompts=("Borduria is governed from the city of",)
    )
    edits = [IBKEEditor.for_model(smollm32).edit([request])]
    asked = list(questions(request, 0, ("bare", "chat"), smollm32.tokenizer))
    known = Baseline(smollm32, tmp_path)
    prompts: list[Sequence[Sequence[int]]] = []

    def noted(lm: LanguageModel, some: Sequence[Sequence[int]], *rest: Any, **more: Any) -> list[Answer]:
        prompts.append(some)
        return generate(lm, some, *rest, **more)

    monkeypatch.setattr(questions_module, "generate", noted)
    short = list(questions_module.ask(smollm32, asked, edits, 32, None, known))
    assert sum(map(len, prompts)) == len(asked)  # of the unedited model alone, which is known from now on
    prompts.clear()
    monkeypatch.setattr(questions_module, "_foretold", lambda *_: None)
    assert list(questions_module.ask(smollm32, asked, edits, 32, None, known)) == short
    assert sum(map(len, prompts)) == len(asked)
    assert all(edited["generation", q.kind] for q, _, edited in short)


def test_a_destructive_edit_shows(smollm: LanguageModel) -> None:
    report = evaluate(smollm, RandomEditor(smollm, scale=3.0), REQUESTS[:1])
    assert report["metrics"]["generation"]["locality"]["mean"] < 0.5
    assert report["metrics"]["generation"]["reliability"]["mean"] == 0.0
    assert report["kl_nats"]["base_edited"]["mean"] > 1.0
    assert report["base"]["generation"]["locality"]["mean"] == 1.0


def test_what_was_not_measured_is_null(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    report = evaluate(lm, RandomEditor(lm), [EditRequest("The sky is", "green")])
    nothing = {"mean": None, "low": None, "high": None}
    assert report["metrics"]["generation"]["locality"] == report["metrics"]["generation"]["generality"] == nothing


def test_the_edit_may_be_worded_as_a_question(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    editor = RandomEditor(lm)
    evaluate(lm, editor, REQUESTS[:1], edit_frame="question")
    assert editor.seen[0].prompt == "Question: The capital of France is\nAnswer:"


def test_wrong_settings_are_refused(tiny_model: Callable[..., LanguageModel]) -> None:
    lm = tiny_model("llama")
    editor = RandomEditor(lm)
    for settings, message in (
        ({"requests": []}, "no request"),
        ({"frames": ("poem",)}, "unknown frame 'poem'"),
        ({"frames": ()}, "unknown frame"),
        ({"edit_frame": "chat"}, "Choose bare or question"),
    ):
        with pytest.raises(RequestError, match=message):
            evaluate(lm, editor, **{"requests": REQUESTS, **settings})
    assert not editor.seen


def test_samples_keep_order_and_repeat() -> None:
    requests = [EditRequest(f"Number {i} is", str(i)) for i in range(50)]
    some = sample(requests, 10, seed=3)
    assert some == sample(requests, 10, seed=3)
    assert some != sample(requests, 10, seed=4)
    numbers = [int(request.target_new) for request in some]
    assert numbers == sorted(set(numbers)) and len(numbers) == 10 and numbers != list(range(10))
    assert sample(requests, None, 0) == sample(requests, 50, 0) == requests
