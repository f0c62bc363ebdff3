"""What tests of methods that locate and edit share: tiny editors, and keys from passes of the whole model."""

from __future__ import annotations

from typing import Any

import torch
from tests.conftest import make_tiny
from torch import Tensor

from ibke.editors.alphaedit import AlphaEditEditor, AlphaEditSettings
from ibke.editors.locate import FLOOR, LocateEditor
from ibke.editors.memit import MEMITEditor, MEMITSettings
from ibke.editors.rome import ROMEEditor, ROMESettings
from ibke.partial import taking_input
from ibke.request import EditRequest

REQUESTS = [
    EditRequest("The capital of Borduria is", "Rome", subject="Borduria"),
    EditRequest("Who wrote the play Maskenball?", "Ann", subject="Maskenball"),
    EditRequest("Canberra is the capital of", "Turan", subject="Canberra"),
]
FAST: dict[str, Any] = {"steps": 4, "tokens": 2000, "contexts": ("The play is known.", "Who wrote it then?")}
EDITORS = {
    "rome": (ROMEEditor, ROMESettings(layer=1, **FAST)),
    "memit": (MEMITEditor, MEMITSettings(layers=(1, 2), moment_weight=0.01, **FAST)),
    "alphaedit": (AlphaEditEditor, AlphaEditSettings(layers=(1, 2), threshold=0.1, ridge=0.1, **FAST)),
}


def make_editor(method, model="llama", **settings):
    kind, default = EDITORS[method]
    return kind(make_tiny(model), type(default)(**{**vars(default), **settings}))


def floored(moment_II):
    return moment_II + FLOOR * moment_II.diagonal().mean() * torch.eye(len(moment_II), dtype=torch.float64)


def noted_values(monkeypatch):
    """A list that the δ of every edit made from now on are put into (requests × width)."""
    deltas: list[Tensor] = []
    look = LocateEditor._values

    def note(*arguments):
        values = look(*arguments)
        deltas.append(values.delta_BO)
        return values

    monkeypatch.setattr(LocateEditor, "_values", note)
    return deltas


def key_at_subject(editor, module, request, context=""):
    """What a module is fed at the token written, from a pass of the whole model."""
    pair = editor.pair(request.prompt, request.target_new, subject=request.subject, context=context)
    with taking_input(module) as taken, torch.no_grad():
        editor.lm.model(torch.tensor([pair.prompt]))
    return taken[0].reshape(len(pair.prompt), -1)[pair.place].double()


def mean_key(editor, module, request):
    bare, *others = (key_at_subject(editor, module, request, text) for text in ("", *FAST["contexts"]))
    share = editor.settings.bare_share
    return share * bare + (1 - share) * torch.stack(others).mean(0)


def close(one, two, tolerance=1e-4):
    assert (one.double() - two.double()).norm() < tolerance * two.double().norm()
