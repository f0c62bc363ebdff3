"""What a summary says of cells that do not hold the same: edits not made, other edits, editors and machines."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from random_editor import RandomEditor
from tests.test_bench import MANY, Bench, make_plan

from ibke.bench.cell import Progress, data_digest
from ibke.bench.compare import by_edit
from ibke.bench.page import page
from ibke.bench.plan import Cell, DataSet, Plan
from ibke.bench.run import finished, run
from ibke.bench.summary import csv_text, markdown, summarise
from ibke.edit import Edit
from ibke.errors import CaptureError
from ibke.evaluation.protocols import evaluate
from ibke.models import LanguageModel
from ibke.request import EditRequest


@pytest.fixture(scope="module")
def lm(tiny_model: Callable[..., LanguageModel]) -> LanguageModel:
    return tiny_model("llama")


def test_a_summary_says_which_edits_were_not_made(lm: LanguageModel, tmp_path: Path) -> None:
    class Faltering(RandomEditor):
        def edit(self, requests: Sequence[EditRequest]) -> Edit:
            if self.scale > 1 and requests[0].prompt == MANY[2].prompt:
                raise CaptureError("the loss is not finite.")
            return super().edit(requests)

    def execute(cell: Cell, progress: Progress) -> dict[str, Any]:
        editor = Faltering(lm, **cell.contender.settings)
        return evaluate(lm, editor, MANY[1:4], cell.stage.protocol, config={"seed": cell.seed})

    plan = make_plan()
    summary = summarise(plan, run(plan, tmp_path, execute=execute))
    assert [row["not_made"] for row in summary["rows"]] == [0, 2, 0, 0]  # of two seeds; no group begins with it
    said = "loud could not make 2 of its 6 edits, which count as nothing done; the first: the loss is not finite."
    assert said in markdown(summary) and said in page(summary) and "calm could not" not in markdown(summary)
    lines = [r for r in csv.DictReader(io.StringIO(csv_text(summary))) if r["metric"] == "not_made"]
    assert [line["mean"] for line in lines] == ["0", "2", "0", "0"]


def test_a_summary_says_what_lies_in_the_requests(lm: LanguageModel, tmp_path: Path) -> None:
    # Three that say different things of one prompt, one of them what no answer can be.
    requests = [replace(MANY[0], target_new=target) for target in ("Here", "There", "No. " * 20)] + MANY[1:3]

    def execute(cell: Cell, progress: Progress) -> dict[str, Any]:
        editor = RandomEditor(lm, **cell.contender.settings)
        return evaluate(lm, editor, requests, cell.stage.protocol, config={"seed": cell.seed})

    plan = make_plan()
    documents = run(plan, tmp_path, execute=execute)
    summary = summarise(plan, documents)
    counts = [[row[name] for name in ("unreachable", "groups", "group", "fewest_groups")] for row in summary["rows"]]
    assert counts == [[2, 10, 1, 10]] * 2 + [[2, 8, 2, 6]] * 2  # of two seeds
    apart = "10 edits were made in 8 groups of at most 2: requests that contradict each other are never in one."
    beyond = "2 of 10 targets are longer than an answer may be, or of several lines: no answer can be one."
    for text in (markdown(summary), page(summary)):
        assert (text.count(apart), text.count(beyond)) == (1, 2)  # once for all methods, under each protocol
    lines = list(csv.DictReader(io.StringIO(csv_text(summary))))
    assert [r["mean"] for r in lines if r["metric"] == "groups"] == ["10", "10", "8", "8"]
    # Cells of before these were counted say nothing of them.
    old = [{k: v for k, v in document.items() if k not in ("groups", "unreachable")} for document in documents]
    said = markdown(summarise(plan, old))
    assert "groups of at most" not in said and "targets are longer" not in said


def test_a_summary_says_which_cells_are_by_another_editor(lm: LanguageModel, tmp_path: Path) -> None:
    plan = make_plan()
    known = run(plan, tmp_path, execute=Bench(lm))
    mark = known[1]["config"]["editor_mark"][:8]
    assert summarise(plan, known)["unlike"] == []

    def said(marks: dict[str, str | None], plan: Plan = plan, **more: Any) -> dict[str, list[str]]:
        """What is said, by protocol, where cells have other marks."""
        documents = [
            document | {"config": document["config"] | {"editor_mark": marks[cell.title]}} | more
            if cell.title in marks
            else document
            for cell, document in zip(plan.cells, known, strict=True)
        ]
        summary = summarise(plan, documents)
        assert all(line in markdown(summary) for one in summary["unlike"] for line in one["what"])
        return {one["protocol"]: one["what"] for one in summary["unlike"]}

    single = [f"loud, towns, single, seed {seed}" for seed in plan.seeds]
    sequential = [f"loud, towns, sequential:2, seed {seed}" for seed in plan.seeds]
    head = "Not all by one editor under its name: loud"
    assert said({single[1]: "0" * 12}) == {
        "single": [f"{head} ({mark}, 00000000 here)."],
        "sequential:2": [f"{head} ({mark} here, 00000000 elsewhere)."],
    }
    # Cells of before marks were kept, beside others of the same settings.
    assert said(dict.fromkeys(single)) == {
        "single": [f"{head} (unknown here, {mark} elsewhere)."],
        "sequential:2": [f"{head} ({mark} here, unknown elsewhere)."],
    }
    # Where nobody knows of any cell, it matters if there is something to train.
    assert said(dict.fromkeys(single + sequential)) == {}
    unknown = ["By a trained editor that is not known: loud."]
    trained = said(dict.fromkeys(single + sequential), training_seconds=1.0)
    assert trained == {"single": unknown, "sequential:2": unknown}
    # Under other settings another mark is what one expects.
    calm, loud = plan.contenders
    other = replace(plan, contenders=[calm, replace(loud, under={"sequential:2": {"scale": 3.0}})])
    assert said(dict.fromkeys(sequential, "0" * 12), other) == {}


def test_a_summary_says_what_is_not_alike(lm: LanguageModel, tmp_path: Path) -> None:
    plan = make_plan(seeds=(0,))
    documents = run(plan, tmp_path, execute=Bench(lm))
    alike = summarise(plan, documents)
    assert alike["unlike"] == [] and "Not " not in markdown(alike).replace("Nothing", "")
    loud = documents[1]  # of single edits
    scores = {"edits": [*loud["scores"]["edits"][:3], "another"]}
    for changed, wanted in (
        (
            {"scores": loud["scores"] | scores},
            "Not of the same edits: loud of 4, calm of 4; differences are over those that both have, 3",
        ),
        (
            {"config": loud["config"] | {"data_sha256": "f" * 64}},
            "Not all made of the same data file: calm (unknown); loud",
        ),
        ({"config": loud["config"] | {"fingerprint": "0" * 32}}, "Not all made by the same model: calm"),
        ({"machine": loud["machine"] | {"cpu": "Another CPU"}}, "Not all made on the same machine"),
    ):
        summary = summarise(plan, [documents[0], {**loud, **changed}, *documents[2:]])
        (one,) = summary["unlike"]
        assert (one["data"], one["protocol"], len(one["what"])) == ("towns", "single", 1)
        assert one["what"][0].startswith(wanted) and one["what"][0] in markdown(summary)
        assert escape(one["what"][0]) in page(summary)
        common = 3 if "scores" in changed else 4
        assert summary["rows"][1]["minus"]["score"]["n"] == common and f"n {common} |" in markdown(summary)
        lines = list(csv.DictReader(io.StringIO(csv_text(summary))))
        assert next(r["minus_n"] for r in lines if (r["method"], r["metric"]) == ("loud", "score")) == str(common)
    # Differences are those of the common edits, and of no others.
    means = [
        by_edit([document], "generation", "locality")
        for document in (documents[0], {**loud, "scores": loud["scores"] | scores})
    ]
    gap = fmean(means[1][edit] - means[0][edit] for edit in scores["edits"][:3])
    changed = {"scores": loud["scores"] | scores}
    found = summarise(plan, [documents[0], {**loud, **changed}, *documents[2:]])["rows"][1]["minus"]["locality"]
    assert found["n"] == 3 and found["mean"] == pytest.approx(gap)


def test_locality_over_an_answers_length_stands_beside_the_strict_one(lm: LanguageModel) -> None:
    plan = make_plan()
    document = evaluate(lm, RandomEditor(lm), MANY[:1], config={"seed": 0}) | {"cell_seconds": 1.0}
    # Loud's single edits by seed; before it was counted a report had none.
    known = {1: {"at_answer_length": {"mean": 0.75}}, 5: {"at_answer_length": {"mean": 0.5}}}
    details = [document["locality_detail"] | {"edited": known.get(number, {})} for number in range(len(plan.cells))]
    summary = summarise(plan, [document | {"locality_detail": detail} for detail in details])
    assert [row["at_answer_length"] for row in summary["rows"]] == [None, 0.625, None, None]
    lines = [r for r in csv.DictReader(io.StringIO(csv_text(summary))) if r["metric"] == "at_answer_length"]
    assert [r["mean"] for r in lines] == ["", "0.625", "", ""] and lines[0]["block"] == "locality_detail"
    written = [line.split(" | ") for line in markdown(summary).splitlines()]
    head = next(number for number, line in enumerate(written) if "locality at answer length" in line)
    assert written[head][5:7] == ["locality", "locality at answer length"]
    assert [line[6] for line in written[head + 2 : head + 4]] == ["–", "0.625"]
    assert "<th>locality at answer length</th>" in page(summary) and "<td>0.625</td>" in page(summary)


def test_a_cell_of_a_data_file_that_has_changed_is_run_again(lm: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "towns.jsonl"
    file.write_text("one")
    plan = replace(make_plan(seeds=(0,)), data=[DataSet("towns", str(file), "jsonl")])
    bench = Bench(lm)

    def execute(cell: Cell, progress: Any) -> dict[str, Any]:
        report = bench(cell, progress)
        report["config"]["data_sha256"] = data_digest(file)
        return report

    run(plan, tmp_path, execute=execute)
    run(plan, tmp_path, execute=execute)
    assert len(bench.ran) == 4
    file.write_text("two")
    assert finished(plan, tmp_path) == [{}] * 4  # nor is it summed up
    run(plan, tmp_path, execute=execute)
    assert len(bench.ran) == 8 and all(finished(plan, tmp_path))
    file.unlink()  # what cannot be compared is not thrown away
    run(plan, tmp_path, execute=execute)
    assert len(bench.ran) == 8
