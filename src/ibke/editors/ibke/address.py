"""Where an edit applies: a direction that answers 1 at the request's subject and 0 elsewhere, in closed form.

Keys are what the edited layer's MLP sees at the last token of the subject. K, where the edit shall answer: the subject
in the request's own words, in every frame, and in contexts that ask nothing. N, where it shall not: the words before
that token in the request, the subject behind words that ask something else about it, its last word by itself where
that is one token, for other bridges end in "Bridge" too, and names like the subject in the request's own words. People
type names with capitals or without, so the request typed otherwise is in K, and a name of one word as any noun ("some
apple") in N. Both stand before generic keys C₀, so with all targets in K equal to 1 and weights W and V, larger for the
request's own words and smaller for lone last words and nouns,

    a = A⁻¹ KᵀW 1,   A = KᵀWK + NᵀVN + γ (C₀ + λ I),

and a is then made longer until the request's own words answer 1 in the mean and each of them clears the threshold. γ
says against how many generic keys the edit's own stand: with few, K and N are told apart by directions that common
words have too, and the edit opens in running text (docs/experiments.md). What a second moment does not say, a sample
of running text does: words in it that answer nevertheless go to N, unless they end as the subject does (in its last
two tokens, or in the only one it has), and the address is made again. Norway is such a word where the currency of
Sweden is edited. It is asked about in the same words, so a word goes to N as it is in the text and once more as it
would be in the request: moved by what the request adds to its own subject's key.

The words before a subject are all a causal model knows at its last token. So contrast with other questions makes sense
only where they say what is asked, as in "The capital of …", and it is made of phrases of that build; one that asks what
the request asks (closely, in the whitened space) is left out of N. Elsewhere the subject alone opens the edit. The
answer is never looked at: an address carries nothing of it.

Shape suffixes: B edits, T keys, D width of the residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibke.batch import Pair, by_length, collate
from ibke.editors.aggregate import solve
from ibke.editors.ibke.contexts import (
    ALIKE,
    ENDING,
    NEUTRAL,
    NOUN,
    OTHER,
    REQUEST,
    TYPED,
    About,
    Context,
    contexts_of,
    own_texts,
)
from ibke.editors.ibke.statistics import Common, KeySpectrum
from ibke.frames import FRAMES
from ibke.partial import PartialModel
from ibke.prefixes import Prefixes, Reading, Row

OWN_WEIGHT = 3.0  # of the request's own words in K, against 1 for other contexts
ENDING_WEIGHT = 0.3  # of a lone last word in N, and of a name as a noun, against 1 for other questions
NEAR, LOUDEST, ROUNDS = 0.3, 64, 2  # common words so near to opening go to N, the nearest first, so many times
NEAR_WEIGHT = 0.1  # of each, against 1 for the rest of N: there are many, and they must not outweigh other questions
MARGIN = 0.15  # responses this far below the threshold write nothing, whatever rounding does
CLEAR, LONGEST = 1.08, 1.5  # what an edit is sure of answers so many times θ c, for at most so much longer an address


def first_open(part: PartialModel, entrance: nn.Module, pairs: Sequence[Pair], gate_RD: Tensor) -> list[int | None]:
    """The first token of each row at which an edit may be in force; None where there is none.

    Args:
        part: the model.
        entrance: the module whose input is the key.
        pairs: tokens.
        gate_RD: what opens the gate of each, a − θ c; a little less than open is taken as open.
    """
    first: list[int | None] = [None] * len(pairs)
    device = part.model.device
    for chosen in by_length([len(pair) for pair in pairs]):
        batch = collate([pairs[row] for row in chosen], 0, device)
        keys_RTD = part.inputs_of(entrance, batch)
        response_RT = torch.einsum("rtd,rd->rt", keys_RTD, gate_RD[chosen].to(device))
        open_RT = ((response_RT > -MARGIN) & batch.attention_RT).cpu()
        for row, places in zip(chosen, open_RT, strict=True):
            if places.any():
                first[row] = int(places.nonzero()[0])
    return first


class Addressed(NamedTuple):
    """What comes of making addresses.

    Args:
        address_BD: float32.
        own: by request, keys of its subject's last token in the request's own words (T × D).
        read: what was to be read in the same passes.
    """

    address_BD: Tensor
    own: tuple[Tensor, ...]
    read: list[Reading]


class Addresser:
    """Makes addresses for one layer of one model.

    Args:
        part: the model.
        entrance: the module whose input is the key.
        tokenizer: the model's.
        spectrum: of C₀, the generic keys.
        common: some of them as they are.
        shut_D: θ c, which an address has to exceed for its edit to be in force.
        gamma, ridge, alike: see :class:`IBKEConfig`.
    """

    def __init__(
        self,
        part: PartialModel,
        entrance: nn.Module,
        tokenizer: Any,
        spectrum: KeySpectrum,
        common: Common,
        shut_D: Tensor,
        *,
        gamma: float,
        ridge: float,
        alike: float,
    ):
        self.part, self.entrance, self.tokenizer = part, entrance, tokenizer
        self.gamma, self.ridge, self.alike = gamma, ridge, alike
        self.basis_DE = spectrum.basis_IE.cpu().double()
        self.values_E = spectrum.values_E.cpu().double() + ridge * spectrum.mean()
        self.pull = spectrum.inverse(gamma, ridge)
        self.common = Common(common.keys_SD.cpu().float(), common.ids_S2.cpu())
        self.shut_D = shut_D.cpu().double()
        self.shut_S = self.common.keys_SD @ self.shut_D.float()

    @property
    def identity(self) -> tuple[Any, ...]:
        """All that decides an address but the model and the request."""
        fixed = (OWN_WEIGHT, NEAR, LOUDEST, ROUNDS, NEAR_WEIGHT, ENDING_WEIGHT, CLEAR, LONGEST)
        return (self.gamma, self.ridge, self.alike, *fixed, json.dumps(own_texts()))

    def __call__(self, requests: Sequence[About]) -> Tensor:
        """Addresses (B × D, float32)."""
        return self.beside((), requests).address_BD

    def beside(
        self,
        pairs: Sequence[Pair],
        requests: Sequence[About],
        earlier: Sequence[nn.Module] = (),
        *,
        alike: bool = False,
    ) -> Addressed:
        """Addresses, made in the same passes in which some pairs are read.

        Args:
            pairs: the requests themselves, say: contexts that they begin with are not run again.
            requests: what addresses are made for.
            earlier: modules before the entrance whose inputs are read, too.
            alike: tell addresses of names like their subjects, at the price of a few more rows each.
        """
        made = [contexts_of(about, self.tokenizer, alike=alike) for about in requests]
        rows = [Row((), tuple(pair.fed)) for pair in pairs]
        rows += [Row(context.prefix, context.tail) for contexts in made for context in contexts]
        found = self.prefixes.read((*earlier, self.entrance), rows)
        keys = iter(reading.fed[-1].cpu() for reading in found[len(pairs) :])
        taken = [list(islice(keys, len(contexts))) for contexts in made]
        sure = [about.sure for about in requests]
        addresses = [self._address(*one) for one in zip(made, taken, sure, strict=True)]
        # The request as it is in every frame, of which an edit is sure; other contexts are guesses.
        asked = [
            [keys_TD[-1] for context, keys_TD in zip(contexts, keys, strict=True) if context.kind == REQUEST]
            for contexts, keys in zip(made, taken, strict=True)
        ]
        own = tuple(torch.stack(keys[: len(FRAMES)]) if keys else torch.zeros(0, len(self.basis_DE)) for keys in asked)
        return Addressed(torch.stack(addresses).float(), own, found[: len(pairs)])

    @cached_property
    def prefixes(self) -> Prefixes:
        """What every request's contexts begin with, run once."""
        known = [row.prefix for row in contexts_of(About("The X of Y Z", "Y Z"), self.tokenizer)]
        return Prefixes(self.part, known, self.part.first + 1)

    def _address(self, rows: Sequence[Context], found: Sequence[Tensor], sure: int) -> Tensor:
        kind_T = torch.tensor([row.kind for row in rows])
        answers_T = (kind_T == REQUEST) | (kind_T == NEUTRAL) | (kind_T == TYPED)
        if not answers_T.any():
            return torch.zeros(len(self.basis_DE), dtype=torch.float64)
        keys_TD = torch.stack([keys_TD[-1] for keys_TD in found]).double()
        answer_TD, other_TD = keys_TD[answers_T], keys_TD[kind_T == OTHER]
        if len(other_TD):
            other_TD = other_TD[~self._asks_the_same(keys_TD, kind_T)]
        # What comes before the subject's last token, without a first position, which belongs to no word.
        before = [
            keys[0 if row.prefix else 1 : -1] for row, keys in zip(rows, found, strict=True) if row.kind == REQUEST
        ]
        silent = [(torch.cat([other_TD, keys_TD[kind_T == ALIKE], *(keys.double() for keys in before)]), 1.0)]
        silent.append((keys_TD[(kind_T == ENDING) | (kind_T == NOUN)], ENDING_WEIGHT))
        root_T = torch.where(kind_T == REQUEST, OWN_WEIGHT**0.5, 1.0)[answers_T]
        own_TD = keys_TD[kind_T == REQUEST] if (kind_T == REQUEST).any() else answer_TD

        def solved() -> Tensor:
            silent_TD = torch.cat([some_TD for some_TD, _ in silent])
            root_S = torch.cat([some_TD.new_full((len(some_TD),), weight**0.5) for some_TD, weight in silent])
            address_D = solve(answer_TD[None], root_T[None], silent_TD[None], root_S[None], self.pull)[0].sum(0)
            return address_D / (own_TD @ address_D).mean().clamp_min(1e-3)

        address_D = solved()
        bar_S = self._bar(torch.tensor([row.ending for row in rows if row.kind in (REQUEST, NEUTRAL, OTHER)]))
        # What standing in the request adds to a key.
        moved_D = own_TD.mean(0) - keys_TD[kind_T == NEUTRAL].mean(0)
        for _ in range(ROUNDS):
            over_S = self.common.keys_SD @ address_D.float() - bar_S
            near = [self.near(over_S), self.near(over_S + float(moved_D @ address_D))]
            if not any(map(len, near)):
                break
            in_text_SD, asked_SD = (self.common.keys_SD[some].double() for some in near)
            silent.append((torch.cat([in_text_SD, asked_SD + moved_D]), NEAR_WEIGHT))
            address_D = solved()
        # Answering in the mean is not enough where a key has much of c, or one frame is unlike the others.
        least = CLEAR * (own_TD[:sure] @ self.shut_D) / (own_TD[:sure] @ address_D).clamp_min(1e-3)
        return address_D * least.max().clamp(1.0, LONGEST)

    def _bar(self, mine_M2: Tensor) -> Tensor:
        """What responses of common words have to exceed; those that end as the subject does never do (S)."""
        # Rows without a token hold no word.
        never_S = self.common.ends(mine_M2) | (self.common.ids_S2[:, 1] < 0)
        return self.shut_S.masked_fill(never_S, torch.inf)

    def near(self, over_S: Tensor) -> Tensor:
        """Which common words answer, or nearly, given by how much each is above its bar."""
        most_S, which_S = over_S.topk(min(LOUDEST, len(over_S)))
        return which_S[most_S > -NEAR]

    def _asks_the_same(self, keys_TD: Tensor, kind_T: Tensor) -> Tensor:
        """Which questions ask what the request asks: they move the subject's key the same way (bool, T of OTHER)."""
        white_TE = (keys_TD @ self.basis_DE) / self.values_E.sqrt()
        rest = white_TE[kind_T == NEUTRAL].mean(0)
        asked_E = white_TE[kind_T == REQUEST].mean(0) - rest
        return F.cosine_similarity(white_TE[kind_T == OTHER] - rest, asked_E[None], dim=-1) >= self.alike
