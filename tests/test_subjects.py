"""What a request is about: as given, or guessed."""

import pytest

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
