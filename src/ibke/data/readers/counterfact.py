"""CounterFact, as published with ROME and in the layout made for MEND."""

from __future__ import annotations

from collections.abc import Iterator

from ibke.data.readers.fields import Fault, Record, easyedit_portability, has_any, mapping, subject_in, text, text_list
from ibke.data.readers.rewrite import read_rewrite
from ibke.request import EditRequest, Probe


def counterfact(record: Record) -> Iterator[EditRequest | Fault]:
    """CounterFact: statements with a false object, in ROME's layout or in MEND's.

    ROME's layout has ``requested_rewrite``, whole lists of ``paraphrase_prompts`` and ``neighborhood_prompts``, and
    with EasyEdit a ``portability`` question. Its ``attribute_prompts`` and ``generation_prompts`` are not read: the
    first have the new object for their right answer, the second no answer. MEND's layout has one paraphrase and one
    neighbour.
    """
    rome = has_any(record, "requested_rewrite", "paraphrase_prompts")
    yield _rome(record) if rome else _mend(record)


def _rome(record: Record) -> EditRequest:
    rewrite = read_rewrite(mapping(record, "requested_rewrite"), "requested_rewrite")
    # A neighbour is another subject with the same true object, so that object is its answer.
    neighbours = text_list(record, "neighborhood_prompts")
    return EditRequest(
        *rewrite,
        rephrase_prompts=text_list(record, "paraphrase_prompts"),
        locality=tuple(Probe(prompt, rewrite.target_true, "same_relation") for prompt in neighbours),
        portability=easyedit_portability(record),
    )


def _mend(record: Record) -> EditRequest:
    prompt = text(record, "prompt")
    neighbour = Probe(text(record, "locality_prompt"), text(record, "locality_ground_truth"), "same_relation")
    return EditRequest(
        prompt=prompt,
        target_new=text(record, "target_new"),
        subject=subject_in(prompt, record),
        target_true=text(record, "ground_truth"),
        rephrase_prompts=(text(record, "rephrase_prompt"),),
        locality=(neighbour,),
    )
