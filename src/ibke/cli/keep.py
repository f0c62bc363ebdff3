"""``ibke edit --ledger``: edits made, checked and written down, one after another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ibke.cli.console import DONE, NOT_ACHIEVED, REFUSED, WRONG_INPUT, Bars
from ibke.cli.correction import guessed
from ibke.cli.output import print_json, screen, shorten
from ibke.errors import IBKEError, RequestError
from ibke.files import digest
from ibke.request import EditRequest, read_requests

if TYPE_CHECKING:
    from ibke.editors.base import Editor
    from ibke.ledger import Ledger
    from ibke.ledger.guard import Guard
    from ibke.ledger.keeper import Keeper, Kept
    from ibke.models import LanguageModel


PLACE_AND_NOTE = ": "  # stands between a request's place in its file and what the user notes
_PLACE = re.compile(rf"(.*?#\d+)(?:{PLACE_AND_NOTE}|$)")
HOME = Path(".ibke")  # where a ledger is unless told otherwise

LedgerFolder = Annotated[
    Path | None, typer.Option(envvar="IBKE_LEDGER", help="Keep the edits in a ledger, beside those that are there.")
]
Guarded = Annotated[
    bool | None, typer.Option("--guard/--no-guard", help="Keep only edits within limits; the default with --ledger.")
]
LimitsFile = Annotated[
    Path | None, typer.Option(help="JSON file with the guard's limits; the ledger's guard.json if left out.")
]
ProbesFile = Annotated[
    Path | None, typer.Option(help="File of prompts whose answers must stay, one a line; our own if left out.")
]


GROUP = 16  # requests of a file


@dataclass(frozen=True)
class Keeping:
    """How edits are kept.

    Args:
        ledger: its folder.
        guarded: whether an edit that breaks a limit is refused.
        limits: file of limits; None takes ``guard.json`` in the ledger, or else our own.
        probes: file of prompts that must not change, one a line; None takes our own.
        note: written down with each edit.
        group: how many requests of a file are made and checked at once.
    """

    ledger: Path
    guarded: bool = True
    limits: Path | None = None
    probes: Path | None = None
    note: str = ""
    group: int = 1

    def __post_init__(self) -> None:
        try:
            self.note.encode()
        except UnicodeEncodeError:
            raise RequestError("it holds half a character.", "--note", "Write it as UTF-8.") from None

    def guard(self, lm: LanguageModel) -> Guard | None:
        """What decides about edits of a model.

        Raises:
            IBKEError: a file cannot be read.
        """
        if not self.guarded:
            return None
        from ibke.ledger.guard import Guard, Limits, Prompt

        own = self.ledger / "guard.json"
        limits = self.limits or (own if own.exists() else None)
        asked: list[Prompt] | None = None
        if self.probes:
            try:
                lines = self.probes.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise RequestError(
                    f"it cannot be read ({error}).", str(self.probes), "Give one prompt a line."
                ) from None
            asked = [(line.strip(), "bare") for line in lines if line.strip()]
            if not asked:
                raise RequestError("there is no prompt in it.", str(self.probes), "Give one prompt a line.")
        return Guard(lm, Limits.read(limits) if limits else None, asked)


def keep_all(
    lm: LanguageModel,
    editor: Editor,
    requests: Iterator[tuple[EditRequest, str]],
    count: int,
    how: Keeping,
    *,
    force: bool = False,
    as_json: bool = False,
) -> int:
    """Keep one edit a request, saying of each what became of it; those that are there already are passed over.

    Args:
        lm: the model.
        editor: the method.
        requests: each with the note that tells it from others.
        count: how many there are.
        how: see :class:`Keeping`.
        force: edit even where the model gives the target already.
        as_json: print a document.

    Returns:
        the exit code: 2 if a request could not be used, 3 if one was refused, 1 if a target does not come, 0 otherwise.
    """
    from ibke.ledger import Ledger
    from ibke.ledger.keeper import Keeper, Kept

    console, tally = screen(as_json), _Tally(as_json)
    with Bars() as tick, Ledger(how.ledger, lm) as ledger:
        tick("Asking probes", 0, None)
        guard = how.guard(lm)
        if guard and guard.left_out:
            most = f"{guard.left_out} probes are more than {guard.limits.probes} and are not asked"
            console.print(Text(f"{most}; `probes` in {how.ledger / 'guard.json'} sets how many are.", style="yellow"))
        keeper = Keeper(lm, ledger, editor, guard)
        known = _there(ledger)
        done = 0
        while some := list(islice(requests, how.group)):
            new = [one for one in some if _mark(*one) not in known]
            for request, place in some:
                if _mark(request, place) in known:
                    tally.note_down({"prompt": request.prompt, "outcome": "there already", "note": place})
            for outcome in _outcomes(keeper, new, how.note, force):
                tick.print(
                    console, _line(outcome) if isinstance(outcome, Kept) else Text(f"✗ {outcome[1]}", style="red")
                )
                tally.note_down(_document(outcome))
            done += len(some)
            tick("Editing", done, count)
        active = len(ledger.active())
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(tally.outcomes.items()))
    console.print(Text(f"{counts}; {active} edits in force in {how.ledger}.", style="bold"))
    if as_json:
        found = {"ledger": str(how.ledger), "in_force": active, "outcomes": tally.outcomes}
        print_json({**found, "edits": tally.documents})
    return tally.code


class _Tally:
    """What became of requests.

    Args:
        whole: hold a document of each; else only how many of a kind there were.
    """

    def __init__(self, whole: bool):
        self.whole, self.missed = whole, False
        self.outcomes = Counter[str]()
        self.documents: list[dict[str, Any]] = []

    def note_down(self, document: dict[str, Any]) -> None:
        """One more."""
        self.outcomes[document["outcome"]] += 1
        self.missed |= document.get("achieved") is False
        if self.whole:
            self.documents.append(document)

    @property
    def code(self) -> int:
        """The exit code."""
        if "unusable" in self.outcomes:
            return WRONG_INPUT
        if "refused" in self.outcomes:
            return REFUSED
        return NOT_ACHIEVED if self.missed else DONE


def _mark(request: EditRequest, place: str) -> tuple[str, str]:
    """What a request of a file is known by: its place, and all it says, since a file may change."""
    return place, digest(request.to_dict())


def _there(ledger: Ledger) -> set[tuple[str, str]]:
    """The marks of the latest edit from each place in a file, taken back or not."""
    latest = {}
    with ledger.reading():
        for request, note in ledger.made():
            if place := _PLACE.match(note):
                latest[place[1]] = _mark(request, place[1])
    return set(latest.values())


def _outcomes(
    keeper: Keeper, some: list[tuple[EditRequest, str]], note: str, force: bool
) -> Iterator[Kept | tuple[EditRequest, Exception]]:
    """What became of some requests; one that cannot be used does not keep the others from theirs."""
    from ibke.evaluation.costs import OF_ONE

    if not some:
        return
    requests = [request for request, _ in some]
    notes = [PLACE_AND_NOTE.join(filter(None, (place, note))) for _, place in some]
    try:
        yield from keeper.add_all(requests, notes=notes, force=force)
    except OF_ONE as error:
        if len(some) == 1:
            yield requests[0], error
        else:
            for one in some:
                yield from _outcomes(keeper, [one], note, force)


def numbered(path: Path) -> Iterator[tuple[EditRequest, str]]:
    """The requests of a file, each with its place as a note, by which a run that was interrupted goes on."""
    name = path.name.encode(errors="replace").decode()  # it may be in no encoding at all
    return ((request, f"{name}#{number}") for number, request in enumerate(read_requests(path), start=1))


def refuse_unused(how: Keeping | None, given: dict[str, Any]) -> None:
    """Refuse options that mean nothing without a ledger, or without its guard.

    Raises:
        IBKEError: one was given.
    """
    if how is None and (name := next((name for name, value in given.items() if value), None)):
        raise IBKEError("it means nothing without a ledger.", name, "Give --ledger FOLDER too.")
    if how and not how.guarded and (how.limits or how.probes):
        name = "--limits" if how.limits else "--probes"
        raise IBKEError("it means nothing without the guard.", name, "Leave --no-guard out.")


def _line(kept: Kept) -> Text:
    fact = f"{shorten(kept.request.prompt, 50)} → {shorten(kept.request.target_new, 30)}"
    if kept.already:
        return Text(f"= {fact}  the model says so already", style="yellow")
    if kept.overtaken:
        return Text(f"= {fact}  a later request about the same fact holds", style="yellow")
    if kept.number is None:
        assert kept.verdict
        return Text(f"✗ {fact}  refused: {'; '.join(kept.verdict.broken)}", style="red")
    tail = f"  takes the place of {', '.join(map(str, kept.supersedes))}" if kept.supersedes else ""
    missed = kept.edit is not None and kept.edit.info.achieved is False  # kept all the same, for nobody guards it
    mark = ("! ", "yellow") if missed else ("✓ ", "green")
    tail += "  the target does not come" if missed else ""
    seconds = (f"{kept.seconds:.1f} s{tail}", "cyan")
    return Text.assemble(mark, f"{kept.number}  {fact}  ", seconds, guessed(kept.request, " · "))


def _document(kept: Kept | tuple[EditRequest, Exception]) -> dict[str, Any]:
    if isinstance(kept, tuple):
        return {"prompt": kept[0].prompt, "outcome": "unusable", "error": str(kept[1])}
    states = {"already": kept.already, "overtaken": kept.overtaken, "refused": kept.number is None, "kept": True}
    outcome = next(name for name, holds in states.items() if holds)
    request = kept.request
    found: dict[str, Any] = {"prompt": request.prompt, "target_new": request.target_new, "outcome": outcome}
    found["subject"] = request.about
    if kept.edit is not None:
        found |= {"edit": kept.number, "supersedes": list(kept.supersedes), "seconds": kept.seconds}
        found |= {"achieved": kept.verdict.scores["achieved"] if kept.verdict else kept.edit.info.achieved}
    if kept.verdict:
        found |= {"scores": kept.verdict.scores, "broken": list(kept.verdict.broken)}
        found |= {"changed": list(kept.verdict.changed)}
    return found
