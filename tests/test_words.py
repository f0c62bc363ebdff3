"""Words of running text that an editor keeps: which, and how."""

import json
from dataclasses import replace

import pytest
import torch
from tests.test_training import ground, settings  # noqa: F401

from ibke.editors.ibke import statistics
from ibke.editors.ibke.address import About, Addresser
from ibke.editors.ibke.bottleneck import Bottleneck
from ibke.editors.ibke.shipped import load_editor, shipped_folder
from ibke.editors.ibke.statistics import Common, key_spectrum, packed, unpacked
from ibke.editors.key_statistics import lines_of
from ibke.errors import FormatError
from ibke.models import load_model
from ibke.subjects import subject_of
from ibke.training import statistics as training_statistics
from ibke.training import words
from ibke.training.trainer import (
    draw_episodes,
    make_addresser,
    prepare_ground,
    take_statistics,
    train,
    with_words,
)

TEXT = [
    "Ada Berg and Bo Ruiz met in Oslo, where the old harbour has a market every Saturday until noon.",
    "In Lima a bus drove past the square; nobody knew that Cy Lund was on it, reading about Bern.",
    "The council of Riga decided that the tram should cross the river twice an hour, also at night.",
] * 8


@pytest.fixture
def text(tmp_path):
    place = tmp_path / "text.json"
    place.write_text(json.dumps([{"title": "A", "context": line} for line in TEXT]))
    return place


@pytest.fixture
def few(monkeypatch):
    """Few words are kept, so that there is something to choose."""
    for module in (statistics, training_statistics, words):
        monkeypatch.setattr(module, "COMMON", 12)


def statistics_of(run):
    base, drawn = prepare_ground(run), draw_episodes(run)
    return base, drawn, take_statistics(run, base, drawn[0])


def test_the_words_kept_are_those_that_come_near(ground, text, tmp_path, few):  # noqa: F811
    run = settings(ground, tmp_path / "run", words=str(text), cache=str(tmp_path / "cache"))
    base, drawn, found = statistics_of(run)
    kept = with_words(run, base, found, drawn[0], lambda _: None).common
    assert kept.keys_SD.shape == (12, 32) and len(kept.ids_S) == 12

    def near(common):
        """How many of some words come near to opening a training edit."""
        addresser = make_addresser(run, base, found, words.CountingAddresser, common)
        addresser.counts_S = torch.zeros(len(common.ids_S))
        addresser([About(one.edit.prompt, subject_of(one.edit.prompt, one.subject)) for one in drawn[0]])
        return float(addresser.counts_S.sum())

    assert near(kept) > 2 * near(found.seen.spread(12)) > 0


def test_the_choice_is_made_once(ground, text, tmp_path, few, monkeypatch):  # noqa: F811
    run = settings(ground, tmp_path / "run", words=str(text), cache=str(tmp_path / "cache"))
    base, drawn, found = statistics_of(run)
    stages = []
    first = with_words(run, base, found, drawn[0], lambda told: stages.append(told["stage"])).common
    assert {"reading words", "choosing words"} == set(stages)
    monkeypatch.setattr(words, "read_words", lambda *_: pytest.fail("read again"))
    again = with_words(run, base, found, drawn[0], lambda _: None).common
    assert torch.equal(first.keys_SD, again.keys_SD) and torch.equal(first.ids_S, again.ids_S)


def test_an_editor_is_trained_with_them(ground, text, tmp_path):  # noqa: F811
    run = settings(ground, tmp_path / "run", words=str(text), steps=4, cache=str(tmp_path / "cache"))
    folder = train(run)
    network, manifest = load_editor(folder, load_model(str(ground / "model"), dtype="float32"))
    base, drawn, found = statistics_of(run)
    chosen = with_words(run, base, found, drawn[0], lambda _: pytest.fail("chosen again")).common
    kept_S = network.common.ids_S >= 0
    assert manifest["training"]["words"] == str(text) and kept_S.sum() == len(chosen.ids_S) > 100
    assert torch.equal(network.common.ids_S[kept_S], chosen.ids_S)
    far = (network.common.keys_SD[kept_S] - chosen.keys_SD).norm() / chosen.keys_SD.norm()
    assert far < 0.1 and not torch.equal(chosen.ids_S, found.common.ids_S)


def test_the_shipped_editor_keeps_as_many_as_it_can(smollm32):
    network, _ = load_editor(shipped_folder(smollm32), smollm32)
    kept = network.common
    assert int((kept.ids_S >= 0).sum()) == statistics.COMMON and int(kept.ids_S.max()) < len(smollm32.tokenizer)
    # Keys of the layer: the constant is near 1 at each of them.
    assert float(((kept.keys_SD @ network.constant_D) > 0.5).float().mean()) > 0.99


def test_rows_that_hold_no_word_are_never_near(ground, tmp_path):  # noqa: F811
    run = settings(ground, tmp_path / "run")
    base, drawn, found = statistics_of(run)
    network = Bottleneck(run.config, base.site.out, 32)
    network.ground(found.spectrum, found.constant_D, found.output_scale)
    network.know(found.seen)
    network.know(found.seen.spread(5))
    assert int((network.common.ids_S >= 0).sum()) == len(found.seen.spread(5).ids_S) < statistics.COMMON
    assert not network.common.keys_SD[network.common.ids_S < 0].any()
    addresser = make_addresser(run, base, found, words.CountingAddresser, network.common)
    addresser.counts_S = torch.zeros(len(network.common.ids_S))
    asked = [About(one.edit.prompt, subject_of(one.edit.prompt, one.subject)) for one in drawn[0]]
    padded_BD = addresser(asked)
    assert float(addresser.counts_S[network.common.ids_S < 0].sum()) == 0
    # Nothing is lost on the way: with and without such rows the addresses are the same.
    assert torch.equal(padded_BD, make_addresser(run, base, found, Addresser, found.seen.spread(5))(asked))


def test_kept_as_bytes_they_answer_as_before():
    generator = torch.Generator().manual_seed(0)
    # Keys whose directions differ in size by a thousand, and addresses that tell them apart by the small ones.
    size_D = torch.logspace(-2, 1, 48)
    keys_SD = torch.randn(400, 48, generator=generator) * size_D
    spectrum = key_spectrum(keys_SD.T @ keys_SD / 400, 48)
    address_BD = torch.linalg.solve((keys_SD.T @ keys_SD / 400).double(), keys_SD[:20].double().T).T.float()
    address_BD = address_BD / (address_BD * keys_SD[:20]).sum(-1, keepdim=True)
    kept_SD = unpacked(packed(keys_SD, spectrum), spectrum)
    assert packed(keys_SD, spectrum).dtype == torch.int8
    assert float((kept_SD @ address_BD.T - keys_SD @ address_BD.T).abs().max()) < 0.02


def test_some_of_them_are_evenly_spread():
    common = Common(torch.arange(10.0)[:, None], torch.arange(10))
    assert common.spread(5).ids_S.tolist() == [0, 2, 4, 6, 8]
    assert common.spread(4).ids_S.tolist() == [0, 3, 6, 9]
    assert common.spread(20).ids_S.tolist() == list(range(10))


def test_a_json_text_gives_the_longest_text_of_each_record(text, tmp_path):
    assert [line.strip() for line in lines_of(str(text))] == TEXT
    for bad in ("{", json.dumps([{"number": 3}]), json.dumps({"a": "b"}), json.dumps(["plain"])):
        place = tmp_path / "bad.json"
        place.write_text(bad)
        with pytest.raises(FormatError, match=r"bad\.json: the text cannot be read"):
            list(lines_of(str(place)))


def test_another_text_is_another_choice(ground, text, tmp_path, few):  # noqa: F811
    run = settings(ground, tmp_path / "run", words=str(text), cache=str(tmp_path / "cache"))
    base, drawn, found = statistics_of(run)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(TEXT[:12]))
    with_words(run, base, found, drawn[0], lambda _: None)
    with_words(replace(run, words=str(other)), base, found, drawn[0], lambda _: None)
    assert len(list((tmp_path / "cache").glob("words-*.safetensors"))) == 2
