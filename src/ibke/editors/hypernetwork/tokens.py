"""Tokens of some edits, as a hypernetwork sees them: at each module a key and a value gradient, side by side.

Shape suffixes: B edits, T tokens of a row, N tokens of all edits, I d_in, O d_out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibke.batch import Batch
from ibke.capture import capture
from ibke.partial import PartialModel


@dataclass(frozen=True)
class Tokens:
    """Tokens at one module.

    Args:
        keys_NI: its inputs.
        grads_NO: gradients of each edit's summed answer NLL at its outputs (nats).
        edit_N: the edit each belongs to.
    """

    keys_NI: Tensor
    grads_NO: Tensor
    edit_N: Tensor


def take_tokens(
    part: PartialModel,
    modules: Mapping[str, nn.Module],
    rows: Sequence[tuple[Tensor, Batch, Tensor]],
    *,
    answers_only: bool,
) -> tuple[dict[str, Tokens], Tensor]:
    """Keys and value gradients of some edits, by one forward and one backward pass of the model as it is.

    Args:
        part: the model, split at the first edited layer.
        modules: the edited modules by name.
        rows: in groups, states entering the first edited layer (R × T × D), tokens and answers, and each row's edit.
        answers_only: take the tokens that predict the answer; else all with a gradient.

    Returns:
        tokens by module name, and the NLL of the answers (R, nats) in the order of the rows.

    Raises:
        CaptureError: a gradient is not finite.
    """
    found: dict[str, list[Tokens]] = {name: [] for name in modules}
    nll: list[Tensor] = []
    for hidden_RTD, batch, edit_R in rows:
        seen = capture(part, modules, hidden_RTD, batch)
        nll.append(seen.nll_B)
        for name in modules:
            keys_RTI, grads_RTO = seen.keys[name], seen.value_grads[name]
            # In the last layer only what predicts the answer has a gradient.
            chosen_RT = batch.predicts_RT if answers_only else batch.attention_RT & (grads_RTO != 0).any(-1)
            edit_N = edit_R[:, None].expand_as(chosen_RT)[chosen_RT]
            found[name].append(Tokens(keys_RTI[chosen_RT], grads_RTO[chosen_RT], edit_N))
    return {name: _joined(some) for name, some in found.items()}, torch.cat(nll)


def _joined(parts: Sequence[Tokens]) -> Tokens:
    """All of them, edit by edit, so that it does not matter in which order rows were run."""
    edit_N = torch.cat([some.edit_N for some in parts])
    order_N = torch.argsort(edit_N, stable=True)
    keys_NI = torch.cat([some.keys_NI for some in parts])
    grads_NO = torch.cat([some.grads_NO for some in parts])
    return Tokens(keys_NI[order_N], grads_NO[order_N], edit_N[order_N])
