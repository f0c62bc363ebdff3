"""What a request is about: as given, or guessed."""

import unicodedata

import pytest

from ibke.errors import RequestError
from ibke.frames import FRAMES, encode_pair
from ibke.request import EditRequest, Probe, refuse_contradictions
from ibke.subjects import guess_subject, place_of, subject_of


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("Who is the author of The Wind in the Willows?", "Wind in the Willows"),
        ("What is the capital of France?", "France"),
        ("the colour of grass is", None),
        ("The founder of eBay is", "eBay"),
        ("The maker of the iPhone is", "iPhone"),
        ("x86 was designed by", "x86"),
        ("Who is Barack Obama's wife?", "Barack Obama"),
        ("Microsoft's CEO is", "Microsoft"),
        ("Dickens' best novel is", "Dickens"),
        ("The director of Schindler's List is", "Schindler's List"),
        ("The king of d'Artagnan and O'Brien’s friends is", "Artagnan and O'Brien"),
        ("The winner of the 2014 World Cup was", "2014 World Cup"),
    ],
)
def test_a_subject_is_guessed_from_capitals(prompt, subject):
    assert guess_subject(prompt) == subject
    assert subject_of(prompt, None) == (subject or prompt)
    assert subject_of(prompt, "Borduria") == (subject or prompt)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [("The head of Ørsted is", "Ørsted"), ("The mayor of Łódź is", "Łódź")],
)
def test_capitals_are_those_of_any_alphabet(prompt, subject):
    assert guess_subject(prompt) == subject


def test_a_subject_is_marked_where_it_stands(tiny_model):
    lm = tiny_model("llama")
    for prompt, subject in (("The capital of Turkey is", " Turkey "), ("In İzmir, the capital of Turkey is", "turkey")):
        request = EditRequest(prompt, "Ankara", subject=subject)
        pair = encode_pair(request.prompt, request.target_new, "bare", lm.tokenizer, request.subject)
        begin, end = pair.subject
        assert lm.tokenizer.decode(pair.prompt[begin:end]).strip() == "Turkey"


def test_what_is_blank_says_nothing():
    request = EditRequest("The capital of Turkey is", "Ankara", subject=" ", target_true="")
    assert request.subject is None and request.target_true is None


@pytest.mark.parametrize(
    ("text", "subject", "word"),
    [
        ("The most populous city of the US is", "US", "the US"),
        ("A romantic beach of Oman is", "Oman", "of Oman"),
        ("Us and them: what is the US?", "US", "the US"),
        ("It is us who ask of the us", "US", "is us"),
        ("The official language of Langu is", "Langu", "of Langu"),
        ("Languages, as they say", "Langu", "Langu"),
        ("The creator of C++ is", "C++", "of C++"),
    ],
)
def test_whole_words_of_the_same_letters_come_first(text, subject, word):
    begin, end = place_of(subject, text)
    assert text[:end].endswith(word) and text[begin:end].lower() == subject.lower()


def test_a_subject_that_is_nowhere_has_no_place():
    assert place_of("Oman", "The capital of Yemen is") is None
    assert place_of("Yemen", "The capital of Yemen is", 20) is None


def test_the_right_one_of_two_places_is_marked(smollm):
    for frame in FRAMES:
        pair = encode_pair("The most populous city of the US is", "Lagos", frame, smollm.tokenizer, "US")
        assert smollm.tokenizer.decode(pair.prompt[slice(*pair.subject)]).strip() == "US"
        assert smollm.tokenizer.decode(pair.prompt[: pair.subject[0]]).endswith("city of the")


@pytest.mark.parametrize("prompt", ["A", "assistant", "Answer", "user", "im"])
def test_a_prompt_is_found_though_its_frame_says_the_same(smollm, prompt):
    for frame in FRAMES:
        pair = encode_pair(prompt, "-", frame, smollm.tokenizer, context="A user said to the assistant: Answer!")
        begin, end = pair.span
        assert smollm.tokenizer.decode(pair.prompt[begin:end]).strip() == prompt
        before = smollm.tokenizer.decode(pair.prompt[:begin])
        assert before.endswith({"bare": "Answer!", "question": "Question:", "chat": "<|im_start|>user\n"}[frame])


def test_letters_with_marks_are_the_same_however_they_were_typed(smollm):
    typed = unicodedata.normalize("NFD", "The mayor of São Paulo is")
    request = EditRequest(typed, "Émile", subject="São Paulo", rephrase_prompts=(unicodedata.normalize("NFD", "É"),))
    assert request.prompt == "The mayor of São Paulo is" and request.rephrase_prompts == ("É",)
    assert EditRequest(typed, "x").subject is None and guess_subject(request.prompt) == "São Paulo"
    assert Probe(typed, typed) == Probe(request.prompt, request.prompt)
    with pytest.raises(RequestError, match="say different things"):
        refuse_contradictions([request, EditRequest("The mayor of São Paulo is", "another")])
    pairs = [encode_pair(text, "Émile", "chat", smollm.tokenizer, "São Paulo") for text in (typed, request.prompt)]
    assert pairs[0].prompt == pairs[1].prompt and pairs[0].subject == pairs[1].subject is not None


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"target_new": 1945}, "`target_new` is no text but int"),
        ({"target_new": " "}, "`target_new` is empty"),
        ({"subject": 5}, "`subject` is no text but int"),
        ({"target_true": 5}, "`target_true` is no text but int"),
        ({"case": 5}, "`case` is no text but int"),
        ({"rephrase_prompts": [1]}, r"`rephrase_prompts\[0\]` is no text but int"),
        ({"rephrase_prompts": ["x", " "]}, r"`rephrase_prompts\[1\]` is empty. Remove it"),
        ({"rephrase_prompts": 5}, "`rephrase_prompts` must be a list"),
        ({"rephrase_prompts": "x"}, "`rephrase_prompts` must be a list"),
    ],
)
def test_what_is_no_text_is_named(fields, why):
    record = {"prompt": "The war ended in", "target_new": "1945", **fields}
    for make in (EditRequest.from_dict, lambda record: EditRequest(**record)):
        with pytest.raises(RequestError, match=why):
            make(record)
