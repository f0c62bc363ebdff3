"""Benchmark files become edit requests, and nothing of them is lost without being named."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.reader_records import RECORDS, query, ripple_test

from ibke.data.readers import READERS, Skipped, count_reasons, files, read, titles
from ibke.data.readers.knowedit import question_form
from ibke.data.readers.rippleedits import rippleedits
from ibke.errors import RequestError
from ibke.request import EditRequest, Probe

ZSRE = RECORDS["zsre"]["MEND"]


DOCS = Path(__file__).parents[1] / "docs" / "data.md"


def write(folder: Path, text: str, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# --- records and what is wrong with them


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


def test_faults_are_named_and_counted_by_what_is_wrong(tmp_path: Path) -> None:
    faulty = [
        {**ZSRE, "alt": " "},
        {**ZSRE, "subject": "Sylvania"},
        7,
        {**ZSRE, "alt": ""},
        {**ZSRE, "rephrase": ["a"]},
    ]
    path = write(tmp_path, json.dumps([ZSRE, *faulty, ZSRE]))
    skipped: list[Skipped] = []
    assert len(list(read(path, "zsre", skipped))) == 2
    assert skipped[1] == (f"{path}, record 2", "subject", "`subject` does not occur in the prompt.")
    assert count_reasons(skipped) == {
        "`alt` is empty.": 2,
        "`subject` does not occur in the prompt.": 1,
        "`rephrase` is no text but list.": 1,
        "`record` is no object but int.": 1,
    }
    with pytest.raises(RequestError, match="record 1: `alt` is empty"):
        list(read(path, "zsre"))


@pytest.mark.parametrize(
    ("portability", "field"),
    [
        (["text"], "portability"),
        ({"Reasoning": {"a": 1}}, "portability.Reasoning"),
        ({"Guess": []}, "portability.Guess"),
        ({"Reasoning": ["a"]}, "portability.Reasoning"),
        ({"Reasoning": [{}]}, "portability.Reasoning.prompt"),
    ],
)
def test_faulty_knowedit_groups_are_named(tmp_path: Path, portability: Any, field: str) -> None:
    good = RECORDS["knowedit"]["WikiData"]
    skipped: list[Skipped] = []
    path = write(tmp_path, json.dumps([good, {**good, "portability": portability}]))
    assert len(list(read(path, "knowedit", skipped))) == 1
    assert [item.field for item in skipped] == [field]


def test_a_question_that_nothing_can_answer_is_left_out_by_name(tmp_path: Path) -> None:
    unanswered = {"Reasoning": [{"prompt": "The river of Freedonia's capital is", "ground_truth": [[]]}]}
    path = write(tmp_path, json.dumps([{**RECORDS["knowedit"]["WikiData"], "portability": unanswered}]))
    skipped: list[Skipped] = []
    (request,) = read(path, "knowedit", skipped)
    assert request.portability == ()
    assert request.rephrase_prompts == ("What is the name of the capital city of Freedonia?",)
    assert [item.field for item in skipped] == ["portability.Reasoning"]


# --- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "holds no record"),
        ("[]", "holds no record"),
        ("", "no list of records"),
        ("7", "no list of records"),
        ("[{]", "not valid JSON from record 0"),
        ('[{"a": 1}, {"a"', "not valid JSON from record 1"),
        ('[{"a": 1} {"a": 1}]', "not valid JSON from record 1"),
        ('{"a": {}, 7: {}}', "not valid JSON from record 1"),
        ('[{"a": {}}] [{"a": {}}]', r"goes on after its closing \]"),
        ('{"a": {}} 7', "goes on after its closing }"),
        ("[7, " + "[" * 5000, "nested too deeply from record 1"),
        ('{"a": 1}\n' + "[" * 5000, "no record has the shape"),
        ("[1, 2]", "no record has the shape"),
        ('[{"a": 1}]', "no record has the shape"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, content)
    for name in RECORDS:
        with pytest.raises(RequestError, match=message):
            list(read(path, name, []))


def test_missing_files_unknown_formats_and_empty_folders(tmp_path: Path) -> None:
    for name in READERS:
        with pytest.raises(RequestError, match="cannot be read"):
            list(read(tmp_path / "none", name))
    with pytest.raises(RequestError, match="Did you mean 'zsre'"):
        read(tmp_path / "none", "zsrre")
    with pytest.raises(RequestError, match="has no file"):
        list(read(tmp_path, "zsre"))
    (tmp_path / "latin.json").write_bytes(b'[{"src": "\xe9"}]')
    with pytest.raises(RequestError, match="not UTF-8"):
        list(read(tmp_path / "latin.json", "zsre"))


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name, layouts in RECORDS.items() for layout in layouts if name != "uniedit"],
)
def test_one_line_is_a_record_and_not_an_object_of_them(tmp_path: Path, name: str, layout: str) -> None:
    record = RECORDS[name][layout]
    alone, listed, keyed = (
        [request.prompt for request in read(write(tmp_path, json.dumps(content)), name)]
        for content in (record, [record], {"0": record})
    )
    assert alone == listed == keyed


@given(
    values=st.lists(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner)), min_size=1),
    keyed=st.booleans(),
    indent=st.sampled_from([None, 1]),
    chunk=st.integers(1, 40),
)
def test_records_are_the_same_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], keyed: bool, indent: int | None, chunk: int
) -> None:
    content = {f"k{i} {{": {"value": value} for i, value in enumerate(values)} if keyed else values
    path = write(tmp_path_factory.mktemp("cut"), json.dumps(content, indent=indent, ensure_ascii=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", chunk)
        found = [(place.key, value) for place, value in files.records(path)]
    assert found == (list(content.items()) if isinstance(content, dict) else list(enumerate(values)))


def test_a_long_array_is_read_a_record_at_a_time(tmp_path: Path) -> None:
    path, record = tmp_path / "data.json", json.dumps({**ZSRE, "cond": "x" * 2000})
    with path.open("w") as out:
        out.write("[" + ",".join([record] * 8000) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read(path, "zsre"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 8000
    assert peak < path.stat().st_size / 2  # 18 MB of file; a few chunks of a million characters in memory


# --- people's own files


def test_values_nested_too_deeply_are_named(tmp_path: Path) -> None:
    deep = "[" * 5000
    for name, text in (("jsonl", deep), ("csv", f"prompt,target_new,locality\nA,B,{deep}\n")):
        with pytest.raises(RequestError, match="line 1: not valid JSON|row 2: `locality` is not"):
            list(read(write(tmp_path, text, "requests"), name))


def test_jsonl_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "A", "target_new": "B", "case": "c"}\n{"prompt": "A"}\n', "requests.jsonl")
    requests = read(path, "jsonl")
    first = next(requests)
    assert (first.target_new, first.case, first.to_dict()["case"]) == ("B", "c", "c")
    with pytest.raises(RequestError, match=r"line 2.*'target_new' is missing"):
        next(requests)


def test_a_request_takes_lists_and_texts_as_files_do() -> None:
    request = EditRequest(
        "x", "y", rephrase_prompts=["a"], locality=["b", Probe("c", "d")], portability=[{"prompt": "e"}]
    )
    assert request.rephrase_prompts == ("a",) and request.portability == (Probe("e"),)
    assert request.locality == (Probe("b"), Probe("c", "d")) and isinstance(hash(request), int)
    for wrong in ({"rephrase_prompts": "a"}, {"locality": "b"}, {"locality": [3]}, {"portability": [{"text": "e"}]}):
        with pytest.raises(RequestError, match=f"`{next(iter(wrong))}`"):
            EditRequest("x", "y", **wrong)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({"prompt": "x", "target": 5}, "`target` is no text but int"),
        ({"prompt": "x", "target": "y", "family": ["a"]}, "`family` is no text but list"),
        ({"prompt": " "}, "empty prompt"),
        ({"prompt": "x\ud83d"}, "half a character"),
        ({"prompt": "x", "target": "\ude00"}, "half a character"),
        ({"prompt": "x", "target": "y", "family": "\ud83d"}, "half a character"),
    ],
)
def test_faulty_probes_are_named(tmp_path: Path, probe: dict[str, Any], message: str) -> None:
    record = {"prompt": "A", "target_new": "B", "portability": [probe]}
    with pytest.raises(RequestError, match=f"line 1: `portability`: .*{message}"):
        list(read(write(tmp_path, json.dumps(record), "requests.jsonl"), "jsonl"))


@pytest.mark.parametrize("field", ["target_true", "subject", "case"])
def test_half_a_character_is_refused_in_every_text(tmp_path: Path, field: str) -> None:
    record = {"prompt": "A\ud83d" if field == "subject" else "A", "target_new": "B", field: "\ud83d"}
    with pytest.raises(RequestError, match=r"line 1: it is no valid Unicode: '\\ud83d' is half a character"):
        list(read(write(tmp_path, json.dumps(record), "requests.jsonl"), "jsonl"))
    whole = json.dumps({"prompt": "A \U0001f600", "target_new": "B", field: "\U0001f600"})
    (request,) = read(write(tmp_path, whole, "requests.jsonl"), "jsonl")
    assert getattr(request, field) == "\U0001f600"


@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_a_portability_prompt_without_an_answer_is_named_and_no_fault(tmp_path: Path, name: str) -> None:
    probes = ["Q", {"prompt": "R", "target": "S"}, {"prompt": "T", "target": " "}]
    line = json.dumps({"prompt": "A", "target_new": "B", "portability": probes})
    cell = json.dumps(probes).replace('"', '""')
    content = {"jsonl": f"\n{line}\n", "csv": f'prompt,target_new,portability\nA,B,"{cell}"\n'}[name]
    path, skipped = write(tmp_path, content, f"requests.{name}"), list[Skipped]()
    assert list(read(path, name)) == list(read(path, name, skipped))
    where = f"{path}, {'line' if name == 'jsonl' else 'row'} 2"
    assert skipped == [Skipped(where, "portability", "`portability` asks a question without an answer.")] * 2


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (request,) = read(write(tmp_path, '\ufeff{"prompt": "A", "target_new": "B"}', "requests.jsonl"), "jsonl")
    assert request.prompt == "A"


CSV = """\ufeffprompt,target_new,subject,rephrase_prompts,locality,portability
The capital of Freedonia is,Lisbon,Freedonia,Freedonia is governed from | Its capital is,The capital of Sylvania is,
"Freedonia's anthem,",Hail,,"[""One, two"", ""3 | 4""]","[{""prompt"": ""P"", ""target"": ""T"", ""family"": ""F""}]",
"""


def test_the_examples_of_the_documentation_can_be_read(tmp_path: Path) -> None:
    blocks = dict(re.findall(r"```(json|csv)\n(.+?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL))
    (one,) = read(write(tmp_path, blocks["json"].replace("\n", " "), "requests.jsonl"), "jsonl")
    same, anthem = read(write(tmp_path, blocks["csv"], "requests.csv"), "csv")
    assert one.prompt == same.prompt and one.rephrase_prompts == same.rephrase_prompts[:1]
    assert len(same.rephrase_prompts) == 2 and anthem.locality[0].family == "same_subject"


def test_csv_fields_and_lists(tmp_path: Path) -> None:
    first, second = read(write(tmp_path, CSV, "requests.csv"), "csv")
    assert (first.prompt, first.target_new, first.subject) == ("The capital of Freedonia is", "Lisbon", "Freedonia")
    assert first.rephrase_prompts == ("Freedonia is governed from", "Its capital is")
    assert first.locality == (Probe("The capital of Sylvania is"),)
    assert second.subject is None and second.portability == ()
    assert second.rephrase_prompts == ("One, two", "3 | 4")
    assert second.locality == (Probe("P", "T", "F"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,target\nA,B\n", "unknown column 'target'.*Known: prompt, target_new"),
        ("prompt,target_new\nA,B\nA,\n", "row 3: field 'target_new' is missing"),
        ("prompt,target_new\nA,B,C\n", "row 2: has more cells"),
        ("prompt,target_new,locality\nA,B,[1\n", "row 2: `locality` is not a valid JSON array"),
        ("prompt,target_new,locality\nA,B,[1]\n", "row 2: an entry of `locality`"),
        ("prompt,target_new,subject\nA,B,C\n", "row 2: the subject 'C' does not occur"),
        ('prompt,target_new\n"A,B\n', "cannot be read"),
    ],
)
def test_csv_names_row_and_field(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        list(read(write(tmp_path, content, "requests.csv"), "csv"))


# --- EntityQuestions

NAMES = ("Freedonia", "Sylvania", "Florin", "Guilder", "Ruritania", "Genovia", "Lilliput", "Brobdingnag")
CAPITALS = {name: f"Port {name[:3]}" for name in NAMES}


def test_entityquestions_gives_every_subject_anothers_answer(tmp_path: Path) -> None:
    records = [{"question": f"What is the capital of {name}?", "answers": [city]} for name, city in CAPITALS.items()]
    twice = {"question": "What is the capital of Florin?", "answers": ["Port Gui"]}
    path = write(tmp_path, json.dumps([*records, twice, {"question": "Who?"}, 7]), "P36.dev.json")
    write(tmp_path, json.dumps([{"question": f"Which Q of {r}?", "answers": ["S"]} for r in "RT"]), "P99999.dev.json")
    write(tmp_path, "[]", "other.json")
    skipped: list[Skipped] = []
    requests = list(read(tmp_path, "entityquestions", skipped))
    assert {request.subject: request.target_true for request in requests} == CAPITALS
    for request in requests:
        assert request.prompt == f"What is the capital of {request.subject}?"
        assert request.target_new in CAPITALS.values() and request.target_new != request.target_true
        assert len(request.rephrase_prompts) == 4 and request.prompt not in request.rephrase_prompts
        assert [probe.family for probe in request.locality][:2] == ["same_relation"] * 2
    # The first answer of the first record is the old one; every answer of a subject counts as true.
    assert next(item for item in requests if item.subject == "Florin").target_new != "Port Gui"
    assert {(item.where.split(", ")[1], item.field): item.why for item in skipped if "P36" in item.where} == {
        ("record 8", "question"): "`question` is asked twice.",
        ("record 9", "answers"): "`answers` is missing.",
        ("record 10", "record"): "`record` is no object but int.",
    }
    assert sum("without wordings" in item.why for item in skipped) == 2
    # The seed is fixed.
    assert list(read(path, "entityquestions", [])) == list(read(path, "entityquestions", []))


@pytest.mark.parametrize("content", ["[]", '[{"question": "Who?"}]', "[{}]"])
def test_entityquestions_without_a_fact(tmp_path: Path, content: str) -> None:
    with pytest.raises(RequestError, match="no record"):
        list(read(write(tmp_path, content, "P36.json"), "entityquestions", []))


# --- all of them


def test_every_format_has_a_line_and_a_row_in_the_documentation() -> None:
    page = DOCS.read_text(encoding="utf-8")
    for name, title in titles().items():
        assert len(title) > 20 and title.endswith("."), name
        assert f"| `{name}` |" in page, name


@pytest.mark.parametrize(
    ("name", "file", "kept", "lost"),
    [
        ("counterfact", "counterfact/counterfact-train.json", 10_000, 0),
        ("counterfact", "counterfact/counterfact-val.json", 1919, 0),
        ("zsre", "zsre/zsre_mend_train-1k.json", 998, 2),
        ("knowedit", "knowedit/recent_train.json", 570, 0),
        ("knowedit", "knowedit/train_cf.json", 1428, 0),
        ("knowedit", "knowedit/wikibio-train-all.json", 464, 0),
        ("mquake", "mquake/lofit_mquake_train.jsonl", 134, 0),
        ("conflictedit", "conflictedit/coverage_edit.json", 5000, 0),
        ("conflictedit", "conflictedit/easy.json", 5000, 0),
        ("entityquestions", "entityquestions/dev/P36.dev.json", 877, 8),
    ],
)
def test_the_public_files_are_read_whole(data_folder: Path, name: str, file: str, kept: int, lost: int) -> None:
    skipped: list[Skipped] = []
    requests = list(read(data_folder / file, name, skipped))
    assert (len(requests), len(skipped)) == (kept, lost)
    # Every record can be scored for generality, but WikiBio's; what has no probe is not scored for locality.
    assert all(request.rephrase_prompts for request in requests) or "wikibio" in file


@pytest.mark.parametrize(("file", "found"), [("train_cf.json", 1244), ("recent_train.json", 401)])
def test_facts_of_rippleedits_are_taken_apart_as_in_knowedit(data_folder: Path, file: str, found: int) -> None:
    """KnowEdit's facts come from RippleEdits; where the object begins and what the subject is, only KnowEdit says."""
    records = json.loads((data_folder / "knowedit" / file).read_text(encoding="utf-8"))
    subjects = 0
    for record in records:
        about = [item["prompt"] for item in record["locality"].get("Relation_Specificity") or []]
        edit = {"prompt": f"{record['prompt']} {record['target_new']}.", "subject_id": "Q9"}
        old = record.get("ground_truth")
        if isinstance(old, str) and old:
            edit["original_fact"] = {"prompt": f"{record['prompt']} {old}."}
        tests = [ripple_test(query(prompt, "A")) for prompt in about]
        request = next(rippleedits({"edit": edit, "Relation_Specificity": tests}))
        assert isinstance(request, EditRequest)
        assert (request.prompt, request.target_new) == (record["prompt"], record["target_new"])
        subjects += request.subject == record["subject"]
        # Without another prompt about it nothing tells what the subject is.
        assert (request.subject is None) == (not about)
    assert subjects == found


def test_what_must_stay_cannot_have_the_new_answer_for_its_own(tmp_path: Path) -> None:
    record = dict(RECORDS["knowedit"]["WikiData"])
    asked = {"prompt": "The capital of Free Land, which is not Lisbon, is", "ground_truth": [["Lisbon"]]}
    record["target_new"] = "Lisbon"
    record["locality"] = {"Forgetfulness": [asked]}
    (request,) = read(write(tmp_path, json.dumps([record])), "knowedit")
    assert [(probe.family, probe.target) for probe in request.locality] == [("forgetfulness", None)]
