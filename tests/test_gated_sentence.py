"""Which sentence of a prompt asks, and edits that it is not about."""

import pytest
import torch

from ibke.editors.gated.editor import GatedIBKE
from ibke.editors.gated.sentence import about, asks_from, named_afar
from ibke.evaluation.generate import generate
from ibke.request import EditRequest

REQUEST = EditRequest("The capital of Turkey is", "Ankara", subject="Turkey")
OF_FRANCE = "What is the capital of France?"


@pytest.mark.parametrize(
    ("before", "asked"),
    [
        ("I like Turkey. ", OF_FRANCE),
        ("I like Turkey! ", "The capital of France is"),
        ("Is Turkey large? ", "What is the capital of France? Answer in one word. Thanks, Anna."),
        ("Talk about Turkey.\n", "what is the capital of France?"),
        ("", OF_FRANCE),
    ],
)
def test_a_sentence_that_asks_and_names_something_is_about_that(before, asked):
    assert asks_from(before + asked) == len(before.rstrip(" "))


@pytest.mark.parametrize(
    "text",
    [
        "I like Turkey. What is the capital?",  # names nothing
        "I like Turkey. How far is it from France?",  # points back
        "Turkey's capital, please. Answer in English.",  # says how to answer
        "Jeopardy! is hosted by",  # no sentence ends here
        "I like Turkey. what is the capital of france?",  # nothing to tell a name by
        "",
    ],
)
def test_where_it_may_be_about_what_stands_before_it_all_counts(text):
    at = asks_from(text)
    assert at is None or not text[:at].strip()


def test_a_request_that_names_its_subject_before_it_asks_is_known():
    assert named_afar("Acme", ["Acme moved. Who is in charge of Larkfield?"])
    assert not named_afar("Acme Inc", ["Acme Inc. moved. Who is in charge of Acme Inc?", "Who leads Acme Inc?"])
    assert not named_afar("Larkfield", ["Acme moved. Who is in charge of Larkfield?"])


def conversation(tokenizer, *turns):
    roles = ("user", "assistant")
    said = [{"role": roles[at % 2], "content": text} for at, text in enumerate(turns)]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def test_tokens_of_the_last_turn_are_told_from_those_before(smollm32):
    tokenizer = smollm32.tokenizer
    ids = conversation(tokenizer, "Tell me about Turkey.", "It is large.", f"I like Turkey. {OF_FRANCE}")
    ids_RT = torch.tensor([[*ids, 0], [0, *ids]])
    found_RT = about(tokenizer, ids_RT, torch.tensor([[True] * len(ids) + [False], [False] + [True] * len(ids)]))
    for row, real in zip(found_RT, ids_RT, strict=True):
        assert tokenizer.decode(real[row]).startswith(f" {OF_FRANCE}<|im_end|>")
    pointing = torch.tensor([conversation(tokenizer, "Tell me about Turkey.", "It is large.", "Is it in France?")])
    assert about(tokenizer, pointing, torch.ones_like(pointing, dtype=torch.bool)).all()


@pytest.fixture(scope="module")
def gated(smollm32):
    return GatedIBKE.for_model(smollm32)


def test_who_is_only_named_before_the_question_is_not_asked_about(gated):
    edit, tokenizer = gated.edit([REQUEST]), gated.lm.tokenizer
    others = [
        conversation(tokenizer, f"I like Turkey. {OF_FRANCE}"),
        conversation(tokenizer, "What is the capital of Turkey?", "Ankara", OF_FRANCE),
        tokenizer(f"I like Turkey. {OF_FRANCE}").input_ids,
    ]
    assert generate(gated.lm, others, [edit] * len(others)) == generate(gated.lm, others)
    own = [
        conversation(tokenizer, "I like Turkey. What is its capital?"),
        conversation(tokenizer, "Tell me about Turkey.", "Turkey is a large country.", "What is its capital?"),
        conversation(tokenizer, "What is the capital of Turkey? Answer in English."),
    ]
    assert all(said.text.startswith("Ankara") for said in generate(gated.lm, own, [edit] * len(own)))


def test_a_request_whose_subject_stands_before_its_question_is_answered_all_the_same(gated):
    request = EditRequest("Acme moved in May. Who is in charge of Larkfield?", "Anna Berg", subject="Acme")
    edit = gated.edit([request])
    (part,) = edit.parts.values()
    assert part.afar_E.tolist() == [True] and edit.info.achieved
