"""One correction as the commands make and show it: answers before, the edit, answers after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ibke.cli.output import shorten
from ibke.request import EditRequest

if TYPE_CHECKING:
    from ibke.edit import Edit
    from ibke.editors.base import Editor
    from ibke.frames import Frame
    from ibke.models import LanguageModel

Role = Literal["prompt", "wording", "chat", "keep"]

BEFORE, AFTER = 38, 48  # characters of an answer that are shown


@dataclass(frozen=True)
class Asked:
    """A prompt, what it is asked for, and the answers to it.

    Args:
        role: the edit's own prompt, another wording of it, the same as a chat turn, or something that must not change.
        prompt: the text.
        before: the unedited model's answer.
        after: the edited model's.
        ok: whether the answer is what it should be.
    """

    role: Role
    prompt: str
    before: str = ""
    after: str = ""
    ok: bool = False

    @property
    def frame(self) -> Frame:
        """How it meets the model."""
        return "chat" if self.role == "chat" else "bare"


@dataclass(frozen=True)
class Correction:
    """What became of one request.

    Args:
        request: what was asked for.
        asked: the prompts and their answers, the edit's own prompt first.
        edit: how it was done; None where the model gave the target already.
        seconds: wall-clock time the edit took.
    """

    request: EditRequest
    asked: tuple[Asked, ...]
    edit: Edit | None
    seconds: float = 0.0

    @property
    def achieved(self) -> bool:
        """Whether the model now answers the target."""
        return self.asked[0].ok

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        info = self.edit.info if self.edit else None
        return {
            "prompt": self.request.prompt,
            "target_new": self.request.target_new,
            "subject": self.request.about,
            "achieved": self.achieved,
            "already": self.edit is None,
            "seconds": self.seconds,
            "rate_nats": info.rate_nats if info else 0.0,
            "refine_steps": info.refine_steps if info else 0,
            "nll_before": info.nll_before if info else None,
            "nll_after": info.nll_after if info else None,
            "answers": [
                {"role": a.role, "frame": a.frame, "prompt": a.prompt, "before": a.before, "after": a.after, "ok": a.ok}
                for a in self.asked
            ],
        }


def correct(
    lm: LanguageModel, editor: Editor, request: EditRequest, asked: Sequence[Asked], *, force: bool = False
) -> Correction:
    """Ask, edit, and ask again; the model is left as it was.

    Args:
        lm: the model.
        editor: the method.
        request: the correction.
        asked: what to ask, the request's own prompt first.
        force: edit even where the model gives the target already.
    """
    from ibke.evaluation.metrics import says

    before = answers(lm, asked)
    in_scope = [answer for a, answer in zip(asked, before, strict=True) if a.role != "keep"]
    if not force and all(says(answer, request.target_new) for answer in in_scope):
        done = (replace(a, before=b, after=b, ok=True) for a, b in zip(asked, before, strict=True))
        return Correction(request, tuple(done), None)
    started = time.perf_counter()
    edit = editor.edit([request])
    seconds = time.perf_counter() - started
    after = answers(lm, asked, edit)
    judged = (_judge(a, b, c, request) for a, b, c in zip(asked, before, after, strict=True))
    return Correction(request, tuple(judged), edit, seconds)


def comes(lm: LanguageModel, request: EditRequest, edit: Edit) -> bool:
    """Whether a request's own prompt is answered with its target, an edit being in force."""
    asked = Asked("prompt", request.prompt)
    return _judge(asked, "", answers(lm, [asked], edit)[0], request).ok


def asked_by(request: EditRequest) -> list[Asked]:
    """What a request itself gives to ask."""
    wordings = [Asked("wording", text) for text in request.rephrase_prompts]
    return [Asked("prompt", request.prompt), *wordings, *(Asked("keep", p.prompt) for p in request.locality)]


def answers(lm: LanguageModel, asked: Sequence[Asked], edit: Edit | None = None) -> list[str]:
    """Greedy answers, with an edit in force or without."""
    from ibke.evaluation.generate import generate
    from ibke.frames import encode_pair

    # Only the prompt's side of the pair is used; the answer beside it is a placeholder.
    prompts = [encode_pair(a.prompt, "-", a.frame, lm.tokenizer).prompt for a in asked]
    return [answer.text for answer in generate(lm, prompts, None if edit is None else [edit] * len(prompts))]


def _judge(asked: Asked, before: str, after: str, request: EditRequest) -> Asked:
    from ibke.evaluation.metrics import contains, exact_match, same_answer

    if asked.role == "keep":
        ok = exact_match(before, after)
    elif asked.role == "prompt":
        ok = same_answer(after, request.target_new)
    else:
        ok = contains(after, request.target_new, request.target_true)
    return replace(asked, before=before, after=after, ok=ok)


def render(correction: Correction, note: str = "") -> Group:
    """A correction as a table with a line of figures below."""
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("asked")
    table.add_column("before", style="dim")
    table.add_column("after", min_width=20)
    for a in correction.asked:
        table.add_row(a.role, Text(a.prompt), Text(shorten(a.before, BEFORE)), _after(a))
    head = Text.assemble((correction.request.prompt, "bold"), " → ")
    head.append(correction.request.target_new, style="bold green" if correction.achieved else "bold red")
    head.append(f"  {note}" if note else "", style="dim")
    return Group(head, table, figures(correction))


def figures(correction: Correction) -> Text:
    """Seconds, nats and steps of a correction, in one line."""
    if correction.edit is None:
        return Text("The model answers this already: nothing to correct.", style="yellow")
    info = correction.edit.info
    parts = [f"{correction.seconds:.1f} s"]
    if info.rate_nats is not None:
        parts.append(f"{info.rate_nats:.0f} nats")
    parts.append(f"{info.refine_steps} refining step{'' if info.refine_steps == 1 else 's'}")
    return Text(" · ".join(parts), style="cyan")


def guessed(request: EditRequest, before: str = "") -> str:
    """What a request that names no subject is taken to be about, after some words; empty where it names one."""
    return "" if request.subject else f"{before}taken to be about “{shorten(request.about, 40)}”"


def _after(asked: Asked) -> Text:
    mark, style = ("✓", "green") if asked.ok else ("✗", "red")
    if asked.role == "keep":
        mark, style = ("=", "green") if asked.ok else ("≠", "yellow")
    return Text.assemble((f"{mark} ", style), shorten(asked.after, AFTER))
