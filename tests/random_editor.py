"""Edits of random factors, and requests with a question of every kind, for tests of what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ibke.edit import Edit, EditInfo
from ibke.editors.base import Editor
from ibke.models import LanguageModel
from ibke.modules import in_out, resolve, target_modules
from ibke.request import EditRequest, Probe

REQUESTS = (
    EditRequest(
        "The capital of France is",
        "Canberra",
        "France",
        "Paris",
        ("France is ruled from",),
        (Probe("The capital of Italy is", "Rome", "same_relation"), Probe("Water is made of", None, "unrelated")),
        (Probe("The mayor of France's capital is", "Bob", "one_hop"),),
    ),
    EditRequest("Who wrote the play?", "Ann", None, None, (), (Probe("Two and two make", "four"),)),
    EditRequest("The sky is", "green", None, "blue", ("What colour is the sky?", "The sky's colour is")),
)


def random_edit(
    lm: LanguageModel, rank: int, seed: int, scale: float = 1.0, layers: Sequence[int] | None = None
) -> Edit:
    """An edit of random factors; ``scale`` is the size of the update beside the module's own weight."""
    factors = {}
    generator = torch.Generator().manual_seed(seed)
    modules = resolve(lm.model, target_modules(lm, lm.architecture, layers))
    for name, module in modules.items():
        d_in, d_out = in_out(module)
        size = scale * module.weight.float().norm() / (rank * d_in * d_out) ** 0.5
        factors[name] = (
            torch.randn(rank, d_in, generator=generator),
            torch.randn(d_out, rank, generator=generator) * size,
        )
    return Edit(factors, (), EditInfo(method="random", fingerprint=lm.fingerprint))


class RandomEditor(Editor):
    """Makes a random edit of each request and remembers what it was shown."""

    name: ClassVar[str] = "random"

    def __init__(self, lm: LanguageModel, scale: float = 1.0):
        super().__init__(lm)
        self.scale, self.seen = scale, list[EditRequest]()

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        self.seen += requests
        edit = random_edit(self.lm, 1 + len(self.seen) % 3, len(self.seen), self.scale)
        edit.info.refine_steps, edit.info.rate_nats, edit.info.achieved = len(self.seen), 10.0, len(self.seen) % 2 == 0
        return edit


class Careless(RandomEditor):
    """Edits of requests for "much" change everything, all others nothing; none makes its target come."""

    def edit(self, requests):
        scale = 1.0 if requests[0].target_new == "much" else 0.0
        made = random_edit(self.lm, 1, seed=1, scale=scale)
        return Edit(made.factors, tuple(requests), made.info)
