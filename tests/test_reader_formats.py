"""What becomes of the fields of every layout, and what is said of a field that is missing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tests.reader_records import BACKWARD, EDITED, QUESTION, RECORDS, hop, query, ripple_test, sample

from ibke.data.readers import Skipped, read
from ibke.errors import RequestError
from ibke.request import EditRequest, Probe

LAYOUTS = [(name, layout) for name, layouts in RECORDS.items() for layout in layouts]


def read_records(folder: Path, name: str, *records: Any, skipped: list[Skipped] | None = None) -> list[EditRequest]:
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return list(read(path, name, skipped))


def one(folder: Path, name: str, layout: str) -> EditRequest:
    (request,) = read_records(folder, name, RECORDS[name][layout])
    return request


def head(request: EditRequest) -> tuple[str | None, ...]:
    return request.prompt, request.target_new, request.subject, request.target_true


@pytest.mark.parametrize("layout", ["MEND", "ROME"])
def test_counterfact(tmp_path: Path, layout: str) -> None:
    request = one(tmp_path, "counterfact", layout)
    assert head(request) == ("The capital of Freedonia is", "Lisbon", "Freedonia", "Fredville")
    if layout == "MEND":
        assert request.rephrase_prompts == ("Freedonia is governed from",)
        assert request.locality == (Probe("The capital of Sylvania is", "Bela", "same_relation"),)
    else:
        assert request.rephrase_prompts == ("Freedonia is governed from", "It rained. The capital of Freedonia,")
        # A neighbour's right answer is the old one.
        assert request.locality[1] == Probe("Fred Island is governed from", "Fredville", "same_relation")
        assert request.portability == (Probe("Which river flows through Freedonia's capital?", "Tagus", "one_hop"),)
    assert request.case is None


@pytest.mark.parametrize("layout", RECORDS["zsre"])
def test_zsre(tmp_path: Path, layout: str) -> None:
    request = one(tmp_path, "zsre", layout)
    subject = None if layout == "MEND training" else "Freedonia"
    assert head(request) == (QUESTION, "Lisbon", subject, "Fredville")
    assert request.rephrase_prompts == ("Which city is Freedonia's capital?",)
    # The query loses its prefix and gains a question mark.
    query_of = {"MEND training": (), "KnowEdit": (Probe("The anthem of Freedonia is", "Hail", "same_subject"),)}
    assert request.locality == query_of.get(layout, (Probe("who sang the anthem?", "A choir", "unrelated"),))
    assert [probe.family for probe in request.portability] == ["one_hop"] * (layout in ("EasyEdit", "KnowEdit"))


def test_zsre_edited_to_the_answer_it_has_has_no_old_one(tmp_path: Path) -> None:
    same = [{**RECORDS["zsre"]["MEND"], "alt": "the Fredville."}, dict(RECORDS["zsre"]["MEND training"])]
    same[1]["alternatives"] = ["fredville"]
    requests = read_records(tmp_path, "zsre", *same)
    assert [(item.target_new, item.target_true) for item in requests] == [("the Fredville.", None), ("fredville", None)]


def test_knowedit_families_aliases_and_first_answers(tmp_path: Path) -> None:
    request = one(tmp_path, "knowedit", "WikiData")
    assert request.rephrase_prompts == ("The name of the capital city of Free Land is",)
    assert [(p.family, p.target) for p in request.portability] == [
        ("one_hop", "Tagus"),
        ("alias", "lisbon"),
        ("alias", "Porto"),
        ("reversal", "no"),
    ]
    assert [(p.family, p.target) for p in request.locality] == [("same_subject", None), ("forgetfulness", "Fredville")]


def test_a_question_with_several_right_answers_is_asked_once_for_the_first(tmp_path: Path) -> None:
    def asked(prompt: str, *answers: str) -> list[dict[str, str]]:
        return [{"prompt": prompt, "ground_truth": answer} for answer in answers]

    record = copy.deepcopy(RECORDS["knowedit"]["WikiData"])
    record["portability"] = {
        "Reasoning": asked("Its language is", "French", "English") + asked("Its river is", "Tagus"),
        "Logical_Generalization": asked("Its language is", "English"),  # another family is another question
        "Subject_Aliasing": asked("The capital of Free Land is", "Porto", "Lisbon"),
    }
    record["locality"]["Relation_Specificity"] = asked("Its anthem is", "", "Hail", "Farewell")
    (request,) = read_records(tmp_path, "knowedit", record)
    assert [(p.prompt, p.target) for p in request.portability] == [
        ("Its language is", "French"),
        ("Its river is", "Tagus"),
        ("Its language is", "English"),
        ("The capital of Free Land is", "Porto"),
    ]
    assert request.rephrase_prompts == ("The capital of Free Land is",)
    assert request.locality[0] == Probe("Its anthem is", "Hail", "same_subject") and len(request.locality) == 2


@pytest.mark.parametrize("format", ["zsre", "knowedit"])
def test_counterfact_under_another_name_is_named_and_not_read_without_its_locality(tmp_path: Path, format: str) -> None:
    with pytest.raises(RequestError, match="`locality_prompt` is of the format `counterfact`"):
        read_records(tmp_path, format, RECORDS["counterfact"]["MEND"])


def test_knowedit_wikibio(tmp_path: Path) -> None:
    request = one(tmp_path, "knowedit", "WikiBio")
    assert (request.subject, request.target_new) == ("rufus firefly", "He declared war on Sylvania.")
    assert request.locality == (Probe("rufus firefly spouse", "nobody", "same_subject"),)
    assert not request.rephrase_prompts and not request.portability


def test_mquake(tmp_path: Path) -> None:
    request = one(tmp_path, "mquake", "one edit")
    assert head(request) == ("The capital of Freedonia is", "Lisbon", "Freedonia", "Fredville")
    assert request.rephrase_prompts == (QUESTION,)
    assert request.locality == (Probe("Which river flows through Lisbon?", "Tagus", "chain"),)
    assert [(p.target, p.family) for p in request.portability] == [("Tagus", "multi_hop")] * 2


def test_mquake_case_of_two_edits(tmp_path: Path) -> None:
    record = copy.deepcopy(RECORDS["mquake"]["one edit"])
    second = {**record["requested_rewrite"][0], "subject": "Lisbon", "prompt": "{} lies on the"}
    second["question"] = "Which river flows through Lisbon?"
    record["requested_rewrite"].append(second)
    skipped: list[Skipped] = []
    requests = read_records(tmp_path, "mquake", record, skipped=skipped)
    assert [request.prompt for request in requests] == ["The capital of Freedonia is", "Lisbon lies on the"]
    # Neither edit alone leads to the answer, and no fact of the chain is left as it was.
    assert not any(request.portability or request.locality for request in requests)
    assert {request.case for request in requests} == {"data/0"}
    assert [(item.field, item.why) for item in skipped] == [("questions", "`questions` need several edits at once.")]
    with pytest.raises(RequestError, match="several edits"):
        read_records(tmp_path, "mquake", record)


def test_rippleedits(tmp_path: Path) -> None:
    request = one(tmp_path, "rippleedits", "popular")
    # The objects share their first word, which still belongs to them.
    prompt = "The name of the capital city of Freedonia is"
    assert head(request) == (prompt, "United Springs", "Freedonia", "United Falls")
    assert request.rephrase_prompts == ("The name of the capital city of Free Land is",)
    families = ["one_hop", "one_hop", "one_hop", "alias", "reversal"]
    assert [p.family for p in request.portability] == families
    assert request.portability[0].target == "Spring"
    assert [(p.family, p.target) for p in request.locality] == [("same_subject", "Hail"), ("forgetfulness", None)]


def test_rippleedits_asks_a_question_of_several_tests_once(tmp_path: Path) -> None:
    record = copy.deepcopy(RECORDS["rippleedits"]["popular"])
    tests = [ripple_test(query("Its language is", language)) for language in ("French", "English")]
    record |= {"Logical_Generalization": tests, "Relation_Specificity": tests}
    (request,) = read_records(tmp_path, "rippleedits", record)
    assert [p.target for p in request.portability if p.family == "reversal"] == ["French"]
    assert [p.target for p in request.locality if p.family == "same_subject"] == ["French"]


def test_rippleedits_without_old_fact_names_or_answers(tmp_path: Path) -> None:
    record = copy.deepcopy(RECORDS["rippleedits"]["popular"])
    del record["edit"]["original_fact"], record["Relation_Specificity"], record["Subject_Aliasing"]
    record["Logical_Generalization"] = [ripple_test(query("Fredville is the capital of", phrase="given"))]
    skipped: list[Skipped] = []
    (request,) = read_records(tmp_path, "rippleedits", record, skipped=skipped)
    assert head(request) == ("The name of the capital city of Freedonia is", "United Springs", None, None)
    assert request.rephrase_prompts == ("What is the name of the capital city of Freedonia?",)
    assert [item.field for item in skipped] == ["Logical_Generalization"]


@pytest.mark.parametrize(
    ("fact", "why"),
    [
        ("The capital of Freedonia is .", "names no object"),
        ("Freedonia is.", "has no relation's phrase"),
    ],
)
def test_rippleedits_facts_without_an_object(tmp_path: Path, fact: str, why: str) -> None:
    record = copy.deepcopy(RECORDS["rippleedits"]["popular"])
    record["edit"] |= {"prompt": fact, "original_fact": {"prompt": "The capital of Freedonia is Fredville."}}
    skipped: list[Skipped] = []
    read_records(tmp_path, "rippleedits", RECORDS["rippleedits"]["popular"], record, skipped=skipped)
    assert len(skipped) == 1 and why in skipped[0].why


def test_rippleedits_keeps_facts_that_stay_what_they_were(tmp_path: Path) -> None:
    record = copy.deepcopy(RECORDS["rippleedits"]["popular"])
    record["edit"]["original_fact"] = {"prompt": record["edit"]["prompt"]}
    (request,) = read_records(tmp_path, "rippleedits", record)
    assert (request.target_new, request.target_true) == ("United Springs", None)


def test_uniedit(tmp_path: Path) -> None:
    (request,) = read_records(tmp_path, "uniedit", RECORDS["uniedit"]["rephrase"])
    assert head(request) == ("The capital of Freedonia is", "Lisbon", "Freedonia", None)
    assert request.rephrase_prompts == ("Freedonia is governed from",)
    assert request.locality == (Probe("Freedonia's anthem is", "Hail", "same_subject"),)


@pytest.mark.parametrize(
    ("generality", "family", "prompt"),
    [
        (sample("P", "Lisbon", [EDITED], [hop("Q9", "P36", subject="Free Land")]), "alias", "P"),
        (sample("P", "Lisboa", [EDITED], [hop("Q9", "P36")]), "alias", "P"),
        (sample("P", "Freedonia", [BACKWARD], [hop("Q9", "P36")]), "reversal", "P"),
        (sample("P", "Tagus", [EDITED, EDITED], [hop("Q9", "P36"), hop("Q7", "P4")]), "multi_hop", "P"),
    ],
)
def test_uniedit_generality(tmp_path: Path, generality: dict[str, Any], family: str, prompt: str) -> None:
    record = {**RECORDS["uniedit"]["rephrase"], "generality": {"0": generality}}
    (request,) = read_records(tmp_path, "uniedit", record)
    assert request.rephrase_prompts == ()
    assert request.portability == (Probe(prompt, generality["target"], family),)


def test_uniedit_double_paths_and_forgotten_objects(tmp_path: Path) -> None:
    paths = {"single_path1": {"one_hops": [hop("Q9", "P36")]}, "single_path2": {"one_hops": [hop("Q8", "P1")]}}
    double = {"path_type": "double", "prompt": "Both are one", "target": "Yes", **paths}
    record = {
        **RECORDS["uniedit"]["rephrase"],
        "generality": {"0": double},
        "locality": {"0": {"loc_type": "head of edit", **double}},
    }
    (request,) = read_records(tmp_path, "uniedit", record)
    assert request.portability == (Probe("Both are one (Yes/No):", "Yes", "same_entity"),)
    assert request.locality == (Probe("Both are one (Yes/No):", "Yes", "forgetfulness"),)


def test_uniedit_files_hold_an_object_of_records(tmp_path: Path) -> None:
    (tmp_path / "art.json").write_text(json.dumps({"a7": RECORDS["uniedit"]["rephrase"], "a9": {}}, indent=4))
    (tmp_path / "law.json").write_text(json.dumps({"l1": RECORDS["uniedit"]["rephrase"]}))
    skipped: list[Skipped] = []
    assert len(list(read(tmp_path, "uniedit", skipped))) == 2
    assert [(item.where, item.field) for item in skipped] == [(f"{tmp_path / 'art.json'}, record a9", "edit")]


@pytest.mark.parametrize("layout", RECORDS["wikibigedit"])
def test_wikibigedit(tmp_path: Path, layout: str) -> None:
    request = one(tmp_path, "wikibigedit", layout)
    assert head(request) == (QUESTION, "Lisbon", "Freedonia", None)
    assert request.rephrase_prompts == ("Which city is Freedonia's capital?",)
    assert request.locality == (Probe("What is the capital of Fredonia?", "Fredtown", "same_relation"),)
    assert [(p.family, p.target) for p in request.portability] == [("persona", "Lisbon"), ("multi_hop", "Rufus")]


def test_wikibigedit_empty_cells(tmp_path: Path) -> None:
    empty = {"personas": None, "mhop": float("nan"), "mhop_ans": None, "loc": "", "rephrase": " "}
    (request,) = read_records(tmp_path, "wikibigedit", {**RECORDS["wikibigedit"]["published"], **empty})
    assert not request.portability and not request.locality and not request.rephrase_prompts


def test_qaedit(tmp_path: Path) -> None:
    request = one(tmp_path, "qaedit", "published")
    assert head(request) == ("what is the capital of freedonia?", "Lisbon", "Freedonia", None)
    queries = (Probe("who sang the anthem?", "A choir", "unrelated"), Probe("is it so?", "Yes", "unrelated"))
    assert request.locality == queries


@pytest.mark.parametrize("layout", RECORDS["conflictedit"])
def test_conflictedit(tmp_path: Path, layout: str) -> None:
    first, second = read_records(tmp_path, "conflictedit", RECORDS["conflictedit"][layout])
    assert first.case == second.case == "data/0"
    expected = {
        "coverage": ("Lisbon", "Porto", "Lisbon"),
        "reverse": ("Lisbon", "Sylvania", "Freedonia"),
        "composite": ("Trentino", "Chico", "Rufus"),
        "RoundEdit": ("Lisbon", "Fredville", "Lisbon"),
    }
    assert (first.target_new, second.target_new, second.target_true) == expected[layout]
    follows = {
        "reverse": (
            Probe("The country of Lisbon is", "Freedonia", "reversal"),
            Probe("The capital of Sylvania is", "Lisbon", "reversal"),
        ),
        "composite": (
            Probe("The father of Bob is", "Trentino", "one_hop"),
            Probe("The spouse of Gloria is", "Chico", "one_hop"),
        ),
    }
    assert first.portability + second.portability == follows.get(layout, ())
    stays = (Probe("The mother of Bob is", "Gloria", "prerequisite"),) if layout == "composite" else ()
    assert first.locality == second.locality == stays
    if layout == "coverage":
        assert first.rephrase_prompts == (QUESTION,)


# Fields without which a record, or the part of it that they name, cannot be used.
NEEDED = {
    "counterfact/MEND": "prompt target_new subject ground_truth rephrase_prompt locality_prompt locality_ground_truth",
    "counterfact/ROME": "requested_rewrite requested_rewrite.prompt requested_rewrite.subject "
    "requested_rewrite.target_new requested_rewrite.target_new.str requested_rewrite.target_true.str "
    "paraphrase_prompts neighborhood_prompts "
    "portability.New_Question portability.New_Answer",
    "zsre/MEND": "src alt subject rephrase loc loc_ans",
    "zsre/MEND_training": "input alternatives output filtered_rephrases",
    "zsre/KnowEdit": "prompt target_new subject",
    "knowedit/WikiData": "prompt target_new subject",
    "knowedit/WikiBio": "text labels concept",
    "mquake/one_edit": "requested_rewrite questions new_answer new_single_hops",
    "rippleedits/popular": "edit edit.prompt edit.subject_id",
    "uniedit/rephrase": "edit edit.prompt edit.target edit.head_entity generality locality generality.0.path_type "
    "generality.0.paths generality.0.one_hops generality.0.prompt locality.0.loc_type locality.0.target",
    "wikibigedit/published": "update ans subject mhop_ans loc_ans",
    "wikibigedit/pipeline": "src alt",
    "qaedit/published": "prompt target subject rephrase locality",
    "conflictedit/coverage": "type triples prerequisites edits",
    "conflictedit/RoundEdit": "edit.relation edit.relation.prompt edit.relation.query edit.subject.label "
    "edit.object.label edit.new_object",
}
CASES = [(layout, field) for layout, fields in NEEDED.items() for field in fields.split()]


def test_every_layout_has_fields_it_cannot_do_without() -> None:
    named = {(name, layout.replace(" ", "_")) for name, layout in LAYOUTS}
    # EasyEdit's is MEND's with a question more; the other two conflicts differ in `type` alone.
    extra = {("zsre", "EasyEdit"), ("conflictedit", "reverse"), ("conflictedit", "composite")}
    assert named == {tuple(layout.split("/")) for layout in NEEDED} | extra


@pytest.mark.parametrize("broken", ["missing", "of another type"])
@pytest.mark.parametrize(("layout", "field"), CASES)
def test_a_faulty_field_is_named_and_the_other_records_are_kept(
    tmp_path: Path, layout: str, field: str, broken: str
) -> None:
    name, _, layout = layout.partition("/")
    good = RECORDS[name][layout.replace("_", " ") if layout in ("MEND_training", "one_edit") else layout]
    bad = copy.deepcopy(good)
    *way, last = (step.replace("New_", "New ") for step in field.split("."))
    inner = bad
    for step in way:
        inner = inner[step]
    if broken == "missing":
        del inner[last]
    else:
        inner[last] = 7
    skipped: list[Skipped] = []
    wanted = len(read_records(tmp_path, name, good))
    assert len(read_records(tmp_path, name, good, bad, good, skipped=skipped)) == 2 * wanted
    (fault,) = skipped
    assert fault.where == f"{tmp_path / 'data.json'}, record 1"
    assert fault.field == field.replace("New_", "New ") and fault.why.startswith(f"`{fault.field}` is")
    with pytest.raises(RequestError, match="record 1"):
        read_records(tmp_path, name, good, bad)
