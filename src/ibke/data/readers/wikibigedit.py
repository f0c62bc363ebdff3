"""WikiBigEdit: facts that changed in Wikidata from one month to the next."""

from __future__ import annotations

from collections.abc import Iterator

from ibke.data.readers.fields import Fault, Record, has_any, optional_text, subject_in, text
from ibke.request import EditRequest, Probe


def wikibigedit(record: Record) -> Iterator[EditRequest | Fault]:
    """WikiBigEdit: facts that changed in Wikidata, as questions.

    As published, ``update`` is edited to ``ans``; as its pipeline writes them, ``src`` to ``alt``. The old answer is
    not known. ``rephrase`` is the paraphrase; ``loc`` asks the same relation where nothing changed, most often of a
    subject of similar name. The same question as somebody else would ask it (``personas``, the pipeline's ``genv2_…``)
    is portability, so that generality stays comparable; ``mhop`` goes one hop on, which in the benchmark is a changed
    fact too. Whatever but the edit itself may be missing.
    """
    asked, answered = ("update", "ans") if has_any(record, "update", "ans") else ("src", "alt")
    prompt, target = text(record, asked), text(record, answered)
    styles = [name for name in record if name == "personas" or name.startswith("genv2_")]
    personas = filter(None, (optional_text(record, name) for name in styles))
    portability = [Probe(question, target, "persona") for question in personas]
    portability += _pair(record, "mhop", "mhop_ans", "multi_hop")
    rephrase = optional_text(record, "rephrase")
    yield EditRequest(
        prompt=prompt,
        target_new=target,
        subject=subject_in(prompt, record),
        rephrase_prompts=(rephrase,) if rephrase else (),
        locality=tuple(_pair(record, "loc", "loc_ans", "same_relation")),
        portability=tuple(portability),
    )


def _pair(record: Record, question: str, answer: str, family: str) -> list[Probe]:
    asked = optional_text(record, question)
    return [Probe(asked, text(record, answer), family)] if asked else []
