"""``ibke edit``: one correction, or a file of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ibke.cli.console import (
    DONE,
    JSON,
    NOT_ACHIEVED,
    WRONG_INPUT,
    Bars,
    Device,
    Dtype,
    EditorPath,
    Method,
    ModelChoice,
    ModelName,
    Modules,
    NoRefine,
    load_for_editing,
)
from ibke.cli.correction import Correction, asked_by, comes, correct, figures, guessed, render
from ibke.cli.keep import (
    GROUP,
    HOME,
    Guarded,
    Keeping,
    LedgerFolder,
    LimitsFile,
    ProbesFile,
    keep_all,
    numbered,
    refuse_unused,
)
from ibke.cli.output import print_json, screen, shorten
from ibke.cli.settings import Settings
from ibke.errors import FormatError, IBKEError, RequestError
from ibke.files import is_special
from ibke.request import EditRequest, Probe, read_requests, refuse_contradictions

if TYPE_CHECKING:
    from rich.console import Console

    from ibke.edit import Edit
    from ibke.editors.base import Editor
    from ibke.models import LanguageModel


def edit(
    prompt: Annotated[str | None, typer.Argument(help="A statement to complete, or a question.")] = None,
    target: Annotated[str | None, typer.Argument(help="The answer it shall get.")] = None,
    subject: Annotated[str | None, typer.Option(help="What the fact is about, as written in the prompt.")] = None,
    rephrase: Annotated[list[str] | None, typer.Option(help="Another wording of the prompt. Repeat.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="A prompt whose answer must stay. Repeat.")] = None,
    requests: Annotated[Path | None, typer.Option(help="Edit requests, one JSON object a line.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to save to; with --requests numbered ones in it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Edit even where the model gives the target already.")] = False,
    ledger: LedgerFolder = None,
    guard: Guarded = None,
    limits: LimitsFile = None,
    probes: ProbesFile = None,
    note: Annotated[str, typer.Option(help="Why, in your own words, for the ledger.")] = "",
    group: Annotated[
        int | None,
        typer.Option(min=1, help="Requests of a file made and checked at once, with --ledger; 16 if left out."),
    ] = None,
    model: ModelName = ModelChoice.name,
    method: Method = "ibke",
    editor: EditorPath = None,
    no_refine: NoRefine = False,
    settings: Settings = None,
    module: Modules = None,
    device: Device = ModelChoice.device,
    dtype: Dtype = ModelChoice.dtype,
    as_json: JSON = False,
) -> None:
    """Make a model answer TARGET to PROMPT.

    The model's files are never touched: the correction is a small folder that `ibke ask --edit` puts on the model.
    With --requests every line becomes a correction of its own, each on the pristine model.

    With --ledger it is checked beside all edits kept there, and written down: `ibke log`, `revert`, `ask --ledger`.

    Exit codes: 0 the model now gives the target, 1 it does not, 2 wrong input, 3 the guard refuses the edit.
    """
    ledger = ledger or (HOME if guard else None)
    how = Keeping(ledger, guard is not False, limits, probes, note, group or GROUP) if ledger else None
    refuse_unused(
        how, {"--no-guard": guard is False, "--limits": limits, "--probes": probes, "--note": note, "--group": group}
    )
    _refuse_both(requests, [prompt, target, subject, *(rephrase or ()), *(keep or ())], ledger, out)
    if requests:
        count, each = _counted(requests, apart=how is None), numbered(requests)
    else:
        locality = tuple(map(Probe, keep or ()))
        asked = EditRequest(prompt or "", target or "", subject, None, tuple(rephrase or ()), locality)
        count, each = 1, iter([(asked, "")])
    chosen = ModelChoice(model, device, dtype, tuple(module or ()))
    lm, editing = load_for_editing(chosen, method, editor, not no_refine, settings or ())
    if how:
        code = keep_all(lm, editing, each, count, how, force=force, as_json=as_json)
    elif requests and out:
        code = _many(lm, editing, requests, count, out, force, as_json)
    else:
        code = _one(lm, editing, next(each)[0], out, force, as_json)
    raise typer.Exit(code)


def _refuse_both(requests: Path | None, single: Sequence[str | None], ledger: Path | None, out: Path | None) -> None:
    """Refuse two sources of requests, two places for edits, or no place for those of a file.

    Raises:
        IBKEError: two places were given.
        RequestError: two sources were given, or no place.
    """
    if ledger and out:
        todo = "Give one of the two, and unset IBKE_LEDGER to use folders."
        raise IBKEError(f"edits are kept in the ledger {ledger}, not in folders.", "--out", todo)
    if requests and any(one is not None for one in single):
        raise RequestError("a file of requests and a request were given.", "edit", "Give --requests, or PROMPT TARGET.")
    if requests and not (ledger or out):
        raise RequestError("there is nowhere to save the edits.", "edit", "Give --out FOLDER, or --ledger FOLDER.")


def _counted(requests: Path, *, apart: bool) -> int:
    """How many requests a file holds; every line is checked before anything is computed, and then read again.

    Args:
        requests: the file.
        apart: edits are never in force together, so that they may contradict each other.

    Raises:
        RequestError: it can be read only once, or holds none, or a line is none; names the line.
    """
    if is_special(requests):
        raise RequestError("it can be read only once.", str(requests), "Write the requests to a file first.")
    lines = read_requests(requests)
    count = sum(1 for _ in lines) if apart else refuse_contradictions(lines, str(requests))
    if not count:
        raise RequestError("there is no request in it.", str(requests), "Write one JSON object a line.")
    return count


def _one(lm: LanguageModel, editor: Editor, request: EditRequest, out: Path | None, force: bool, as_json: bool) -> int:
    from ibke.edit_folder import clear_folder

    console = screen(as_json)
    with Bars() as tick:
        tick("Editing", 0, None)
        correction = correct(lm, editor, request, asked_by(request), force=force)
    folder = _save(correction, out, editor.mark)  # first of all: nothing that goes wrong with a screen loses it
    cleared = bool(out and folder is None and clear_folder(out))  # of an earlier edit, which says otherwise
    console.print(render(correction))
    if cleared:
        console.print(f"The edit that was in {out} is deleted.", markup=False, soft_wrap=True)
    _advise(correction, folder, console)
    if as_json:
        print_json(_document(correction, folder, lm, editor))
    return DONE if correction.achieved else NOT_ACHIEVED


def _many(lm: LanguageModel, editor: Editor, path: Path, count: int, out: Path, force: bool, as_json: bool) -> int:
    from ibke.edit import Edit
    from ibke.edit_folder import clear_folder

    console, digits, mark = screen(as_json), max(4, len(str(count))), editor.mark  # a digest of all weights
    documents: list[dict[str, Any]] = []
    unusable = achieved = there = 0
    with Bars() as tick:
        names = (f"{index:0{digits}d}" for index in range(1, count + 1))
        for index, (name, outcome) in enumerate(_corrections(lm, editor, mark, path, out, names, force), start=1):
            if isinstance(outcome, Edit):
                document = _there(outcome, out / name, lm, editor)
                there += 1
            elif isinstance(outcome, Exception):
                tick.print(console, Text.assemble(f"{name} ", ("✗ ", "red"), (str(outcome), "red")))
                unusable += 1
                clear_folder(out / name)
                document = {"error": str(outcome), "achieved": False}
            else:
                if not (folder := _save(outcome, out / name, mark)):
                    clear_folder(out / name)  # an earlier file's edit, of another request
                tick.print(console, _line(name, outcome))
                document = _document(outcome, folder, lm, editor)
            achieved += bool(document["achieved"])
            if as_json:  # else a file of any length takes no more memory than a line of it
                documents.append(document)
            tick("Editing", index, count)
    tail = f", {unusable} could not be used" if unusable else ""
    tail += f"; {there} were there already (delete their folders to make them again)" if there else ""
    console.print(Text(f"{achieved} of {count} targets are generated{tail}; edits are in {out}.", style="bold"))
    if as_json:
        print_json({"n": count, "achieved": achieved, "unusable": unusable, "there": there, "edits": documents})
    if unusable:
        return WRONG_INPUT
    return DONE if achieved == count else NOT_ACHIEVED


def _corrections(
    lm: LanguageModel, editor: Editor, mark: str, path: Path, out: Path, names: Iterable[str], force: bool
) -> Iterator[tuple[str, Correction | Edit | Exception]]:
    """One outcome a request, with its folder's name: the edit itself, where an earlier run has made it.

    One that does not fit the model does not keep the others from theirs.
    """
    from ibke.evaluation.costs import OF_ONE

    # It has been counted; what is added to it meanwhile is for another run.
    for name, request in zip(names, read_requests(path), strict=False):
        if made := _made(out / name, request, lm, mark):
            yield name, made
            continue
        try:
            yield name, correct(lm, editor, request, asked_by(request), force=force)
        except OF_ONE as error:
            yield name, error


def _made(folder: Path, request: EditRequest, lm: LanguageModel, mark: str) -> Edit | None:
    """The edit of a request that is in its folder; None where there is none, or one of other settings or weights."""
    from ibke.edit import Edit

    try:
        edit = Edit.load(folder)
    except FormatError:
        return None
    same = (edit.info.fingerprint, edit.info.editor) == (lm.fingerprint, mark)
    return edit if same and [one.to_dict() for one in edit.requests] == [request.to_dict()] else None


def _there(edit: Edit, folder: Path, lm: LanguageModel, editor: Editor) -> dict[str, Any]:
    request, info = edit.requests[0], edit.info
    document = {"prompt": request.prompt, "target_new": request.target_new, "achieved": comes(lm, request, edit)}
    document |= {"there": True, "rate_nats": info.rate_nats, "refine_steps": info.refine_steps}
    return {**document, "folder": str(folder), "model": lm.name, "fingerprint": lm.fingerprint, "method": editor.name}


def _save(correction: Correction, folder: Path | None, mark: str) -> Path | None:
    if not (correction.edit and folder):
        return None
    correction.edit.info.editor = mark
    return correction.edit.save(folder)


def _document(correction: Correction, folder: Path | None, lm: LanguageModel, editor: Editor) -> dict[str, Any]:
    place = {"folder": str(folder) if folder else None, "model": lm.name, "fingerprint": lm.fingerprint}
    return {**correction.to_dict(), "method": editor.name, **place}


def _advise(correction: Correction, folder: Path | None, console: Console) -> None:
    if correction.edit is None:
        console.print("Nothing was saved. Give --force to make the edit all the same.")
        return
    if about := guessed(correction.request, "The fact is "):
        console.print(Text(f"{about}; --subject tells otherwise.", style="dim"))
    if not correction.achieved:
        console.print(Text("The target is not generated.", style="bold red"))
    if folder:
        console.print(f"Saved to {folder}. Use it:  ibke ask --edit {folder} …", markup=False, soft_wrap=True)
    else:
        console.print("Not saved: give --out FOLDER to keep it.")


def _line(name: str, correction: Correction) -> Text:
    mark, style = ("✓", "green") if correction.achieved else ("✗", "red")
    prompt, target = shorten(correction.request.prompt, 50), shorten(correction.request.target_new, 30)
    told = {"wording": "wordings that follow", "keep": "answers kept"}
    fine = {role: [a.ok for a in correction.asked if a.role == role] for role in told}
    about = guessed(correction.request, " · ")
    said = "".join(f" · {told[role]} {sum(ok)} of {len(ok)}" for role, ok in fine.items() if not all(ok))
    return Text.assemble(
        f"{name} ", (f"{mark} ", style), f"{prompt} → {target}  ", figures(correction), about, (said, "red")
    )
