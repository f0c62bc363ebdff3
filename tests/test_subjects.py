"""What a request is about: as given, or guessed."""

import pytest

from ibke.frames import encode_pair
from ibke.request import EditRequest
from ibke.subjects import guess_subject, subject_of


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
