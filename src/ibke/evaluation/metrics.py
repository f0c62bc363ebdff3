"""What is measured of an answer, and means with their intervals.

*Reliability* is asked with the edit's own prompt, *generality* with its paraphrases, *portability* with prompts whose
answers follow from it; each counts whether the new answer comes. *Locality* is asked with prompts that have nothing to
do with the edit and counts whether the answer is still that of the unedited model. Scores of one edit's prompts are
averaged first and edits after that, so an edit with ten probes weighs no more than one with a single probe.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Metric:
    """A mean over edits and its 95 % interval; all None where nothing was measured."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces.

    A text made of these alone ("A", "The The", "!!!") would vanish, so it is only lower-cased.
    """
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    words = re.sub(r"\b(a|an|the)\b", " ", kept).split()
    return " ".join(words) or " ".join(text.lower().split())


def exact_match(answer: str, target: str) -> bool:
    """Whether an answer is the target, both normalised."""
    return normalise(answer) == normalise(target)


# Signs that say something: C is not C++, 1.5 is not 15, and -3 is not 3.
_SIGNS = re.compile(r"[#$%&*+/<=>@\\^|~]|(?<=\d)[.,:](?=\d)|(?<!\w)-(?=[\d.])")


def signed(text: str) -> str:
    """The normal form with the signs behind it that it leaves out though they say something."""
    return " ".join([normalise(text), *_SIGNS.findall(text)])


def same_answer(answer: str, target: str) -> bool:
    """As :func:`exact_match`, but of :func:`signed` forms."""
    return signed(answer) == signed(target)


def says(answer: str, target: str) -> bool:
    """Whether an answer is the target, or begins with it and then ends a clause."""
    begins = rf"[\s\"'“‘«(*_]*{re.escape(target.strip())}\s*([.,;:!?](?!\w)|$)"
    return re.match(begins, answer, re.IGNORECASE) is not None


def contains(answer: str, new: str, old: str | None = None) -> bool:
    """Whether an answer holds the new target as whole words, and not the old one elsewhere."""
    said, wanted = f" {normalise(answer)} ", f" {normalise(new)} "
    if old is None or exact_match(old, new):
        return wanted in said
    gone = f" {normalise(old)} "
    # One may stand inside the other, and the longer is no mention of the shorter: "New York" does not say "York".
    if wanted in gone:
        return gone not in said and wanted in said
    return wanted in said and gone not in said.replace(wanted, "  ")


def shared_prefix(base: Sequence[int], edited: Sequence[int]) -> float:
    """Share of the base's answer, in tokens, that comes before the first difference (ratio 0–1)."""
    pairs = enumerate(zip(base, edited, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(base), len(edited))) / len(base)


def proportion(values: Sequence[float]) -> Metric:
    """Mean of scores between 0 and 1, one an edit, with Wilson's interval.

    The number of edits stands for the number of trials. A score averaged over an edit's prompts varies no more than a
    single trial of the same mean, so the interval is rather too wide than too narrow, and a mean of 0 or 1 does not
    make it vanish.
    """
    n = len(values)
    if not n:
        return Metric()
    mean = math.fsum(values) / n
    centre = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2))
    return Metric(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def average(values: Sequence[float]) -> Metric:
    """Mean of quantities without bounds (nats, steps), one an edit, with the normal interval."""
    n = len(values)
    if not n:
        return Metric()
    mean = math.fsum(values) / n
    if n == 1:
        return Metric(mean)
    half = Z95 * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return Metric(mean, mean - half, mean + half)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of the values do not exceed; None without values."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None
