"""Training of hypernetworks on a tiny model: gradients by plain autograd, it learns, a killed run goes on exactly."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.commands import Run, refused
from tests.conftest import make_tiny
from tests.hypernetworks import stir, training, write_facts
from tests.test_training import ENVIRONMENT
from torch.func import functional_call

from ibke.editors.hypernetwork.tokens import take_tokens
from ibke.editors.malmen import MALMEN
from ibke.editors.mend import MEND
from ibke.editors.rledit import RLEdit
from ibke.errors import TrainingError
from ibke.modules import weight_OI
from ibke.rows import EDIT, OUTSIDE, binned_kl
from ibke.training.building import RowBuilder
from ibke.training.cache import RowCache
from ibke.training.hypernetwork.lessons import Lessons
from ibke.training.hypernetwork.trainer import train, train_for
from ibke.training.run import cached_shards, draw_episodes

KINDS = [MEND, MALMEN, RLEdit]
SMALL = {"layers": (1, 2), "rank": 8, "step_size": 1e-2}
SEQUENCE = {MEND: {}, MALMEN: {}, RLEdit: {"turns": 3, "depth": 1, "decay": 0.5, "penalty": 0.1}}


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return write_facts(tmp_path_factory.mktemp("facts"))


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A tiny model in a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    lm = make_tiny("llama")
    lm.model.generation_config.pad_token_id = lm.tokenizer.pad_token_id
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def classroom(kind, lm, facts, tmp_path):
    settings = training(kind, facts, tmp_path / "run", {**SMALL, **SEQUENCE[kind]})
    network = kind.untrained(lm, settings.config)
    stir(network)
    editor = kind(lm, network)
    builder = RowBuilder(lm.model, lm.tokenizer, editor.part)
    folders = cached_shards(settings, builder, draw_episodes(settings), (), lambda _: None)
    return editor, Lessons(editor, RowCache(folders[0]))


def log(out, stage="training"):
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["stage"] == stage]


def dense_rows(lm, weights, groups):
    """NLL in scope and KL(base‖edited) out of scope, means over tokens, of whole rows under dense weights."""
    nll, divergence = [], []
    for group in groups:
        logits = functional_call(
            lm.model, weights, (), {"input_ids": group.batch.ids_RT, "attention_mask": group.batch.attention_RT.long()}
        ).logits[group.batch.predicts_RT]
        kind_N = group.kind_R[group.batch.row_N]
        inside = kind_N != OUTSIDE
        nll.append(F.cross_entropy(logits[inside], group.batch.labels_N[inside], reduction="none"))
        kl, _ = binned_kl(logits[kind_N == OUTSIDE], group.base_tokens_NP, group.base_log_probs_NP)
        divergence.append(kl)
    return torch.cat(nll), torch.cat(divergence)


def dense_update(network, tokens, edits):
    """ΔW of each module: one for all edits, or one for each (a list)."""
    made = network(tokens, network.statistics)
    if network.joint:
        return [{name: b.T @ a for name, (a, b) in made.items()}]
    return [
        {name: b[tokens[name].edit_N == edit].T @ a[tokens[name].edit_N == edit] for name, (a, b) in made.items()}
        for edit in range(edits)
    ]


def dense_loss(lm, network, editor, lessons, turns):
    """The loss of a step as it stands in the papers, by dense weights and whole rows."""
    config, total, asked = network.config, torch.zeros(()), []
    standing = {name: torch.zeros_like(weight_OI(module)) for name, module in editor.modules.items()}
    for chosen in turns:
        now = copy.deepcopy(lm)
        for name, delta in standing.items():
            now.model.get_submodule(name).weight.data += delta
        there = type(editor)(now, network)
        groups = lessons.episodes.groups(chosen, (EDIT,))
        rows = [(there.part.prefix(group.batch), group.batch, group.owner_R) for group in groups]
        tokens, _ = take_tokens(there.part, there.modules, rows, answers_only=network.answers_only)
        network.observe(tokens)
        deltas = dense_update(network, tokens, len(chosen))
        asked.append(chosen)
        for back, earlier in enumerate(reversed(asked[-1 - config.depth :])):
            nll, divergence = [], []
            for place, episode in enumerate(earlier):
                delta = deltas[0] if network.joint else deltas[place]
                weights = {
                    f"{name}.weight": weight_OI(module) + standing[name] + delta[name]
                    for name, module in editor.modules.items()
                }
                found = dense_rows(lm, weights, lessons.episodes.groups([episode]))
                nll.append(found[0])
                divergence.append(found[1])
            loss = config.generality_weight * torch.cat(nll).mean()
            total = total + config.decay**back * (loss + config.locality_weight * torch.cat(divergence).mean())
        total = total + config.penalty * sum(d.square().sum() for delta in deltas for d in delta.values())
        if network.joint:
            standing = {name: standing[name] + deltas[0][name].detach() for name in standing}
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_dense_objective(kind, facts, tmp_path):
    lm = make_tiny("llama")
    editor, lessons = classroom(kind, lm, facts, tmp_path)
    network, turns = editor.network, [[3, 1, 4], [5, 9], [2, 6]][: editor.network.config.turns]
    plain = copy.deepcopy(network)
    wanted = torch.autograd.grad(dense_loss(lm, plain, editor, lessons, turns), list(plain.parameters()))
    record = lessons.learn(network, turns)
    assert all(record[name] > 0 for name in ("reliability_nats", "generality_nats", "locality_nats"))
    for (name, parameter), grad in zip(network.named_parameters(), wanted, strict=True):
        assert parameter.grad is not None, name
        assert (parameter.grad - grad).norm() < 1e-3 * grad.norm() + 1e-7, name
    for (name, mine), (_, theirs) in zip(network.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_are_examined_as_they_are_made(kind, facts, tmp_path):
    """What validation says of edits is what an editor's own edits do."""
    from ibke.session import EditSession

    lm = make_tiny("llama")
    editor, lessons = classroom(kind, lm, facts, tmp_path)
    with torch.no_grad():
        editor.network.log_step -= 4.0  # so that some answers out of scope stay as they were and others do not
    editor.network.requires_grad_(False)
    editor.network.observe(lessons._tokens(editor.network, range(8)))
    turns = [[0, 1, 2, 3, 4, 5]] if kind is not RLEdit else [[0, 1, 2], [3, 4, 5]]
    found = lessons.examine(editor.network, turns)
    episodes = draw_episodes(training(kind, facts, tmp_path / "run", SMALL))[0]
    from ibke.request import EditRequest

    asked = [[EditRequest(e.edit.prompt, e.edit.target, e.subject) for e in (episodes[i] for i in t)] for t in turns]
    right = []
    with EditSession(lm) as session:
        making = editor
        for requests, chosen in zip(asked, turns, strict=True):
            groups = [[request] for request in requests] if kind is MEND else [requests]
            for place, group in enumerate(groups):
                edit = making.edit(group)
                session.attach(edit)
                if kind is MEND:
                    right += exact(lm, lessons, [chosen[place]])
                    session.detach(edit)
                else:
                    making = making.after(edit)
        if kind is not MEND:
            right = exact(lm, lessons, [item for chosen in turns for item in chosen])
    assert 0 < sum(right) < len(right), "nothing was told apart"
    assert sum(sum(some) for some in found.values()) == sum(right)
    assert sum(len(some) for some in found.values()) == len(right)


def exact(lm, lessons, chosen):
    right = []
    for group in lessons.episodes.groups(chosen):
        logits = lm.model(input_ids=group.batch.ids_RT, attention_mask=group.batch.attention_RT.long()).logits
        right += group.batch.score(logits[group.batch.predicts_RT])[1].tolist()
    return right


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_the_editor_loads(kind, facts, tmp_path):
    lm = make_tiny("llama")
    seen = []
    changes = {"steps": 60, "learning_rate": 1e-3, "scalar_step": 100.0, "validate_every": 30}
    config = {"rank": 64, "step_size": 1e-3, "layers": (1, 2, 3), **({"turns": 2} if kind is RLEdit else {})}
    settings = training(kind, facts, tmp_path / "run", config, **changes)
    folder = train_for(lm, settings, seen.append)
    losses = [entry["generality_nats"] for entry in log(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    assert {"locality_nats", "edits_per_second", "seconds_left", "figures"} <= set().union(*seen)
    manifest = json.loads((folder / "editor.json").read_text())
    assert manifest["fingerprint"] == lm.fingerprint and manifest["method"] == kind.name
    assert "out" not in manifest["training"]
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.pkl"))
    assert kind.for_model(lm, folder).network.statistics and kind.for_model(lm, folder).training_seconds


def test_training_time_has_caching_in_it_whoever_did_it(facts, tmp_path):
    """So has the budget: what was found computed leaves no more time for steps."""
    lm, cache = make_tiny("llama"), str(tmp_path / "cache")
    folder = train_for(lm, training(MEND, facts, tmp_path / "one", {}, steps=2, cache=cache))
    manifest = json.loads((folder / "editor.json").read_text())
    assert 0 < manifest["caching_seconds"] < manifest["seconds"] == MEND.for_model(lm, folder).training_seconds
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    for path in files:
        save_file(load_file(path), path, {"seconds": "1000"})
    more = training(MEND, facts, tmp_path / "two", {}, steps=8, cache=cache, minutes=1000 * len(files) / 60)
    folder = train_for(lm, more)
    manifest = json.loads((folder / "editor.json").read_text())
    assert 1000 * len(files) < manifest["caching_seconds"] < manifest["seconds"]
    assert [entry["step"] for entry in log(tmp_path / "two", "validation")] == [1]


def test_a_run_killed_at_any_moment_goes_on_exactly(facts, on_disk, tmp_path):
    kind = RLEdit  # which has all the others have, and turns
    script = (
        "import sys, time; from pathlib import Path; from ibke.editors.base import method_class; "
        "from ibke.training.hypernetwork.trainer import train; from tests.hypernetworks import training; "
        "kind = method_class(sys.argv[1]); "
        "s = training(kind, Path(sys.argv[2]), Path(sys.argv[4]), {'step_size': 1e-3}, model=sys.argv[3], steps=8, "
        "threads=1, dtype='float32'); "
        "here = lambda e: len(sys.argv) == 5 and (e['stage'], e.get('step')) == ('validation', 6); "
        "train(s, lambda e: here(e) and (print('here', flush=True), time.sleep(600)), resume=len(sys.argv) > 5)"
    )

    def command(out, *more):
        return [sys.executable, "-c", script, kind.name, str(facts), str(on_disk), str(tmp_path / out), *more]

    process = subprocess.Popen(command("killed"), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None and process.stdout.readline() == "here\n"  # logged, but no checkpoint yet
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command("killed", "resume"), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    config = {"step_size": 1e-3}
    train(training(kind, facts, tmp_path / "whole", config, model=str(on_disk), steps=8, threads=1, dtype="float32"))
    mine, theirs = (load_file(tmp_path / out / "checkpoint.safetensors") for out in ("whole", "killed"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert [e["step"] for e in log(tmp_path / "killed", "validation")] == [2, 4, 6, 8]


def test_a_budget_of_time_ends_a_run_and_may_be_raised(facts, tmp_path):
    lm = make_tiny("llama")
    train_for(lm, training(MEND, facts, tmp_path / "run", {}, steps=10_000, minutes=1e-6))
    assert [entry["step"] for entry in log(tmp_path / "run", "validation")] == [1]
    train_for(lm, training(MEND, facts, tmp_path / "run", {}, steps=4, minutes=0.0), resume=True)
    assert [entry["step"] for entry in log(tmp_path / "run", "validation")] == [1, 2, 4]


def test_what_is_left_out_is_trained_where_editors_are_looked_for(facts, tmp_path, monkeypatch):
    lm = make_tiny("llama")
    monkeypatch.setattr("ibke.editors.hypernetwork.storage.cache_folder", lambda: tmp_path / "cache")
    settings = training(MALMEN, facts, "", {}, steps=2)
    folder = train_for(lm, settings)
    assert folder.is_relative_to(tmp_path / "cache")
    assert MALMEN.for_model(lm).network.statistics
    with pytest.raises(TrainingError, match="already"):
        train_for(lm, settings)


def test_a_wrong_run_is_named(facts, tmp_path):
    lm = make_tiny("llama")
    with pytest.raises(TrainingError, match="`minutes` is below 0"):
        training(MEND, facts, tmp_path, {}, minutes=-1.0)
    with pytest.raises(TrainingError, match="`validation` must be at least 1"):
        training(MEND, facts, tmp_path, {}, validation=0)
    with pytest.raises(TrainingError, match="another method's"):
        train_for(lm, training(MEND, facts, tmp_path / "run", {}, method="malmen"))
    with pytest.raises(TrainingError, match="no hypernetwork"):
        train_for(lm, training(MEND, facts, tmp_path / "run", {}, method="rome"))
    train_for(lm, training(MEND, facts, tmp_path / "run", {}, steps=2))
    with pytest.raises(TrainingError, match="`batch` was 3"):
        train_for(lm, training(MEND, facts, tmp_path / "run", {}, batch=4), resume=True)
    with pytest.raises(TrainingError, match="no run to resume"):
        train_for(lm, training(MEND, facts, tmp_path / "nowhere", {}), resume=True)


def test_train_and_use_by_command(run: Run, facts, on_disk, tmp_path, monkeypatch):
    monkeypatch.setenv("IBKE_CACHE", str(tmp_path / "cache"))
    ask = ("--model", on_disk, "--method", "malmen", "--data", facts, "--limit", 2)
    refused(run("eval", *ask), "malmen has not been trained", "ibke train --method malmen")
    command = ["train", "--method", "malmen", "--model", on_disk, "--data", f"jsonl:{facts}", "--dtype", "float32"]
    command += ["--episodes", 10, "--batch", 3, "--steps", 2]
    for setting in ("validation=4", "hold_out_relations=0", "rank=8", "minutes=1"):
        command += ["--set", setting]
    document = json.loads(run(*command, "--json").stdout)
    assert document["settings"]["config"]["rank"] == 8 and os.path.isdir(document["editor"])  # noqa: PTH112
    report = json.loads(run("eval", *ask, "--json", "-").stdout)
    assert report["n"] == 2 and report["config"]["method"] == "malmen"
    refused(run(*command), "a run is here already", "--resume")


def test_what_cannot_be_trained_is_named(run: Run, facts):
    refused(run("train", "--method", "rome", "--data", "facts"), "nothing to train", "ibke, mend, malmen, rledit")
    refused(run("train", "--method", "mendd", "--data", "facts"), "Did you mean 'mend'?")
    refused(run("train", "--method", "mend", "--data", "facts", "--set", "ranks=3"), "Did you mean 'rank'?")
    refused(run("train", "--data", f"jsonl:{facts}"), "no folder named", "--out")
