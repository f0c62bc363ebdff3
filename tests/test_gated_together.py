"""Many gated edits in force at once: which of them speaks, and where."""

import pytest
import torch

from ibke.editors.gated.editor import GatedIBKE
from ibke.editors.gated.memory import SPOKEN, _Asking
from ibke.evaluation.generate import Together, generate
from ibke.frames import FRAMES
from ibke.request import EditRequest
from ibke.session import EditSession

EDITS, PAIRS = 3, torch.tensor([[0, 0, 1, 1, 2, 2]])  # two neurons an edit


def asking(question_RT, spoken_RE=None, real_RT=None):
    """What decides, with questions that stand at some tokens."""
    some = _Asking.__new__(_Asking)
    some.heard_RE, some.question_RT = None, torch.tensor(question_RT, dtype=torch.bool)
    some.about_RT, some.afar_RE = some.question_RT, torch.zeros(len(question_RT), EDITS, dtype=torch.bool)
    some.real_RT = some.question_RT if real_RT is None else torch.tensor(real_RT, dtype=torch.bool)
    some.spoken_RE = torch.zeros(len(question_RT), EDITS, dtype=torch.bool) if spoken_RE is None else spoken_RE
    return some


def said(*rows):
    """What both neurons of each edit say at each token, by row."""
    return torch.tensor(rows, dtype=torch.float32).repeat_interleave(2, dim=-1)


def test_the_edit_that_is_surest_of_its_subject_speaks_and_no_other():
    one = asking([[1, 1, 1]])
    heard = one._first(PAIRS, said([[0, 5, 0], [9, 0, 0], [2, 7, 8]]))
    assert torch.equal(heard, said([[0, 0, 0], [9, 0, 0], [2, 0, 0]]))
    assert one.since_RE.tolist() == [[1, 3, 3]] and one.spoken_RE.tolist() == [[True, False, False]]
    # What the relays say counts from there on, of that edit alone.
    later = one._later(PAIRS, said([[4, 4, 4]] * 3))
    assert torch.equal(later, said([[0, 0, 0], [4, 0, 0], [4, 0, 0]]))


def test_of_equals_the_latest_speaks_and_of_the_quiet_none():
    one = asking([[1, 1], [1, 1]])
    heard = one._first(PAIRS.expand(2, -1), said([[0, 6, 6], [0, 0, 0]], [[SPOKEN, 0.5, 0], [0, 0, SPOKEN]]))
    assert torch.equal(heard, said([[0, 0, 6], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]))
    assert one.spoken_RE.tolist() == [[False, False, True], [False, False, False]]


def test_padding_is_not_listened_to_and_in_an_answer_nobody_new():
    one = asking([[0, 1, 1, 0]], real_RT=[[0, 1, 1, 1]])
    heard = one._first(PAIRS, said([[9, 0, 0], [0, 3, 0], [0, 0, 0], [9, 9, 9]]))
    assert torch.equal(heard, said([[0, 0, 0], [0, 3, 0], [0, 0, 0], [0, 9, 0]]))
    assert one.since_RE.tolist() == [[4, 1, 4]]
    # Token by token it is the same.
    one.real_RT = torch.ones(1, 1, dtype=torch.bool)
    assert torch.equal(one._first(PAIRS, said([[9, 9, 9]])), said([[0, 9, 0]]))


def test_what_has_spoken_in_an_earlier_turn_is_still_heard():
    one = asking([[1]], torch.tensor([[False, True, False]]))
    assert not one._first(PAIRS, said([[0, 0, 0]])).any()
    assert one.since_RE.tolist() == [[1, 0, 1]] and one.spoken_RE.tolist() == [[False, True, False]]


@pytest.fixture(scope="module")
def many(smollm32):
    """Facts whose subjects end alike, and whose answers name each other's subjects."""
    gated = GatedIBKE.for_model(smollm32)
    facts = [
        EditRequest("What is the capital of Andapa District?", "Louny", subject="Andapa District"),
        EditRequest("What is the capital of Thimphu District?", "Guingamp", subject="Thimphu District"),
        EditRequest("What is the capital of Yeletsky District?", "Prudnik", subject="Yeletsky District"),
        EditRequest("Where is Geigertown located?", "Thimphu District", subject="Geigertown"),
        EditRequest("The twin town of Louny is", "Yeletsky District", subject="Louny"),
        EditRequest("Who was Marco Maddaloni's mother?", "Lucrezia Maddaloni", subject="Marco Maddaloni"),
    ]
    return gated, facts, gated.edit(facts)


def test_subjects_that_end_alike_and_answers_that_name_subjects_are_told_apart(many):
    gated, facts, whole = many
    prompts = [gated.pair(fact.prompt, "-", frame).prompt for fact in facts for frame in FRAMES]
    wanted = [fact.target_new for fact in facts for _ in FRAMES]
    answers = [one.text.rstrip(".") for one in generate(gated.lm, prompts, Together((whole,)))]
    assert answers == wanted and whole.info.achieved


def test_how_rows_are_batched_changes_no_answer(many):
    gated, facts, whole = many
    texts = ["Hi", *(fact.prompt for fact in facts), f"{'Boats leave before sunrise. ' * 9}{facts[0].prompt}"]
    prompts = [gated.pair(text, "-").prompt for text in texts]
    alone = [generate(gated.lm, [prompt], Together((whole,)))[0].text for prompt in prompts]
    assert [one.text for one in generate(gated.lm, prompts, Together((whole,)), batch_size=32)] == alone


def test_made_once_more_with_another_answer_the_later_edit_is_in_force(many):
    gated, facts, _ = many
    first, second = (
        gated.edit([EditRequest(facts[0].prompt, to, subject="Andapa District")]) for to in ("Louny", "Brno")
    )
    ids = [gated.pair(facts[0].prompt, "-", frame).prompt for frame in FRAMES]
    for order, wanted in (((first, second), "Brno"), ((second, first), "Louny")):
        with EditSession(gated.lm) as session:
            for edit in order:
                session.attach(edit)
            assert [one.text.rstrip(".") for one in generate(gated.lm, ids)] == [wanted] * len(FRAMES)
