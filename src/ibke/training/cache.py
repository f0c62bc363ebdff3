"""Random access to cached episodes: what is small is in memory, the rest is read from disk as needed.

Shape suffixes: B episodes, R rows, T tokens, N answer positions, D width of the residual stream, P leading, F attention
keys and values of one token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ibke.batch import Batch, by_length
from ibke.editors.ibke.bottleneck import Written
from ibke.partial import Past
from ibke.rows import EDIT, INSIDE, OUTSIDE, RowGroup

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "I32": torch.int32, "I64": torch.int64}
ON_DISK = ("keys_TD", "grads_TD", "hidden_TD", "past_TF", "base_tokens_NP", "base_log_probs_NP")


class OpenFile:
    """A file that is open as long as somebody reads from it; there may be no more than a thousand at once."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.number)


class StoredRows:
    """One tensor of a safetensors file, read row range by row range.

    A memory map would count the whole file as ours; reading leaves it to the system's page cache.
    """

    def __init__(self, file: OpenFile, offset: int, dtype: torch.dtype, shape: list[int]):
        self.file, self.offset, self.dtype, self.shape = file, offset, dtype, shape
        self.row_bytes = dtype.itemsize * torch.Size(shape[1:]).numel()

    def __getitem__(self, rows: slice) -> Tensor:
        count = rows.stop - rows.start
        if not count:
            return torch.empty(0, *self.shape[1:], dtype=self.dtype)
        raw = os.pread(self.file.number, count * self.row_bytes, self.offset + rows.start * self.row_bytes)
        return torch.frombuffer(bytearray(raw), dtype=self.dtype).view(count, *self.shape[1:])


def open_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, StoredRows]]:
    """The small tensors of a shard, and the large ones left on disk."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    shared = OpenFile(path)
    stored = {
        name: StoredRows(shared, 8 + size + entry["data_offsets"][0], DTYPES[entry["dtype"]], entry["shape"])
        for name, entry in header.items()
    }
    small = {name: rows[0 : rows.shape[0]] for name, rows in stored.items() if name not in ON_DISK}
    return small, {name: rows for name, rows in stored.items() if name in ON_DISK}


@dataclass
class EpisodeBatch:
    """Some episodes ready for one training step.

    Args:
        written: what the editor may know of each.
        groups: all rows, in groups of similar length so that little is computed on padding.
    """

    written: Written
    groups: list[RowGroup]

    def to(self, device: torch.device) -> EpisodeBatch:
        """The same episodes on another device."""
        if device.type == "cpu":
            return self
        moved = {item.name: getattr(self.written, item.name).to(device) for item in fields(self.written)}
        return EpisodeBatch(Written(**moved), [group.to(device) for group in self.groups])


class RowCache:
    """The rows of the episodes of a folder of shards.

    Args:
        folder: where :func:`ibke.training.building.build` wrote them.
    """

    def __init__(self, folder: Path):
        self.shards: list[dict[str, Tensor]] = []
        self.stored: list[dict[str, StoredRows]] = []
        self.index: list[tuple[int, int]] = []
        for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
            data, stored = open_shard(path)
            data["row_start"] = _starts(data["length"])
            data["past_start"] = _starts(data["past_length"])
            data["answer_start"] = _starts(data["answer_length"])
            data["base_start"] = _starts((data["row_kind"] == OUTSIDE) * data["answer_length"])
            self.shards.append(data)
            self.stored.append(stored)
            # Every episode has the row of its edit.
            self.index += [(number, episode) for episode in range(int(data["row_owner"].max()) + 1)]

    def __len__(self) -> int:
        return len(self.index)

    def groups(self, chosen: Sequence[int], kinds: Sequence[int] = (EDIT, INSIDE, OUTSIDE)) -> list[RowGroup]:
        """The rows of some episodes, of like length together; each is owned by its episode's place among them."""
        rows = [
            (shard, int(row), slot)
            for slot, (shard, episode) in enumerate(self.index[item] for item in chosen)
            for row in (self.shards[shard]["row_owner"] == episode).nonzero()[:, 0]
            if int(self.shards[shard]["row_kind"][row]) in kinds
        ]
        lengths = [int(self.shards[shard]["length"][row]) for shard, row, _ in rows]
        return [self._group([rows[item] for item in some]) for some in by_length(lengths)]

    def _group(self, rows: list[tuple[int, int, int]]) -> RowGroup:
        hidden, batch = self._rows(rows)
        kind = torch.stack([self.shards[shard]["row_kind"][row] for shard, row, _ in rows])
        spans = [(self.stored[shard], *self._span(shard, "base_start", row)) for shard, row, _ in rows]
        return RowGroup(
            hidden, batch, kind, torch.tensor([slot for _, _, slot in rows]),
            torch.cat([data["base_tokens_NP"][begin:end] for data, begin, end in spans]).long(),
            torch.cat([data["base_log_probs_NP"][begin:end] for data, begin, end in spans]),
            self._past(rows, hidden.dtype),
        )  # fmt: skip

    def _past(self, rows: list[tuple[int, int, int]], dtype: torch.dtype) -> Past | None:
        """What attention keeps of the tokens before, padded on the left; None where rows are whole."""
        spans = [(shard, *self._span(shard, "past_start", row)) for shard, row, _ in rows]
        longest = max(end - begin for _, begin, end in spans)
        if not longest:
            return None
        shapes = self.shards[0]["past_shapes"].tolist()
        flat_RTF = torch.zeros(len(rows), longest, sum(heads * size for heads, size in shapes), dtype=dtype)
        real_RT = torch.zeros(len(rows), longest, dtype=torch.bool)
        for slot, (shard, begin, end) in enumerate(spans):
            flat_RTF[slot, longest - (end - begin) :] = self.stored[shard]["past_TF"][begin:end]
            real_RT[slot, longest - (end - begin) :] = True
        parts = flat_RTF.split([heads * size for heads, size in shapes], dim=2)
        whole = [part.unflatten(2, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]
        return Past(real_RT, list(zip(whole[::2], whole[1::2], strict=True)))

    def _span(self, shard: int, name: str, item: int) -> tuple[int, int]:
        starts = self.shards[shard][name]
        return int(starts[item]), int(starts[item + 1])

    def _rows(self, rows: list[tuple[int, int, int]]) -> tuple[Tensor, Batch]:
        spans = [self._span(shard, "row_start", row) for shard, row, _ in rows]
        longest = max(end - begin for begin, end in spans)
        like = self.stored[0]["hidden_TD"]
        hidden = torch.zeros(len(rows), longest, like.shape[-1], dtype=like.dtype)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        attention = torch.zeros(len(rows), longest, dtype=torch.bool)
        predicts = torch.zeros(len(rows), longest, dtype=torch.bool)
        labels: list[Tensor] = []
        for slot, ((shard, row, _), (begin, end)) in enumerate(zip(rows, spans, strict=True)):
            data, size = self.shards[shard], end - begin
            hidden[slot, :size] = self.stored[shard]["hidden_TD"][begin:end]
            ids[slot, :size] = data["ids"][begin:end]
            attention[slot, :size] = True
            answer = data["answer"][slice(*self._span(shard, "answer_start", row))].long()
            predicts[slot, size - len(answer) : size] = True
            labels.append(answer)
        row_N = torch.cat([torch.full((len(answer),), slot) for slot, answer in enumerate(labels)])
        return hidden, Batch(ids, attention, predicts, torch.cat(labels), row_N)


class EpisodeCache(RowCache):
    """Episodes with what the bottleneck may know of each edit."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        for data in self.shards:
            data["coded_start"] = _starts(data["coded"])

    def batch(self, chosen: Sequence[int]) -> EpisodeBatch:
        """Gather and pad some episodes."""
        found = [self.index[item] for item in chosen]
        keys, mask = self._padded(found, "keys_TD")
        grads, _ = self._padded(found, "grads_TD")
        role = torch.zeros(mask.shape, dtype=torch.long)
        role[mask] = torch.cat([self.shards[s]["role"][slice(*self._span(s, "coded_start", e))] for s, e in found])
        address, answer = (
            torch.stack([self.shards[shard][name][episode] for shard, episode in found])
            for name in ("address_BD", "answer_BD")
        )
        return EpisodeBatch(Written(keys, grads, role, mask, address, answer), self.groups(chosen))

    def initial(self, count: int) -> tuple[Tensor, Tensor]:
        """Gradients at the written token and addresses of the first ``count`` episodes (each B × D)."""
        grads, addresses = [], []
        for shard, episode in self.index[:count]:
            begin = int(self.shards[shard]["coded_start"][episode])
            grads.append(self.stored[shard]["grads_TD"][begin : begin + 1])
            addresses.append(self.shards[shard]["address_BD"][episode])
        return torch.cat(grads).float(), torch.stack(addresses)

    def _padded(self, found: list[tuple[int, int]], name: str) -> tuple[Tensor, Tensor]:
        """Keys or gradients of some episodes' coded tokens (B × T × D), with the mask B × T."""
        spans = [(shard, *self._span(shard, "coded_start", episode)) for shard, episode in found]
        longest = max(end - begin for _, begin, end in spans)
        block = torch.zeros(len(found), longest, self.stored[0][name].shape[1])
        mask = torch.zeros(len(found), longest, dtype=torch.bool)
        for slot, (shard, begin, end) in enumerate(spans):
            block[slot, : end - begin] = self.stored[shard][name][begin:end]
            mask[slot, : end - begin] = True
        return block, mask


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
