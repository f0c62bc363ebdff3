"""``ibke demo``: three facts that have changed since the model learned them, corrected one after another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from ibke.cli.console import DONE, JSON, NOT_ACHIEVED, EditorPath, ModelChoice, NoRefine, load_for_editing
from ibke.cli.correction import Asked, Correction, correct, render
from ibke.cli.output import print_json, screen
from ibke.request import EditRequest

if TYPE_CHECKING:
    from rich.console import Console

MODEL = "smollm2-135m"
NEXT = Text.from_markup(
    'Next: [cyan]ibke edit "The capital of Turkey is" Ankara --out ankara[/]\n'
    'then: [cyan]ibke ask "What is the capital of Turkey?" --chat --edit ankara[/]'
)


@dataclass(frozen=True)
class Fact:
    """One fact of the demonstration: what the editor sees of it, what is asked, and since when it holds."""

    request: EditRequest
    asked: tuple[Asked, ...]
    since: str


def load_facts() -> list[Fact]:
    """The three facts. Their other wordings are only asked: the editor does not see them."""
    records = json.loads((resources.files("ibke.data") / "demo.json").read_text(encoding="utf-8"))
    return [_fact(**record) for record in records]


def _fact(since: str, wordings: list[str], chat: str, keep: list[str], **request: Any) -> Fact:
    asked = [Asked("prompt", request["prompt"]), *(Asked("wording", text) for text in wordings), Asked("chat", chat)]
    asked += [Asked("keep", text) for text in keep]
    return Fact(EditRequest(**request), tuple(asked), since)


def demo(no_refine: NoRefine = False, editor: EditorPath = None, as_json: JSON = False) -> None:
    """Correct three facts in a real model and watch its answers change.

    Each fact is edited into the pristine model by itself. The editor sees the prompt and the target alone; the other
    wordings, the chat question and the things that must not change are only asked.
    """
    console = screen(as_json)
    lm, method = load_for_editing(ModelChoice(MODEL), "ibke", editor, not no_refine)
    corrections = []
    for fact in load_facts():
        correction = correct(lm, method, fact.request, fact.asked, force=True)
        corrections.append(correction)
        console.print(render(correction, fact.since), Text())
    _sum_up(corrections, console)
    if as_json:
        print_json({"model": lm.name, "method": method.name, "edits": [c.to_dict() for c in corrections]})
    raise typer.Exit(DONE if all(c.achieved for c in corrections) else NOT_ACHIEVED)


def _sum_up(corrections: list[Correction], console: Console) -> None:
    asked = [a for c in corrections for a in c.asked]
    wordings = [a.ok for a in asked if a.role in ("wording", "chat")]
    kept = [a.ok for a in asked if a.role == "keep"]
    seconds = sum(c.seconds for c in corrections)
    text = Text(f"{sum(c.achieved for c in corrections)} of {len(corrections)} facts corrected", style="bold")
    text.append(
        f" in {seconds:.1f} s; {sum(wordings)} of {len(wordings)} other wordings follow, "
        f"{sum(kept)} of {len(kept)} other answers stayed.",
        style="not bold",
    )
    console.print(text, NEXT, sep="\n")
