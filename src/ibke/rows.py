"""Prompts with known answers, run through the editable part of a model under edits of their own.

A row is in scope (its answer is the edit's target) or out of scope (its answer is what the base itself says there,
and must go on saying). Rows of similar length are computed together, so that little is spent on padding.

Shape suffixes: R rows, T tokens, N answer positions, D hidden, V vocabulary, P leading tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ibke.batch import Batch, Pair, by_length, collate
from ibke.greedy import ended, greedy
from ibke.modules import end_tokens
from ibke.neurons import Neurons, Site, row_neurons
from ibke.partial import PartialModel, Past, join
from ibke.prefixes import Prefixes

EDIT, INSIDE, OUTSIDE = 0, 1, 2
LEADING = 64  # base tokens kept per position for IL; the rest of the distribution is one more bin
AT_ONCE = 96  # prompts that are answered together
CONTINUATION = 8  # tokens of the base's own greedy answer that must stay


@dataclass
class RowGroup:
    """Rows of similar length, padded together.

    Args:
        hidden_RTD: states entering the first edited layer.
        batch: tokens and answers.
        kind_R: ``EDIT``, ``INSIDE`` or ``OUTSIDE``.
        owner_R: the edit in force on each row, counted within the batch of edits.
        base_tokens_NP, base_log_probs_NP: the base's leading tokens at the answer positions of rows out of scope.
        past: tokens before these, where no edit reaches; None where rows are whole.
    """

    hidden_RTD: Tensor
    batch: Batch
    kind_R: Tensor
    owner_R: Tensor
    base_tokens_NP: Tensor
    base_log_probs_NP: Tensor
    past: Past | None = None

    def to(self, device: torch.device) -> RowGroup:
        """The same rows on another device."""
        return RowGroup(
            self.hidden_RTD.to(device),
            self.batch.to(device),
            self.kind_R.to(device),
            self.owner_R.to(device),
            self.base_tokens_NP.to(device),
            self.base_log_probs_NP.to(device),
            self.past and self.past.map(lambda tensor: tensor.to(device)),
        )

    def select(self, rows_R: Tensor) -> RowGroup:
        """The chosen rows only (a boolean mask)."""
        kept_N = rows_R[self.batch.row_N]
        outside_N = kept_N[(self.kind_R == OUTSIDE)[self.batch.row_N]]
        renumbered_R = rows_R.long().cumsum(0) - 1
        length = int(self.batch.attention_RT[rows_R].sum(1).max())
        batch = Batch(
            self.batch.ids_RT[rows_R, :length],
            self.batch.attention_RT[rows_R, :length],
            self.batch.predicts_RT[rows_R, :length],
            self.batch.labels_N[kept_N],
            renumbered_R[self.batch.row_N[kept_N]],
        )
        return RowGroup(
            self.hidden_RTD[rows_R, :length],
            batch,
            self.kind_R[rows_R],
            self.owner_R[rows_R],
            self.base_tokens_NP[outside_N],
            self.base_log_probs_NP[outside_N],
            self.past and self.past.map(lambda tensor: tensor[rows_R]),
        )


def merge(groups: Sequence[RowGroup]) -> RowGroup:
    """Several groups as one, so that the weights are read once for all of them."""
    length = max(group.hidden_RTD.shape[1] for group in groups)

    def padded(values: Sequence[Tensor]) -> Tensor:
        flat = [F.pad(value, (0, 0) * (value.dim() - 2) + (0, length - value.shape[1])) for value in values]
        return torch.cat(flat)

    starts = [0]
    for group in groups:
        starts.append(starts[-1] + group.batch.rows)
    batch = Batch(
        padded([group.batch.ids_RT for group in groups]),
        padded([group.batch.attention_RT for group in groups]),
        padded([group.batch.predicts_RT for group in groups]),
        torch.cat([group.batch.labels_N for group in groups]),
        torch.cat([group.batch.row_N + start for group, start in zip(groups, starts, strict=False)]),
    )
    return RowGroup(
        padded([group.hidden_RTD for group in groups]),
        batch,
        torch.cat([group.kind_R for group in groups]),
        torch.cat([group.owner_R for group in groups]),
        torch.cat([group.base_tokens_NP for group in groups]),
        torch.cat([group.base_log_probs_NP for group in groups]),
        join([group.past for group in groups if group.past]) if groups[0].past else None,
    )


@dataclass
class RowTerms:
    """What came out, by row: NLL of the answer in scope, both divergences out of scope (nats), and exactness.

    Greedy decoding reproduces a given answer if and only if every token of it is the most likely one after those before
    it, so one pass over an answer decides what generation would do.
    """

    nll_R: Tensor
    forward_R: Tensor
    backward_R: Tensor
    right_R: Tensor
    kind_R: Tensor
    owner_R: Tensor


def edited_logits(part: PartialModel, site: Site, neurons: Neurons, group: RowGroup) -> Tensor:
    """Logits at every answer position, each row under its own edit (N × V)."""
    with row_neurons({site.out: site}, {site.out: neurons[group.owner_R]}):
        return part.suffix(group.hidden_RTD, group.batch, group.past)


def run_rows(part: PartialModel, site: Site, neurons: Neurons, groups: Sequence[RowGroup]) -> RowTerms:
    """Run every row under its edit's neurons (B × K × D)."""
    parts = [row_terms(edited_logits(part, site, neurons, group), group) for group in groups]
    return RowTerms(*(torch.cat([getattr(some, item.name) for some in parts]) for item in fields(RowTerms)))


def row_terms(logits_NV: Tensor, group: RowGroup) -> RowTerms:
    """What logits at the answer positions are worth, row by row."""
    batch, outside_N = group.batch, group.kind_R[group.batch.row_N] == OUTSIDE
    inside_N = ~outside_N
    values_N = F.cross_entropy(logits_NV[inside_N], batch.labels_N[inside_N], reduction="none")
    nll_R = batch.per_row(values_N, inside_N)
    forward_N, backward_N = binned_kl(logits_NV[outside_N], group.base_tokens_NP, group.base_log_probs_NP)
    wrong_N = (logits_NV.detach().argmax(-1) != batch.labels_N).float()
    return RowTerms(
        nll_R,
        batch.per_row(forward_N, outside_N),
        batch.per_row(backward_N, outside_N),
        batch.per_row(wrong_N) == 0,
        group.kind_R,
        group.owner_R,
    )


def leading_tokens(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The base's most likely tokens at each position and their log-probabilities (N × P)."""
    log_probs, tokens = logits_NV.log_softmax(-1).topk(min(LEADING, logits_NV.shape[-1]))
    return tokens, log_probs


def binned_kl(logits_NV: Tensor, tokens_NP: Tensor, base_log_probs_NP: Tensor) -> tuple[Tensor, Tensor]:
    """KL(base‖edited) and KL(edited‖base) over the base's leading tokens and one bin for all others (N, nats).

    Merging outcomes can only lower a divergence, so both are lower bounds, tight where the base is confident.
    """
    edited_NP = logits_NV.gather(1, tokens_NP) - logits_NV.logsumexp(-1, keepdim=True)
    base, edited = _with_rest(base_log_probs_NP), _with_rest(edited_NP)
    return (base.exp() * (base - edited)).sum(-1), (edited.exp() * (edited - base)).sum(-1)


def _with_rest(log_probs_NP: Tensor) -> Tensor:
    mass = log_probs_NP.exp().sum(-1, keepdim=True)
    return torch.cat([log_probs_NP, (1.0 - mass).clamp_min(1e-5).log()], dim=-1)


@torch.no_grad()
def build_groups(
    part: PartialModel,
    pairs: Sequence[Pair],
    kinds: Sequence[int],
    owners: Sequence[int],
    pad_id: int,
    *,
    prefixes: Prefixes | None = None,
) -> list[RowGroup]:
    """Rows from tokenised pairs: one pass of the frozen first layers, and of the rest for rows out of scope.

    Args:
        part: the model, split at the edited layer.
        pairs: prompts and answers.
        kinds: ``EDIT``, ``INSIDE`` or ``OUTSIDE`` for each.
        owners: the edit in force on each.
        pad_id: token to pad with.
        prefixes: given, compute again and again only what an edit in force from the subject's last token on can reach
            (:meth:`Pair.reached` marks a pair that it reaches elsewhere): the model is causal, so what stands before it
            is passed once, through all layers, and kept; and what stands before a prompt's own words is taken from
            here, where it is known. For a chat turn that is most of it. Rows that name no subject stay whole.
    """
    device = next(part.model.parameters()).device
    groups = []
    known = [_known(pair, prefixes) if prefixes else () for pair in pairs]
    for chosen in by_length([len(pair) - len(prefix) for pair, prefix in zip(pairs, known, strict=True)]):
        some = [pairs[row] for row in chosen]
        kind = torch.tensor([kinds[row] for row in chosen], device=device)
        owner = torch.tensor([owners[row] for row in chosen], device=device)
        outside_R = kind == OUTSIDE
        none = torch.zeros(0, LEADING, dtype=torch.long, device=device), torch.zeros(0, LEADING, device=device)
        if prefixes:
            before = prefixes.past([known[row] for row in chosen])
            tails = [_without(pairs[row], len(known[row])) for row in chosen]
            batch = collate(tails, pad_id, device)
            hidden, states_ND, past = part.whole(batch, before)
            outside_N = outside_R[batch.row_N]
            leading = leading_tokens(part.logits(states_ND[outside_N])) if bool(outside_R.any()) else none
            hidden, batch, past = _cut(tails, hidden, past, pad_id)
            groups.append(RowGroup(hidden, batch, kind, owner, *leading, past))
            continue
        batch = collate(some, pad_id, device)
        hidden, leading = part.prefix(batch), none
        if bool(outside_R.any()):
            alone = collate([pair for pair, out in zip(some, outside_R.tolist(), strict=True) if out], pad_id, device)
            leading = leading_tokens(part.suffix(hidden[outside_R][:, : alone.ids_RT.shape[1]], alone))
        groups.append(RowGroup(hidden, batch, kind, owner, *leading))
    return groups


def _known(pair: Pair, prefixes: Prefixes) -> tuple[int, ...]:
    """What stands before the prompt's own words, if that is known and the edit does not reach into it."""
    before = tuple(pair.prompt[: pair.span[0]])
    return before if before in prefixes.index and pair.subject and pair.subject[1] > len(before) else ()


def _without(pair: Pair, count: int) -> Pair:
    """The pair without its first tokens, and without its span."""
    about = pair.subject and (pair.subject[0] - count, pair.subject[1] - count)
    return Pair(pair.prompt[count:], pair.answer, (0, 1), about)


def _cut(pairs: Sequence[Pair], hidden_RTD: Tensor, whole: Past, pad_id: int) -> tuple[Tensor, Batch, Past]:
    """Rows as what an edit reaches, and what comes before it.

    Args:
        pairs: without what ``whole`` has before them.
        hidden_RTD: their states entering the first edited layer.
        whole: keys and values of all tokens; what came before the pairs is padded on the left.
        pad_id: token to pad with.
    """
    device = hidden_RTD.device
    start_R = torch.tensor([pair.subject[1] - 1 if pair.subject else 0 for pair in pairs], device=device)
    tails = [_without(pair, start) for pair, start in zip(pairs, start_R.tolist(), strict=True)]
    batch = collate(tails, pad_id, device)
    length = hidden_RTD.shape[1]
    earlier = whole.real_RT.shape[1] - length
    after_RT = (start_R[:, None] + torch.arange(batch.ids_RT.shape[1], device=device)).clamp(max=length - 1)
    rows_R1 = torch.arange(len(pairs), device=device)[:, None]
    # What came before stands on the left of its tail, so padding goes to its own left.
    count_R = whole.real_RT[:, :earlier].sum(1) + start_R
    before = int(count_R.max())
    place_RT = torch.arange(before, device=device) - before + earlier + start_R[:, None]
    real_RT = place_RT >= (earlier + start_R - count_R)[:, None]
    place_RT = place_RT.clamp(min=0)

    def take(item_RHTD: Tensor) -> Tensor:
        return item_RHTD.transpose(1, 2)[rows_R1, place_RT].transpose(1, 2)

    past = Past(real_RT, [(take(keys), take(values)) for keys, values in whole.layers])
    return hidden_RTD[rows_R1, after_RT], batch, past


def continuations(model: Any, tokenizer: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The base's own greedy answers (up to ``CONTINUATION`` tokens), which edits must leave alone."""
    ends = end_tokens(model, tokenizer)
    out: list[list[int]] = [[]] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for begin in range(0, len(order), AT_ONCE):
        rows = order[begin : begin + AT_ONCE]
        made = greedy(model, [prompts[row] for row in rows], tokenizer.pad_token_id, ends, CONTINUATION)
        for row, tokens in zip(rows, made, strict=True):
            out[row] = ended(tokens, ends)
    return out
