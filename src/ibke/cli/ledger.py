"""Commands on a ledger: ``ibke log``, ``show``, ``revert``, ``restore``, ``diff``, ``verify``, ``gc``, ``export``."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ibke.cli.console import (
    DONE,
    JSON,
    NOT_ACHIEVED,
    Bars,
    Dtype,
    EditorPath,
    Method,
    ModelChoice,
    ModelName,
    load_for_editing,
)
from ibke.cli.keep import HOME
from ibke.cli.output import print_json, screen, shorten
from ibke.errors import FormatError, LedgerError
from ibke.files import write_atomically

if TYPE_CHECKING:
    from ibke.ledger import Entry, Ledger

Folder = Annotated[Path, typer.Option("--ledger", envvar="IBKE_LEDGER", help="The ledger's folder.")]
Numbers = Annotated[list[int], typer.Argument(help="Numbers of edits, as `ibke log` shows them.")]
Note = Annotated[str, typer.Option(help="Why, in your own words.")]


def _open(folder: Path) -> Ledger:
    from ibke.ledger import Ledger

    return Ledger(folder)


def log(
    limit: Annotated[int | None, typer.Option(min=1, help="Only the last so many.")] = None,
    folder: Folder = HOME,
    as_json: JSON = False,
) -> None:
    """What was done, oldest first: which edits were made, taken back, and put in force again."""
    console = screen(as_json)
    with _open(folder) as ledger:
        events = list(ledger.events())[-limit if limit else 0 :]
        entries = {number: ledger.entry(number) for number in {event.edit for event in events}}
        active = set(ledger.active())
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("event", "when", "who", "what", "edit", "", "fact", "note"):
        table.add_column(name, no_wrap=name in ("event", "when", "edit"))
    for event in events:
        entry, mark = entries[event.edit], "in force" if event.edit in active else ""
        row = (str(event.id), event.at[:16].replace("T", " "), event.who, event.action, str(event.edit), mark)
        table.add_row(*map(Text, (*row, _fact(entry), event.note)))
    console.print(table if events else "Nothing yet.")
    if as_json:
        shown = [asdict(event) | {"in_force": event.edit in active} | _said(entries[event.edit]) for event in events]
        print_json({"ledger": str(folder), "events": shown})


def show(
    number: Annotated[int, typer.Argument(help="Number of an edit, as `ibke log` shows it.")],
    folder: Folder = HOME,
    as_json: JSON = False,
) -> None:
    """All that was written down of one edit."""
    console = screen(as_json)
    with _open(folder) as ledger:
        entry, standing, active = ledger.entry(number), ledger.standing(number), number in ledger.active()
        events = [event for event in ledger.events() if event.edit == number]
    state = "in force" if active else "superseded" if standing else "taken back"
    info = entry.record["info"]
    lines = {
        "state": state,
        "made": f"{entry.at} by {entry.who}, after event {entry.parent}",
        "method": entry.method + (f", editor {entry.editor}" if entry.editor else ""),
        "supersedes": ", ".join(map(str, entry.supersedes)) or "nothing",
        "nats": "–" if info["rate_nats"] is None else f"{info['rate_nats']:.0f}",
        "seconds": f"{info['seconds']:.2f}",
        "bytes": f"{entry.latent_bytes:,} of code, {entry.factors_bytes:,} of tensors",
        **{name: str(value) for name, value in entry.scores.items()},
        "events": ", ".join(f"{event.id} {event.action}" for event in events),
    }
    console.print(Text(f"{number}  {_fact(entry)}", style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in lines.items():
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)
    if as_json:
        print_json(asdict(entry) | {"state": state, "events": [asdict(event) for event in events]})


def revert(
    edits: Annotated[list[int] | None, typer.Argument(help="Numbers of edits, as `ibke log` shows them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every edit, so that none is in force.")] = False,
    note: Note = "",
    folder: Folder = HOME,
    as_json: JSON = False,
) -> None:
    """Take edits back. What they had taken the place of is in force again."""
    if everything == bool(edits):
        raise LedgerError("which edits?", "revert", "Give their numbers, or --all.")
    with _open(folder) as ledger:
        before = ledger.head()
        if everything:
            ledger.revert_all(note=note)
        else:
            ledger.revert(edits or [], note=note)
        _report_change(ledger, before, ledger.head(), as_json)


def restore(edits: Numbers, note: Note = "", folder: Folder = HOME, as_json: JSON = False) -> None:
    """Put edits that were taken back in force again."""
    with _open(folder) as ledger:
        before = ledger.head()
        ledger.restore(edits, note=note)
        _report_change(ledger, before, ledger.head(), as_json)


def diff(
    first: Annotated[int, typer.Argument(help="An event, as `ibke log` shows it; 0 is before the first.")],
    second: Annotated[int | None, typer.Argument(help="Another; the last if left out.")] = None,
    folder: Folder = HOME,
    as_json: JSON = False,
) -> None:
    """Which edits are in force after one event and not after the other."""
    with _open(folder) as ledger:
        _report_change(ledger, first, ledger.head() if second is None else second, as_json)


def _report_change(ledger: Ledger, first: int, second: int, as_json: bool) -> None:
    console = screen(as_json)
    gone, come = ledger.diff(first, second)
    for mark, style, numbers in (("−", "red", gone), ("+", "green", come)):
        for number in numbers:
            console.print(Text(f"{mark} {number}  {_fact(ledger.entry(number))}", style=style))
    console.print(f"{len(ledger.active(second))} edits in force after event {second}.")
    if as_json:
        print_json({"first": first, "second": second, "gone": gone, "come": come, "in_force": ledger.active(second)})


def verify(
    replay: Annotated[
        bool, typer.Option("--replay", help="Make every edit again from its request and code, and compare.")
    ] = False,
    folder: Folder = HOME,
    model: ModelName = ModelChoice.name,
    method: Method = "ibke",
    editor: EditorPath = None,
    dtype: Dtype = ModelChoice.dtype,
    as_json: JSON = False,
) -> None:
    """Check that all of a ledger is as it was written: exit code 1 if not."""
    console = screen(as_json)
    from ibke.ledger import care

    editing = load_for_editing(ModelChoice(model, dtype=dtype), method, editor, True)[1] if replay else None
    left_out: list[str] = []
    with _open(folder) as ledger, Bars() as tick:
        problems = care.verify(ledger, lambda done, total: tick("Checking", done, total))
        if editing and not problems:
            problems, left_out = care.replay(ledger, editing, lambda done, total: tick("Making again", done, total))
        count = ledger.rows("SELECT count(*) FROM edits")[0][0]
    for text in left_out:
        console.print(Text(text, style="yellow"))
    for problem in problems:
        console.print(Text(problem, style="red"))
    console.print(f"{count} edits, {len(problems) or 'no'} problem{'' if len(problems) == 1 else 's'}.")
    if as_json:
        print_json({"ledger": str(folder), "edits": count, "problems": problems, "left_out": left_out})
    raise typer.Exit(NOT_ACHIEVED if problems else DONE)


def gc(folder: Folder = HOME, as_json: JSON = False) -> None:
    """Delete files that no edit needs, left behind by interrupted commands."""
    from ibke.ledger.care import gc as clear

    with _open(folder) as ledger:
        count, size = clear(ledger)
    screen(as_json).print(f"{count} files deleted, {size:,} bytes.")
    if as_json:
        print_json({"files": count, "bytes": size})


def export(
    out: Annotated[str, typer.Argument(metavar="FILE|-", help="Where to; - is standard output.")],
    folder: Folder = HOME,
    as_json: JSON = False,
) -> None:
    """Write a ledger as JSON Lines, tensors included: exit code 1 if what is written down there has changed."""
    from ibke.ledger.exchange import export_lines
    from ibke.ledger.schema import broken_seals

    with _open(folder) as ledger:
        if out == "-":
            for line in export_lines(ledger):
                typer.echo(line, nl=False)
        else:
            try:
                write_atomically(Path(out), (line.encode() for line in export_lines(ledger)))
            except OSError as error:
                raise LedgerError(f"it cannot be written ({error.strerror}).", out, "Choose another file.") from None
        count, changed = ledger.rows("SELECT count(*) FROM edits")[0][0], broken_seals(ledger.base)
    # It may be all that can be saved, so it is written; but whoever takes it in takes what it says for what was done.
    if changed:
        said = f"events {', '.join(map(str, changed))} are not what they were when they were written down"
        screen(True).print(Text(f"{said}; see `ibke verify`.", style="red"))
    if out != "-":
        screen(as_json).print(f"{count} edits written to {out}.", markup=False)
        if as_json:
            print_json({"edits": count, "file": out, "changed_events": changed})
    raise typer.Exit(NOT_ACHIEVED if changed else DONE)


def import_(
    source: Annotated[Path, typer.Argument(help="A file that `ibke export` wrote.")],
    folder: Folder = HOME,
    model: ModelName = ModelChoice.name,
    as_json: JSON = False,
) -> None:
    """Add all edits of an exported ledger of the same model after those already here."""
    from ibke.ledger import Ledger
    from ibke.ledger.exchange import import_lines

    lm = ModelChoice(model).load()
    with ExitStack() as stack:
        try:
            lines: Iterable[str] = stack.enter_context(source.open(encoding="utf-8"))
            ledger = stack.enter_context(Ledger(folder, lm))
            count = import_lines(ledger, lines, str(source))
        except OSError as error:
            raise FormatError(f"it cannot be read ({error.strerror}).", str(source), "Check the path.") from None
        except UnicodeDecodeError:
            raise FormatError("it is no text.", str(source), "Give a file that `ibke export` wrote.") from None
        active = len(ledger.active())
    screen(as_json).print(f"{count} edits taken in; {active} in force.")
    if as_json:
        print_json({"edits": count, "in_force": active})


def _fact(entry: Entry) -> str:
    first, more = entry.requests[0], len(entry.requests) - 1
    text = f"{shorten(first.prompt, 60)} → {shorten(first.target_new, 30)}"
    return f"{text} and {more} more" if more else text


def _said(entry: Entry) -> dict[str, Any]:
    return {"requests": [{"prompt": one.prompt, "target_new": one.target_new} for one in entry.requests]}
