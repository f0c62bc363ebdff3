"""``ibke ask``: one prompt, with edits in force or without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibke.cli.console import JSON, Bars, Device, Dtype, ModelChoice, ModelName, Modules
from ibke.cli.output import print_json
from ibke.errors import RequestError

if TYPE_CHECKING:
    from ibke.edit import Edit
    from ibke.models import LanguageModel


def ask(
    prompt: Annotated[str, typer.Argument(help="A text to go on with, or a question.")],
    edits: Annotated[list[Path] | None, typer.Option("--edit", help="Folder of an edit to put on. Repeat.")] = None,
    ledger: Annotated[
        Path | None, typer.Option(envvar="IBKE_LEDGER", help="Folder of a ledger; all its edits are in force.")
    ] = None,
    editor: Annotated[
        Path | None, typer.Option(help="Folder of the trained editor an edit by ibke-gated is of, if not ours.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 40,
    model: ModelName = ModelChoice.name,
    module: Modules = None,
    device: Device = ModelChoice.device,
    dtype: Dtype = ModelChoice.dtype,
    as_json: JSON = False,
) -> None:
    """Print a model's greedy answer, up to its end or its first line.

    The answer alone goes to standard output. Several edits add up, in the order given.
    """
    if not prompt.strip():
        raise RequestError("the prompt is empty.", "ask", "Give it a text.")
    from ibke.edit import Edit
    from ibke.evaluation.generate import generate
    from ibke.frames import Frame, encode_pair
    from ibke.session import EditSession

    loaded = [Edit.load(folder) for folder in edits or ()]
    lm = ModelChoice(model, device, dtype, tuple(module or ())).load()
    if editor:
        from ibke.editors.gated.question import load_gate

        load_gate(editor, lm)
    loaded += _kept(ledger, lm) if ledger else []
    frame: Frame = "chat" if chat else "bare"
    # Only the prompt's side of the pair is used; the answer beside it is a placeholder.
    ids = encode_pair(prompt, "-", frame, lm.tokenizer).prompt
    with EditSession(lm) as session, Bars() as tick:
        for edit in loaded:
            session.attach(edit)
        tick("Answering", 0, None)
        answer = generate(lm, [ids], max_new_tokens=max_tokens)[0]
    if as_json:
        print_json(
            {
                "prompt": prompt,
                "frame": frame,
                "answer": answer.text,
                "tokens": len(answer.ids),
                "model": lm.name,
                "edits": [str(folder) for folder in edits or ()],
                "ledger": str(ledger) if ledger else None,
            }
        )
    else:
        typer.echo(answer.text)


def _kept(ledger: Path, lm: LanguageModel) -> list[Edit]:
    """All that is in force in a ledger, as one edit, if there is any."""
    from ibke.fingerprint import check_fingerprint
    from ibke.ledger import Ledger

    with Ledger(ledger) as kept:
        check_fingerprint(kept.fingerprint, lm, f"the ledger {ledger}")
        return [state] if (state := kept.state()) else []
