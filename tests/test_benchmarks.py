"""The scripts under benchmarks/: what they take for done, and what a table shows of cells that do not say all."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.locating import REQUESTS, make_editor

from ibke.evaluation.sequence import InSequence

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports one of them, for one test: by their names other packages may look for something else."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def row(data: str, method: str, **more: float) -> dict[str, Any]:
    """A row of a summary."""
    metrics = {name: {"mean": 0.5} for name in ("reliability", "generality", "locality", "score")}
    effects = {"perplexity_change": None, "choices_kept": None}
    head = {"data": data, "protocol": "single", "method": method, "n": 4, "bytes_per_edit": None}
    return head | {"generation": metrics, "effects": effects} | more


def test_the_table_shows_locality_over_an_answers_length(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report: ModuleType = script("report")
    rows = [row("counterfact", "ibke", at_answer_length=0.9), row("zsre", "ibke"), row("zsre", "grace")]
    (tmp_path / "rivals").mkdir()
    (tmp_path / "rivals/summary.json").write_text(json.dumps({"rows": rows, "base": []}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "TUNED", tmp_path / "tuned.json")
    head, rule, *lines = report.rivals("single").splitlines()
    assert head.count("| loc. | loc. (answer) | mean |") == 2
    assert len({line.count("|") for line in (head, rule, *lines[:2])}) == 1
    measured = "0.500 | 0.500 | 0.500"
    assert lines[0].startswith(f"| ibke | {measured} | 0.900 | **0.500** | {measured} | – | **0.500** |")
    assert lines[1].startswith(f"| grace (not tuned) | – | – | – | – | – | {measured} | – | **0.500** |")


def test_validation_edits_are_others_where_cells_draw_others(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rivals: ModuleType = script("rivals")
    requests = [{"prompt": f"Land {i} is in", "target_new": "it", "rephrase_prompts": ["?"]} for i in range(30)]
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, requests)))
    monkeypatch.setattr(rivals, "DATA", tmp_path)
    monkeypatch.setattr(rivals, "TUNING", tmp_path / "tuning")

    def drawn(counts: dict[str, int], source: str) -> Path:
        monkeypatch.setattr(rivals, "COUNTS", counts)
        monkeypatch.setattr(rivals, "DATASETS", {"lands": (source, "jsonl", source)})
        return rivals.validation_edits("lands", 5)

    first = drawn({"single": 10}, "one.jsonl")
    assert first.name.startswith("lands-5.") and first == drawn({"single": 10}, "one.jsonl")
    assert len(first.read_text().splitlines()) == 5
    others = {drawn({"single": 20}, "one.jsonl"), drawn({"single": 10}, "two.jsonl")}
    assert len(others) == 2 and first not in others and all(path.exists() for path in others)


def test_a_stream_goes_on_with_the_edits_that_it_began_with(script: Any, tmp_path: Path) -> None:
    lifelong: ModuleType = script("lifelong")
    file, place, result = tmp_path / "mixed-2.jsonl", tmp_path / "run/stream", tmp_path / "result.json"
    for path, text in ((file, "edits"), (lifelong.sources_of(file), "{}")):
        path.write_text(text)
    held = lifelong.digest_of(file)
    file.write_text("other edits")
    other = lifelong.digest_of(file)
    lifelong.refuse_another(place, held, "on another stream")
    lifelong.refuse_another(place, held, "on another stream")
    with pytest.raises(SystemExit, match="begun on another stream"):
        lifelong.refuse_another(place, other, "on another stream")
    report = {"editor_mark": "m", "config": {}, "rows": [{"edits": 1}]}
    for known in (report, report | {"stream_sha256": other}):  # older ones do not know
        result.write_text(json.dumps(known))
        assert lifelong.rows(result, "m", other, {}) == report["rows"]
    with pytest.raises(SystemExit, match="another stream of this name"):
        lifelong.rows(result, "m", held, {})
    assert lifelong.rows(result, "another", held, {}) == []


@pytest.mark.usefixtures("statistics_folder")
def test_a_method_that_remembers_goes_on_as_if_it_had_not_stopped(script: Any, tmp_path: Path) -> None:
    lifelong: ModuleType = script("lifelong")
    editor, tried = make_editor("alphaedit"), []
    with InSequence(editor.lm) as sequence:
        whole = editor
        for number, request in enumerate(REQUESTS):
            whole, attempt = lifelong.one_more(tmp_path / f"{number:05d}", sequence, whole, [request])
            tried.append(attempt)
    with InSequence(editor.lm) as sequence:
        again = lifelong.go_on(sequence, editor, tmp_path, tried)
        assert sequence.whole is not None and sequence.whole.requests == tuple(REQUESTS)
    assert editor.history == {} and again.history.keys() == whole.history.keys() != set()
    for name, history in whole.history.items():
        assert torch.allclose(again.history[name], history, rtol=1e-4, atol=1e-7)


def test_points_of_another_editor_or_length_are_dropped(script: Any, tmp_path: Path) -> None:
    sweep: ModuleType = script("rate_sweep")
    path, points = tmp_path / "bottleneck.json", {"beta-1": {}}
    nothing = {"editor_mark": "m", "steps": 200, "points": {}}
    assert sweep.known(path, "m", 200) == nothing
    for report in ({"points": points}, nothing | {"editor_mark": "o", "points": points}, nothing | {"steps": 100}):
        sweep.write(path, report)
        assert sweep.known(path, "m", 200) == nothing
    sweep.write(path, nothing | {"points": points})
    assert sweep.known(path, "m", 200)["points"] == points
