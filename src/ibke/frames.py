"""The three ways a prompt meets a model: bare text, a question form, and the model's own chat template.

Prompts and targets are tokenised separately, so that a byte-pair merge across their border can never shift a label.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, get_args

from ibke.batch import Pair
from ibke.request import composed
from ibke.subjects import place_of

Frame = Literal["bare", "question", "chat"]
FRAMES: tuple[Frame, ...] = get_args(Frame)
WORD = "qzx"  # stands for a prompt, where only what is around it matters


def render(prompt: str, frame: Frame, tokenizer: Any) -> tuple[str, str]:
    """Text to feed for a prompt, and what joins it to its answer.

    Returns:
        (text, joiner): the joiner is a space where the answer goes on in running text, empty after a chat turn.
    """
    prompt = prompt.strip()
    if frame == "bare":
        return prompt, " "
    if frame == "question" or not getattr(tokenizer, "chat_template", None):
        return f"Question: {prompt}\nAnswer:", " "
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True), ""


def opening(tokenizer: Any) -> list[list[int]]:
    """Tokens that may stand before a prompt's own words, the longest first; a question form is part of the words.

    They are those of the chat template with all that comes before the user's turn, and those that begin any text.
    """
    marked, plain = (tokenizer(WORD, add_special_tokens=special).input_ids for special in (True, False))
    begin = next((at for at in range(len(marked)) if marked[at : at + len(plain)] == plain), 0)
    heads = [marked[:begin]]
    if _is_template("chat", tokenizer):
        text = render(WORD, "chat", tokenizer)[0]
        heads.append(tokenizer(text[: text.index(WORD)], add_special_tokens=False).input_ids)
    return sorted(heads, key=len, reverse=True)


def encode_pair(
    prompt: str, target: str, frame: Frame, tokenizer: Any, subject: str | None = None, context: str = ""
) -> Pair:
    """Tokenise a framed prompt and its answer, closed by the end-of-turn token so that free generation stops there.

    Args:
        prompt: the prompt.
        target: its answer.
        frame: how the prompt is put to the model.
        tokenizer: a fast tokenizer (it must tell where each token stands in the text).
        subject: what the fact is about, to be marked among the tokens; ignored where it does not occur.
        context: running text that stands before it all.
    """
    prompt, target, context = composed(prompt), composed(target), composed(context)
    subject = subject and composed(subject)
    text, joiner = render(prompt, frame, tokenizer)
    text = f"{context} {text}" if context else text
    encoding = tokenizer(text, add_special_tokens=not _is_template(frame, tokenizer), return_offsets_mapping=True)
    offsets = encoding["offset_mapping"]
    end = len(text) - len(tail(frame, tokenizer))
    begin = text.rindex(prompt.strip(), 0, end)
    span = _covering(offsets, begin, begin + len(prompt.strip()))
    place = place_of(subject, text[:end], begin) if subject else None
    about = _covering(offsets, *place) if place else None
    answer = tokenizer(joiner + target.strip(), add_special_tokens=False).input_ids
    return Pair(list(encoding["input_ids"]), [*answer, tokenizer.eos_token_id], span, about)


def tail(frame: Frame, tokenizer: Any) -> str:
    """What stands after a prompt in a frame."""
    return _tail(frame, tokenizer, getattr(tokenizer, "chat_template", None))


@lru_cache(maxsize=16)
def _tail(frame: Frame, tokenizer: Any, template: str | None) -> str:
    """What stands after a prompt in a frame, of a tokenizer with a certain template."""
    del template  # it is the tokenizer's own; a changed one has another tail
    return render(WORD, frame, tokenizer)[0].rpartition(WORD)[2]


def _covering(offsets: list[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """First and last-plus-one index of the tokens that stand between two characters."""
    inside = [index for index, (start, stop) in enumerate(offsets) if stop > max(start, begin) and start < end]
    return inside[0], inside[-1] + 1


def _is_template(frame: Frame, tokenizer: Any) -> bool:
    return frame == "chat" and bool(getattr(tokenizer, "chat_template", None))
