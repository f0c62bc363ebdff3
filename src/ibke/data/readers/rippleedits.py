"""RippleEdits: facts of Wikidata with six kinds of tests of what an edit sets off."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ibke.data.readers.fields import Fault, Record, asked_once, first_text, mapping, objects, text
from ibke.data.readers.knowedit import other_wordings
from ibke.request import EditRequest, Probe

PORTABILITY = {
    "Compositionality_I": "one_hop",
    "Compositionality_II": "one_hop",
    "Subject_Aliasing": "alias",
    "Logical_Generalization": "reversal",
}
LOCALITY = {
    "Relation_Specificity": "same_subject",
    "Relation_Specifity": "same_subject",  # so spelt in the benchmark's description
    "Forgetfulness": "forgetfulness",
}
# Every relation of the benchmark is stated by a phrase that ends in one of these.
END_OF_PHRASE = re.compile(r" (?:is followed by|is|are|follows)(?= )")
PHRASES = (
    "The the name names number of which that with by in to a and is are has won plays follows followed associated "
    "member part capital country children award position sports team performed most"
)
WORDS_OF_PHRASES = frozenset(PHRASES.split())


def rippleedits(record: Record) -> Iterator[EditRequest | Fault]:
    """RippleEdits: facts of Wikidata, with six kinds of tests of what an edit sets off.

    A fact is stated whole (``The mother of X is Y.``), so prompt and target are what stands before and after the end of
    the relation's phrase; the old fact (``original_fact``) shows where they part. The subject is what the prompt has in
    common with others about the same entity; left out where there is none. Paraphrases are found as for KnowEdit. Tests
    are taken without the conditions under which the benchmark counts them; a test with several queries gives
    several questions, the same one once, for its first answer; a question without an answer is left out and named.
    """
    edit = mapping(record, "edit")
    before = next((mapping(edit, name, "edit") for name in ("original_fact", "previous_fact") if name in edit), None)
    fact, old = text(edit, "prompt", "edit"), text(before, "prompt", "edit.original_fact") if before else None
    prompt = _prompt(fact, old)
    target, target_true = _object(fact, prompt), _object(old, prompt) if old else None
    if not target:
        raise Fault("edit.prompt", "names no object")
    locality: list[Probe] = []
    portability: list[Probe] = []
    unanswered: list[Fault] = []
    for name, query in _queries(record):
        asked = text(query, "prompt", name)
        answer = first_text([item.get("value") for item in objects(query, "answers", name)])
        if name in LOCALITY:
            locality.append(Probe(asked, answer, LOCALITY[name]))
        elif answer is None:
            unanswered.append(Fault(name, "asks a question without an answer"))
        else:
            portability.append(Probe(asked, answer, PORTABILITY[name]))
    yield EditRequest(
        prompt=prompt,
        target_new=target,
        subject=_subject(prompt, record, text(edit, "subject_id", "edit")),
        target_true=target_true if target_true != target else None,  # some facts stay what they were
        rephrase_prompts=other_wordings(prompt, target, portability),
        locality=asked_once(locality),
        portability=asked_once(portability),
    )
    yield from unanswered


def _prompt(fact: str, old: str | None) -> str:
    """The fact up to the end of its relation's phrase, the last one in what it shares with the old fact."""
    shared = len(fact)
    if old:
        pairs = zip(fact.split(" "), old.split(" "), strict=False)
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        shared = len(" ".join(fact.split(" ")[:same])) + 1
    ends = [match.end() for match in END_OF_PHRASE.finditer(fact) if match.end() <= shared]
    if not ends:
        raise Fault("edit.prompt", "has no relation's phrase before its object")
    return fact[: ends[-1]]


def _object(fact: str, prompt: str) -> str | None:
    return fact[len(prompt) :].strip().removesuffix(".").strip() or None


def _queries(record: Record) -> Iterator[tuple[str, Record]]:
    for name in (*PORTABILITY, *LOCALITY):
        for test in objects(record, name) if record.get(name) else ():
            for query in objects(test, "test_queries", name):
                yield name, query


def _subject(prompt: str, record: Record, entity: str) -> str | None:
    """The longest run of words, those of phrases aside, that all prompts about the entity have in common."""
    # Queries with a phrase of their own name the entity by an alias, or another entity before it.
    others = [
        text(query, "prompt", name)
        for name, query in _queries(record)
        if query.get("subject_id") == entity and not query.get("phrase")
    ]
    others = [other for other in dict.fromkeys(others) if other != prompt]
    if not others:
        return None
    words = prompt.split(" ")
    best: list[str] = []
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            run = words[start:end]
            if not all(f" {' '.join(run)} " in f" {other} " for other in others):
                break
            if _weight(run) > _weight(best):
                best = run
    while best and best[0] in WORDS_OF_PHRASES:
        best = best[1:]
    while best and best[-1] in WORDS_OF_PHRASES:
        best = best[:-1]
    return " ".join(best) or None


def _weight(words: list[str]) -> int:
    return sum(word not in WORDS_OF_PHRASES for word in words)
