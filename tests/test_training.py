"""Training on a tiny model: it learns, two runs agree, and a killed run goes on exactly."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import make_tiny

from ibke.data import mixture as data_mixture
from ibke.data.mixture import Source, Split
from ibke.data.split import held_out
from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.ibke.shipped import load_editor
from ibke.errors import FingerprintMismatchError, FormatError, TrainingError
from ibke.models import load_model
from ibke.rows import EDIT, INSIDE, OUTSIDE, run_rows
from ibke.training.episodes import EpisodeMaker
from ibke.training.run import check_same
from ibke.training.settings import TrainSettings
from ibke.training.step import terms
from ibke.training.trainer import (
    batch_of,
    draw_episodes,
    prepare_episodes,
    prepare_ground,
    schedule,
    start_network,
    take_statistics,
    train,
)

CITIES = ["Oslo", "Lima", "Bern", "Kyiv", "Rome", "Cairo", "Quito", "Riga"]
PEOPLE = [
    "Ada Berg",
    "Bo Ruiz",
    "Cy Lund",
    "Di Moss",
    "Ed Kahn",
    "Flo Park",
    "Gus Vale",
    "Hal Wren",
    "Ida York",
    "Jo Zeal",
]


# A child finds this package where its parent does, and the tests beside it.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A tiny model and a file of requests on disk."""
    folder = tmp_path_factory.mktemp("ground")
    lm = make_tiny("llama")
    lm.model.generation_config.pad_token_id = lm.tokenizer.pad_token_id
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    lines = []
    for index, name in enumerate(PEOPLE * 3):
        city, other = CITIES[index % 8], PEOPLE[(index + 1) % len(PEOPLE)]
        lines.append(
            {
                "prompt": f"The home town of {name} is" if index % 2 else f"Where does {name} live?",
                "target_new": city,
                "subject": name,
                "rephrase_prompts": [f"{name} comes from", f"Tell me where {name} lives"],
                "locality": [f"The home town of {other} is", f"The job of {name} is"],
            }
        )
    (folder / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def settings(ground, out, **changes):
    config = IBKEConfig(layer=1, relay_layer=2, content_dim=12, context_dim=6, width=16, depth=1, beta=1e-4)
    values = {
        "model": str(ground / "model"),
        "data": (f"jsonl:{ground / 'facts.jsonl'}",),
        "out": str(out),
        "cache": str(ground / "cache"),
        "episodes": 24,
        "validation": 6,
        "steps": 12,
        "batch": 4,
        "warmup": 2,
        "validate_every": 4,
        "threads": 1,
        "dtype": "float32",
        "hold_out_relations": 0.0,
        "patience": 100,
        "config": config,
    }
    return TrainSettings(**(values | changes))


def test_training_time_has_caching_in_it_whoever_did_it(ground, tmp_path):
    """A run that finds everything computed says that it took what computing it had taken."""
    run = settings(ground, tmp_path / "one", cache=str(tmp_path / "cache"), steps=4)
    run = replace(run, words=str(ground / "facts.txt"))
    (ground / "facts.txt").write_text("The home town of Ada Berg is Oslo, and Bo Ruiz lives in Lima.\n" * 40)
    manifests = []
    for out in ("one", "two"):
        folder = train(replace(run, out=str(tmp_path / out)))
        manifests.append(json.loads((folder / "editor.json").read_text()))
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert {path.stem.partition("-")[0] for path in files} == {"words", "00000"}
    took = []
    for path in files:
        with safe_open(path, "pt") as file:
            took.append(float(file.metadata()["seconds"]))
    assert len(took) == 3 and all(seconds > 0 for seconds in took)
    for manifest in manifests:
        assert sum(took) < manifest["caching_seconds"] < manifest["seconds"]
    # As slow as they say: had they not been counted, the second would say less than they took.
    for path in files:
        save_file(load_file(path), path, {"seconds": "1000"})
    folder = train(replace(run, out=str(tmp_path / "three")))
    third = json.loads((folder / "editor.json").read_text())
    assert 3000 < third["caching_seconds"] < third["seconds"] < 3600


def test_the_objective_falls_and_the_editor_loads(ground, tmp_path):
    seen = []
    run = settings(ground, tmp_path / "run", steps=120, learning_rate=1e-2, validate_every=120)
    # In 32 dimensions an address can hardly tell so many keys apart; this gate opens to other wordings all the same.
    run = replace(run, config=replace(run.config, threshold=0.3))
    folder = train(run, seen.append)
    base, drawn = prepare_ground(run), draw_episodes(run)
    statistics = take_statistics(run, base, drawn[0])
    training, _ = prepare_episodes(run, base, statistics, drawn, lambda _: None)
    everything = training.batch(range(len(training)))
    networks = start_network(run, base, statistics, training), load_editor(folder, base.lm)[0]
    with torch.no_grad():
        found = [terms(network, base.part, base.site, everything, None) for network in networks]
    before, after = (float(item.loss(run.config.lambda_il, run.config.beta)) for item in found)
    assert after < 0.9 * before
    assert {"rate_nats", "il_nats", "edits_per_second", "seconds_left"} <= set().union(*seen)
    lm = load_model(ground / "model", dtype="float32")
    network, manifest = load_editor(folder, lm)
    assert manifest["fingerprint"] == lm.fingerprint and network.name == manifest["module"]
    with pytest.raises(FingerprintMismatchError):
        load_editor(folder, make_tiny("llama", seed=1))


def checkpoint(out):
    """All that a run goes on from: weights, their average, the optimiser's moments, the state of the noise."""
    return load_file(out / "checkpoint.safetensors")


def logged(out):
    """The log but for what is of the clock and the machine."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    passing = ("seconds", "edits_per_second", "peak_memory_mb")
    return [{name: value for name, value in entry.items() if name not in passing} for entry in entries]


def assert_same_run(one, two):
    mine, theirs = checkpoint(one), checkpoint(two)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert logged(one) == logged(two)
    assert (one / "editor/editor.safetensors").read_bytes() == (two / "editor/editor.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(ground, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(settings(ground, tmp_path / name, seed=seed))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    mine, theirs = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "three")
    trained = [name for name in mine if name.startswith("network/") and name.endswith("weight")]
    assert trained and not any(torch.equal(mine[name], theirs[name]) for name in trained)


def test_a_run_killed_between_two_checkpoints_goes_on_exactly(ground, tmp_path):
    train(settings(ground, tmp_path / "whole"))
    script = (
        "import sys, time; from tests.test_training import settings; from ibke.training.trainer import train; "
        "from pathlib import Path; s = settings(Path(sys.argv[1]), Path(sys.argv[2])); resume = len(sys.argv) > 3; "
        "here = lambda e: not resume and (e['stage'], e.get('step')) == ('training', 10); "
        "train(s, lambda e: here(e) and (print('here', flush=True), time.sleep(600)), resume=resume)"
    )
    arguments = [sys.executable, "-c", script, str(ground), str(tmp_path / "killed")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(logged(tmp_path / "killed")) == 3  # validation at 4 and 8, and step 10, which is taken again
    with (tmp_path / "killed/log.jsonl").open("a") as log:
        log.write('{"stage": "training", "st')  # as a kill may cut a line
    finished = subprocess.run([*arguments, "resume"], capture_output=True, text=True, env=ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_rows_cut_where_an_edit_begins_are_worth_what_whole_rows_are(ground, tmp_path, monkeypatch):
    monkeypatch.setattr("ibke.training.building.KEPT", torch.float32)  # so that nothing but the cut differs
    run = settings(ground, tmp_path / "run")
    base, drawn = prepare_ground(run), draw_episodes(run)
    statistics = take_statistics(run, base, drawn[0])
    learned = replace(run, cache=str(tmp_path / "whole"), config=replace(run.config, keys="code"))
    _, cut = prepare_episodes(run, base, statistics, drawn, lambda _: None)
    _, whole = prepare_episodes(learned, base, statistics, drawn, lambda _: None)
    network = start_network(run, base, statistics, whole)
    found = {}
    for name, cache in (("cut", cut), ("whole", whole)):
        batch = cache.batch(range(len(cache)))
        with torch.no_grad():
            neurons = network.decode(network.encode(batch.written).mean, batch.written, base.site)
            rows = run_rows(base.part, base.site, neurons, batch.groups)
        order = torch.argsort(rows.kind_R * 1000 + rows.owner_R, stable=True)
        tokens = sum(group.batch.ids_RT.numel() for group in batch.groups)
        found[name] = (rows.kind_R[order], rows.nll_R[order], rows.forward_R[order], tokens)
    # Compared as sums over episodes, since prompts of one episode may change places.
    for kind in (EDIT, INSIDE, OUTSIDE):
        one, two = ((values[0] == kind) for values in found.values())
        torch.testing.assert_close(found["cut"][1][one].sum(), found["whole"][1][two].sum(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found["cut"][2][one].sum(), found["whole"][2][two].sum(), rtol=1e-3, atol=1e-3)
    assert found["cut"][2].sum() > 0.01, "no edit was in force anywhere, so nothing was compared"
    assert found["cut"][3] < found["whole"][3]


def test_training_leaves_out_what_no_edit_reaches(ground, tmp_path):
    lines = [json.loads(line) for line in (ground / "facts.jsonl").read_text().splitlines()]
    far = [json.dumps(line | {"locality": ["Water boils at"]}) + "\n" for line in lines]
    (tmp_path / "far.jsonl").write_text("".join(far))
    run = settings(ground, tmp_path / "run", data=(f"jsonl:{tmp_path / 'far.jsonl'}",))
    base, drawn = prepare_ground(run), draw_episodes(run)
    training, validation = prepare_episodes(run, base, take_statistics(run, base, drawn[0]), drawn, lambda _: None)
    count = [sum(len(shard["row_kind"]) for shard in cache.shards) for cache in (training, validation)]
    asked = [sum(1 + len(item.inside) + len(item.outside) for item in episodes) for episodes in drawn]
    assert count[0] < asked[0] and count[1] == asked[1]


def test_a_run_is_not_overwritten_and_nothing_is_resumed_from_nothing(ground, tmp_path):
    train(settings(ground, tmp_path / "run", steps=4))
    with pytest.raises(TrainingError, match="already"):
        train(settings(ground, tmp_path / "run", steps=4))
    with pytest.raises(TrainingError, match="`batch` was 4"):
        train(settings(ground, tmp_path / "run", steps=4, batch=5), resume=True)
    with pytest.raises(TrainingError, match="no run to resume"):
        train(settings(ground, tmp_path / "nowhere"), resume=True)


def test_a_damaged_editor_is_named(ground, tmp_path):
    folder = train(settings(ground, tmp_path / "run", steps=4))
    raw = (folder / "editor.safetensors").read_bytes()
    (folder / "editor.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(FormatError, match="damaged"):
        load_editor(folder, load_model(ground / "model", dtype="float32"))
    with pytest.raises(FormatError, match="no editor"):
        load_editor(tmp_path, load_model(ground / "model", dtype="float32"))


def test_every_epoch_sees_every_episode_once():
    steps = [batch_of(step, 4, 10, seed=1) for step in range(5)]
    seen = [item for chosen in steps for item in chosen]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20] and batch_of(3, 4, 10, seed=1) == steps[3]


def test_the_schedule_warms_up_and_cools_down():
    assert schedule(0, 10, 100) == pytest.approx(0.1)
    assert schedule(9, 10, 100) > 0.95
    assert schedule(100, 10, 100) == pytest.approx(0.02)


def test_relations_held_out_do_not_depend_on_anything_else():
    names = [f"r{index}" for index in range(2000)]
    share = sum(held_out(name, 0.2) for name in names) / len(names)
    assert 0.17 < share < 0.23
    assert held_out("lre:person native language", 0.2) == held_out("P103", 0.2)
    assert not any(held_out(name, 0.0) for name in names)


def test_excluded_subjects_and_prompts_stay_out(ground):
    from ibke.request import EditRequest

    split = Split(0.0, [f"jsonl:{ground / 'facts.jsonl'}"])
    assert not split.allows(EditRequest("Ada Berg plays", "chess", subject="Ada Berg"))
    assert not split.allows(EditRequest("Where does Ada Berg live?", "Rome"))
    assert split.allows(EditRequest("Zed Nova plays", "chess", subject="Zed Nova"))


def test_an_episode_is_reproducible_and_asks_other_forms(ground):
    from ibke.request import read_requests

    requests = list(read_requests(ground / "facts.jsonl"))
    maker = EpisodeMaker(3, pool=["Unrelated one", "Unrelated two"])
    episodes = [maker.make(request, "jsonl", index) for index, request in enumerate(requests)]
    assert episodes == [maker.make(request, "jsonl", index) for index, request in enumerate(requests)]
    assert all(len(episode.inside) == 2 for episode in episodes)
    # What is said of the subject can move; the other prompts of these requests cannot.
    assert all([asked.prompt for asked in e.outside] == [f"The job of {e.subject} is"] for e in episodes)
    assert all((asked.prompt, asked.frame) != (e.edit.prompt, "bare") for e in episodes for asked in e.inside)
    assert {asked.frame for episode in episodes for asked in episode.inside} == {"bare", "question", "chat"}


def test_a_run_goes_on_wherever_it_lies():
    before = {"out": "a", "cache": "b", "device": "cpu", "threads": 1, "steps": 9, "seed": 0}
    check_same(before, {**before, "out": "/x/a", "cache": "", "device": "cuda", "threads": 2, "steps": 99}, Path("a"))
    with pytest.raises(TrainingError, match="`seed` was 0 when this run began and is 1 now"):
        check_same(before, {**before, "seed": 1}, Path("a"))


def test_an_unknown_source_is_named():
    with pytest.raises(TrainingError, match="unknown data source 'wikipedia'"):
        Source.parse("wikipedia")
    for name in ("counterfact", "csv", "jsonl"):  # the folder at hand is not meant
        with pytest.raises(TrainingError, match=f"Write {name}:FILE"):
            Source.parse(name)
    with pytest.raises(TrainingError, match="Write entityquestions:FILE"):
        Split(0.2, ["entityquestions"])
    assert Source.parse("counterfact:a/b=c.json=2.5") == Source("counterfact", "a/b=c.json", 2.5)


def test_what_moves_every_answer_is_shown_prompts_of_every_kind(ground):
    from ibke.request import EditRequest, Probe

    kinds = {"same_relation": "The job of Bo Ek is", "same_subject": "Ada Berg lives in", "unrelated": "Water boils at"}
    locality = tuple(Probe(prompt, None, family) for family, prompt in kinds.items())
    request = EditRequest("The job of Ada Berg is", "baker", subject="Ada Berg", locality=locality)
    shown = EpisodeMaker(3, pool=["Another one"], everywhere=True).make(request, "jsonl", 0).outside
    assert {asked.prompt for asked in shown} == {*kinds.values(), "Another one"}


def test_relations_held_out_word_no_prompt_of_training(data_folder, monkeypatch):
    monkeypatch.setenv("IBKE_DATA", str(data_folder))
    known = {}

    def note(pool, wordings, **_):
        known.update(wordings)
        return iter(())

    monkeypatch.setattr(data_mixture, "generate", note)
    assert list(data_mixture.requests(Source.parse("pararel"), 0, 10, Split(0.2))) == []
    assert known and not any(held_out(name, 0.2) for name in known)
