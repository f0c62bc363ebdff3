"""Which sentence of a prompt asks, and whether it names what it asks about.

"I like Turkey. What is the capital of France?" asks what an edit of Turkey's capital answers, but of France. What a
model knows at the prompt's end does not tell the two apart (docs/experiments.md, 2026-12-01). Sentences do: one that
asks and has a name in it, and no word that points back ("its", "there"), is not about what stands before it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from torch import Tensor

from ibke.frames import tail
from ibke.phrases import SENTENCE_END, words
from ibke.subjects import name_of, place_of

_WORD = re.compile(r"[^\W\d_]+")


def asks_from(text: str) -> int | None:
    """The character at which the sentence that asks begins; None where it may be about what stands before it.

    It is the last one with a question mark, or else the last.
    """
    begin, asked = 0, None
    for stop in SENTENCE_END.finditer(text):
        rest = text[stop.end() :].lstrip(" \"'“‘(")
        if "?" in stop[0]:
            asked = begin, stop.start()
        if rest and ("\n" in stop[0] or not rest[0].islower()):
            begin = stop.end()
    at, end = asked or (begin, len(text))
    said = [word.lower() for word in _WORD.findall(text[at:end])]
    ordered = not asked and bool(said) and said[0] in words("verbs", "telling")  # "Answer in English."
    return None if ordered or words("pointing").intersection(said) or name_of(text[at:end]) is None else at


def named_afar(subject: str, texts: Iterable[str]) -> bool:
    """Whether some text that is about a subject names it before a sentence that seems to ask about something else."""
    return any(
        (at := asks_from(text)) is not None and place_of(subject, text) and not place_of(subject.split()[-1], text, at)
        for text in texts
    )


def about(tokenizer: Any, ids_RT: Tensor, question_RT: Tensor) -> Tensor:
    """Of the tokens of questions those that may name what is asked about (R × T).

    Args:
        tokenizer: of the model.
        ids_RT: token ids.
        question_RT: which of them are a question's.
    """
    found_RT = question_RT.clone()
    for row, columns in enumerate(_columns(question_RT)):
        begin = _first_token(tokenizer, tuple(ids_RT[row, columns].tolist()))
        found_RT[row, columns[:begin]] = False
    return found_RT


def _columns(mask_RT: Tensor) -> Iterator[Tensor]:
    return (mask_T.nonzero()[:, 0] for mask_T in mask_RT)


@lru_cache(maxsize=4096)
def _first_token(tokenizer: Any, ids: tuple[int, ...]) -> int:
    """The first token of the sentence that asks, in a chat of its last turn; 0 where all before it may count."""
    end = tuple(tokenizer(tail("chat", tokenizer), add_special_tokens=False).input_ids)
    kept = ids[: -len(end)] if end and ids[-len(end) :] == end else ids
    special = set(tokenizer.all_special_ids)
    turn = max((at + 1 for at, token in enumerate(kept) if token in special), default=0)

    def text(count: int) -> str:
        return str(tokenizer.decode(kept[turn : turn + count], clean_up_tokenization_spaces=False))

    at = asks_from(text(len(kept) - turn))
    if at is None:
        return 0
    return turn + bisect_right(range(len(kept) - turn), at, key=lambda count: len(text(count))) - 1
