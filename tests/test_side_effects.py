"""Perplexity, abilities and drift of weights, each against a plain computation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny
from random_editor import REQUESTS, RandomEditor, random_edit

from ibke.data.abilities import OWN, Choice, read_abilities
from ibke.edit import Edit, EditInfo
from ibke.editors.grace import GRACE, GRACESettings
from ibke.editors.ike import IKE
from ibke.errors import FormatError, RequestError
from ibke.evaluation.generate import Together
from ibke.evaluation.protocols import Protocol, evaluate
from ibke.evaluation.running_text import WINDOW
from ibke.evaluation.scoring import MOST, divergence, score
from ibke.evaluation.side_effects import LEADING, Battery, Beside, update_size
from ibke.frames import encode_pair
from ibke.models import LanguageModel
from ibke.modules import resolve, target_modules, weight_OI
from ibke.neurons import Neurons
from ibke.session import EditSession

TEXT = "The harbour lies between two hills. Boats leave before sunrise, and the market is busy at noon. " * 12
SUITE = (
    Choice("Boats leave before", ("sunrise", "the end of the next long winter"), 0),
    Choice("The harbour lies between two", ("hills", "seas", "towns"), 2),
)


@pytest.fixture
def lm() -> LanguageModel:
    return make_tiny("llama")


@torch.no_grad()
def plain_nll(lm: LanguageModel, ids: list[int], first: int) -> list[float]:
    """NLL of every token from ``first`` on."""
    logits = lm.model(torch.tensor([ids])).logits[0].float()
    return F.cross_entropy(logits[first - 1 : -1], torch.tensor(ids[first:]), reduction="none").tolist()


def plain_choice(lm: LanguageModel, choice: Choice) -> int:
    prompt = lm.tokenizer(choice.prompt)["input_ids"]
    sums = []
    for text in choice.choices:
        answer = lm.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        sums.append(sum(plain_nll(lm, prompt + answer, len(prompt))))
    return sums.index(min(sums))


@pytest.mark.parametrize("edited", [False, True])
def test_text_and_abilities_are_those_of_a_plain_computation(lm: LanguageModel, edited: bool) -> None:
    battery = Battery(lm, TEXT, tokens=600, suites={"suite": SUITE}, batch_size=2)
    edits = [random_edit(lm, 2, seed=3)] if edited else []
    found = battery.condition(edits)
    ids = lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:600]
    with EditSession(lm) as session:
        for edit in edits:
            session.attach(edit)
        nll = [value for at in range(0, len(ids), WINDOW) for value in plain_nll(lm, ids[at : at + WINDOW], 1)]
        right = tuple(plain_choice(lm, choice) == choice.right for choice in SUITE)
    assert found.nll == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert found.abilities == {"suite": right}
    if edited:
        assert found.nll != pytest.approx(battery.base.nll, rel=1e-4)


def spaces_apart(before: torch.Tensor, after: torch.Tensor) -> float:
    mine, other = (torch.linalg.svd(weight.double()).U[:, :LEADING] for weight in (before, after))
    return 1 - float((mine.T @ other).square().sum()) / LEADING


def test_the_size_of_an_update_is_that_of_the_dense_one(lm: LanguageModel) -> None:
    edits = [random_edit(lm, 2, seed=1, scale=0.3), random_edit(lm, 1, seed=2, scale=0.3)]
    found = update_size(lm, edits)
    ratios, drifts = [], []
    for name, module in resolve(lm.model, list(edits[0].factors)).items():
        weight, delta = weight_OI(module).detach(), edits[0].delta(name) + edits[1].delta(name)
        ratios.append(float(delta.norm() / weight.norm()))
        drifts.append(spaces_apart(weight, weight + delta))
    assert found["relative_norm"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert found["drift"] == pytest.approx(sum(drifts) / len(drifts), rel=1e-4)
    assert found["drift"] > 0.01


def test_neurons_count_as_columns_of_a_wider_projection(lm: LanguageModel) -> None:
    name = target_modules(lm, lm.architecture, [1])[0]
    weight = weight_OI(resolve(lm.model, [name])[name]).detach()
    out = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)) * weight.norm() / 8
    edit = Edit({}, (), EditInfo("random", lm.fingerprint), {name: Neurons(out, out, out)})
    found = update_size(lm, [edit])
    assert found["relative_norm"] == pytest.approx(float(out.norm() / weight.norm()), rel=1e-5)
    assert found["drift"] == pytest.approx(spaces_apart(weight, torch.cat([weight, out.T], 1)), rel=1e-4)


def test_a_model_that_is_broken_is_no_model_without_side_effects(lm: LanguageModel) -> None:
    made = random_edit(lm, 1, seed=0)
    broken = Edit({name: (a * 1e25, b * 1e25) for name, (a, b) in made.factors.items()}, (), made.info)
    assert update_size(lm, [broken])["drift"] == 1.0
    pair, force = encode_pair("The harbour", "lies", "bare", lm.tokenizer), Together((broken,))
    (read,), (moved,) = score(lm, [pair], force), divergence(lm, [pair], force)
    assert max(read.nll) == moved.forward == MOST


def test_questions_have_intervals_over_questions_paired_with_the_unedited_models_answers(lm: LanguageModel) -> None:
    battery = Battery(lm, suites={"suite": SUITE})
    for seed in range(2):
        battery.note([random_edit(lm, 1, seed=seed, scale=1.0)])
    found = battery.report()["abilities"]["suite"]
    assert found["change"]["mean"] == pytest.approx(found["edited"]["mean"] - found["base"])
    assert found["edited"]["mean"] == pytest.approx(fmean(row["abilities"]["suite"] for row in battery.found))
    assert 0.0 <= found["kept"]["low"] <= found["kept"]["mean"] <= found["kept"]["high"] <= 1.0
    silent = Battery(lm, suites={"suite": SUITE}).report()["abilities"]["suite"]
    assert silent["edited"]["mean"] is None and silent["change"]["mean"] is None


def test_the_unedited_model_is_asked_without_what_is_attached(lm: LanguageModel) -> None:
    battery = Battery(lm, TEXT, tokens=60, suites={"suite": SUITE})
    with EditSession(lm).attach(random_edit(lm, 1, seed=0, scale=1.0)):
        assert battery.base.nll != battery.condition(()).nll
    assert battery.base.nll == battery.condition(()).nll


def test_an_edit_that_changes_nothing_has_no_side_effect(lm: LanguageModel) -> None:
    battery = Battery(lm, TEXT, suites={"suite": SUITE})
    battery.note([random_edit(lm, 1, seed=0, scale=0.0)])
    report = battery.report()
    assert report["perplexity"]["ratio"]["mean"] == 1.0
    assert report["perplexity"]["base"] == pytest.approx(math.exp(battery.base.nll or 0.0))
    assert report["abilities"]["suite"]["edited"]["mean"] == report["abilities"]["suite"]["base"]
    assert report["relative_norm"]["mean"] == 0.0
    assert report["drift"]["mean"] == pytest.approx(0.0, abs=1e-9)


def test_an_edit_without_weights_has_effects_and_no_size(lm: LanguageModel) -> None:
    battery = Battery(lm, TEXT, tokens=60, suites={"suite": SUITE})
    told, book = IKE(lm).edit(REQUESTS[:1]), GRACE(lm, GRACESettings(epochs=2)).edit(REQUESTS[:1])
    assert update_size(lm, [told, book]) == {"relative_norm": 0.0, "drift": 0.0}
    battery.note([told])
    battery.note([book])
    found = battery.report()
    assert found["n"] == found["asked"] == 2
    assert found["perplexity"]["each"][0] != 1.0 and found["perplexity"]["each"][1] == pytest.approx(1.0)
    assert found["relative_norm"]["mean"] == found["drift"]["mean"] == 0.0
    json.dumps(found, allow_nan=False)


def test_a_text_in_front_that_leaves_no_room_is_counted(lm: LanguageModel) -> None:
    battery = Battery(lm, TEXT, tokens=60, suites={"suite": SUITE})
    # 75 tokens and more stand in front of 60 others; the window is 128.
    told = IKE(lm).edit([replace(REQUESTS[0], prompt="word " * 15, subject=None)])
    battery.note([told])
    battery.note([random_edit(lm, 1, seed=0, scale=0.0)])
    found = battery.report()
    assert (found["n"], found["asked"]) == (2, 1)
    assert found["perplexity"]["each"] == [1.0] and found["abilities"]["suite"]["kept"]["mean"] == 1.0
    assert found["relative_norm"]["mean"] == 0.0


@pytest.mark.parametrize(("protocol", "looks"), [("single", 2), ("batch:2", 2), ("sequential:2", 1)])
def test_reports_hold_the_side_effects_of_the_models_looked_at(lm: LanguageModel, protocol: str, looks: int) -> None:
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    battery = Battery(lm, TEXT, tokens=100, suites={"suite": SUITE}, edits=2)
    report = evaluate(lm, RandomEditor(lm), REQUESTS, Protocol.parse(protocol), battery=battery)
    found = report["side_effects"]
    assert (found["n"], found["text_tokens"], found["abilities"]["suite"]["n"]) == (looks, 99, 2)
    assert found["perplexity"]["ratio"]["mean"] != 1.0
    assert found["relative_norm"]["mean"] > 0.1
    assert found["seconds"] > 0
    json.dumps(report)
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert "side_effects" not in evaluate(lm, RandomEditor(lm), REQUESTS[:1])


def test_a_change_of_choice_and_a_broken_model_show(lm: LanguageModel) -> None:
    battery = Battery(lm, TEXT, tokens=100, suites={"suite": SUITE})
    battery.note([])
    calm = battery.condition([])
    turned = replace(calm, nll=math.nan, chosen={"suite": (calm.chosen["suite"][0], -1)})
    battery.condition = lambda _: turned  # type: ignore[method-assign]
    battery.note([])
    found = battery.report()
    assert found["abilities"]["suite"]["kept"]["mean"] == pytest.approx((1.0 + 0.5) / 2)
    assert found["perplexity"]["each"] == [1.0, pytest.approx(math.exp(MOST))]
    json.dumps(found, allow_nan=False)


def test_nothing_to_measure_is_an_error(lm: LanguageModel) -> None:
    with pytest.raises(RequestError, match="neither text nor a question"):
        Battery(lm)
    with pytest.raises(RequestError, match="less than two tokens"):
        Battery(lm, "")


BOOLQ = '{"question": "is it so", "title": "T", "answer": true, "passage": "It is so."}\n'
PAIRS = (
    "index\tsentence1\tsentence2\tlabel\n"
    '0\tHe said "no.\tHe spoke.\tentailment\n1\tIt rains.\tIt is dry.\tnot_entailment\n'
)
TRUTHFUL = (
    "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    'A,B,"Which, if any?",None,None; No,One; Two,http\nA,B,What?,This,This,,http\n'
)


def test_our_own_questions_are_there_and_even() -> None:
    found = read_abilities(OWN)
    assert len(found) >= 60 and len({item.prompt for item in found}) == len(found)
    for choices in (("no", "yes"), ("True", "False")):  # whoever always says the same is right half the time
        rights = [item.right for item in found if item.choices == choices]
        assert len(rights) >= 20 and sum(rights) == len(rights) / 2
    assert sum(item.prompt.startswith("Q: ") for item in found) >= 20
    assert Beside(abilities=("own",), questions=5).read()[1]["own"] == read_abilities(OWN, 5)


def test_published_suites_are_read(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("b.jsonl", "p.tsv", "t.csv")}
    for path, text in zip(paths.values(), (BOOLQ, PAIRS, TRUTHFUL), strict=True):
        path.write_text(f"\ufeff{text}")  # as some programs begin UTF-8
    boolq, pairs, truthful = (read_abilities(path) for path in paths.values())
    assert boolq == [Choice("It is so.\nQuestion: is it so?\nAnswer:", ("no", "yes"), 1)]
    assert [(item.choices[item.right], item.prompt[:9]) for item in pairs] == [
        ("True", 'He said "'),
        ("False", "It rains."),
    ]
    # A question without a wrong answer decides nothing.
    assert truthful == [Choice("Q: Which, if any?\nA:", ("None", "One", "Two"), 0)]
    drawn = read_abilities(paths["p.tsv"], limit=1, seed=1)
    assert drawn == read_abilities(paths["p.tsv"], limit=1, seed=1)
    assert len(drawn) == 1


def test_two_suites_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "suite.jsonl", tmp_path / "suite.tsv"]
    for path, text in zip(paths, (BOOLQ, PAIRS), strict=True):
        path.write_text(text)
    names = tuple(map(str, paths))
    with pytest.raises(RequestError, match=r"suite\.tsv: it goes by the same name as .*suite\.jsonl"):
        Beside(abilities=names).read()
    assert list(Beside(abilities=(names[0], names[0])).read()[1]) == ["suite"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOOLQ + '{"passage": "x"}\n', "line 2"),
        (BOOLQ + "{\n", "line 2"),
        (BOOLQ + "[" * 5000, "line 2"),
        ("[" * 5000, "not valid JSON"),
        (BOOLQ + '{"passage": "x", "question": "y", "answer": "no"}\n', "line 2.*'no', neither true nor false"),
        (BOOLQ + '{"passage": "x", "question": "y", "answer": 0}\n', "line 2.*0, neither true nor false"),
        (BOOLQ + '{"passage": "", "question": "y", "answer": true}\n', "line 2.*a text is empty"),
        (BOOLQ + '{"passage": ["x"], "question": "y", "answer": true}\n', "line 2.*is no text"),
        (PAIRS + "2\tx\ty\tmaybe\n", "line 4"),
        (PAIRS + "2\tx\t\tentailment\n", "line 4.*a text is empty"),
        ("a,b\n1,2\n", "none of those known"),
        ("", "none of those known"),
        ("[{", "not valid JSON"),
        ('["x"]', "record 1"),
        ('[{"prompt": "x", "choices": ["a"], "right": 0}]', "1 choices"),
        ('[{"prompt": 1, "choices": ["a", "b"], "right": 0}]', "no text"),
        ('[{"prompt": " ", "choices": ["a", "b"], "right": 0}]', "record 1.*a text is empty"),
        ('[{"prompt": "\\ud83d", "choices": ["a", "b"], "right": 0}]', "record 1.*surrogates"),
        ('[{"prompt": "x", "choices": ["a", ""], "right": 0}]', "record 1.*a text is empty"),
        ('[{"prompt": "x", "choices": "ab", "right": 0}]', "record 1.*no list"),
        ('[{"prompt": "x", "choices": ["a", "b"], "right": true}]', "record 1.*no index but True"),
        ('[{"prompt": "x", "choices": ["a", "b"], "right": 0.0}]', "record 1.*no index but 0.0"),
        ("[]", "no question"),
    ],
)
def test_a_faulty_suite_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "suite"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        read_abilities(path)
    with pytest.raises(FormatError, match="cannot be read"):
        read_abilities(tmp_path / "missing")
