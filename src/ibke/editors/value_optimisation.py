"""What an MLP should return at a subject's last token so that the model answers an edit's target.

ROME (Meng et al. 2022, arXiv 2202.05262, eq. 4) finds it by gradient descent on δ, added to what is returned there:

    L(δ) = mean over contexts x of −log P(o given x + p; δ)
           + λ_KL · KL( P(· given "S is a"; δ) ‖ P(· given "S is a") )
           + λ_w · ‖δ‖ / ‖v₀‖²,     ‖δ‖ ≤ c ‖v₀‖

with target o, prompt p, subject S and v₀ what is returned in the bare prompt. The last line is in the authors' code
only, and so is that log-probabilities are averaged over the target's tokens and that the search ends where L falls
below a threshold. MEMIT and AlphaEdit do the same to the state that leaves a layer.

Only what δ can reach is computed again and again: the tokens from the subject's last on, in the layers from the edited
one on. All contexts of all requests go through the model together.

Shape suffixes: B requests, R rows, T tokens, N answer positions, O width of what is returned, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibke.batch import Pair
from ibke.editors.settings import refuse_below, refuse_not_positive
from ibke.errors import CaptureError
from ibke.partial import PartialModel
from ibke.prefixes import Prefixes
from ibke.rows import EDIT, OUTSIDE, RowGroup, build_groups, merge

# Texts of our own instead of ones sampled from the model: the same for every model and run, and nothing to wait for.
CONTEXTS = (
    "It had rained all day and the streets were empty.",
    "Many people have asked about this before.",
    "Therefore I would like to add one more thing.",
    "Because of the weather we stayed at home and talked.",
    "You may have read about it in the newspaper.",
)


@dataclass(frozen=True)
class ValueSettings:
    """How a value is looked for.

    Args:
        steps: most looks at the objective, of which the last is followed by no step. Published: 20 for ROME on GPT-2
            XL, else 25.
        learning_rate: of Adam. Published: 0.5, on Llama-3-8B 0.1.
        weight_decay: λ_w. Published: 0.5, in EasyEdit's settings for Llama 0.001.
        clamp: c, the longest δ in lengths of v₀. Published: 4 for ROME, 0.75 for MEMIT and AlphaEdit.
        kl_weight: λ_KL. Published: 0.0625.
        stop_below: a request is done when its L is below (nats). Published: 0.05.
        contexts: texts that stand before the prompt, besides none. Published: sampled from the model, 20 of 5 or 10
            tokens for ROME, 5 of 10 tokens for MEMIT and AlphaEdit.
    """

    steps: int = 25
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 4.0
    kl_weight: float = 0.0625
    stop_below: float = 0.05
    contexts: tuple[str, ...] = CONTEXTS

    def __post_init__(self) -> None:
        refuse_below(self, 1, "steps")
        refuse_below(self, 0, "weight_decay", "kl_weight", "stop_below")
        refuse_not_positive(self, "learning_rate")
        refuse_not_positive(self, "clamp", infinite=True)


@dataclass(frozen=True)
class Values:
    """What was found, by request.

    Args:
        delta_BO: δ, to be added to what is returned now (float32).
        steps_B: Adam steps taken.
    """

    delta_BO: Tensor
    steps_B: Tensor


def value_rows(part: PartialModel, asked: Sequence[Sequence[Pair]], about: Sequence[Pair], pad_id: int) -> RowGroup:
    """All that is asked of some requests as rows that begin with the token written.

    Args:
        part: the model, split at the layer where a value is looked for.
        asked: by request, its prompt and target, bare first, then behind each context.
        about: by request, "S is a", its next token standing for all.
        pad_id: token to pad with.
    """
    pairs = [pair.reached(pair.place) for pairs in asked for pair in pairs]
    kinds = [EDIT] * len(pairs)
    owners = [owner for owner, pairs in enumerate(asked) for _ in pairs]
    pairs += [pair.reached(pair.place) for pair in about]
    kinds += [OUTSIDE] * len(about)
    owners += range(len(about))
    # No beginnings are kept from one call to the next: edits may have been attached meanwhile.
    return merge(build_groups(part, pairs, kinds, owners, pad_id, prefixes=Prefixes(part)))


@torch.enable_grad()
def optimise_values(
    part: PartialModel, place: nn.Module, group: RowGroup, start_BO: Tensor, settings: ValueSettings
) -> Values:
    """Look for every request's δ at once; each stops for itself.

    Args:
        part: the model, split at the layer where a value is looked for.
        place: the module whose output δ is added to, in that layer.
        group: see :func:`value_rows`.
        start_BO: v₀.
        settings: how far and how.

    Raises:
        CaptureError: the loss is not finite.
    """
    limit_B1 = settings.clamp * start_BO.norm(dim=-1, keepdim=True)
    delta_BO = torch.zeros_like(start_BO, dtype=torch.float32).requires_grad_()
    adam = torch.optim.Adam([delta_BO], lr=settings.learning_rate)
    open_B = torch.ones(len(start_BO), dtype=torch.bool, device=start_BO.device)
    steps_B, base_BV = open_B.long() * 0, None
    for look in range(settings.steps):
        loss_B, base_BV = _objective(part, place, group, delta_BO, base_BV, settings.kl_weight)
        loss_B = loss_B + settings.weight_decay * delta_BO.norm(dim=-1) / start_BO.norm(dim=-1).square()
        if not torch.isfinite(loss_B[open_B]).all():
            todo = "Lower the learning rate, or load the model in float32."
            raise CaptureError("the loss is not finite.", "looking for a value", todo)
        still_B = open_B & (loss_B.detach() >= settings.stop_below)
        if not still_B.any() or look == settings.steps - 1:
            break
        adam.zero_grad()
        loss_B[still_B].sum().backward()
        kept_BO = delta_BO.detach().clone()
        adam.step()
        with torch.no_grad():
            delta_BO.mul_((limit_B1 / delta_BO.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0))
            # Adam's momentum would carry on those that are done.
            delta_BO[~still_B] = kept_BO[~still_B]
        steps_B += still_B
        if not torch.equal(still_B, open_B):
            group, open_B = group.select(still_B[group.owner_R]), still_B
    return Values(delta_BO.detach(), steps_B)


def _objective(
    part: PartialModel, place: nn.Module, group: RowGroup, delta_BO: Tensor, base_BV: Tensor | None, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """L without its last line (B), and log-probabilities after "S is a" of the base (B × V): as given, or as here."""
    batch, count = group.batch, len(delta_BO)
    with adding_at_first(place, delta_BO[group.owner_R]):
        logits_NV = part.suffix(group.hidden_RTD, batch, group.past)
    owner_N, target_N = group.owner_R[batch.row_N], group.kind_R[batch.row_N] != OUTSIDE
    nll_N = F.cross_entropy(logits_NV[target_N], batch.labels_N[target_N], reduction="none")
    length_R = torch.bincount(batch.row_N, minlength=batch.rows)
    contexts_B = torch.bincount(group.owner_R[group.kind_R != OUTSIDE], minlength=count)
    shares_N = (length_R[batch.row_N] * contexts_B[owner_N])[target_N]
    none_B = torch.zeros(count, device=delta_BO.device)
    loss_B = none_B.index_add(0, owner_N[target_N], nll_N / shares_N)
    said_NV = logits_NV[~target_N].log_softmax(-1)
    about = owner_N[~target_N]
    if base_BV is None:
        base_BV = torch.zeros(count, said_NV.shape[-1], device=said_NV.device)
        base_BV[about] = said_NV.detach()
    kl_N = (said_NV.exp() * (said_NV - base_BV[about])).sum(-1)
    return loss_B + kl_weight * none_B.index_add(0, about, kl_N), base_BV


@contextmanager
def adding_at_first(module: nn.Module, delta_RO: Tensor) -> Iterator[None]:
    """Add a vector of its own to what a module returns at the first token of every row."""

    def add(_: nn.Module, __: Any, out: Any) -> Any:
        returned = out[0] if isinstance(out, tuple) else out
        # Some models flatten rows and tokens before a linear module.
        rows_RTO = returned.reshape(len(delta_RO), -1, returned.shape[-1])
        added_RTO = F.pad(delta_RO[:, None], (0, 0, 0, rows_RTO.shape[1] - 1)).to(rows_RTO.dtype)
        moved = (rows_RTO + added_RTO).view_as(returned)
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
