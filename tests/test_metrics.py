"""Normal forms, containment, and intervals."""

import math

import pytest

from ibke.evaluation.metrics import (
    Metric,
    average,
    contains,
    exact_match,
    normalise,
    proportion,
    quantile,
    same_answer,
    says,
    shared_prefix,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The  Eiffel Tower. ", "eiffel tower"),
        ("An apple, a pear", "apple pear"),
        ("Franche-Comté", "franchecomté"),
        ("Theatre", "theatre"),
        ("A", "a"),
        ("!?", "!?"),
        ("", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_exact_match_wants_the_whole_answer() -> None:
    assert exact_match("the Netherlands.", "Netherlands")
    assert not exact_match("the Netherlands, in Europe", "Netherlands")
    assert not exact_match("", "Netherlands")


def test_an_answer_says_what_it_begins_with_and_then_ends_a_clause() -> None:
    assert says("Paris.", "Paris")
    assert says(" “Paris”, the capital", "Paris") is False  # the closing quote belongs to the answer
    assert says("paris, the capital", "Paris")
    assert not says("Paris Hilton", "Paris")
    assert not says("Parisian", "Paris")
    assert not says("-3", "3") and not says("1.5", "1") and not says("C++", "C")


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ("the Netherlands.", "Netherlands", True),
        ("C", "C++", False),
        ("C++", "C++.", True),
        ("1.5", "15", False),
        ("1,500", "1500", False),
        ("3", "-3", False),
        ("50%", "50", False),
        ("St. Louis", "St Louis", True),
        ("10:30", "1030", False),
    ],
)
def test_signs_that_say_something_count(answer: str, target: str, same: bool) -> None:
    assert exact_match(answer, target) and same_answer(answer, target) is same


@pytest.mark.parametrize(
    ("answer", "new", "old", "holds"),
    [
        ("It lies in Rome, Italy.", "Rome", "Paris", True),
        ("Romeo", "Rome", None, False),
        ("Rome, not Paris", "Rome", "Paris", False),
        ("New York", "New York", "York", True),
        ("New York, near York", "New York", "York", False),
        ("York", "New York", "York", False),
        ("New York", "York", "New York", False),
        ("York, not New York", "York", "New York", False),
        ("York", "York", "New York", True),
        ("Rome", "Rome", "Rome", True),
    ],
)
def test_contains_new_and_not_old(answer: str, new: str, old: str | None, holds: bool) -> None:
    assert contains(answer, new, old) is holds


@pytest.mark.parametrize(
    ("base", "edited", "share"),
    [((1, 2, 3, 4), (1, 2, 9, 4), 0.5), ((1, 2), (1, 2), 1.0), ((1, 2), (1,), 0.5), ((1,), (1, 5), 1.0)],
)
def test_shared_prefix(base: tuple[int, ...], edited: tuple[int, ...], share: float) -> None:
    assert shared_prefix(base, edited) == share


def test_wilson_interval_of_a_textbook_case() -> None:
    metric = proportion([1.0] * 8 + [0.0] * 2)
    assert metric.mean == 0.8
    assert (metric.low, metric.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_certainty_is_never_claimed() -> None:
    for value in (0.0, 1.0):
        metric = proportion([value] * 20)
        assert metric.mean == value
        assert metric.low is not None and metric.high is not None
        assert 0.0 <= metric.low <= value <= metric.high <= 1.0
        assert metric.high - metric.low > 0.1


def test_average_has_the_normal_interval() -> None:
    metric = average([1.0, 2.0, 3.0, 4.0])
    half = 1.96 * math.sqrt(5 / 3) / 2
    assert metric.mean == 2.5
    assert (metric.low, metric.high) == (pytest.approx(2.5 - half, rel=1e-3), pytest.approx(2.5 + half, rel=1e-3))


def test_nothing_measured_is_none_and_not_a_number() -> None:
    assert proportion([]) == average([]) == Metric(None, None, None)
    assert average([3.0]) == Metric(3.0, None, None)


def test_quantile() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [quantile(values, share) for share in (0.0, 0.2, 0.21, 0.95, 1.0)] == [1.0, 1.0, 2.0, 5.0, 5.0]
    assert quantile([], 0.5) is None
