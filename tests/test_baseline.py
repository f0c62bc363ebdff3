"""The unedited model's answers are remembered for the very same questions, and for no others."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_tiny
from random_editor import REQUESTS, RandomEditor
from test_side_effects import SUITE, TEXT

from ibke.evaluation import questions
from ibke.evaluation.baseline import Baseline
from ibke.evaluation.protocols import evaluate
from ibke.evaluation.side_effects import Battery
from ibke.models import LanguageModel

MEASURED = {"metrics", "base", "kl_nats", "by_frame", "by_age", "scores", "contains", "nll_nats"}


@pytest.fixture
def lm() -> LanguageModel:
    return make_tiny("llama")


def measured(lm: LanguageModel, baseline: Baseline | None) -> dict:
    battery = Battery(lm, TEXT, tokens=300, suites={"suite": SUITE}, baseline=baseline)
    told: list[int] = []
    report = evaluate(
        lm,
        RandomEditor(lm),
        REQUESTS,
        frames=("bare", "chat"),
        battery=battery,
        baseline=baseline,
        progress=lambda what, done, total: told.append(total - done) if what == "answers" else None,
    )
    assert told[-1] == 0
    effects = {name: value for name, value in report["side_effects"].items() if name != "seconds"}
    return {name: report[name] for name in MEASURED if name in report} | {"side_effects": effects}


def test_known_answers_are_not_asked_for_again_and_change_nothing(lm, tmp_path: Path, monkeypatch) -> None:
    unaided = measured(lm, None)
    assert measured(lm, Baseline(lm, tmp_path)) == unaided
    asked: list[bool] = []
    generate = questions.generate
    monkeypatch.setattr(
        questions,
        "generate",
        lambda lm, prompts, *edits, **how: asked.append(bool(edits)) or generate(lm, prompts, *edits, **how),
    )
    assert measured(lm, Baseline(lm, tmp_path)) == unaided
    assert asked
    assert all(asked)


def test_what_is_kept_is_of_one_model_and_one_question(lm, tmp_path: Path) -> None:
    baseline = Baseline(lm, tmp_path)
    baseline.keep(["who?"], ["me"])
    assert baseline.recall(["who?"]) == ["me"]
    assert baseline.recall(["where?"]) is None
    assert Baseline(replace(lm, fingerprint="another"), tmp_path).recall(["who?"]) is None
    assert Baseline(lm).recall(["who?"]) is None


def test_a_cache_that_cannot_be_written_keeps_nothing(lm, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    baseline = Baseline(lm, file / "answers")
    baseline.keep(["who?"], ["me"])
    assert baseline.recall(["who?"]) is None


def test_a_damaged_file_is_answered_again(lm, tmp_path: Path) -> None:
    unaided = measured(lm, Baseline(lm, tmp_path))
    for kept in tmp_path.iterdir():
        kept.write_bytes(kept.read_bytes()[:-5])
    assert measured(lm, Baseline(lm, tmp_path)) == unaided
