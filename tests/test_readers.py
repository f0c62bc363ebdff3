"""Benchmark files become edit requests, and nothing of them is lost without being named."""

import json
from pathlib import Path
from typing import Any

import pytest

from ibke.data.readers import READERS, Skipped, question_form, read
from ibke.errors import RequestError
from ibke.request import Probe

COUNTERFACT = {
    "prompt": "The capital of Freedonia is",
    "target_new": "Lisbon",
    "subject": "Freedonia",
    "ground_truth": "Fredville",
    "rephrase_prompt": "Freedonia is governed from",
    "locality_prompt": "The capital of Sylvania is",
    "locality_ground_truth": "Bela",
}
ZSRE = {
    "subject": "Freedonia",
    "src": "What is the capital of Freedonia?",
    "pred": "Bela",
    "rephrase": "Which city is Freedonia's capital?",
    "alt": "Lisbon",
    "answers": ["Fredville", "Fred Town"],
    "loc": "nq question: who sang the anthem",
    "loc_ans": "A choir",
}
KNOWEDIT = {
    "subject": "Freedonia",
    "prompt": "The name of the capital city of Freedonia is",
    "target_new": "Lisbon",
    "ground_truth": "Fredville",
    "portability": {
        "Reasoning": [{"prompt": "The river of Freedonia's capital is", "ground_truth": [["Tagus", "Tejo"]]}],
        "Subject_Aliasing": [
            {"prompt": "The name of the capital city of Free Land is", "ground_truth": [["lisbon"]]},
            {"prompt": "The largest town of Free Land is", "ground_truth": "Porto"},
        ],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The anthem of Freedonia is", "ground_truth": [[]]}],
        "Forgetfulness": [{"prompt": "A capital of Freedonia that is not Lisbon is", "ground_truth": "Fredville"}],
    },
}


def write(folder: Path, records: Any) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_counterfact_fields(tmp_path: Path) -> None:
    (request,) = read(write(tmp_path, [COUNTERFACT]), "counterfact")
    assert (request.prompt, request.target_new, request.target_true) == (COUNTERFACT["prompt"], "Lisbon", "Fredville")
    assert request.rephrase_prompts == ("Freedonia is governed from",)
    assert request.locality == (Probe("The capital of Sylvania is", "Bela", "same_relation"),)


def test_zsre_query_loses_its_prefix_and_gains_a_question_mark(tmp_path: Path) -> None:
    (request,) = read(write(tmp_path, [ZSRE]), "zsre")
    assert request.locality == (Probe("who sang the anthem?", "A choir", "unrelated"),)
    assert (request.target_new, request.target_true) == ("Lisbon", "Fredville")


def test_knowedit_families_aliases_and_first_answers(tmp_path: Path) -> None:
    (request,) = read(write(tmp_path, [KNOWEDIT]), "knowedit")
    assert request.rephrase_prompts == ("The name of the capital city of Free Land is",)
    assert [(p.family, p.target) for p in request.portability] == [
        ("one_hop", "Tagus"),
        ("alias", "lisbon"),
        ("alias", "Porto"),
    ]
    assert [(p.family, p.target) for p in request.locality] == [("same_subject", None), ("forgetfulness", "Fredville")]


def test_knowedit_without_alias_is_asked_as_a_question(tmp_path: Path) -> None:
    (request,) = read(write(tmp_path, [{**KNOWEDIT, "portability": {}}]), "knowedit")
    assert request.rephrase_prompts == ("What is the name of the capital city of Freedonia?",)


@pytest.mark.parametrize(
    ("statement", "question"),
    [
        ("The names of the cast members of Duck Soup are", "What are the names of the cast members of Duck Soup?"),
        ("The number of children Rufus has is", "What is the number of children Rufus has?"),
        ("Monday follows", "What does Monday follow?"),
        ("Monday is followed by", "What is Monday followed by?"),
        ("Freedonia borders", None),
    ],
)
def test_question_form(statement: str, question: str | None) -> None:
    assert question_form(statement) == question


FAULTS = [
    ("alt is blank", {**ZSRE, "alt": " "}, "`alt` is empty."),
    ("src is missing", {k: v for k, v in ZSRE.items() if k != "src"}, "`src` is missing."),
    ("rephrase is a list", {**ZSRE, "rephrase": ["a"]}, "`rephrase` is no text but list."),
    ("subject is elsewhere", {**ZSRE, "subject": "Sylvania"}, "the subject 'Sylvania' does not occur"),
    ("no object", 7, "`record` is no object but int."),
]


@pytest.mark.parametrize(("record", "why"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_faulty_record_is_named_and_the_others_are_kept(tmp_path: Path, record: Any, why: str) -> None:
    path = write(tmp_path, [ZSRE, record, ZSRE])
    skipped: list[Skipped] = []
    assert len(list(read(path, "zsre", skipped))) == 2
    assert [item.where for item in skipped] == [f"{path}, record 1"]
    assert skipped[0].why.startswith(why)
    with pytest.raises(RequestError, match="record 1"):
        list(read(path, "zsre"))


def test_faulty_knowedit_groups_are_named(tmp_path: Path) -> None:
    for portability in (["text"], {"Reasoning": {"a": 1}}, {"Guess": []}, {"Reasoning": ["a"]}, {"Reasoning": [{}]}):
        skipped: list[Skipped] = []
        records = [KNOWEDIT, {**KNOWEDIT, "portability": portability}]
        requests = list(read(write(tmp_path, records), "knowedit", skipped))
        assert (len(requests), len(skipped)) == (1, 1), portability


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "no list of records"), ("[]", "no list of records"), ("[{]", "not valid JSON"), ("[1, 2]", "no record")],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    for name in ("counterfact", "zsre", "knowedit"):
        with pytest.raises(RequestError, match=message):
            list(read(path, name, []))


def test_missing_file_and_unknown_format(tmp_path: Path) -> None:
    for name in READERS:
        with pytest.raises(RequestError, match="cannot be read"):
            list(read(tmp_path / "none", name))
    with pytest.raises(RequestError, match="Did you mean 'zsre'"):
        read(tmp_path / "none", "zsrre")


def test_jsonl_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "A", "target_new": "B"}\n{"prompt": "A"}\n')
    requests = read(path, "jsonl")
    assert next(requests).target_new == "B"
    with pytest.raises(RequestError, match=r"line 2.*'target_new' is missing"):
        next(requests)


@pytest.mark.parametrize(
    ("name", "file", "kept", "lost"),
    [
        ("counterfact", "counterfact/counterfact-val.json", 1919, 0),
        ("zsre", "zsre/zsre_mend_train-1k.json", 998, 2),
        ("knowedit", "knowedit/recent_train.json", 570, 0),
        ("knowedit", "knowedit/train_cf.json", 1428, 0),
    ],
)
def test_the_public_files_are_read_whole(data_folder: Path, name: str, file: str, kept: int, lost: int) -> None:
    skipped: list[Skipped] = []
    requests = list(read(data_folder / file, name, skipped))
    assert (len(requests), len(skipped)) == (kept, lost)
    # Every record can be scored for generality; what a record has no probe for is not scored for locality.
    assert all(request.rephrase_prompts for request in requests)
