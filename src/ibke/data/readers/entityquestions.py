"""EntityQuestions: true facts, made into edits by giving a subject another subject's answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ibke.data.readers.fields import Fault, Skipped, leave_out, text, text_list
from ibke.data.readers.files import files_of, records
from ibke.data.triples import Skips, Triple, shared_ends
from ibke.errors import RequestError
from ibke.request import EditRequest

SEED = 0  # decides targets, wordings and probes; always the same, so that a file always gives the same edits


def entityquestions(path: Path, skipped: list[Skipped] | None) -> Iterator[EditRequest]:
    """EntityQuestions: questions, edited to another subject's answer in the same relation.

    The path is a file ``P*.json`` or a folder of them; a file is one Wikidata relation. The published question is the
    prompt and its first answer the old one. Target, paraphrases (the packaged wordings of the relation) and probes are
    drawn by :func:`ibke.data.facts.generate` with a fixed seed: two neighbours of the same relation, two other
    questions about the subject, one unrelated, and one-hop questions. All facts are held in memory.
    """
    from ibke.data.facts import generate
    from ibke.data.relations import load_wordings

    facts: list[Triple] = []
    asked: dict[tuple[str, str], tuple[str, str, str]] = {}
    for file in files_of(path, "P*.json"):
        for place, question, found in _facts(file, skipped):
            facts += found
            key = (found[0].relation, found[0].subject)
            if key in asked:
                leave_out(skipped, place, Fault("question", "is asked twice"))
            asked.setdefault(key, (question, found[0].obj, place))
    wordings = load_wordings()
    for made in generate(facts, wordings, seed=SEED, true_targets=0.0, skips=Skips()):
        # A subject with several answers is edited once.
        if found_in := asked.pop((made.relation, made.request.subject or ""), None):
            prompt, old, _ = found_in
            others = dict.fromkeys((made.request.prompt, *made.request.rephrase_prompts))
            rephrases = tuple(other for other in others if other != prompt)
            yield replace(made.request, prompt=prompt, target_true=old, rephrase_prompts=rephrases)
    for (relation, _), (_, _, place) in asked.items():
        why = "has no other answer in its relation" if relation in wordings else "is of a relation without wordings"
        leave_out(skipped, place, Fault("question", why))


def _facts(file: Path, skipped: list[Skipped] | None) -> Iterator[tuple[str, str, list[Triple]]]:
    """Place, question and facts of each record; the subject is what only this question of the file has."""
    rows: list[tuple[str, str, tuple[str, ...]]] = []
    for place, record in records(file):
        try:
            rows.append((str(place), *_row(record)))
        except Fault as fault:
            leave_out(skipped, str(place), fault)
    if not rows:
        raise RequestError("no record asks for a fact.", str(file), "Check that file and format belong together.")
    prefix, suffix = shared_ends([question for _, question, _ in rows])
    relation = file.name.split(".")[0]
    for where, question, answers in rows:
        if match := re.fullmatch(f"{re.escape(prefix)}(.+){re.escape(suffix)}", question):
            yield where, question, [Triple(match[1].strip(), relation, answer, "entityquestions") for answer in answers]
        else:
            leave_out(skipped, where, Fault("question", "is not worded like the others of its file"))


def _row(record: Any) -> tuple[str, tuple[str, ...]]:
    if isinstance(record, Fault):
        raise record
    if not isinstance(record, dict):
        raise Fault("record", f"is no object but {type(record).__name__}")
    question, answers = " ".join(text(record, "question").split()), text_list(record, "answers")
    if not answers:
        raise Fault("answers", "is empty")
    return question, tuple(" ".join(answer.split()) for answer in answers)
