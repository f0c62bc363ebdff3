"""Token sequences with answers, padded into one batch.

Shape suffixes: R rows (sequences), T tokens, N answer positions of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """A tokenised prompt and its answer.

    Args:
        prompt: token ids fed before the answer.
        answer: token ids to be predicted, end token included.
        span: first and last-plus-one index of the prompt's own words inside ``prompt`` (a chat
            template or question form around them does not count).
        subject: the same for the tokens of the edit's subject, where it is known.
    """

    prompt: list[int]
    answer: list[int]
    span: tuple[int, int]
    subject: tuple[int, int] | None = None

    @property
    def place(self) -> int:
        """The token that is written: the subject's last; where no subject is known the prompt's own last word.

        It is no first position, whose activation belongs to no word, unless there is no other.
        """
        return min(max((self.subject or self.span)[1] - 1, 1), len(self.prompt) - 1)

    def reached(self, place: int | None) -> Pair:
        """The same, with the first token an edit reaches in the place of the subject; None is the prompt's last."""
        begin = len(self.prompt) - 1 if place is None else min(place, len(self.prompt) - 1)
        return replace(self, subject=(begin, begin + 1))

    def __len__(self) -> int:
        # The last answer token is predicted but never fed.
        return len(self.prompt) + len(self.answer) - 1

    @property
    def fed(self) -> list[int]:
        """The tokens a model is fed."""
        return (self.prompt + self.answer)[: len(self)]


@dataclass
class Batch:
    """Right-padded rows.

    Args:
        ids_RT: token ids.
        attention_RT: True where a token is real.
        predicts_RT: True at the positions whose next token is an answer token.
        labels_N: those next tokens, row by row.
        row_N: the row of each answer position.
    """

    ids_RT: Tensor
    attention_RT: Tensor
    predicts_RT: Tensor
    labels_N: Tensor
    row_N: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        tensors = (self.ids_RT, self.attention_RT, self.predicts_RT, self.labels_N, self.row_N)
        return Batch(*(tensor.to(device) for tensor in tensors))

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.ids_RT.shape[0]

    @property
    def question_ends_R(self) -> Tensor:
        """The column of each row's prompt's last token."""
        return self.predicts_RT.long().argmax(1)

    def per_row(self, values_N: Tensor, where_N: Tensor | None = None) -> Tensor:
        """Sum values given per answer position, or for those where it is true, into one per row."""
        row_N = self.row_N if where_N is None else self.row_N[where_N]
        return torch.zeros(self.rows, dtype=values_N.dtype, device=values_N.device).index_add(0, row_N, values_N)

    def score(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """NLL of each answer (R, nats), and whether greedy decoding gives it (R).

        It does if and only if each token of the answer is the likeliest after those before it.
        """
        wrong_N = (logits_NV.detach().argmax(-1) != self.labels_N).float()
        return self.per_row(F.cross_entropy(logits_NV, self.labels_N, reduction="none")), self.per_row(wrong_N) == 0


def collate(pairs: Sequence[Pair], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pad pairs to the longest."""
    longest = max(len(pair) for pair in pairs)
    ids = torch.full((len(pairs), longest), pad_id)
    attention = torch.zeros(len(pairs), longest, dtype=torch.bool)
    predicts = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        size = len(pair)
        ids[row, :size] = torch.tensor(pair.fed)
        attention[row, :size] = True
        predicts[row, len(pair.prompt) - 1 : size] = True
    labels = torch.tensor([token for pair in pairs for token in pair.answer])
    rows = torch.tensor([row for row, pair in enumerate(pairs) for _ in pair.answer])
    return Batch(ids.to(device), attention.to(device), predicts.to(device), labels.to(device), rows.to(device))


GROUP_TOKENS = 256  # padded tokens computed at once
READ_TOKENS = 40  # reading the weights once more costs about as much: 30 tokens in float32, 50 in bfloat16


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in groups of like length, at least cost: padded tokens computed, and weights read once a group.

    Args:
        lengths: tokens of each row.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    cost, begins = [0.0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        first = min(end - 1, max(0, end - GROUP_TOKENS // max(1, longest)))
        best = min(range(first, end), key=lambda begin: cost[begin] + (end - begin) * longest)
        cost.append(cost[best] + (end - best) * longest + READ_TOKENS)
        begins.append(best)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


SUBJECT, LAST, ANSWER = 0, 1, 2
ROLES = 3


def coded_positions(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens whose gradients make up a code: the subject's last, the prompt's last, and the answer's own.

    Args:
        pairs: B tokenised edits; where no subject is known the prompt's own last word stands for it.

    Returns:
        positions, roles (``SUBJECT``, ``LAST``, ``ANSWER``) and mask, each B × T, the subject first.
    """
    rows: list[list[tuple[int, int]]] = []
    for pair in pairs:
        end = len(pair.prompt) - 1
        row = [(pair.place, SUBJECT)] + ([(end, LAST)] if end != pair.place else [])
        rows.append(row + [(position, ANSWER) for position in range(end + 1, len(pair))])
    longest = max(len(row) for row in rows)
    padded = torch.tensor([row + [(0, 0)] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    return padded[..., 0], padded[..., 1], mask
