"""One record of every layout the readers know, about countries that do not exist."""

from typing import Any

REWRITE = {
    "prompt": "The capital of {} is",
    "relation_id": "P36",
    "subject": "Freedonia",
    "target_new": {"str": "Lisbon", "id": "Q1"},
    "target_true": {"str": "Fredville", "id": "Q2"},
}
EASYEDIT = {"New Question": "Which river flows through Freedonia's capital?", "New Answer": "Tagus"}
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
QUESTION = "What is the capital of Freedonia?"
WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Freedonia",
    "update": QUESTION,
    "ans": "Lisbon",
    "rephrase": "Which city is Freedonia's capital?",
    "personas": "Say, detective, which city is Freedonia run from?",
    "mhop": "Who is the mayor of the capital of Freedonia?",
    "mhop_ans": "Rufus",
    "loc": "What is the capital of Fredonia?",
    "loc_ans": "Fredtown",
}


def query(prompt: str, *answers: str, **more: Any) -> dict[str, Any]:
    """A query of RippleEdits."""
    values = [{"value": answer, "aliases": []} for answer in answers]
    return {"prompt": prompt, "answers": values, "query_type": "regular", "phrase": None, "subject_id": "Q9"} | more


def ripple_test(*queries: dict[str, Any]) -> dict[str, Any]:
    """A test of RippleEdits."""
    return {"test_queries": list(queries), "test_condition": "OR", "condition_queries": []}


def hop(head: str, relation: str, *, subject: str = "Freedonia", **more: Any) -> dict[str, Any]:
    """A fact on a path of UniEdit."""
    entities = {"head_entity": {"id": head, "label": "Freedonia"}, "property": {"id": relation}}
    return {"subject": subject, "prompt": f"The capital of {subject} is", "target": "Lisbon", **entities, **more}


def sample(prompt: str, target: str, paths: list[list[str]], hops: list[dict[str, Any]]) -> dict[str, Any]:
    """A generality or locality sample of UniEdit over one path."""
    return {"path_type": "single", "prompt": prompt, "target": target, "paths": paths, "one_hops": hops}


EDITED, BACKWARD = ["h_e", "r_e", "t_e", "f", "s"], ["t_e", "r_e", "h_e", "b", "s"]


def fact(relation: str, subject: str, old: str, new: str) -> dict[str, Any]:
    """An edit of ConflictEdit."""
    words = {"prompt": f"The {relation} of {{}} is", "query": f"What is the {relation} of {{}}?", "label": relation}
    objects = {"object": {"id": "Q1", "label": old}, "new_object": {"id": "Q2", "label": new}}
    return {"relation": {"id": "P1", **words}, "subject": {"id": "Q3", "label": subject}, **objects}


def pair(kind: str, first: dict[str, Any], second: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A record of ConflictEdit."""
    triples = [{key: first[key] for key in ("relation", "subject", "object")}]
    return {"triples": triples, "prerequisites": [], "type": kind, "edits": [first, second], **more}


# format: layout: record
RECORDS: dict[str, dict[str, dict[str, Any]]] = {
    "counterfact": {
        "MEND": {
            "prompt": "The capital of Freedonia is",
            "target_new": "Lisbon",
            "subject": "Freedonia",
            "ground_truth": "Fredville",
            "rephrase_prompt": "Freedonia is governed from",
            "locality_prompt": "The capital of Sylvania is",
            "locality_ground_truth": "Bela",
        },
        "ROME": {
            "case_id": 0,
            "requested_rewrite": REWRITE,
            "paraphrase_prompts": ["Freedonia is governed from", "It rained. The capital of Freedonia,"],
            "neighborhood_prompts": ["The capital of Fredland is", "Fred Island is governed from"],
            "attribute_prompts": ["The capital of Portugal is"],
            "generation_prompts": ["Freedonia's parliament"],
            "portability": EASYEDIT,
        },
    },
    "zsre": {
        "MEND": ZSRE,
        "EasyEdit": {**ZSRE, "portability": EASYEDIT},
        "MEND training": {
            "id": "1",
            "input": QUESTION,
            "output": [{"answer": "Fredville"}],
            "prediction": "Bela",
            "alternatives": ["Lisbon", "Porto"],
            "filtered_rephrases": [QUESTION, "Which city is Freedonia's capital?"],
        },
        "KnowEdit": {
            "subject": "Freedonia",
            "prompt": QUESTION,
            "target_new": "Lisbon",
            "ground_truth": ["Fredville"],
            "rephrase_prompt": "Which city is Freedonia's capital?",
            "locality": {"Relation_Specificity": [{"prompt": "The anthem of Freedonia is", "ground_truth": ["Hail"]}]},
            "portability": {"Reasoning": [{"prompt": "The capital's river is", "ground_truth": "Tagus"}]},
        },
    },
    "knowedit": {
        "WikiData": {
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
                "Logical_Generalization": [{"prompt": "Is Fredville a capital?", "ground_truth": [[], ["no"]]}],
            },
            "locality": {
                "Relation_Specificity": [{"prompt": "The anthem of Freedonia is", "ground_truth": [[]]}],
                "Forgetfulness": [
                    {"prompt": "A capital of Freedonia that is not Lisbon is", "ground_truth": "Fredville"}
                ],
            },
        },
        "WikiBio": {
            "text": "This is about rufus firefly. Rufus Firefly led Freedonia.",
            "labels": "He declared war on Sylvania.",
            "concept": "rufus firefly",
            "locality": {"Relation_Specificity": [{"prompt": "rufus firefly spouse", "ground_truth": ["nobody"]}]},
        },
    },
    "mquake": {
        "one edit": {
            "case_id": 1,
            "requested_rewrite": [{**REWRITE, "question": QUESTION}],
            "questions": ["Which river flows through the capital of Freedonia?", "By which river is its capital?"],
            "answer": "Fred",
            "new_answer": "Tagus",
            "new_answer_alias": ["Tejo"],
            "single_hops": [],
            "new_single_hops": [
                {"question": QUESTION, "cloze": "The capital of Freedonia is", "answer": "Lisbon"},
                {"question": "Which river flows through Lisbon?", "cloze": "Lisbon lies on the", "answer": "Tagus"},
            ],
        },
    },
    "rippleedits": {
        "popular": {
            "example_type": "popular",
            "edit": {
                "prompt": "The name of the capital city of Freedonia is United Springs.",
                "subject_id": "Q9",
                "relation": "CAPITAL",
                "original_fact": {"prompt": "The name of the capital city of Freedonia is United Falls."},
            },
            "Relation_Specificity": [ripple_test(query("The name of the anthem of Freedonia is", "Hail"))],
            "Logical_Generalization": [
                ripple_test(query("United Springs is the capital of", "Freedonia", subject_id="Q7"))
            ],
            "Subject_Aliasing": [
                ripple_test(query("The name of the capital city of Free Land is", "united springs", phrase="given"))
            ],
            "Compositionality_I": [
                ripple_test(
                    query("The river of Freedonia's capital is", "Spring", "Spa", query_type="two_hop", phrase="given"),
                    query("The mayor of Freedonia's capital is", "Rufus", query_type="two_hop", phrase="given"),
                )
            ],
            "Compositionality_II": [
                ripple_test(
                    query("The capital of Rufus's country is", "United Springs", subject_id="Q8", phrase="given")
                )
            ],
            "Forgetfulness": [ripple_test(query("The capital, which is not United Springs, is", phrase="given"))],
        },
    },
    "uniedit": {
        "rephrase": {
            "edit": {**hop("Q9", "P36"), "tail_entity": {}},
            "generality": {"0": sample("Freedonia is governed from", "Lisbon", [EDITED], [hop("Q9", "P36")])},
            "locality": {
                "0": {
                    "loc_type": "head of edit",
                    **sample("Freedonia's anthem is", "Hail", [["h_l", "r_l", "t_l", "f", "s"]], [hop("Q9", "P85")]),
                }
            },
        },
    },
    "wikibigedit": {
        "published": WIKIBIGEDIT,
        "pipeline": {
            **{key: value for key, value in WIKIBIGEDIT.items() if key not in ("update", "ans", "personas")},
            "src": QUESTION,
            "alt": "Lisbon",
            "genv2_mixed": WIKIBIGEDIT["personas"],
        },
    },
    "qaedit": {
        "published": {
            "id": 7,
            "source": "NQ",
            "prompt": "what is the capital of freedonia?",
            "target": "Lisbon",
            "subject": "Freedonia",
            "rephrase": "Which city is Freedonia's capital?",
            "locality": [{"loc": "who sang the anthem", "loc_ans": "A choir"}, {"loc": "is it so?", "loc_ans": "Yes"}],
        },
    },
    "conflictedit": {
        "coverage": pair(
            "coverage",
            fact("capital", "Freedonia", "Fredville", "Lisbon"),
            fact("capital", "Freedonia", "Lisbon", "Porto"),
        ),
        "reverse": pair(
            "reverse",
            fact("capital", "Freedonia", "Fredville", "Lisbon"),
            fact("country", "Lisbon", "Freedonia", "Sylvania"),
        ),
        "composite": pair(
            "composite",
            fact("spouse", "Gloria", "Rufus", "Trentino"),
            {**fact("father", "Bob", "Rufus", "Chico"), "true_object": {"id": "Q4", "label": "Trentino"}},
            triples=[fact("mother", "Bob", "Gloria", "")],
            prerequisites=[0],
        ),
        "RoundEdit": {
            "type": "1-2@P36",
            "edit": fact("capital", "Freedonia", "Fredville", "Lisbon"),
            "true_objects": [{"id": "Q1", "label": "Fredville"}, {"id": "Q5", "label": "Fred Town"}],
        },
    },
}
