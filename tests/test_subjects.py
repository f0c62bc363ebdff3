"""What a request is about: as given, or guessed."""

import pytest

from ibke.frames import FRAMES, encode_pair
from ibke.request import EditRequest
from ibke.subjects import guess_subject, place_of, subject_of


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("Who is the author of The Wind in the Willows?", "Wind in the Willows"),
        ("What is the capital of France?", "France"),
        ("the colour of grass is", None),
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
