"""Words of running text that an editor keeps: which, and how."""

import json
from dataclasses import replace

import pytest
import torch
from tests.test_training import ground, settings  # noqa: F401

from ibke.editors.ibke import statistics
from ibke.editors.ibke.address import Addresser
from ibke.editors.ibke.bottleneck import Bottleneck
from ibke.editors.ibke.contexts import About
from ibke.editors.ibke.shipped import load_editor, shipped_folder
from ibke.editors.ibke.statistics import ANY, Common, key_spectrum, packed, unpacked
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
    assert kept.keys_SD.shape == (12, 32) and len(kept.ids_S2) == 12

    def near(common):
        """How many of some words come near to opening a training edit."""
        addresser = make_addresser(run, base, found, words.CountingAddresser, common)
        addresser.counts_S = torch.zeros(len(common.ids_S2))
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
    assert torch.equal(first.keys_SD, again.keys_SD) and torch.equal(first.ids_S2, again.ids_S2)


def test_an_editor_is_trained_with_them(ground, text, tmp_path):  # noqa: F811
    run = settings(ground, tmp_path / "run", words=str(text), steps=4, cache=str(tmp_path / "cache"))
    folder = train(run)
    network, manifest = load_editor(folder, load_model(str(ground / "model"), dtype="float32"))
    base, drawn, found = statistics_of(run)
    chosen = with_words(run, base, found, drawn[0], lambda _: pytest.fail("chosen again")).common
    kept_S = network.common.ids_S2[:, 1] >= 0
    assert manifest["training"]["words"] == str(text) and kept_S.sum() == len(chosen.ids_S2) > 100
    assert torch.equal(network.common.ids_S2[kept_S], chosen.ids_S2)
    far = (network.common.keys_SD[kept_S] - chosen.keys_SD).norm() / chosen.keys_SD.norm()
    assert far < 0.1 and not torch.equal(chosen.ids_S2, found.common.ids_S2)


def test_the_shipped_editor_keeps_as_many_as_it_can(smollm32):
    network, _ = load_editor(shipped_folder(smollm32), smollm32)
    kept = network.common
    assert int((kept.ids_S2 >= 0).sum()) == 2 * statistics.COMMON and int(kept.ids_S2.max()) < len(smollm32.tokenizer)
    # Keys of the layer: the constant is near 1 at each of them.
    assert float(((kept.keys_SD @ network.constant_D) > 0.5).float().mean()) > 0.99


def test_a_text_of_no_row_is_refused(ground, tmp_path):  # noqa: F811
    (tmp_path / "short.txt").write_text("Only this.")
    run = settings(ground, tmp_path / "run", words=str(tmp_path / "short.txt"), cache=str(tmp_path / "cache"))
    with pytest.raises(FormatError, match="not even one row"):
        with_words(run, *statistics_of(run)[::2], draw_episodes(run)[0], lambda _: None)


def test_rows_that_hold_no_word_are_never_near(ground, tmp_path):  # noqa: F811
    run = settings(ground, tmp_path / "run")
    base, drawn, found = statistics_of(run)
    network = Bottleneck(run.config, base.site.out, 32)
    network.ground(found.spectrum, found.constant_D, found.output_scale)
    network.know(found.seen)
    network.know(found.seen.spread(5))
    filled_S = network.common.ids_S2[:, 1] >= 0
    assert int(filled_S.sum()) == len(found.seen.spread(5).ids_S2) < statistics.COMMON
    assert not network.common.keys_SD[~filled_S].any()
    addresser = make_addresser(run, base, found, words.CountingAddresser, network.common)
    addresser.counts_S = torch.zeros(len(network.common.ids_S2))
    asked = [About(one.edit.prompt, subject_of(one.edit.prompt, one.subject)) for one in drawn[0]]
    padded_BD = addresser(asked)
    assert float(addresser.counts_S[~filled_S].sum()) == 0
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
    common = Common(torch.arange(10.0)[:, None], torch.arange(20).view(10, 2))
    assert common.spread(5).ids_S2[:, 1].tolist() == [1, 5, 9, 13, 17]
    assert common.spread(4).keys_SD[:, 0].tolist() == [0, 3, 6, 9]
    assert torch.equal(common.spread(20).ids_S2, common.ids_S2)


def test_words_that_end_as_a_subject_does_are_known_by_two_tokens():
    common = Common(torch.zeros(4, 1), torch.tensor([[5, 7], [6, 7], [7, 5], [-1, -1]]))
    assert common.ends(torch.tensor([[5, 7]])).tolist() == [True, False, False, False]
    assert common.ends(torch.tensor([[5, 7], [8, 8], [7, 5], [5, 7]])).tolist() == [True, False, True, False]
    assert common.ends(torch.tensor([[ANY, 7]])).tolist() == [True, True, False, False]  # a subject of one token


def test_a_word_of_the_text_has_the_one_before_it_beside_it(ground, text, tmp_path, few):  # noqa: F811
    run = settings(ground, tmp_path / "run", words=str(text))
    base, _, found = statistics_of(run)
    read = words.read_words(make_addresser(run, base, found, Addresser, found.seen), str(text), lambda *_: None)
    line = base.lm.tokenizer("".join(lines_of(str(text))), add_special_tokens=False).input_ids
    follows = set(zip(line, line[1:], strict=False))
    pairs = {tuple(pair) for pair in read.ids_S2.tolist()}
    assert len(pairs) > 50 and len(pairs & follows) / len(pairs) > 0.9  # rows are cut line by line


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
