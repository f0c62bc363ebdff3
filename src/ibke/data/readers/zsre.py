"""zsRE: questions from relation extraction, in the three layouts in use."""

from __future__ import annotations

from collections.abc import Iterator

from ibke.data.readers.fields import (
    Fault,
    Record,
    easyedit_portability,
    first_text,
    has_any,
    nq_question,
    objects,
    other_answer,
    subject_in,
    text,
    text_list,
)
from ibke.data.readers.knowedit import knowedit
from ibke.request import EditRequest, Probe


def zsre(record: Record) -> Iterator[EditRequest | Fault]:
    """ZsRE: questions with another answer, in MEND's layouts, EasyEdit's or KnowEdit's.

    With ``src`` (MEND's evaluation file; EasyEdit's adds a ``portability`` question): edited to ``alt``, and ``loc`` is
    an unrelated Natural Questions query. With ``input`` (MEND's training file): edited to the first of its
    ``alternatives``, with all of its ``filtered_rephrases``; it names no subject and has no locality. Else KnowEdit's.
    """
    if has_any(record, "src", "alt"):
        yield _mend(record)
    elif has_any(record, "input", "alternatives"):
        yield _mend_training(record)
    else:
        yield from knowedit(record)


def _mend(record: Record) -> EditRequest:
    prompt, target = text(record, "src"), text(record, "alt")
    return EditRequest(
        prompt=prompt,
        target_new=target,
        subject=subject_in(prompt, record),
        target_true=other_answer(first_text(record.get("answers")) or text(record, "pred"), target),
        rephrase_prompts=(text(record, "rephrase"),),
        locality=(Probe(nq_question(text(record, "loc")), text(record, "loc_ans"), "unrelated"),),
        portability=easyedit_portability(record),
    )


def _mend_training(record: Record) -> EditRequest:
    prompt, alternatives = text(record, "input"), text_list(record, "alternatives")
    if not alternatives:
        raise Fault("alternatives", "is empty")
    answers = (first_text(output.get("answer")) for output in objects(record, "output"))
    others = dict.fromkeys(text_list(record, "filtered_rephrases"))
    return EditRequest(
        prompt=prompt,
        target_new=alternatives[0],
        target_true=other_answer(next(filter(None, answers), None) or text(record, "prediction"), alternatives[0]),
        rephrase_prompts=tuple(other for other in others if other != prompt),
    )
