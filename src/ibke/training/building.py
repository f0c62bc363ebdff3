"""Everything of an episode that never changes while the editor learns, computed once.

Gradients, addresses, the hidden states entering the edited layer, what attention keeps of the tokens before an edit's
own, and the base's own answers out of scope are functions of the frozen model. They are written in shards, each
complete or absent, so building can stop and go on.

Shape suffixes: B episodes, R rows, T tokens, N answer positions, D width of the residual stream, P leading,
F attention keys and values of one token, all layers from the edited one on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibke.batch import Pair, coded_positions, collate
from ibke.capture import capture
from ibke.editors.ibke.address import Addresser, first_open
from ibke.editors.ibke.bottleneck import answer_embedding, select
from ibke.editors.ibke.contexts import About
from ibke.errors import TrainingError
from ibke.frames import encode_pair
from ibke.neurons import Site
from ibke.partial import PartialModel
from ibke.prefixes import Prefixes, frame_prefixes
from ibke.rows import EDIT, INSIDE, OUTSIDE, build_groups, continuations
from ibke.training.checkpoint import write_tensors
from ibke.training.clock import Found, since, unnoticed
from ibke.training.episodes import Episode

SHARD = 128  # episodes
KEPT = torch.bfloat16  # keys and values that training only reads: half the bytes


@dataclass
class RowBuilder:
    """Computes shards of rows for one frozen model.

    Args:
        model, tokenizer: the base.
        part: the base split at the edited layer.
    """

    model: Any
    tokenizer: Any
    part: PartialModel

    @cached_property
    def prefixes(self) -> Prefixes:
        """What stands before a prompt in each frame, run once."""
        return frame_prefixes(self.part, self.tokenizer)

    def shard(self, episodes: Sequence[Episode], whole: bool) -> dict[str, Tensor]:
        """Everything about some episodes as flat tensors; an edit may reach every token.

        Args:
            episodes: some episodes.
            whole: keep rows that no edit reaches too; they cost time and give no gradient, but they count in scores.
        """
        pairs, kinds, owner = self.asked(episodes)
        return self.rows([pair.reached(0) for pair in pairs], kinds, owner)

    def asked(self, episodes: Sequence[Episode]) -> tuple[list[Pair], list[int], list[int]]:
        """Tokenised prompts with the answers they must have, their kinds, and the episode each belongs to.

        Raises:
            TrainingError: there is nothing out of scope.
        """
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
                    about = episode.about if kind == EDIT else None
                    pairs.append(encode_pair(asked.prompt, asked.target or "", asked.frame, self.tokenizer, about))
                    kinds.append(kind)
                    owner.append(index)
            for asked in episode.outside:
                pair = encode_pair(asked.prompt, "-", asked.frame, self.tokenizer)
                pairs.append(Pair(pair.prompt, answers[position], pair.span))
                position += 1
                kinds.append(OUTSIDE)
                owner.append(index)
        if OUTSIDE not in kinds:
            raise TrainingError(
                "no request names a prompt whose answer must stay.", "training data", "Give some `locality` prompts."
            )
        return pairs, kinds, owner

    def rows(self, pairs: list[Pair], kinds: list[int], owner: list[int]) -> dict[str, Tensor]:
        """Rows from their marked token on, and what attention keeps of those before."""
        hidden: list[Tensor] = [torch.empty(0)] * len(pairs)
        past: list[Tensor] = [torch.empty(0)] * len(pairs)
        leading: dict[int, tuple[Tensor, Tensor]] = {}
        starts = [pair.subject[0] if pair.subject else 0 for pair in pairs]
        # The owner of a row is irrelevant here, so it carries the row's own number through the grouping.
        numbers, pad_id = list(range(len(pairs))), self.tokenizer.pad_token_id
        shapes = torch.zeros(0, 2, dtype=torch.long)
        for group in build_groups(self.part, pairs, kinds, numbers, pad_id, prefixes=self.prefixes):
            assert group.past is not None
            shapes = torch.tensor([[item.shape[1], item.shape[3]] for pair in group.past.layers for item in pair])
            flat_RTF = torch.cat([item.transpose(1, 2).flatten(2) for pair in group.past.layers for item in pair], 2)
            begin = 0
            for slot, row in enumerate(group.owner_R.tolist()):
                hidden[row] = group.hidden_RTD[slot, : len(pairs[row]) - starts[row]].cpu()
                past[row] = flat_RTF[slot, flat_RTF.shape[1] - starts[row] :].to(KEPT).cpu()
                if kinds[row] == OUTSIDE:
                    end = begin + len(pairs[row].answer)
                    tokens, log_probs = group.base_tokens_NP[begin:end], group.base_log_probs_NP[begin:end]
                    leading[row] = (tokens.int().cpu(), log_probs.cpu())
                    begin = end
        outside = [row for row in numbers if row in leading]
        none = torch.zeros(1, 0)  # nothing out of scope that an edit reaches
        flat_ids = [token for pair, start in zip(pairs, starts, strict=True) for token in pair.fed[start:]]
        return {
            "hidden_TD": torch.cat(hidden),
            "past_TF": torch.cat(past),
            "past_shapes": shapes,
            "past_length": torch.tensor(starts),
            "ids": torch.tensor(flat_ids, dtype=torch.int32),
            "row_kind": torch.tensor(kinds),
            "row_owner": torch.tensor(owner),
            "length": torch.tensor([len(pair) - start for pair, start in zip(pairs, starts, strict=True)]),
            "answer": torch.tensor([token for pair in pairs for token in pair.answer], dtype=torch.int32),
            "answer_length": torch.tensor([len(pair.answer) for pair in pairs]),
            "base_tokens_NP": torch.cat([leading[row][0] for row in outside] or [none.int()]),
            "base_log_probs_NP": torch.cat([leading[row][1] for row in outside] or [none]),
        }


@dataclass
class Builder(RowBuilder):
    """Computes shards of episodes for one frozen model and the bottleneck.

    Args:
        site: the edited MLP.
        addresser: finds where an edit applies.
        shut_D: θ c, which an address has to exceed for its edit to be in force; None where addresses are learned, so
            that nobody knows yet which tokens an edit reaches.
    """

    site: Site
    addresser: Addresser
    shut_D: Tensor | None

    def shard(self, episodes: Sequence[Episode], whole: bool) -> dict[str, Tensor]:
        """Everything about some episodes as flat tensors; rows begin where their edit comes into force.

        Args:
            episodes: some episodes.
            whole: keep rows that no edit reaches too; they cost time and give no gradient, but they count in scores.
        """
        pairs, kinds, owner = self.asked(episodes)
        out = self._edits([pair for pair, kind in zip(pairs, kinds, strict=True) if kind == EDIT])
        asked_about = [About(item.edit.prompt, item.about) for item in episodes]
        out["address_BD"] = torch.cat([self.addresser(asked_about[i : i + 8]) for i in range(0, len(asked_about), 8)])
        first = self._first_reached(pairs, out["address_BD"][owner])
        kept = [row for row, place in enumerate(first) if whole or kinds[row] == EDIT or place is not None]
        # Before it is in force an edit changes nothing, so what stands there is computed once and for all.
        tails = [pairs[row].reached(first[row]) for row in kept]
        return out | self.rows(tails, [kinds[row] for row in kept], [owner[row] for row in kept])

    def _first_reached(self, pairs: list[Pair], address_RD: Tensor) -> list[int | None]:
        if self.shut_D is None:
            return [0] * len(pairs)
        return first_open(self.part, self.site.entrance, pairs, address_RD - self.shut_D)

    def _edits(self, pairs: list[Pair]) -> dict[str, Tensor]:
        keys, grads, roles, counts, answers = [], [], [], [], []
        device = next(self.model.parameters()).device
        for begin in range(0, len(pairs), 64):
            part = pairs[begin : begin + 64]
            batch = collate(part, self.tokenizer.pad_token_id, device)
            taken = capture(self.part, self.site.ends, self.part.prefix(batch), batch)
            embedding = self.model.get_input_embeddings()
            answer_BD = answer_embedding(embedding, batch.labels_N, batch.row_N, batch.rows)
            position, role, mask = (tensor.to(device) for tensor in coded_positions(part))
            nowhere = torch.empty(0)  # addresses are made elsewhere
            written = select(taken, self.site, (position, role, mask), nowhere, answer_BD)
            keys.append(written.keys_BTD[mask].cpu())
            grads.append(written.grads_BTD[mask].cpu())
            roles.append(role[mask].cpu())
            counts.append(mask.sum(1).cpu())
            answers.append(answer_BD.cpu())
        return {
            "keys_TD": torch.cat(keys),
            "grads_TD": torch.cat(grads),
            "role": torch.cat(roles),
            "coded": torch.cat(counts),
            "answer_BD": torch.cat(answers),
        }


def build(
    builder: RowBuilder,
    episodes: Sequence[Episode],
    folder: Path,
    progress: Callable[[int, int], None],
    found: Found = unnoticed,
    *,
    whole: bool,
) -> None:
    """Write all shards that are not there yet; safe to interrupt at any moment.

    Args:
        builder: computes them.
        episodes: what of.
        folder: where to.
        progress: told how many are done.
        found: told of each that is there.
        whole: see :class:`RowBuilder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for begin in range(0, len(episodes), SHARD):
        path = folder / f"{begin // SHARD:05d}.safetensors"
        if path.exists():
            found(path)
        else:
            began = time.monotonic()
            shard = builder.shard(episodes[begin : begin + SHARD], whole)
            write_tensors(path, shard, since(began))
        progress(min(begin + SHARD, len(episodes)), len(episodes))
