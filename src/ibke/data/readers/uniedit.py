"""UniEdit: facts of 25 fields of knowledge with questions sampled from the graph around them."""

from __future__ import annotations

from collections.abc import Iterator

from ibke.data.readers.fields import Fault, Record, mapping, name_of, objects, optional_text, subject_in, text, value_of
from ibke.request import EditRequest, Probe

SHARED = {  # what a locality question has in common with the edit
    "none": "unrelated",
    "head of edit": "same_subject",
    "property of edit": "same_relation",
    "tail of edit": "same_object",
}
YES_OR_NO = "(Yes/No):"


def uniedit(record: Record) -> Iterator[EditRequest | Fault]:
    """UniEdit: facts of 25 fields of knowledge, with questions along paths of the graph around.

    ``edit`` is a cloze prompt. A ``generality`` question over the edited fact alone is a paraphrase where it has the
    edit's subject and target, else of the family ``alias``; asked from its object ``reversal``, over more facts
    ``multi_hop``, over two paths to one entity ``same_entity``. ``locality`` is named after what it shares with the
    edit; the same subject and relation is ``forgetfulness``. Statements over two paths ask for yes or no and say so.
    """
    edit = mapping(record, "edit")
    prompt, target = text(edit, "prompt", "edit"), text(edit, "target", "edit")
    rephrases: list[str] = []
    portability: list[Probe] = []
    for sample, inside in _samples(record, "generality"):
        probe = _probe(sample, _reasoning(sample, edit, inside), inside)
        if probe.family == "rephrase":
            rephrases.append(probe.prompt)
        else:
            portability.append(probe)
    locality = [
        _probe(sample, _shared(sample, edit, inside), inside) for sample, inside in _samples(record, "locality")
    ]
    yield EditRequest(
        prompt=prompt,
        target_new=target,
        subject=subject_in(prompt, edit, "subject", "edit") if optional_text(edit, "subject", "edit") else None,
        rephrase_prompts=tuple(rephrases),
        locality=tuple(locality),
        portability=tuple(portability),
    )


def _samples(record: Record, field: str) -> Iterator[tuple[Record, str]]:
    samples = mapping(record, field)
    return ((mapping(samples, key, field), name_of(key, field)) for key in samples)


def _probe(sample: Record, family: str, inside: str) -> Probe:
    prompt, target = text(sample, "prompt", inside), text(sample, "target", inside)
    return Probe(f"{prompt} {YES_OR_NO}" if sample["path_type"] == "double" else prompt, target, family)


def _hops(sample: Record, inside: str) -> list[Record]:
    """The single facts that a question goes over."""
    if text(sample, "path_type", inside) != "double":
        return objects(sample, "one_hops", inside)
    paths = [(mapping(sample, name, inside), name_of(name, inside)) for name in ("single_path1", "single_path2")]
    return [hop for path, within in paths for hop in objects(path, "one_hops", within)]


def _reasoning(sample: Record, edit: Record, inside: str) -> str:
    """How a question leads over the edited fact; a path's fourth entry is its direction, forward or backward."""
    hops = _hops(sample, inside)
    if sample["path_type"] == "double":
        return "same_entity"
    paths = value_of(sample, "paths", list, "list", inside)
    if len(paths) != 1:
        return "multi_hop"
    if not (isinstance(paths[0], list) and len(paths[0]) > 3 and len(hops) == 1):
        raise Fault(name_of("paths", inside), "is no list of paths")
    if paths[0][3] == "b":
        return "reversal"
    label = text(mapping(edit, "head_entity", "edit"), "label", "edit.head_entity")
    own_name = text(hops[0], "subject", name_of("one_hops", inside)).lower() == label.lower()
    own_target = text(sample, "target", inside).lower() == text(edit, "target", "edit").lower()
    return "rephrase" if own_name and own_target else "alias"


def _shared(sample: Record, edit: Record, inside: str) -> str:
    shared = text(sample, "loc_type", inside)
    if shared not in SHARED:
        raise Fault(name_of("loc_type", inside), "is none of the four known")
    same_fact = any(_ids(hop, name_of("one_hops", inside)) == _ids(edit, "edit") for hop in _hops(sample, inside))
    return "forgetfulness" if same_fact else SHARED[shared]


def _ids(fact: Record, inside: str) -> tuple[str, ...]:
    """Subject and relation of a fact in Wikidata."""
    fields = ("head_entity", "property")
    return tuple(text(mapping(fact, field, inside), "id", name_of(field, inside)) for field in fields)
