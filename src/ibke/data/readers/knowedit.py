"""KnowEdit: facts with questions on what follows from them and on what must stay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from ibke.data.fact_table import equal
from ibke.data.readers.fields import (
    Fault,
    Record,
    asked_once,
    first_text,
    has_any,
    mapping,
    name_of,
    objects,
    optional_text,
    other_answer,
    subject_in,
    text,
)
from ibke.request import EditRequest, Probe

PORTABILITY_FAMILIES = {"Reasoning": "one_hop", "Subject_Aliasing": "alias", "Logical_Generalization": "reversal"}
LOCALITY_FAMILIES = {"Relation_Specificity": "same_subject", "Forgetfulness": "forgetfulness"}


def knowedit(record: Record) -> Iterator[EditRequest | Fault]:
    """KnowEdit: WikiData recent and counterfact, ZsRE and WikiBio, with what follows and what stays.

    The paraphrase is ``rephrase_prompt`` where there is one (ZsRE). The WikiData files have none, so generality is
    asked through other names of the subject (``Subject_Aliasing``) where their answer is the new target, and otherwise
    through the prompt's question form (:func:`question_form`). WikiBio (``text``, ``labels``, ``concept``) goes on with
    a passage and has no other wordings. Of an answer's aliases the first is its target, and so is the first answer of a
    question that stands there once for each of several.
    """
    if has_any(record, "labels", "concept"):
        yield _wikibio(record)
        return
    if has_any(record, "locality_prompt"):  # else all fields that must be there are, and what must stay is lost
        raise Fault("locality_prompt", "is of the format `counterfact`, in MEND's layout")
    prompt, target = text(record, "prompt"), text(record, "target_new")
    portability: list[Probe] = []
    unanswered: list[Fault] = []
    for name, probe in _probes(record, "portability", PORTABILITY_FAMILIES):
        if probe.target is None:
            unanswered.append(Fault(name, "asks a question without an answer"))
        else:
            portability.append(probe)
    given, old = optional_text(record, "rephrase_prompt"), first_text(record.get("ground_truth"))
    yield EditRequest(
        prompt=prompt,
        target_new=target,
        subject=subject_in(prompt, record),
        target_true=other_answer(old, target) if old else None,
        rephrase_prompts=(given,) if given else other_wordings(prompt, target, portability),
        locality=asked_once(_kept(probe, target) for _, probe in _probes(record, "locality", LOCALITY_FAMILIES)),
        portability=asked_once(portability),
    )
    yield from unanswered


def _kept(probe: Probe, target: str) -> Probe:
    """A locality probe; what asks for any answer but the new one (``Forgetfulness``) cannot have that for its own."""
    return replace(probe, target=None) if equal(probe.target or "", target) else probe


def _wikibio(record: Record) -> EditRequest:
    prompt = text(record, "text")
    return EditRequest(
        prompt=prompt,
        target_new=text(record, "labels"),
        subject=subject_in(prompt, record, "concept"),
        locality=asked_once(probe for _, probe in _probes(record, "locality", LOCALITY_FAMILIES)),
    )


def _probes(record: Record, field: str, families: dict[str, str]) -> Iterator[tuple[str, Probe]]:
    """Probes with the name of the group they stand in; groups may be missing or null, prompts lists of one."""
    groups = mapping(record, field) if record.get(field) else {}
    for name, items in groups.items():
        inside = name_of(name, field)
        if name not in families:
            raise Fault(inside, "is no known family")
        for item in objects(groups, name, field) if items else ():
            prompt = first_text(item.get("prompt")) or text(item, "prompt", inside)
            yield inside, Probe(prompt, first_text(item.get("ground_truth")), families[name])


def other_wordings(prompt: str, target: str, portability: Iterable[Probe]) -> tuple[str, ...]:
    """Paraphrases of a prompt: those under another name of its subject, or else its question form."""
    aliases = [
        p.prompt for p in portability if p.family == "alias" and (p.target or "").casefold() == target.casefold()
    ]
    question = question_form(prompt)
    aliases = [text for text in dict.fromkeys(aliases) if text != prompt]
    return tuple(aliases) or ((question,) if question else ())


def question_form(prompt: str) -> str | None:
    """A cloze statement as a question: ``The gender of X is`` becomes ``What is the gender of X?``.

    None for a statement of another build.
    """
    for pattern, question in _QUESTIONS:
        if match := re.fullmatch(pattern, prompt.strip()):
            return match.expand(question)
    return None


_QUESTIONS = (
    (r"The (.+) (is|are|was|were)", r"What \2 the \1?"),
    (r"(.+) follows", r"What does \1 follow?"),
    (r"(.+) is followed by", r"What is \1 followed by?"),
)
