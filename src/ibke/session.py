"""Put edits on a model and take them off again, to the last bit.

Shape suffixes: R rank, I d_in, O d_out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ibke.edit import Edit
from ibke.errors import FormatError, IBKEError, ModuleNotEditableError
from ibke.fingerprint import check_fingerprint
from ibke.models import LanguageModel
from ibke.modules import add_delta_, in_out, resolve, weight_OI
from ibke.neurons import Site, moved


class EditSession:
    """Edits in force on a model.

    Attached edits ride beside the weights, which stay as they are; merged edits are folded into them, and a copy of
    each weight they touch is kept. Leaving the session as a context manager undoes both, also after an exception::

        with EditSession(lm).attach(edit):
            ...  # lm.model is edited
        # lm.model is as it was, bit for bit

    Only one session at a time should merge into a model.

    Args:
        lm: the model.
    """

    def __init__(self, lm: LanguageModel):
        self.lm = lm
        # Each edit as it was given, and as it is in force: moved, where another one had its neurons.
        self._attached: list[tuple[Edit, Edit, list[RemovableHandle]]] = []
        self._merged: list[tuple[Edit, Edit]] = []
        self._saved: dict[str, Tensor] = {}

    @property
    def attached(self) -> tuple[Edit, ...]:
        """Edits riding beside the weights, in order of attachment."""
        return tuple(edit for edit, *_ in self._attached)

    @property
    def merged(self) -> tuple[Edit, ...]:
        """Edits folded into the weights, in order."""
        return tuple(edit for edit, _ in self._merged)

    def attach(self, edit: Edit) -> EditSession:
        """Let an edit ride beside the weights: y ← y + (x Aᵀ) Bᵀ at each of its modules, in the model's dtype.

        Returns:
            This session, so that ``with EditSession(lm).attach(edit):`` reads as it should.

        Raises:
            FingerprintMismatchError: the edit was made for another model.
            ModuleNotEditableError: it names a module the model has not.
            FormatError: its shapes are not the module's.
            IBKEError: it is attached already, or no neuron is left for it.
        """
        if any(edit is other for other in self.attached):
            raise IBKEError("this edit is attached already.", "attach", "Detach it first.")
        modules = self._modules(edit)
        placed = self._placed(edit)
        hooks = {name: _adder(modules[name], self.lm.dtype, *placed.factors[name]) for name in modules}
        handles = [module.register_forward_hook(hooks[name]) for name, module in modules.items()]
        self._attached.append((edit, placed, handles))
        return self

    def detach(self, edit: Edit | None = None) -> EditSession:
        """Take an attached edit off, or all of them.

        Raises:
            IBKEError: this edit is not attached.
        """
        leaving = [pair for pair in self._attached if edit is None or pair[0] is edit]
        if edit is not None and not leaving:
            raise IBKEError("this edit is not attached.", "detach", "See `attached` for those that are.")
        for pair in leaving:
            for handle in pair[2]:
                handle.remove()
            self._attached.remove(pair)
        return self

    def merge(self, edit: Edit) -> EditSession:
        """Fold an edit into the weights: W ← W + BA, summed in float32 and rounded once to the weight's dtype.

        Either all its modules change or none.

        Raises:
            FingerprintMismatchError: the edit was made for another model.
            ModuleNotEditableError: a module does not exist, or its weight is packed or shared with another module.
            FormatError: its shapes are not the module's.
        """
        modules = self._modules(edit)
        for name, module in modules.items():
            weight_OI(module)
            self._refuse_shared(name, module)
        placed = self._placed(edit)
        self._saved |= {name: weight_OI(module).clone() for name, module in modules.items() if name not in self._saved}
        try:
            for name, module in modules.items():
                add_delta_(module, placed.delta(name))
        except BaseException:
            self._rebuild(modules)
            raise
        self._merged.append((edit, placed))
        return self

    def restore(self) -> EditSession:
        """Undo everything: detach all edits and put back the weights as they were before the first merge."""
        self.detach()
        self._merged = []
        self._rebuild(resolve(self.lm.model, self._saved))
        self._saved = {}
        return self

    def __enter__(self) -> EditSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _modules(self, edit: Edit) -> dict[str, nn.Module]:
        check_fingerprint(edit.info.fingerprint, self.lm, "this edit")
        modules = resolve(self.lm.model, edit.factors)
        for name, module in modules.items():
            a_RI, b_OR = edit.factors[name]
            d_in, d_out = in_out(module)
            if (a_RI.shape[1], b_OR.shape[0]) != (d_in, d_out):
                raise FormatError(
                    f"the update is {b_OR.shape[0]} × {a_RI.shape[1]}, the module {d_out} × {d_in}.",
                    name,
                    "Use the model the edit was made for.",
                )
        return modules

    def _placed(self, edit: Edit) -> Edit:
        """The edit, moved to neurons of its own where edits in force have taken some of its."""
        in_force = [placed for _, placed, _ in self._attached] + [placed for _, placed in self._merged]
        for name, mine in edit.info.neurons.items():
            taken = {neuron for other in in_force for neuron in other.info.neurons.get(name, [])}
            clash = [neuron for neuron in mine if neuron in taken]
            if not clash:
                continue
            spare = [int(neuron) for neuron in edit.info.latent.get("spare", [])]
            free = [neuron for neuron in spare if neuron not in taken and neuron not in mine]
            if len(free) < len(clash):
                raise IBKEError("no neuron is left for this edit.", name, "Detach an edit, or make several as one.")
            to = dict(zip(clash, free, strict=False))
            site = Site.find(self.lm.model, name)
            factors = moved(site, edit.factors, to, edit.info.latent["constant"], self._base)
            neurons = {**edit.info.neurons, name: [to.get(neuron, neuron) for neuron in mine]}
            edit = replace(edit, factors=factors, info=replace(edit.info, neurons=neurons))
        return edit

    def _base(self, name: str) -> Tensor:
        """A module's weight before the first merge."""
        return self._saved[name] if name in self._saved else weight_OI(resolve(self.lm.model, [name])[name])

    @torch.no_grad()
    def _rebuild(self, modules: dict[str, nn.Module]) -> None:
        """Set weights to their saved state with the merged edits added again, in order: the same bits each time."""
        for name, module in modules.items():
            weight_OI(module).copy_(self._saved[name])
            for _, placed in self._merged:
                if name in placed.factors:
                    add_delta_(module, placed.delta(name))

    def _refuse_shared(self, name: str, module: nn.Module) -> None:
        for other, parameter in self.lm.model.named_parameters(remove_duplicate=False):
            if parameter is module.weight and other != f"{name}.weight":
                raise ModuleNotEditableError(
                    f"its weight is shared with {other}.", name, "Attach the edit instead of merging it."
                )


def _adder(
    module: nn.Module, dtype: torch.dtype, a_RI: Tensor, b_OR: Tensor
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    device = next(module.parameters()).device
    a_RI, b_OR = a_RI.to(device, dtype), b_OR.to(device, dtype)

    def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + F.linear(F.linear(args[0], a_RI), b_OR)

    return add
