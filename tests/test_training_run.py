"""What all training runs have in common: averaged weights, clipping, early stopping, and where files are written."""

import errno
import json
from dataclasses import replace

import pytest
import torch
from tests.test_training import settings
from torch import nn

from ibke.errors import TrainingError
from ibke.training.run import Run, begun, open_run


class Line(Run):
    """Weights that are pulled along given slopes, with given scores."""

    def __init__(self, run, slopes, scores=()):
        torch.manual_seed(0)
        super().__init__(run, nn.Linear(3, 1, bias=False), [], 1.0, lambda _: None)
        self.slopes, self.given = list(slopes), list(scores)
        self.norms, self.kept = [], []

    def take_step(self):
        slope = self.slopes[self.step]
        self.norms.append(self.descend(lambda: (self.network.weight * slope).sum().backward(), 1.0))
        return {}

    def scores(self):
        score = self.given.pop(0)
        return {"reliability": score, "generality": score, "locality": score}

    def keep(self, folder, about):
        self.kept.append((about["step"], self.averaged.weight.clone()))


@pytest.fixture
def run(tmp_path):
    return settings(tmp_path, tmp_path / "run", steps=6, validate_every=1, clip=1.0, ema=0.5, weight_decay=0.0)


def test_weights_are_averaged_and_gradients_clipped(run):
    line = Line(run, [1.0, 100.0, 1e-3])
    averaged = line.averaged.weight.clone()
    moved = []
    for step in range(3):
        before = line.network.weight.clone()
        line.take_step()
        line.step += 1
        decay = min(0.5, (1 + step) / (10 + step))
        averaged = decay * averaged + (1 - decay) * line.network.weight
        assert torch.allclose(line.averaged.weight, averaged, atol=1e-6)
        moved.append((line.network.weight - before).abs().max().item())
        assert line.network.weight.grad.norm() <= 1.0 + 1e-5
    assert line.norms == pytest.approx([slope * 3**0.5 for slope in (1.0, 100.0, 1e-3)])  # before they are clipped
    assert all(0 < some < 2 * run.learning_rate for some in moved)


def test_it_stops_when_validation_gets_no_better_and_the_best_is_kept(run, tmp_path):
    with begun(run):
        pass
    line = Line(replace(run, patience=2), [1.0] * 6, [0.2, 0.5, 0.4, 0.5, 0.9, 0.9])
    line.run()
    assert line.step == 4 and [step for step, _ in line.kept] == [1, 2]
    steps = [json.loads(text)["step"] for text in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    again = Line(replace(run, patience=2), [1.0] * 6, [])
    again.start(resume=True)
    assert again.over() and again.best == 0.5 and torch.equal(again.network.weight, line.network.weight)


def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(run):
    with begun(run):
        pass
    line = Line(run, [1.0, float("nan")], [0.3])
    with pytest.raises(TrainingError, match="the gradient is not finite.*learning rate"):
        line.run()
    again = Line(run, [1.0] * 6, [])
    again.start(resume=True)
    assert again.step == 1 and len(line.kept) == 1
    for one, two in ((line.network, again.network), (line.averaged, again.averaged)):
        assert torch.equal(one.weight, two.weight) and one.weight.isfinite().all()


def test_nothing_is_written_where_no_run_can_be(run, tmp_path):
    """A file, somebody else's settings, damaged ones; and what is there stays."""
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/run"):
        with pytest.raises(TrainingError, match="no run can be kept here"):
            open_run(replace(run, out=str(tmp_path / out)), resume=False)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "run").mkdir()
    for text, why in (('{"theme": "dark"}', "not the settings of a run"), ('{"steps": 1', "no run can be kept here")):
        (tmp_path / "run/settings.json").write_text(text)
        for resume in (False, True):
            with pytest.raises(TrainingError, match=why):
                open_run(run, resume)
        assert (tmp_path / "run/settings.json").read_text() == text


def test_a_full_disk_is_named_with_what_to_do(run, monkeypatch):
    with begun(run):
        pass
    line = Line(run, [1.0] * 6, [0.1, 0.2, 0.3])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match=r"No space left on device.*--resume"), begun(run):
        line.slopes, line.settings = [1.0], replace(run, steps=1)
        line.run()
        line.settings = run
        line.slopes = [1.0] * 6
        monkeypatch.setattr("ibke.training.checkpoint.write_atomically", full)
        line.run()
    monkeypatch.undo()
    again = Line(run, [1.0] * 6, [])
    again.start(resume=True)
    assert again.step == 1
