"""Whether cells that are compared can be: of the same edits and data file, by one editor and model, on one machine.

Cells lie in a folder for weeks, and are copied there from other machines; what their names do not tell is read out of
them and said beside the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Document = Mapping[str, Any]
UNKNOWN = "unknown"


def unlike(
    here: Mapping[str, Sequence[Document]], against: str, everywhere: Mapping[str, Sequence[Document]]
) -> list[str]:
    """What differs between methods under one data set and protocol; a sentence each, none where all is alike.

    Args:
        here: reports of each method.
        against: the one that the others are compared with.
        everywhere: of each method, its reports of the same settings under any data set and protocol.
    """
    ran = {label: reports for label, reports in here.items() if reports}
    first = against if against in ran else next(iter(ran), "")
    differing = [
        _said("Not all made of the same data file", ran, _file),
        _said("Not all made by the same model", ran, _model),
        _said("Not all made on the same machine, so that seconds and memory cannot be compared", ran, _machine),
    ]
    editors = _other_editors(ran, everywhere)
    return [*_other_edits(ran, first), *editors, *(sentence for sentence in differing if sentence)]


def machine_name(machine: Document) -> str:
    """A machine in words."""
    device = machine.get("device", "cpu")
    return (
        f"{machine.get('cpu', 'unknown processor')}, {machine.get('threads', '?')} thread(s) of "
        f"{machine.get('cores', '?')} core(s){'' if device == 'cpu' else f', {device}'}, "
        f"torch {machine.get('torch', '?')}, ibke {machine.get('ibke', '?')}"
    )


def _other_edits(ran: Mapping[str, Sequence[Document]], first: str) -> list[str]:
    """Which methods were not given the edits of the one they are compared with."""
    edits = {
        label: {edit for report in reports for edit in report["scores"]["edits"]} for label, reports in ran.items()
    }
    alike: dict[tuple[int, int], list[str]] = {}
    for label, own in edits.items():
        if own != edits[first]:
            alike.setdefault((len(own), len(own & edits[first])), []).append(label)
    return [
        f"Not of the same edits: {', '.join(labels)} of {own}, {first} of {len(edits[first])}; differences are over "
        f"those that both have, {both}."
        for (own, both), labels in alike.items()
    ]


def _other_editors(ran: Mapping[str, Sequence[Document]], everywhere: Mapping[str, Sequence[Document]]) -> list[str]:
    """Which methods were not one method all the time (other weights, or what they are told of), or may not have been.

    A table is read across data sets and protocols, and cells of before a training are not run again after it.
    """
    several, unknown = [], []
    for label, reports in ran.items():
        own = _editors(reports)
        others = [mark for mark in _editors(everywhere[label]) if mark not in own]
        if len(own) + len(others) > 1:
            elsewhere = f", {', '.join(others)} elsewhere" if others else ""
            several.append(f"{label} ({', '.join(own)} here{elsewhere})")
        elif own == [UNKNOWN] and any(report.get("training_seconds") is not None for report in reports):
            unknown.append(label)
    said = {"Not all by one editor under its name": several, "By a trained editor that is not known": unknown}
    return [f"{what}: {', '.join(labels)}." for what, labels in said.items() if labels]


def _said(what: str, ran: Mapping[str, Sequence[Document]], name: Callable[[Document], str]) -> str:
    """Which methods have which of several things, if there are several."""
    having: dict[str, list[str]] = {}
    for label, reports in ran.items():
        for found in dict.fromkeys(name(report) for report in reports):
            having.setdefault(found, []).append(label)
    if len(having) < 2:
        return ""
    listed = [f"{', '.join(labels)} ({found})" for found, labels in having.items()]
    return f"{what}: {'; '.join(listed)}."


def _editors(reports: Sequence[Document]) -> list[str]:
    """The first digits of their editors' marks, each once; cells of before these were kept do not know."""
    return list(dict.fromkeys((report["config"].get("editor_mark") or UNKNOWN)[:8] for report in reports))


def _file(report: Document) -> str:
    """By the first digits of its digest; cells of before it was taken do not know."""
    return (report["config"].get("data_sha256") or UNKNOWN)[:8]


def _model(report: Document) -> str:
    config = report["config"]
    known = [config.get("model"), (config.get("fingerprint") or UNKNOWN)[:8], config.get("dtype")]
    return " ".join(str(part) for part in known if part)


def _machine(report: Document) -> str:
    return machine_name(report["machine"]) if report.get("machine") else UNKNOWN
