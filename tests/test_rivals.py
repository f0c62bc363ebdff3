"""The comparison of docs/results.md: what is said of settings is said of every rival, and is what the code does."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from ibke.cli.settings import parse
from ibke.editors.base import METHODS, method_class
from ibke.editors.hypernetwork.editor import HypernetworkEditor
from ibke.training.hypernetwork.settings import HypernetworkSettings

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rivals

    return rivals


@pytest.fixture
def report(rivals: ModuleType) -> ModuleType:
    import report

    return report


def test_published_settings_stand_beside_ours_for_every_rival(
    rivals: ModuleType, report: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(BENCHMARKS.parent)
    hypernetworks = {name for name in METHODS if issubclass(method_class(name), HypernetworkEditor)}
    assert set(rivals.TRAINED) == hypernetworks
    # IKE without retrieval has no settings.
    assert set(rivals.PUBLISHED) == set(rivals.RIVALS.split(",")) - {"ike"}
    assert hypernetworks <= set(rivals.CANDIDATES) <= set(rivals.PUBLISHED)
    table = report.tuned()
    for method in rivals.TRAINED:
        line = f"| {method} | {rivals.PUBLISHED[method]} | training | – | {rivals.trained(method)} | – | – |"
        assert line in table.splitlines()


def test_what_a_rival_is_said_to_be_trained_with_is_what_it_is(rivals: ModuleType) -> None:
    said = rivals.trained("rledit")
    assert said.startswith("Adam 1e-05, 4 turns of 16 edits a step, clip 1, 59 minutes, rank 1024, 4 blocks")
    assert said.endswith("step size from 0.0001, weights 1 and 0.6, decay 0.95 over 10 turns, penalty 0.0001")
    assert "weights 0.1 and 1" in rivals.trained("mend") and "turns" not in rivals.trained("malmen")
    script = (BENCHMARKS / "train_rivals.sh").read_text()
    assert "--set minutes=59" in script and not any(f"--set {name}=" in script for name in ("batch", "learning_rate"))


def test_what_is_trained_is_trained_on_one_mixture(rivals: ModuleType) -> None:
    """The scripts that train IBKE and the hypernetworks, and what SERAC's classifier is told."""
    for name in ("train_rivals.sh", "train_shipped.sh"):
        words = (BENCHMARKS / name).read_text().replace("\\\n", " ").split()
        sources = [value for flag, value in zip(words, words[1:], strict=False) if flag == "--data"]
        assert ",".join(sources) == rivals.ALWAYS["serac"]["sources"] == rivals.MIXTURE
        assert f"exclude={rivals.ALWAYS['serac']['exclude']}" in words
        episodes = int(words[words.index("--episodes") + 1])
        assert episodes + 96 == rivals.ALWAYS["serac"]["requests"]  # the validation of both
    assert HypernetworkSettings("", ("facts",)).validation == 96


def test_settings_are_those_of_the_protocol_or_of_the_one_most_like_it(
    rivals: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tuned = {"single": {"layer": 1}, "batch:100": {"layer": 2}}
    known = {"rome": {name: {"settings": settings} for name, settings in tuned.items()}}
    (tmp_path / "tuned.json").write_text(json.dumps(known))
    monkeypatch.setattr(rivals, "TUNED", tmp_path / "tuned.json")
    assert rivals.labelled(["rome", "memit"]) == {"rome": ("rome", tuned), "memit": ("memit", {})}
    for protocol, layer in (("single", 1), ("batch:100", 2), ("sequential:100", 2), ("sequential", 1)):
        assert rivals.settings_under(protocol, tuned) == {"layer": layer}
    assert rivals.settings_under("single", {}) == {}


def test_no_setting_is_tried_twice_and_all_are_settings(rivals: ModuleType) -> None:
    for method, tried in rivals.CANDIDATES.items():
        everything = [{}, *tried, *rivals.TOGETHER.get(method, [])]
        assert len({json.dumps(one, sort_keys=True) for one in everything}) == len(everything)
        for one in everything:
            parse([f"{name}={value}" for name, value in one.items()], method_class(method).Settings)
    assert set(rivals.TOGETHER) <= set(rivals.CANDIDATES)
