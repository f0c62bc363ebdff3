"""QAEdit: questions that people asked, from three sets of questions and answers."""

from __future__ import annotations

from collections.abc import Iterator

from ibke.data.readers.fields import Fault, Record, nq_question, objects, subject_in, text
from ibke.request import EditRequest, Probe


def qaedit(record: Record) -> Iterator[EditRequest | Fault]:
    """QAEdit: questions from NQ, TriviaQA and SimpleQA, edited to their right answers.

    ``target`` is the right answer; the old one is not known. ``rephrase`` is the paraphrase, ``locality`` a list of
    unrelated Natural Questions queries.
    """
    prompt = text(record, "prompt")
    queries = objects(record, "locality")
    yield EditRequest(
        prompt=prompt,
        target_new=text(record, "target"),
        subject=subject_in(prompt, record),
        rephrase_prompts=(text(record, "rephrase"),),
        locality=tuple(
            Probe(nq_question(text(query, "loc", "locality")), text(query, "loc_ans", "locality"), "unrelated")
            for query in queries
        ),
    )
