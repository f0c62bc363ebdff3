"""The bench: cells that are run once, comparisons that a plain computation confirms, and a page that stands alone."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from random_editor import REQUESTS, RandomEditor

from ibke.bench.cell import Progress
from ibke.bench.compare import METRICS, bootstrap, by_edit, paired
from ibke.bench.effects import EFFECTS, effect
from ibke.bench.page import page
from ibke.bench.plan import Cell, Conditions, Contender, DataSet, Plan, Stage
from ibke.bench.report import write
from ibke.bench.run import CELLS, load, run, seconds_left
from ibke.bench.summary import COSTS, COUNTS, csv_text, markdown, summarise
from ibke.data.readers import Skipped, account
from ibke.errors import IBKEError, RequestError
from ibke.evaluation.protocols import evaluate, sample
from ibke.evaluation.side_effects import Battery, Beside
from ibke.files import to_json
from ibke.models import LanguageModel
from ibke.request import EditRequest

MANY = [
    EditRequest(f"The capital of land {i} is", f"Town {i}", None, None, (f"Land {i} is ruled from",), (probe,))
    for i, probe in enumerate(REQUESTS[0].locality[:1] * 6)
]


def make_plan(seeds: tuple[int, ...] = (0, 1), limit: int | None = 4) -> Plan:
    stages = [Stage.parse(text, limit) for text in ("single", "sequential:2/6")]
    contenders = [Contender("calm", "random", {"scale": 0.1}), Contender("loud", "random", {"scale": 2.0})]
    return Plan(contenders, [DataSet("towns", "towns.jsonl", "jsonl")], stages, seeds, Conditions("tiny"))


class Bench:
    """Evaluates cells here and now, on one tiny model, and counts them."""

    def __init__(self, lm: LanguageModel):
        self.lm, self.ran, self.fail = lm, list[str](), ""

    def __call__(self, cell: Cell, progress: Progress) -> dict[str, Any]:
        if cell.contender.label == self.fail:
            raise ValueError("it broke")
        self.ran.append(cell.title)
        requests = sample(MANY, cell.stage.limit, cell.seed, "random")
        editor = RandomEditor(self.lm, **cell.contender.settings)
        return evaluate(self.lm, editor, requests, cell.stage.protocol, config={"seed": cell.seed}, progress=progress)


@pytest.fixture(scope="module")
def lm(tiny_model: Callable[..., LanguageModel]) -> LanguageModel:
    return tiny_model("llama")


# --- plans


def test_what_is_set_under_a_protocol_holds_there_alone() -> None:
    plan = make_plan()
    plain = plan.cells
    wider = replace(plan.contenders[0], under={"sequential:2": {"scale": 0.5, "more": 1}})
    cells = replace(plan, contenders=[wider, plan.contenders[1]]).cells
    settings = {(cell.contender.label, str(cell.stage.protocol)): dict(cell.contender.settings) for cell in cells}
    assert settings["calm", "single"] == {"scale": 0.1} and settings["loud", "sequential:2"] == {"scale": 2.0}
    assert settings["calm", "sequential:2"] == {"scale": 0.5, "more": 1}
    # Cells that it does not touch are found again where they were.
    changed = [one.title for one, other in zip(cells, plain, strict=True) if one.file != other.file]
    assert changed == [cell.title for cell in plain if cell.title.startswith("calm, towns, sequential:2")]


def test_a_plan_compares_all_methods_on_the_same_edits_first() -> None:
    plan = make_plan()
    assert [cell.title for cell in plan.cells[:3]] == [
        "calm, towns, single, seed 0",
        "loud, towns, single, seed 0",
        "calm, towns, sequential:2, seed 0",
    ]
    assert [cell.stage.limit for cell in plan.cells[:4]] == [4, 4, 6, 6]
    assert len({cell.file for cell in plan.cells}) == len(plan.cells) == 8
    # A cell under other settings is another cell.
    assert not {cell.file for cell in plan.cells} & {
        cell.file for cell in make_plan(limit=3).cells if cell.stage.limit == 3
    }
    assert all(json.loads(json.dumps(cell.spec)) == cell.spec for cell in plan.cells)


def test_what_is_no_plan_is_refused() -> None:
    plan = make_plan()
    parts: dict[str, Any] = {"contenders": [], "data": [], "stages": [], "seeds": []}
    for name, nothing in parts.items():
        rest = {key: getattr(plan, key) for key in parts}
        with pytest.raises(IBKEError, match="nothing in it"):
            Plan(**{**rest, name: nothing}, conditions=plan.conditions)
    with pytest.raises(IBKEError, match="'calm' is in it twice"):
        Plan([plan.contenders[0]] * 2, plan.data, plan.stages, plan.seeds, plan.conditions)
    for text in ("towns.jsonl", "towns=towns.jsonl", "=a:b", "towns=:jsonl"):
        with pytest.raises(IBKEError, match="NAME=FILE:FORMAT"):
            DataSet.parse(text)
    with pytest.raises(IBKEError, match="'a/b' is no name"):
        DataSet.parse("a/b=file:jsonl")
    with pytest.raises(RequestError, match="'x' is no number of edits"):
        Stage.parse("batch:3/x", None)


# --- cells


def test_a_finished_cell_is_never_run_again(lm: LanguageModel, tmp_path: Path) -> None:
    plan, bench = make_plan(), Bench(lm)
    seen: list[tuple[Any, ...]] = []
    first = run(make_plan(seeds=(0,)), tmp_path, execute=bench)
    files = {path: path.read_bytes() for path in (tmp_path / CELLS).iterdir()}
    assert len(files) == len(first) == 4 and all(path.suffix == ".json" for path in files)
    documents = run(plan, tmp_path, lambda *what: seen.append(what), bench)
    assert len(bench.ran) == len(set(bench.ran)) == 8
    assert documents[:4] == first and all(path.read_bytes() == raw for path, raw in files.items())
    cells = [what for what in seen if what[0] == "Cells"]
    assert {what[1] for what in cells} == {4, 5, 6, 7} and all(what[2] == 8 for what in cells)
    assert all(what[4] is not None and what[4] >= 0 for what in cells)  # known from the cells on disk
    assert ("Edits", 6, 6) in seen


def test_a_cell_that_is_not_whole_is_run_again(lm: LanguageModel, tmp_path: Path) -> None:
    plan, bench = make_plan(seeds=(0,)), Bench(lm)
    run(plan, tmp_path, execute=bench)
    torn, strange, *_ = ((tmp_path / CELLS / cell.file) for cell in plan.cells)
    torn.write_bytes(torn.read_bytes()[:300])
    strange.write_text("[1]")
    assert load(tmp_path / CELLS, plan.cells[0]) is None
    run(plan, tmp_path, execute=bench)
    assert bench.ran[4:] == [plan.cells[0].title, plan.cells[1].title]


def test_a_setting_without_bound_comes_back_as_it_was_written(lm: LanguageModel, tmp_path: Path) -> None:
    contenders = [Contender("free", "random", {"scale": 0.1, "bound": math.inf, "bounds": (1.0, (-math.inf,))})]
    plan, ran = replace(make_plan(seeds=(0,)), contenders=contenders), list[str]()

    def execute(cell: Cell, progress: Progress) -> dict[str, Any]:
        ran.append(cell.title)
        return {"scores": {}}

    assert run(plan, tmp_path, execute=execute) == run(plan, tmp_path, execute=execute)
    assert len(ran) == len(plan.cells)
    assert plan.cells[0].spec["contender"]["settings"] == {"scale": 0.1, "bound": "inf", "bounds": [1.0, ["-inf"]]}


def test_a_failed_cell_says_why_and_is_tried_again(lm: LanguageModel, tmp_path: Path) -> None:
    plan, bench = make_plan(seeds=(0,)), Bench(lm)
    bench.fail = "loud"
    documents = run(plan, tmp_path, execute=bench)
    assert [document.get("failed") for document in documents] == [None, "ValueError: it broke"] * 2
    summary = summarise(plan, documents)
    assert [(one["cell"], one["why"]) for one in summary["failed"]][0] == (plan.cells[1].title, "ValueError: it broke")
    assert "ValueError: it broke" in markdown(summary) and "ValueError: it broke" in page(summary)
    loud = next(row for row in summary["rows"] if row["method"] == "loud")
    assert loud["n"] == 0 and loud["generation"]["score"]["mean"] is None and loud["seconds_per_edit"] is None
    bench.fail = ""
    assert not any("failed" in document for document in run(plan, tmp_path, execute=bench))
    assert len(bench.ran) == 4


def test_time_left_is_that_of_like_cells() -> None:
    plan = make_plan(seeds=(0, 1))
    assert seconds_left(plan.cells, []) is None
    spent = (1.0, 10.0, 3.0)  # calm single, loud single, calm sequential
    done = [{"cell": cell.spec, "cell_seconds": s} for cell, s in zip(plan.cells, spent, strict=False)]
    # Loud's sequence by loud's only cell, then seed 1 as seed 0.
    assert seconds_left(plan.cells[3:], done) == 10.0 + 1.0 + 10.0 + 3.0 + 10.0
    other = Cell(
        Contender("new", "random"), *(getattr(plan.cells[0], k) for k in ("data", "stage", "seed", "conditions"))
    )
    assert seconds_left([other], done) == pytest.approx(fmean(spent))


# --- comparisons


def test_the_bootstrap_is_the_plain_one() -> None:
    draw = random.Random(5)
    values = [draw.random() ** 2 for _ in range(40)]
    found = bootstrap(values, draws=500, seed=3)
    indices = np.random.default_rng(3).integers(0, 40, (500, 40)).tolist()
    means = sorted(sum(values[i] for i in row) / 40 for row in indices)

    def quantile(share: float) -> float:
        place = share * 499
        low = int(place)
        return means[low] + (place - low) * (means[min(low + 1, 499)] - means[low])

    assert (found.n, found.mean) == (40, pytest.approx(sum(values) / 40))
    assert (found.low, found.high) == (pytest.approx(quantile(0.025)), pytest.approx(quantile(0.975)))
    assert bootstrap([0.5] * 9).low == bootstrap([0.5] * 9).high == 0.5
    assert bootstrap([]).mean is None


def test_the_interval_is_as_wide_as_theory_says() -> None:
    draw = random.Random(1)
    values = [draw.gauss(0.3, 0.2) for _ in range(400)]
    found = bootstrap(values)
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.std(values) / 20, rel=0.08)


def test_pairs_are_the_same_edits_and_their_hardness_falls_out() -> None:
    draw = random.Random(2)
    hard = {str(i): draw.random() for i in range(60)}
    better = {edit: value + 0.1 + draw.gauss(0, 0.01) for edit, value in hard.items() if edit != "7"}
    found = paired(better, hard | {"another": 0.0})
    assert found.n == 59 and found.mean == pytest.approx(0.1, abs=0.01)
    assert found.low is not None and found.high is not None and found.high - found.low < 0.01
    alone = bootstrap(list(hard.values()))
    assert alone.low is not None and alone.high is not None and alone.high - alone.low > 0.1


def test_an_edit_that_two_seeds_drew_counts_once() -> None:
    def report(edits: str, reliability: list[float | None]) -> dict[str, Any]:
        rest = {name: [1.0] * len(edits) for name in ("generality", "locality")}
        return {"scores": {"edits": list(edits), "generation": {"reliability": reliability, **rest}}}

    reports = [report("ab", [1.0, 0.0]), report("bc", [1.0, None])]
    assert by_edit(reports, "generation", "reliability") == {"a": 1.0, "b": 0.5}
    assert by_edit(reports, "generation", "score") == {"a": 1.0, "b": pytest.approx(2.5 / 3)}


# --- what is shown


class Page(HTMLParser):
    """Notes tags that are left open, and everything a page would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.fetched, self.tags = list[str](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "br", "line", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_summary_says_what_the_cells_hold(lm: LanguageModel, tmp_path: Path) -> None:
    plan = make_plan()
    documents = run(plan, tmp_path, execute=Bench(lm))
    summary = summarise(plan, documents)
    assert json.loads(to_json(summary)) == json.loads(json.dumps(summary, allow_nan=False))
    assert [(row["protocol"], row["method"]) for row in summary["rows"]] == [
        ("single", "calm"),
        ("single", "loud"),
        ("sequential:2", "calm"),
        ("sequential:2", "loud"),
    ]
    calm, loud = summary["rows"][2:]
    pairs = {"calm": documents[2::4], "loud": documents[3::4]}  # both seeds drew all six
    for row in (calm, loud):
        own = pairs[row["method"]]
        for name in ("reliability", "generality", "locality"):
            mean = fmean(document["metrics"]["generation"][name]["mean"] for document in own)
            assert row["generation"][name] == {**row["generation"][name], "n": 6, "mean": pytest.approx(mean)}
        assert row["seconds_per_edit"] == pytest.approx(fmean(document["seconds_per_edit"] for document in own))
        assert row["n"] == 12 and row["seeds"] == [0, 1]
        assert all((tmp_path / CELLS / file).exists() for file in row["files"])
    gap = loud["generation"]["locality"]["mean"] - calm["generation"]["locality"]["mean"]
    assert loud["minus"]["locality"]["mean"] == pytest.approx(gap)
    assert calm["minus"]["score"] == {"n": 6, "mean": 0.0, "low": 0.0, "high": 0.0}
    assert summarise(plan, documents, "loud")["rows"][2]["minus"]["locality"]["mean"] == pytest.approx(-gap)
    table = list(csv.DictReader(io.StringIO(csv_text(summary))))
    assert len(table) == 4 * (2 * len(METRICS) + 1 + len(COSTS) + len(EFFECTS) + len(COUNTS) + 1)  # one family
    line = next(r for r in table if (r["protocol"], r["method"], r["metric"]) == ("sequential:2", "loud", "locality"))
    assert float(line["minus_mean"]) == pytest.approx(gap) and line["minus"] == "calm"


def test_the_page_is_whole_and_fetches_nothing(lm: LanguageModel, tmp_path: Path) -> None:
    plan = make_plan(seeds=(0,))
    summary = summarise(plan, run(plan, tmp_path, execute=Bench(lm)))
    files = write(summary, tmp_path)
    assert [path.name for path in files] == ["summary.json", "summary.md", "summary.csv", "summary.html"]
    text = files[-1].read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == [] and found.fetched == [] and "script" not in found.tags
    assert "url(" not in text and "@import" not in text and "http" not in text
    # Metrics, differences and costs; ages of the sequence. Nobody asked about portability or side effects.
    assert found.tags.count("svg") == 2 * (4 + 4 + 2) + 3
    assert "ortability" not in text and "perplexity" not in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r'="[^"]*nan', text)
    for row in summary["rows"]:
        assert all(file in text for file in row["files"])
    assert "| MB at once |" in markdown(summary) and "<th>MB at once</th>" in text  # of a group, not per edit
    assert markdown(summary).count("\n| calm |") == 8  # metrics, teacher-forced, side effects (KL), families


def test_records_left_out_are_named(lm: LanguageModel, tmp_path: Path) -> None:
    plan = make_plan(seeds=(0,), limit=1)
    skipped = [Skipped(f"towns.json, record {i}", "alt", "`alt` is empty.") for i in range(120)]
    document = evaluate(lm, RandomEditor(lm), MANY[:1], config={"seed": 0} | account(skipped)) | {"cell_seconds": 1.0}
    summary = summarise(plan, [{**document, "cell": cell.spec} for cell in plan.cells])
    (one,) = summary["left_out"]
    assert (one["data"], one["skipped"], len(one["skipped_records"])) == ("towns", 120, 100)
    assert one["skipped_records"][1] == {"where": "towns.json, record 1", "field": "alt", "why": "`alt` is empty."}
    said = "Of towns, records or parts of them were left out: 120 × `alt` is empty; the first in towns.json, record 0."
    assert said in markdown(summary) and said in page(summary)


def test_a_report_names_records_left_out_from_the_data_folder_on(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IBKE_DATA", str(tmp_path))
    skipped = [Skipped(f"{place}, record 1", "alt", "`alt` is empty.") for place in (tmp_path / "a/b.json", "c/d.json")]
    assert [one["where"] for one in account(skipped)["skipped_records"]] == ["a/b.json, record 1", "c/d.json, record 1"]


def test_what_was_measured_besides_is_shown(lm: LanguageModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. " * 60)
    plan, beside = make_plan(seeds=(0,)), Beside(str(text), ("own",), questions=4, looks=2)

    def execute(cell: Cell, progress: Progress) -> dict[str, Any]:
        editor, battery = RandomEditor(lm, **cell.contender.settings), Battery.of(lm, beside)
        return evaluate(lm, editor, REQUESTS, cell.stage.protocol, battery=battery, config={"seed": 0})

    documents = run(plan, tmp_path, execute=execute)
    summary = summarise(plan, documents)
    json.dumps(summary, allow_nan=False)
    for row, document in zip(summary["rows"], documents, strict=True):
        found = document["side_effects"]
        assert row["effects"] == {
            "kl_nats": document["kl_nats"]["base_edited"]["mean"],
            "relative_norm": found["relative_norm"]["mean"],
            "drift": found["drift"]["mean"],
            "perplexity_change": found["perplexity"]["ratio"]["mean"] - 1,
            "abilities_change": found["abilities"]["own"]["edited"]["mean"] - found["abilities"]["own"]["base"],
            "choices_kept": found["abilities"]["own"]["kept"]["mean"],
            "tasks_change": None,
        }
        portability = document["portability"]["edited"]["generation"]["mean"]
        assert (
            row["generation"]["portability"]["mean"] == portability == row["families"]["portability/one_hop"]["edited"]
        )
    pages = page(summary), markdown(summary)
    for name, found in summary["rows"][0]["effects"].items():
        title, shown = EFFECTS[name][0], found is not None
        assert all((title in text, effect(name, found) in text) == (True, True) for text in pages) == shown, name
    assert all("portability/one hop" in text and "unedited" in text for text in pages)
    assert Page(pages[0]).open == [] and pages[0].count("<svg") == 2 * (5 + 5 + 2 + 3) + 3


def test_cells_from_before_a_question_could_be_asked_are_still_found(lm: LanguageModel) -> None:
    cell = make_plan().cells[0]
    assert "beside" not in cell.spec["conditions"]
    asked = replace(cell, conditions=replace(cell.conditions, beside=Beside(abilities=("own",))))
    assert asked.spec["conditions"]["beside"]["abilities"] == ["own"] and asked.file != cell.file
    assert json.loads(json.dumps(asked.spec)) == asked.spec
    scores = {"edits": ["a"], "generation": {"reliability": [1.0]}}
    assert by_edit([{"scores": scores}], "generation", "portability") == {}


def test_names_are_text_and_not_markup(lm: LanguageModel) -> None:
    plan = make_plan(seeds=(0,))
    document = {"failed": "<b>x & y</b>", "cell_seconds": 1.0}
    text = page(summarise(plan, [document] * len(plan.cells)))
    assert "&lt;b&gt;x &amp; y&lt;/b&gt;" in text and Page(text).open == []


def test_json_for_people_is_the_same_json() -> None:
    value = {"a": [1, 2.5, None, "x\n[ 1 ]  ü"], "b": {}, "c": [{"d": []}, [1, [2]]], "e": {"f": True}}
    text = to_json(value)
    assert json.loads(text) == value == json.loads(to_json(value, ascii_only=True))
    assert '"a": [1, 2.5, null, "x\\n[ 1 ]  ü"]' in text and to_json(value, ascii_only=True).isascii()
