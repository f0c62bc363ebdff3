"""lm-evaluation-harness on local tasks agrees with the likelihoods taken here."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import make_tiny
from random_editor import random_edit

from ibke.data.abilities import Choice
from ibke.errors import RequestError
from ibke.evaluation.harness import Harness
from ibke.evaluation.side_effects import Battery, Beside
from ibke.models import LanguageModel
from ibke.parts import told_ends

QUESTIONS = (
    Choice("Boats leave before", ("sunrise", "the end"), 0),
    Choice("The harbour lies between two", ("hills", "seas", "towns"), 2),
    Choice("The market is busy at", ("night", "noon"), 1),
    Choice("A loaf of", ("bread", "stone"), 0),
    Choice("Snow is", ("green", "white", "loud"), 1),
)


@pytest.fixture
def lm() -> LanguageModel:
    return make_tiny("llama")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one task of lm-eval, its questions beside it."""
    asked = tmp_path / "asked.jsonl"
    rows = [{"prompt": q.prompt, "choices": list(q.choices), "right": q.right} for q in QUESTIONS]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "harbour",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(asked)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/harbour.yaml").write_text(yaml.safe_dump(task))
    return tmp_path / "tasks"


def test_a_local_task_is_what_the_likelihoods_say_edited_or_not(lm: LanguageModel, folder: Path) -> None:
    battery = Battery(lm, suites={"harbour": QUESTIONS}, harness=Harness(lm, folder, 10))
    edits = [random_edit(lm, 4, seed=seed, scale=3.0) for seed in range(3)]
    for edit in edits:
        battery.note([edit])
    assert battery.base.tasks == {"harbour/acc": sum(battery.base.abilities["harbour"]) / len(QUESTIONS)}
    for row in battery.found:
        assert row["tasks"]["harbour/acc"] == pytest.approx(row["abilities"]["harbour"])
    assert {row["tasks"]["harbour/acc"] for row in battery.found} != {battery.base.tasks["harbour/acc"]}
    found = battery.report()["tasks"]["harbour/acc"]
    assert found["base"] == battery.base.tasks["harbour/acc"]
    assert found["edited"]["mean"] == pytest.approx(sum(row["tasks"]["harbour/acc"] for row in battery.found) / 3)


def test_edits_are_told_where_its_questions_end(lm: LanguageModel, folder: Path) -> None:
    told: list[list[int]] = []

    def note(*_: object) -> None:
        ends = told_ends()
        told.append([] if ends is None else ends.tolist())

    hook = lm.model.base_model.register_forward_pre_hook(note)
    Harness(lm, folder, 10).scores()
    hook.remove()
    ends = [len(lm.tokenizer(one.prompt)["input_ids"]) - 1 for one in QUESTIONS for _ in one.choices]
    assert sorted(end for some in told for end in some) == sorted(ends)


def test_no_more_questions_than_wanted(lm: LanguageModel, folder: Path) -> None:
    assert Harness(lm, folder, 1).scores()["harbour/acc"] in (0.0, 1.0)


def test_what_cannot_be_run_is_named(lm: LanguageModel, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="no task in it"):
        Harness(lm, tmp_path / "empty", 5)
    (tmp_path / "asked.jsonl").unlink()
    with pytest.raises(RequestError, match="lm-eval cannot run it"):
        Battery.of(lm, Beside(harness=str(folder)))
