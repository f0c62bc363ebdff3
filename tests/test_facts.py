"""Facts become edit requests that are well worded, consistent with the table, and the same for the same seed."""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path

import pytest

from ibke.data.fact_table import FactTable, same
from ibke.data.facts import FactRequest, generate
from ibke.data.relations import KINDS, fill, fits, load_wordings
from ibke.data.triples import (
    Skips,
    Triple,
    read_csv,
    read_entityquestions,
    read_facts,
    read_lre,
    read_pararel,
    shared_ends,
)
from ibke.errors import FormatError

DATA = Path(os.environ.get("IBKE_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "facts").is_dir(), reason="no research data: set IBKE_DATA to the folder that holds it"
)

ROWS = """subject,relation,object
Norway,facts:country_capital,Oslo
Peru,facts:country_capital,Lima
Kenya,facts:country_capital,Nairobi
Japan,facts:country_capital,Tokyo
Netherlands,facts:country_capital,Amsterdam
Norway,facts:country_currency,Krone
Peru,facts:country_currency,Sol
Kenya,facts:country_currency,Shilling
Japan,facts:country_currency,Yen
Norway,facts:country_borders,Sweden
Norway,facts:country_borders,Finland
Kenya,facts:country_borders,Uganda
Ada Berg,P27,Norway
Rosa Quispe,P27,Peru
Wanjiru Otieno,P27,Kenya
Ada Berg,P19,Oslo
Rosa Quispe,P19,Lima
Wanjiru Otieno,P19,Nairobi
"""


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    path = tmp_path / "facts.csv"
    path.write_text(ROWS, encoding="utf-8")
    return path


@pytest.fixture
def requests(csv_file: Path) -> list[FactRequest]:
    return list(generate(read_csv(csv_file), load_wordings(), seed=3))


def prompts(made: FactRequest) -> list[str]:
    request = made.request
    probes = (*request.locality, *request.portability)
    return [request.prompt, *request.rephrase_prompts, *(probe.prompt for probe in probes)]


def test_every_fact_becomes_a_complete_request(requests: list[FactRequest]) -> None:
    assert len(requests) == len(ROWS.splitlines()) - 1
    for made in requests:
        texts = prompts(made)
        assert len(made.request.rephrase_prompts) == 3
        assert sorted(made.kinds) == sorted(set(texts)), "each prompt occurs once and has a kind"
        assert set(made.kinds.values()) <= set(KINDS)
        assert all("{}" not in text and "  " not in text for text in texts)
        families = [probe.family for probe in made.request.locality]
        assert families.count("same_subject") == 2
        assert families.count("unrelated") == 1
        assert made.request.subject in made.request.prompt


def test_targets_are_another_subjects_answer_or_the_truth(csv_file: Path, requests: list[FactRequest]) -> None:
    table = FactTable(read_csv(csv_file), load_wordings())
    for made in requests:
        request = made.request
        assert request.target_new in table.objects[made.relation]
        own = table.all_objects(made.relation, request.subject or "")
        if request.target_true is None:
            assert request.target_new in own
        else:
            assert request.target_true in own
            assert not any(same(request.target_new, obj) for obj in own)


def test_about_a_tenth_keeps_the_true_object(csv_file: Path) -> None:
    triples, wordings = list(read_csv(csv_file)), load_wordings()
    made = list(chain.from_iterable(generate(triples, wordings, seed=seed) for seed in range(40)))
    share = sum(one.request.target_true is None for one in made) / len(made)
    assert 0.05 < share < 0.15


def test_same_relation_probes_never_expect_the_new_object(requests: list[FactRequest]) -> None:
    probes = [(made, p) for made in requests for p in made.request.locality if p.family == "same_relation"]
    assert probes
    for made, probe in probes:
        assert probe.target != made.request.target_new
        if made.relation == "facts:country_borders":
            assert probe.target is None, "a country has many neighbours: none of them is the answer"


def test_one_hop_consequences_follow_the_new_object(csv_file: Path) -> None:
    """Whoever becomes a citizen of Peru pays in soles, whatever country it was before."""
    currency = {"Norway": "Krone", "Peru": "Sol", "Kenya": "Shilling"}
    capital = {"Norway": "Oslo", "Peru": "Lima", "Kenya": "Nairobi"}
    triples, wordings = list(read_csv(csv_file)), load_wordings()
    checked = 0
    for made in chain.from_iterable(generate(triples, wordings, seed=seed) for seed in range(5)):
        for probe in made.request.portability:
            assert made.relation == "P27"
            assert "home country of " in probe.prompt
            assert probe.target in (currency[made.request.target_new], capital[made.request.target_new])
            checked += 1
    assert checked > 10


def test_the_same_seed_gives_the_same_requests_and_limit_only_cuts(csv_file: Path) -> None:
    triples, wordings = list(read_csv(csv_file)), load_wordings()
    first = list(generate(triples, wordings, seed=1))
    assert first == list(generate(triples, wordings, seed=1))
    assert first[:4] == list(generate(triples, wordings, seed=1, limit=4))
    assert first != list(generate(triples, wordings, seed=2))
    one_each = list(generate(triples, wordings, seed=1, per_relation=1))
    assert len(one_each) == len({made.relation for made in one_each}) == 5


def test_an_own_relation_with_its_own_wordings(tmp_path: Path) -> None:
    table = tmp_path / "tools.csv"
    table.write_text("object,subject,relation\nrack 4,valve 7,shelf\nrack 9,pump 2,shelf\n", encoding="utf-8")
    words = tmp_path / "words.json"
    own = {"shelf": {"statements": ["The {} is kept on"], "questions": ["Where is the {}?"]}}
    words.write_text(json.dumps(own), encoding="utf-8-sig")  # as some editors write
    made = list(generate(read_csv(table), load_wordings(words), seed=0))
    assert {one.request.subject for one in made} == {"valve 7", "pump 2"}
    assert {one.request.prompt for one in made} <= {
        "The valve 7 is kept on",
        "Where is the valve 7?",
        "The pump 2 is kept on",
        "Where is the pump 2?",
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (",P36,Oslo", "blank subject or object"),
        ("Norway,P36,", "blank subject or object"),
        (f"{'very ' * 12}long,P36,Oslo", "subject or object of more than 12 words"),
        ("Norway", "malformed record"),
    ],
)
def test_records_that_do_not_fit_are_named_or_counted(tmp_path: Path, row: str, reason: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"subject,relation,object\nPeru,P36,Lima\n{row}\n", encoding="utf-8")
    with pytest.raises(FormatError, match=f"bad.csv, record 3: {reason}"):
        list(read_csv(path))
    skips = Skips()
    assert list(read_csv(path, skips)) == [Triple("Peru", "P36", "Lima", "csv:bad.csv")]
    assert sum(skips.counts.values()) == 1
    assert [where for places in skips.examples.values() for where in places] == [f"{path}, record 3"]


def test_facts_without_wordings_or_alternatives_are_counted() -> None:
    triples = [Triple("a", "no such relation", "b", "x"), Triple("Norway", "P36", "Oslo", "x")]
    with pytest.raises(FormatError, match="no wordings for relation"):
        list(generate(triples, load_wordings(), seed=0))
    skips = Skips()
    made = list(generate(triples, load_wordings(), seed=0, skips=skips))
    assert len(made) + skips.counts["no other object in relation P36"] == 1
    assert skips.counts["no wordings for relation no such relation"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ('{"r": {"statement": ["{} is"]}}', "unknown field 'statement'"),
        ('{"r": {"statements": "{} is"}}', "not a list of texts"),
        ('{"r": {"statements": ["it is"]}}', "no single {} for the subject"),
        ('{"r": {"label": "nothing"}}', "no wording at all"),
    ],
)
def test_bad_wordings_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "words.json"
    path.write_text(text)
    with pytest.raises(FormatError, match="words.json") as caught:
        load_wordings(path)
    assert message in str(caught.value)


def test_a_csv_without_its_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("subject,object\na,b\n")
    with pytest.raises(FormatError, match="`relation`"):
        list(read_csv(path))
    with pytest.raises(FormatError, match="cannot be read"):
        list(read_csv(tmp_path / "absent.csv"))


@pytest.mark.parametrize(
    ("template", "subject", "place", "text"),
    [
        ("The capital of {} is", "Netherlands", True, "The capital of the Netherlands is"),
        ("{} borders", "The Netherlands", True, "The Netherlands borders"),
        ("{} lies in", "United States of America", True, "The United States of America lies in"),
        ("Who founded {}?", "Union", True, "Who founded Union?"),
        ("Who sings {}?", "Who Are You?", False, "Who sings Who Are You?"),
        ("The fans of the {} like", "The Beatles", False, "The fans of the Beatles like"),
        ("A {} is a kind of", "eagle", False, "An eagle is a kind of"),
        ("{} are, on the inside,", "bananas", False, "Bananas are, on the inside,"),
        ("{} was made by", "iOS 8", False, "iOS 8 was made by"),
        ("We asked. {} lies in", "the capital of Peru", False, "We asked. The capital of Peru lies in"),
    ],
)
def test_subjects_are_written_as_people_would(template: str, subject: str, place: bool, text: str) -> None:
    assert fill(template, subject, place=place) == text


def test_kinds_fit_upward_only() -> None:
    assert fits("city", "place")
    assert fits("city", "city")
    assert not fits("place", "city")
    assert not fits("person", "place")


def test_names_that_may_mean_the_same() -> None:
    assert same("The Hague", "hague")
    assert same("Washington", "Washington, D.C.")
    assert not same("Nigeria", "Niger")


@needs_data
def test_every_source_yields_requests() -> None:
    wordings = load_wordings(templates_from=DATA)
    readers = {
        "facts": read_facts,
        "pararel": read_pararel,
        "lre": read_lre,
        "entityquestions": lambda data, skips: read_entityquestions(data, "dev", skips),
    }
    for name, read in readers.items():
        skips = Skips()
        made = list(generate(read(DATA, skips), wordings, seed=0, limit=60, skips=skips))
        assert len(made) == 60, name
        assert len({one.relation for one in made}) > 20, name
        assert all(one.source.startswith(name) for one in made)


def test_what_questions_share_may_stand_at_either_end() -> None:
    towns = ("Paris", "Rome", "Oslo")
    assert shared_ends([f"Where is {town}?" for town in towns]) == ("Where is ", "?")
    assert shared_ends([f"{town} is where?" for town in towns]) == ("", " is where?")


@needs_data
def test_entityquestions_subjects_are_recovered() -> None:
    skips = Skips()
    triples = set(read_entityquestions(DATA, "dev", skips))
    path = DATA / "entityquestions" / "dev" / "P36.dev.json"
    for record in json.loads(path.read_text(encoding="utf-8"))[:50]:
        subject = record["question"].removeprefix("What is the capital of ").removesuffix("?")
        assert Triple(subject, "P36", record["answers"][0], "entityquestions:dev") in triples
    assert sum(skips.counts.values()) < 0.01 * len(triples)
