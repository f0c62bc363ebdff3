"""Everything of an episode that never changes while the editor learns, computed once.

Keys, gradients, the hidden states entering the first edited layer and the base's own answers out of scope are functions
of the frozen model. They are written in shards, each complete or absent, so building can stop and go on.

Shape suffixes: B episodes, R rows, T tokens, N answer positions, L modules, I d_in, O d_out, D hidden, P leading.
"""

from __future__ import annotations

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
from ibke.editors.ibke.contrast import contrast_keys
from ibke.frames import encode_pair
from ibke.partial import PartialModel
from ibke.rows import EDIT, INSIDE, OUTSIDE, RowGroup, build_groups, by_length, continuations
from ibke.training.episodes import Episode

SHARD = 128  # episodes


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
        prompts = [encode_pair(asked.prompt, "-", asked.frame, self.tokenizer).prompt for asked in outside]
        answers = continuations(self.model, self.tokenizer, prompts)
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
        out |= self._contrast(episodes)
        out |= self._rows(pairs, kinds)
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

    def _contrast(self, episodes: Sequence[Episode]) -> dict[str, Tensor]:
        keys, count = [], []
        for begin in range(0, len(episodes), 64):
            requests = [(item.edit.prompt, item.subject) for item in episodes[begin : begin + 64]]
            found, mask = contrast_keys(self.part, self.modules, self.tokenizer, requests)
            keys.append(found.transpose(0, 1).transpose(1, 2)[mask].bfloat16())
            count.append(mask.sum(1))
        return {"contrast_SLI": torch.cat(keys), "contrast": torch.cat(count)}

    def _rows(self, pairs: list[Pair], kinds: list[int]) -> dict[str, Tensor]:
        hidden: list[Tensor] = [torch.empty(0)] * len(pairs)
        leading: dict[int, tuple[Tensor, Tensor]] = {}
        # The owner of a row is irrelevant here, so it carries the row's own number through the grouping.
        for group in build_groups(self.part, pairs, kinds, list(range(len(pairs))), self.tokenizer.pad_token_id):
            begin = 0
            for slot, row in enumerate(group.owner_R.tolist()):
                hidden[row] = group.hidden_RTD[slot, : len(pairs[row])].cpu()
                if kinds[row] == OUTSIDE:
                    end = begin + len(pairs[row].answer)
                    leading[row] = (group.base_tokens_NP[begin:end].int(), group.base_log_probs_NP[begin:end])
                    begin = end
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


def build(builder: Builder, episodes: Sequence[Episode], folder: Path, progress: Callable[[int, int], None]) -> None:
    """Write all shards that are not there yet; safe to interrupt at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    for begin in range(0, len(episodes), SHARD):
        path = folder / f"{begin // SHARD:05d}.safetensors"
        if not path.exists():
            part = path.with_suffix(".part")
            save_file(builder.shard(episodes[begin : begin + SHARD]), part)
            part.replace(path)
        progress(min(begin + SHARD, len(episodes)), len(episodes))


@dataclass
class EpisodeBatch:
    """Some episodes ready for one training step.

    Args:
        keys_LBTI, grads_LBTO, role_BT, mask_BT, contrast_LBSI, contrast_mask_BS: see ``bottleneck.Written``.
        groups: all rows, in groups of similar length so that little is computed on padding.
    """

    keys_LBTI: Tensor
    grads_LBTO: Tensor
    role_BT: Tensor
    mask_BT: Tensor
    contrast_LBSI: Tensor
    contrast_mask_BS: Tensor
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
            data["contrast_start"] = torch.cat([torch.zeros(1, dtype=torch.long), data["contrast"].cumsum(0)])
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
        keys, mask = self._padded(found, "keys_TLI", "written_start")
        grads, _ = self._padded(found, "grads_TLO", "written_start")
        role = torch.zeros(mask.shape, dtype=torch.long)
        role[mask] = torch.cat([self.shards[s]["role"][slice(*self._span(s, "written_start", e))] for s, e in found])
        contrast, contrast_mask = self._padded(found, "contrast_SLI", "contrast_start")
        lengths = [int(self.shards[shard]["length"][row]) for shard, row, _ in rows]
        groups = [self._group([rows[item] for item in some]) for some in by_length(lengths)]
        return EpisodeBatch(keys, grads, role, mask, contrast, contrast_mask, groups)

    def _group(self, rows: list[tuple[int, int, int]]) -> RowGroup:
        hidden, batch = self._rows(rows)
        kind = torch.stack([self.shards[shard]["row_kind"][row] for shard, row, _ in rows])
        spans = [(self.shards[shard], *self._span(shard, "base_start", row)) for shard, row, _ in rows]
        return RowGroup(
            hidden, batch, kind, torch.tensor([slot for _, _, slot in rows]),
            torch.cat([data["base_tokens_NP"][begin:end] for data, begin, end in spans]).long(),
            torch.cat([data["base_log_probs_NP"][begin:end] for data, begin, end in spans]),
        )  # fmt: skip

    def tokens(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys (L × T × I) and gradients (L × T × O) of the first written tokens, ``count`` of them at most."""
        keys = torch.cat([data["keys_TLI"] for data in self.shards])[:count].float()
        grads = torch.cat([data["grads_TLO"] for data in self.shards])[:count].float()
        return keys.transpose(0, 1), grads.transpose(0, 1)

    def _padded(self, found: list[tuple[int, int]], name: str, starts: str) -> tuple[Tensor, Tensor]:
        """Ragged tokens × modules × features of some episodes as L × B × T × features, with the mask B × T."""
        spans = [(shard, *self._span(shard, starts, episode)) for shard, episode in found]
        longest = max(1, max(end - begin for _, begin, end in spans))
        count, size = self.shards[0][name].shape[1:]
        block = torch.zeros(count, len(found), longest, size)
        mask = torch.zeros(len(found), longest, dtype=torch.bool)
        for slot, (shard, begin, end) in enumerate(spans):
            block[:, slot, : end - begin] = self.shards[shard][name][begin:end].transpose(0, 1)
            mask[slot, : end - begin] = True
        return block, mask

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
