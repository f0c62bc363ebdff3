"""MQuAKE: questions whose answer changes when one or more facts on the way to it do."""

from __future__ import annotations

from collections.abc import Iterator

from ibke.data.readers.fields import Fault, Record, objects, text, text_list
from ibke.data.readers.rewrite import read_rewrite
from ibke.request import EditRequest, Probe


def mquake(record: Record) -> Iterator[EditRequest | Fault]:
    """MQuAKE: chains of facts of which some are changed, and questions that go along the chain.

    Each of ``requested_rewrite`` becomes a request, with its ``question`` as paraphrase. The chain's facts that are not
    changed (``new_single_hops``) must stay. The multi-hop ``questions`` are portability where the case has one edit;
    where it has several, no single one of them leads to ``new_answer``, so they are left out and named.
    """
    rewrites = objects(record, "requested_rewrite")
    if not rewrites:
        raise Fault("requested_rewrite", "is empty")
    asked = [text(rewrite, "question", "requested_rewrite") for rewrite in rewrites]
    questions = text_list(record, "questions")
    answer = text(record, "new_answer")
    chain = tuple(
        Probe(question, text(hop, "answer", "new_single_hops"), "chain")
        for hop in objects(record, "new_single_hops")
        if (question := text(hop, "question", "new_single_hops")) not in asked
    )
    follows = tuple(Probe(question, answer, "multi_hop") for question in questions) if len(rewrites) == 1 else ()
    for rewrite, question in zip(rewrites, asked, strict=True):
        yield EditRequest(
            *read_rewrite(rewrite, "requested_rewrite"),
            rephrase_prompts=(question,),
            locality=chain,
            portability=follows,
        )
    if not follows and questions:
        yield Fault("questions", "need several edits at once")
