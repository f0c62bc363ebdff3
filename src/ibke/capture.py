"""Keys and value gradients of an edit: one forward and one backward of the frozen base.

For a linear module y = W x and the answer's summed negative log-likelihood, the *key* of a token is the module's
input x and its *value gradient* the gradient of the loss with respect to y; their outer products sum to the weight
gradient.

Shape suffixes: B edits, T tokens, I d_in, O d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ibke.batch import Batch
from ibke.errors import CaptureError
from ibke.partial import PartialModel


@dataclass
class Capture:
    """What an editor may know of an edit.

    Args:
        keys: by module name, inputs (B × T × I, float32).
        value_grads: by module name, gradients of the summed answer NLL at the outputs (B × T × O, float32, nats).
        nll_B: the answers' summed NLL on the base (nats).
        right_B: whether the base's greedy answers are these already.
    """

    keys: dict[str, Tensor]
    value_grads: dict[str, Tensor]
    nll_B: Tensor
    right_B: Tensor


def capture(part: PartialModel, modules: Mapping[str, nn.Module], hidden_RTD: Tensor, batch: Batch) -> Capture:
    """Keys and value gradients of every row of a batch.

    Args:
        part: the model, split at its first edited layer.
        modules: the editable linear modules by name.
        hidden_RTD: the hidden states entering the first edited layer.
        batch: tokens and answers; rows are independent edits.

    Raises:
        CaptureError: a gradient is not finite.
    """
    taken: dict[str, tuple[Tensor, Tensor]] = {}

    def taker(name: str) -> Callable[..., Tensor]:
        def take(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            out = out if out.requires_grad else out.detach().requires_grad_()
            taken[name] = (args[0].detach(), out)
            # A copy goes on, since some models add to it in place.
            return out.clone()

        return take

    handles = [module.register_forward_hook(taker(name)) for name, module in modules.items()]
    try:
        with torch.enable_grad():
            logits_NV = part.suffix(hidden_RTD.detach(), batch)
            nll_B, right_B = batch.score(logits_NV)
            grads = torch.autograd.grad(nll_B.sum(), [taken[name][1] for name in modules])
    finally:
        for handle in handles:
            handle.remove()
    # Some models flatten rows and tokens before a linear module; here they are rows of tokens again.
    shape = (*batch.ids_RT.shape, -1)
    value_grads = {name: grad.float().reshape(shape) for name, grad in zip(modules, grads, strict=True)}
    for name, grad in value_grads.items():
        if not torch.isfinite(grad).all():
            whole = part.model.dtype == torch.float32
            todo = "Its weights may be damaged: fetch it anew." if whole else "Load it with dtype='float32'."
            raise CaptureError("the gradient of the answer is not finite.", name, f"{todo} Nothing was changed.")
    keys = {name: taken[name][0].float().reshape(shape) for name in modules}
    return Capture(keys, value_grads, nll_B.detach(), right_B)
