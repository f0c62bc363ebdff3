"""Requests → codes: the passes of an edit's capture, and what the network's encoder makes of them.

Shape suffixes: B edits, T tokens, L layers, D width of an MLP's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ibke.batch import Batch, Pair, coded_positions, collate
from ibke.capture import Capture, capture
from ibke.editors.ibke.address import Addresser
from ibke.editors.ibke.bottleneck import Bottleneck, Code, answer_embedding, select
from ibke.editors.ibke.contexts import About
from ibke.models import LanguageModel
from ibke.neurons import Site
from ibke.partial import taking_inputs
from ibke.prefixes import Reading
from ibke.request import EditRequest


class Encoded(NamedTuple):
    """What is known of some requests once they have been passed forward and backward.

    Args:
        code: as the encoder gives it.
        nll_B: the targets' NLL on the base (nats).
        already_B: whether the base's greedy answers are the targets.
        own: by request, keys at which it is in its own words (T × D).
        ends_BLD: what the noted modules are fed at the prompts' last tokens (float32), in the order of their layers.
    """

    code: Code
    nll_B: Tensor
    already_B: Tensor
    own: tuple[Tensor, ...]
    ends_BLD: Tensor | None


class RequestEncoder:
    """Encodes requests.

    Args:
        lm: the model.
        network: whose encoder it is.
        addresser: makes the addresses that the code goes with.
        site: the edited MLP.
    """

    def __init__(self, lm: LanguageModel, network: Bottleneck, addresser: Addresser, site: Site):
        self.lm, self.network, self.addresser, self.site = lm, network, addresser, site

    def __call__(
        self,
        pairs: Sequence[Pair],
        requests: Sequence[EditRequest],
        noted: Mapping[int, nn.Module] | None = None,
        *,
        alike: bool = False,
    ) -> Encoded:
        """The codes of some requests.

        Args:
            pairs: the requests as they are worded to the model, with their targets.
            requests: the same.
            noted: by layer, modules whose inputs at the prompts' last tokens are wanted; no pass is made for them.
            alike: see :meth:`Addresser.beside`.

        Raises:
            CaptureError: a gradient is not finite.
        """
        noted, part = noted or {}, self.addresser.part
        early = [noted[layer] for layer in sorted(noted) if layer < part.first]
        late = [noted[layer] for layer in sorted(noted) if layer >= part.first]
        batch = collate(pairs, self.lm.tokenizer.pad_token_id, self.lm.device)
        asked = [About.of(request) for request in requests]
        address_BD, own, read = self.addresser.beside(pairs, asked, early, alike=alike)
        hidden_BTD = pad_sequence([reading.entering_TD for reading in read], batch_first=True)
        with taking_inputs(late, last=False) as taken:
            seen = capture(part, self.site.ends, hidden_BTD, batch)
        code = self._code(seen, pairs, address_BD, batch)
        return Encoded(code, seen.nll_B, seen.right_B, own, _ends(read, [one[0] for one in taken], batch))

    @torch.no_grad()
    def _code(self, seen: Capture, pairs: Sequence[Pair], address_BD: Tensor, batch: Batch) -> Code:
        device = self.lm.device
        position, role, real = (tensor.to(device) for tensor in coded_positions(pairs))
        written = select(
            seen,
            self.site,
            (position, role, real),
            address_BD.to(device),
            answer_embedding(self.lm.model.get_input_embeddings(), batch.labels_N, batch.row_N, batch.rows),
        )
        return self.network.encode(written)


def _ends(read: Sequence[Reading], late: Sequence[Tensor], batch: Batch) -> Tensor | None:
    """What noted modules were fed where questions end; of the early ones it is in the readings."""
    fed = [pad_sequence(list(same), batch_first=True) for same in zip(*(one.fed[:-1] for one in read), strict=True)]
    # Some models flatten rows and tokens before a linear module.
    fed += [one.float().reshape(*batch.ids_RT.shape, -1) for one in late]
    rows_B = torch.arange(batch.rows, device=batch.ids_RT.device)
    return torch.stack([one_BTD[rows_B, batch.question_ends_R] for one_BTD in fed], 1) if fed else None
