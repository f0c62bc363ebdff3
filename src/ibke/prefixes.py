"""Beginnings that many token sequences share, run once.

Shape suffixes: R rows, T tokens, H heads, D size; I a module's d_in.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ibke.batch import Pair, by_length, collate
from ibke.frames import FRAMES, encode_pair
from ibke.partial import PartialModel, Past, taking_input, taking_inputs


class Row(NamedTuple):
    """Tokens after a known beginning (at least one)."""

    prefix: tuple[int, ...]
    tail: tuple[int, ...]


class Reading(NamedTuple):
    """What was seen at the tokens of a row's tail.

    Args:
        entering_TD: states entering the first layer that an edit may change.
        fed: what each module is fed (T × I, float32).
    """

    entering_TD: Tensor
    fed: tuple[Tensor, ...]


SHARED = 8  # tokens from which on a beginning that others begin with is run before them


class Prefixes:
    """Beginnings of token sequences that never change, run once; what follows them then costs its own tokens only.

    Args:
        part: the model; kept are keys and values of its attention.
        prefixes: token ids of the beginnings; an empty one is always there.
        layers: of how many layers, counted from the first; None is all. No pass goes further.
    """

    def __init__(self, part: PartialModel, prefixes: Sequence[tuple[int, ...]] = (), layers: int | None = None):
        self.part = part
        self.index: dict[tuple[int, ...], int] = {(): 0}
        for prefix in prefixes:
            self.index.setdefault(prefix, len(self.index))
        known = [prefix for prefix in self.index if prefix]
        self.real_RT = torch.zeros(
            len(self.index), max(map(len, self.index)), dtype=torch.bool, device=part.model.device
        )
        for prefix in known:
            self.real_RT[self.index[prefix], -len(prefix) :] = True
        self.kept: list[tuple[Tensor, Tensor]] = []
        self._last = part.layers[layers] if layers is not None and layers < len(part.layers) else None
        # The shortest has none itself, so that two rounds are enough.
        stems = [min((one for one in known if _begins(one, prefix)), key=len, default=()) for prefix in known]
        rows = [Row(stem, prefix[len(stem) :]) for stem, prefix in zip(stems, known, strict=True)]
        for later in (False, True):
            some = [row for row in rows if bool(row.prefix) == later]
            for chosen in by_length([len(row.tail) for row in some]):
                self._run([some[place] for place in chosen])

    @torch.no_grad()
    def _run(self, rows: Sequence[Row]) -> None:
        """Keep what rows bring whose prefixes are known."""
        past = self.past([row.prefix for row in rows])
        batch = collate([Pair(list(row.tail), [0], (0, 1)) for row in rows], 0, self.real_RT.device)
        given = self.part.after(past, batch)
        with taking_input(self._last, last=True) if self._last is not None else nullcontext():
            self.part.decoder(input_ids=batch.ids_RT, **given)
        found = [(keys, values) for keys, values, *_ in given["past_key_values"]]
        if not self.kept:
            self.kept = [(self._room(keys), self._room(values)) for keys, values in found]
        before = past.real_RT.shape[1]
        for at, row in enumerate(rows):
            place, known = self.index[row.prefix + row.tail], len(row.prefix)
            # Padding, before and behind, may hold anything and is left out.
            tokens = slice(before - known, before + len(row.tail))
            for kept, new in zip(self.kept, found, strict=True):
                for room_RHTD, item_RHTD in zip(kept, new, strict=True):
                    room_RHTD[place, :, -known - len(row.tail) :] = item_RHTD[at, :, tokens]

    def _room(self, item_RHTD: Tensor) -> Tensor:
        rows, longest = self.real_RT.shape
        return item_RHTD.new_zeros(rows, item_RHTD.shape[1], longest, item_RHTD.shape[3])

    def past(self, prefixes: Sequence[tuple[int, ...]], layers: int | None = None) -> Past:
        """Known beginnings of some rows, padded on the left to the longest among them.

        Args:
            prefixes: one a row.
            layers: how many layers, counted from the first; None is all.
        """
        chosen = torch.tensor([self.index[prefix] for prefix in prefixes], device=self.real_RT.device)
        longest = max(map(len, prefixes))
        begin = self.real_RT.shape[1] - longest
        kept = self.kept[:layers] if longest else []
        return Past(
            self.real_RT[chosen, begin:],
            [(keys[chosen, :, begin:], values[chosen, :, begin:]) for keys, values in kept],
        )

    def split(self, tokens: Sequence[int], at: int) -> Row:
        """Some tokens as a row: cut where they are, if what stands before is known, or else not at all."""
        prefix = tuple(tokens[:at])
        return Row(prefix, tuple(tokens[at:])) if prefix in self.index else Row((), tuple(tokens))

    @torch.no_grad()
    def read(self, modules: Sequence[nn.Module], rows: Sequence[Row]) -> list[Reading]:
        """What some modules are fed at the tokens of each row, and what enters the last one's layer, where a pass ends.

        A row that another one begins with is read there. A row whose prefix is not known is run as a whole.

        Args:
            modules: in the order in which they are run, the last one in the first layer that an edit may change.
            rows: a beginning and the tokens after it.
        """
        split = [self.split(row.prefix + row.tail, len(row.prefix)) for row in rows]
        source = _longest_of_same_beginning(split)
        run = sorted(set(source))
        got: dict[int, Reading] = {}
        for chosen in by_length([len(split[row].tail) for row in run]):
            numbers = [run[place] for place in chosen]
            got |= dict(zip(numbers, self._read(modules, [split[row] for row in numbers]), strict=True))
        found = []
        for row, known, place in zip(rows, split, source, strict=True):
            # What is read of a row ends with it, and begins where its own tail does.
            here, (entering_TD, fed) = slice(len(known.tail) - len(row.tail), len(known.tail)), got[place]
            found.append(Reading(entering_TD[here], tuple(fed_TI[here] for fed_TI in fed)))
        return found

    def _read(self, modules: Sequence[nn.Module], rows: Sequence[Row]) -> list[Reading]:
        part, past = self.part, self.past([row.prefix for row in rows], self.part.first + 1)
        batch = collate([Pair(list(row.tail), [0], (0, 1)) for row in rows], 0, self.real_RT.device)
        with taking_input(part.layers[part.first]) as entering, taking_inputs(modules) as taken:
            part.decoder(input_ids=batch.ids_RT, **part.after(past, batch))
        shape = (*batch.ids_RT.shape, -1)  # some models flatten rows and tokens before a linear module
        fed = [one[0].float().reshape(shape) for one in taken]
        return [
            Reading(entering_TD[: len(row.tail)], tuple(fed_RTI[at, : len(row.tail)] for fed_RTI in fed))
            for at, (row, entering_TD) in enumerate(zip(rows, entering[0].reshape(shape), strict=True))
        ]


def _begins(stem: tuple[int, ...], prefix: tuple[int, ...]) -> bool:
    return SHARED <= len(stem) < len(prefix) and prefix[: len(stem)] == stem


def _longest_of_same_beginning(rows: Sequence[Row]) -> list[int]:
    """For each row the number of the longest one that begins with it, which it is read from."""
    source = list(range(len(rows)))
    order = sorted(source, key=lambda row: len(rows[row].tail), reverse=True)
    lengths = sorted({len(row.tail) for row in rows})
    begun: dict[Row, int] = {}
    for row in order:
        prefix, tail = rows[row]
        source[row] = begun.get(rows[row], row)
        if source[row] == row:
            for end in lengths[: bisect_right(lengths, len(tail))]:
                begun.setdefault(Row(prefix, tail[:end]), row)
    return source


def frame_prefixes(part: PartialModel, tokenizer: Any) -> Prefixes:
    """What stands before a prompt's own words in each frame, run once."""
    framed = [encode_pair("x", "-", frame, tokenizer) for frame in FRAMES]
    return Prefixes(part, [tuple(pair.prompt[: pair.span[0]]) for pair in framed])
