"""Everything of an episode that never changes while the editor learns, computed once.

Keys, gradients, the hidden states entering the first edited layer and the base's own answers out of scope are functions
of the frozen model. They are written in shards, each complete or absent, so building can stop and go on.

Shape suffixes: E episodes, R rows, T tokens, N answer positions, L modules, I d_in, O d_out, D hidden, P leading tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ibke.batch import Batch, Pair, collate, written_positions
from ibke.capture import capture
from ibke.frames import encode_pair
from ibke.partial import PartialModel
from ibke.training.episodes import Asked, Episode

SHARD = 128  # episodes
LEADING = 64  # base tokens kept per position for IL; the rest of the distribution is one more bin
CONTINUATION = 8  # tokens of the base's own greedy answer that must stay
GROUP_TOKENS = 1024  # padded tokens computed at once
EDIT, INSIDE, OUTSIDE = 0, 1, 2


@dataclass
class Builder:
    """Computes shards for one frozen model.

    Args:
        model, tokenizer: the base.
        part: the base split at the first edited layer.
        modules: edited modules by name.
        write_last, write_answer: which positions may be written (see :class:`IBKEConfig`).
    """

    model: Any
    tokenizer: Any
    part: PartialModel
    modules: dict[str, nn.Module]
    write_last: bool
    write_answer: bool

    def shard(self, episodes: Sequence[Episode]) -> dict[str, Tensor]:
        """Everything about some episodes as flat tensors."""
        outside = [asked for episode in episodes for asked in episode.outside]
        answers = continuations(self.model, self.tokenizer, outside)
        pairs: list[Pair] = []
        kinds: list[int] = []
        owner: list[int] = []
        position = 0
        for index, episode in enumerate(episodes):
            for kind, group in ((EDIT, (episode.edit,)), (INSIDE, episode.inside)):
                for asked in group:
                    pairs.append(encode_pair(asked.prompt, asked.target or "", asked.frame, self.tokenizer))
                    kinds.append(kind)
                    owner.append(index)
            for asked in episode.outside:
                pair = encode_pair(asked.prompt, "-", asked.frame, self.tokenizer)
                pairs.append(Pair(pair.prompt, answers[position], pair.span))
                position += 1
                kinds.append(OUTSIDE)
                owner.append(index)
        out = self._edits([pair for pair, kind in zip(pairs, kinds, strict=True) if kind == EDIT])
        out |= self._rows(pairs, torch.tensor(kinds))
        return out | {"row_kind": torch.tensor(kinds), "row_owner": torch.tensor(owner)}

    def _edits(self, pairs: list[Pair]) -> dict[str, Tensor]:
        keys: list[Tensor] = []
        grads: list[Tensor] = []
        roles: list[Tensor] = []
        counts: list[Tensor] = []
        for begin in range(0, len(pairs), 64):
            part = pairs[begin : begin + 64]
            batch = collate(part, self.tokenizer.pad_token_id)
            taken = capture(self.part, self.modules, self.part.prefix(batch), batch)
            position, role, mask = written_positions(part, last=self.write_last, answer=self.write_answer)
            row = torch.arange(len(part))[:, None].expand_as(position)[mask]
            keys.append(torch.stack([k[row, position[mask]] for k in taken.keys.values()], 1).bfloat16())
            grads.append(torch.stack([g[row, position[mask]] for g in taken.value_grads.values()], 1).bfloat16())
            roles.append(role[mask])
            counts.append(mask.sum(1))
        return {
            "keys_TLI": torch.cat(keys),
            "grads_TLO": torch.cat(grads),
            "role": torch.cat(roles),
            "written": torch.cat(counts),
        }

    @torch.no_grad()
    def _rows(self, pairs: list[Pair], kind_R: Tensor) -> dict[str, Tensor]:
        order = sorted(range(len(pairs)), key=lambda row: len(pairs[row]))
        hidden: list[Tensor] = [torch.empty(0)] * len(pairs)
        leading: dict[int, tuple[Tensor, Tensor]] = {}
        for begin in range(0, len(order), 64):
            rows = order[begin : begin + 64]
            batch = collate([pairs[row] for row in rows], self.tokenizer.pad_token_id)
            states = self.part.prefix(batch)
            for slot, row in enumerate(rows):
                hidden[row] = states[slot, : len(pairs[row])].clone()
            keep = torch.tensor([int(kind_R[row]) == OUTSIDE for row in rows])
            if keep.any():
                chosen = [row for row in rows if int(kind_R[row]) == OUTSIDE]
                some = collate([pairs[row] for row in chosen], self.tokenizer.pad_token_id)
                logits = self.part.suffix(states[keep][:, : some.ids_RT.shape[1]], some)
                log_probs, tokens = logits.log_softmax(-1).topk(LEADING)
                for slot, row in enumerate(chosen):
                    leading[row] = (tokens[some.row_N == slot].int(), log_probs[some.row_N == slot])
        outside = [row for row in range(len(pairs)) if row in leading]
        flat_ids = [token for pair in pairs for token in (pair.prompt + pair.answer)[: len(pair)]]
        return {
            "hidden_TD": torch.cat(hidden),
            "ids": torch.tensor(flat_ids, dtype=torch.int32),
            "length": torch.tensor([len(pair) for pair in pairs]),
            "answer": torch.tensor([token for pair in pairs for token in pair.answer], dtype=torch.int32),
            "answer_length": torch.tensor([len(pair.answer) for pair in pairs]),
            "base_tokens_NP": torch.cat([leading[row][0] for row in outside]),
            "base_log_probs_NP": torch.cat([leading[row][1] for row in outside]),
        }


@torch.no_grad()
def continuations(model: Any, tokenizer: Any, asked: Sequence[Asked]) -> list[list[int]]:
    """The base's own greedy answers (up to ``CONTINUATION`` tokens), which edits must leave alone."""
    prompts = [encode_pair(item.prompt, "-", item.frame, tokenizer).prompt for item in asked]
    out: list[list[int]] = [[]] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for begin in range(0, len(order), 96):
        rows = order[begin : begin + 96]
        longest = max(len(prompts[row]) for row in rows)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        attention = torch.zeros_like(ids)
        for slot, row in enumerate(rows):
            ids[slot, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
            attention[slot, longest - len(prompts[row]) :] = 1
        made = model.generate(
            input_ids=ids, attention_mask=attention, max_new_tokens=CONTINUATION, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )[:, longest:]
        for slot, row in enumerate(rows):
            tokens = made[slot].tolist()
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id) + 1]
            out[row] = tokens
    return out


def build(builder: Builder, episodes: Sequence[Episode], folder: Path, progress: Callable[[int, int], None]) -> None:
    """Write all shards that are not there yet; safe to interrupt at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    for begin in range(0, len(episodes), SHARD):
        path = folder / f"{begin // SHARD:05d}.safetensors"
        if not path.exists():
            part = path.with_suffix(".part")
            save_file(builder.shard(episodes[begin : begin + SHARD]), part)
            os.replace(part, path)
        progress(min(begin + SHARD, len(episodes)), len(episodes))


@dataclass
class RowGroup:
    """Rows of similar length, padded together.

    Args:
        hidden_RTD: states entering the first edited layer.
        batch: tokens and answers.
        kind_R: ``EDIT``, ``INSIDE`` or ``OUTSIDE``.
        owner_R: the episode, counted within the batch.
        base_tokens_NP, base_log_probs_NP: the base's leading tokens at the answer positions of rows out of scope.
    """

    hidden_RTD: Tensor
    batch: Batch
    kind_R: Tensor
    owner_R: Tensor
    base_tokens_NP: Tensor
    base_log_probs_NP: Tensor


@dataclass
class EpisodeBatch:
    """Some episodes ready for one training step.

    Args:
        keys_LBTI, grads_LBTO, role_BT, mask_BT: the written tokens (see ``bottleneck.Written``).
        groups: all rows, in groups of similar length so that little is computed on padding.
    """

    keys_LBTI: Tensor
    grads_LBTO: Tensor
    role_BT: Tensor
    mask_BT: Tensor
    groups: list[RowGroup]


class EpisodeCache:
    """Random access to the episodes of a folder of shards (memory-mapped, read as needed)."""

    def __init__(self, folder: Path):
        self.shards = []
        self.index: list[tuple[int, int]] = []
        for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
            with safe_open(path, framework="pt") as file:
                data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            data["row_start"] = torch.cat([torch.zeros(1, dtype=torch.long), data["length"].cumsum(0)])
            data["answer_start"] = torch.cat([torch.zeros(1, dtype=torch.long), data["answer_length"].cumsum(0)])
            data["written_start"] = torch.cat([torch.zeros(1, dtype=torch.long), data["written"].cumsum(0)])
            outside = (data["row_kind"] == OUTSIDE) * data["answer_length"]
            data["base_start"] = torch.cat([torch.zeros(1, dtype=torch.long), outside.cumsum(0)])
            self.shards.append(data)
            self.index += [(number, episode) for episode in range(len(data["written"]))]

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, chosen: Sequence[int]) -> EpisodeBatch:
        """Gather and pad some episodes."""
        found = [self.index[item] for item in chosen]
        rows = [
            (shard, int(row), slot)
            for slot, (shard, episode) in enumerate(found)
            for row in (self.shards[shard]["row_owner"] == episode).nonzero()[:, 0]
        ]
        spans = [self._span(shard, "written_start", episode) for shard, episode in found]
        longest = max(end - begin for begin, end in spans)
        first = self.shards[found[0][0]]
        count, d_in = first["keys_TLI"].shape[1:]
        keys = torch.zeros(count, len(found), longest, d_in)
        grads = torch.zeros(count, len(found), longest, first["grads_TLO"].shape[-1])
        role = torch.zeros(len(found), longest, dtype=torch.long)
        mask = torch.zeros(len(found), longest, dtype=torch.bool)
        for slot, ((shard, _), (begin, end)) in enumerate(zip(found, spans, strict=True)):
            data = self.shards[shard]
            keys[:, slot, : end - begin] = data["keys_TLI"][begin:end].transpose(0, 1)
            grads[:, slot, : end - begin] = data["grads_TLO"][begin:end].transpose(0, 1)
            role[slot, : end - begin] = data["role"][begin:end]
            mask[slot, : end - begin] = True
        return EpisodeBatch(keys, grads, role, mask, [self._group(some) for some in self._by_length(rows)])

    def _by_length(self, rows: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
        """Split rows into groups of at most ``GROUP_TOKENS`` padded tokens: small enough for the processor's cache."""
        rows = sorted(rows, key=lambda item: int(self.shards[item[0]]["length"][item[1]]))
        groups: list[list[tuple[int, int, int]]] = [[]]
        for item in rows:
            length = int(self.shards[item[0]]["length"][item[1]])
            if groups[-1] and (len(groups[-1]) + 1) * length > GROUP_TOKENS:
                groups.append([])
            groups[-1].append(item)
        return groups

    def _group(self, rows: list[tuple[int, int, int]]) -> RowGroup:
        hidden, batch = self._rows(rows)
        kind = torch.stack([self.shards[shard]["row_kind"][row] for shard, row, _ in rows])
        spans = [(self.shards[shard], *self._span(shard, "base_start", row)) for shard, row, _ in rows]
        return RowGroup(
            hidden, batch, kind, torch.tensor([slot for _, _, slot in rows]),
            torch.cat([data["base_tokens_NP"][begin:end] for data, begin, end in spans]).long(),
            torch.cat([data["base_log_probs_NP"][begin:end] for data, begin, end in spans]),
        )  # fmt: skip

    def _span(self, shard: int, name: str, item: int) -> tuple[int, int]:
        starts = self.shards[shard][name]
        return int(starts[item]), int(starts[item + 1])

    def _rows(self, rows: list[tuple[int, int, int]]) -> tuple[Tensor, Batch]:
        spans = [self._span(shard, "row_start", row) for shard, row, _ in rows]
        longest = max(end - begin for begin, end in spans)
        hidden = torch.zeros(len(rows), longest, self.shards[0]["hidden_TD"].shape[-1], dtype=torch.bfloat16)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        attention = torch.zeros(len(rows), longest, dtype=torch.bool)
        predicts = torch.zeros(len(rows), longest, dtype=torch.bool)
        labels: list[Tensor] = []
        for slot, ((shard, row, _), (begin, end)) in enumerate(zip(rows, spans, strict=True)):
            data, size = self.shards[shard], end - begin
            hidden[slot, :size], ids[slot, :size] = data["hidden_TD"][begin:end], data["ids"][begin:end]
            attention[slot, :size] = True
            answer = data["answer"][slice(*self._span(shard, "answer_start", row))].long()
            predicts[slot, size - len(answer) : size] = True
            labels.append(answer)
        row_N = torch.cat([torch.full((len(answer),), slot) for slot, answer in enumerate(labels)])
        return hidden, Batch(ids, attention, predicts, torch.cat(labels), row_N)
