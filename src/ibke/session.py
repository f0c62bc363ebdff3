"""Put edits on a model and take them off again, to the last bit.

Shape suffixes: R rank, I d_in, O d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ibke.edit import Edit
from ibke.errors import FormatError, IBKEError, ModuleNotEditableError
from ibke.fingerprint import check_fingerprint
from ibke.models import LanguageModel
from ibke.modules import add_delta_, in_out, parameters_of, resolve, set_parameters_, weight_OI
from ibke.neurons import Neurons, Site
from ibke.parts import attach_parts, join_parts

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


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
        self._attached: list[tuple[Edit, dict[str, Hook]]] = []
        self._neurons: dict[str, Neurons] = {}  # of all attached edits together
        self._handles: list[RemovableHandle] = []  # while they are in force
        self._merged: list[Edit] = []
        self._saved: dict[str, Tensor] = {}  # weights before the first merge
        self._sums: dict[str, Tensor] = {}  # of merged updates, float32: added to these, and rounded once
        self._narrow: dict[str, tuple[nn.Parameter, nn.Parameter | None]] = {}

    @property
    def attached(self) -> tuple[Edit, ...]:
        """Edits riding beside the weights, in order of attachment."""
        return tuple(edit for edit, _ in self._attached)

    @property
    def merged(self) -> tuple[Edit, ...]:
        """Edits folded into the weights, in order."""
        return tuple(self._merged)

    def attach(self, edit: Edit) -> EditSession:
        """Let an edit ride beside the weights: y ← y + (x Aᵀ) Bᵀ in the model's dtype, neurons, parts.

        Returns:
            This session, so that ``with EditSession(lm).attach(edit):`` reads as it should.

        Raises:
            FingerprintMismatchError: the edit was made for another model.
            ModuleNotEditableError: it names a module the model has not.
            FormatError: its shapes are not the module's, or a part of another kind is in a place of its own.
            IBKEError: it is in force already.
        """
        self._refuse_again(edit, "attach")
        if wide := next((name for name in edit.factors if name in self._narrow), None):
            raise IBKEError(
                "a merged edit has added neurons to this module.", wide, "Merge this edit too, or restore first."
            )
        modules = self._checked(edit)
        join_parts([*(other.parts for other in self.attached), edit.parts])
        hooks = {name: _adder(module, self.lm.dtype, *edit.factors[name]) for name, module in modules.items()}
        return self._take([*self._attached, (edit, hooks)])

    def detach(self, edit: Edit | None = None) -> EditSession:
        """Take an attached edit off, or all of them.

        Raises:
            IBKEError: this edit is not attached.
        """
        staying = [pair for pair in self._attached if edit is not None and pair[0] is not edit]
        if edit is not None and len(staying) == len(self._attached):
            raise IBKEError("this edit is not attached.", "detach", "See `attached` for those that are.")
        return self._take(staying)

    def merge(self, edit: Edit) -> EditSession:
        """Fold an edit into the weights: W ← W₀ + Σ BA, rounded once to the weight's dtype.

        The sum over merged edits is kept in float32, so a thousand of them one after another are as good as at once.

        Neurons are appended to those of their MLP, which grows. Either all its modules change or none.

        Raises:
            FingerprintMismatchError: the edit was made for another model.
            ModuleNotEditableError: a module does not exist, or its weight is packed or shared with another module.
            FormatError: its shapes are not the module's.
            IBKEError: it has parts, which act while the model runs and are no weights, or it is in force already.
        """
        check_fingerprint(edit.info.fingerprint, self.lm, "this edit")
        self._refuse_again(edit, "merge")
        if edit.parts:
            kinds = ", ".join(sorted({part.kind for part in edit.parts.values()}))
            raise IBKEError(
                f"it acts while the model runs ({kinds}) and changes no weight, so it cannot be merged.",
                f"edit by {edit.info.method}",
                "Attach it instead.",
            )
        attached = {name for _, hooks in self._attached for name in hooks}
        widened = [module for name in edit.neurons for module in Site.find(self.lm.model, name).modules]
        if wide := next((name for name in widened if name in attached), None):
            raise IBKEError(
                "it would add neurons to a module beside whose weight another edit rides.",
                wide,
                "Merge that edit too, or detach it.",
            )
        merged, modules = list(self._merged), {}
        self._make_narrow()
        try:
            modules = self._checked(edit)
            for name, module in self._touched(edit, modules).items():
                weight_OI(module)
                self._refuse_shared(name, module)
            for name, module in modules.items():
                self._saved.setdefault(name, weight_OI(module).clone())
                self._set_(name, module, self._sums.get(name, 0.0) + edit.delta(name))
            self._merged.append(edit)
            self._widen()
            if self not in self.lm.merged:
                self.lm.merged.append(self)
        except BaseException:
            self._merged = merged
            self._make_narrow()
            self._rebuild(modules)
            self._widen()
            raise
        return self

    def restore(self) -> EditSession:
        """Undo everything: detach all edits and put back the weights as they were before the first merge."""
        self.detach()
        self._merged = []
        self._make_narrow()
        self._rebuild(resolve(self.lm.model, self._saved))
        self._saved, self._sums = {}, {}
        if self in self.lm.merged:
            self.lm.merged.remove(self)
        return self

    def __enter__(self) -> EditSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _refuse_again(self, edit: Edit, what: str) -> None:
        for state, known in (("attached", self.attached), ("merged", self._merged)):
            if any(edit is other for other in known):
                raise IBKEError(f"this edit is {state} already.", what, "Detach it, or restore the session, first.")

    def _checked(self, edit: Edit) -> dict[str, nn.Module]:
        """The linear modules of an edit that fits this model."""
        check_fingerprint(edit.info.fingerprint, self.lm, "this edit")
        modules = resolve(self.lm.model, edit.factors)
        for name, module in modules.items():
            a_RI, b_OR = edit.factors[name]
            _refuse_size(name, (a_RI.shape[1], b_OR.shape[0]), in_out(module))
        for name, some in edit.neurons.items():
            site = Site.find(self.lm.model, name)
            width = in_out(site.entrance)[0]
            _refuse_size(name, (some.gate.shape[1], some.out.shape[1]), (width, width))
            if (site.value is None) != (some.value is None):
                raise FormatError("only one of MLP and neurons is gated.", name, "Use the model the edit was made for.")
        for place, part in edit.parts.items():
            part.check(self.lm, place)
        return modules

    def _touched(self, edit: Edit, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Every module whose weight merging an edit changes."""
        sites = [Site.find(self.lm.model, name) for name in edit.neurons]
        return modules | {name: module for site in sites for name, module in site.modules.items()}

    def _take(self, attached: list[tuple[Edit, dict[str, Hook]]]) -> EditSession:
        """Have these edits attached, or, where they do not go together, those that were.

        All their neurons are one set an MLP, so that a thousand edits cost as many products as one. So with parts:
        which of them answers is decided once, over all of them.
        """
        neurons = _joined(edit for edit, _ in attached)
        before = self._attached, self._neurons
        self._silence()
        try:
            self._attached, self._neurons = attached, neurons
            self._speak()
        except BaseException:
            self._attached, self._neurons = before
            self._silence()
            self._speak()
            raise
        return self

    def _speak(self) -> None:
        """Put the attached edits in force."""
        for _, hooks in self._attached:
            for name, module in resolve(self.lm.model, hooks).items():
                self._handles.append(module.register_forward_hook(hooks[name]))
        for name, some in self._neurons.items():
            site = Site.find(self.lm.model, name)
            self._handles += site.attach(some.to(next(site.entrance.parameters()).device))
        self._handles += attach_parts(self.lm, [join_parts(edit.parts for edit, _ in self._attached)])
        if self._attached:
            self.lm.sessions.append(self)

    def _silence(self) -> None:
        """Take them off the model, but remember them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self in self.lm.sessions:
            self.lm.sessions.remove(self)

    def _widen(self) -> None:
        """Append the merged edits' neurons to their MLPs."""
        for name, some in _joined(self._merged).items():
            site = Site.find(self.lm.model, name)
            self._narrow |= {name: parameters_of(module) for name, module in site.modules.items()}
            site.widen_(some)

    def _make_narrow(self) -> None:
        """Give MLPs back the parameters they had without merged neurons."""
        for name, module in resolve(self.lm.model, self._narrow).items():
            set_parameters_(module, *self._narrow[name])
        self._narrow = {}

    def _rebuild(self, modules: dict[str, nn.Module]) -> None:
        """Set weights to their saved state with the merged edits added again, in order: the same bits each time."""
        for name, module in modules.items():
            if name in self._saved:
                updates = [edit.delta(name) for edit in self._merged if name in edit.factors]
                self._set_(name, module, reduce(torch.add, updates) if updates else None)

    @torch.no_grad()
    def _set_(self, name: str, module: nn.Module, delta_OI: Tensor | None) -> None:
        """Set a weight to its saved state with an update."""
        weight_OI(module).copy_(self._saved[name])
        self._sums.pop(name, None)
        if delta_OI is not None:
            self._sums[name] = delta_OI
            add_delta_(module, delta_OI)

    def _refuse_shared(self, name: str, module: nn.Module) -> None:
        for other, parameter in self.lm.model.named_parameters(remove_duplicate=False):
            if parameter is module.weight and other != f"{name}.weight":
                raise ModuleNotEditableError(
                    f"its weight is shared with {other}.", name, "Attach the edit instead of merging it."
                )


@contextmanager
def set_aside(lm: LanguageModel) -> Iterator[None]:
    """Take all edits that are attached to a model off it for a while, whoever attached them; merged ones stay."""
    silenced: list[EditSession] = []
    try:
        for session in tuple(lm.sessions):
            silenced.append(session)
            session._silence()
        yield
    finally:
        for session in silenced:
            if not session._handles:  # else it was attached to meanwhile
                session._speak()


def refuse_merged(lm: LanguageModel, where: str) -> None:
    """Refuse a model whose weights hold edits, where those of the pristine one are needed.

    Raises:
        IBKEError: edits are merged into it.
    """
    if lm.merged:
        raise IBKEError("edits are merged into this model's weights.", where, "Restore their session first.")


def _refuse_size(name: str, mine: tuple[int, int], wanted: tuple[int, int]) -> None:
    if mine != wanted:
        raise FormatError(
            f"the update is {mine[1]} × {mine[0]}, the module {wanted[1]} × {wanted[0]}.",
            name,
            "Use the model the edit was made for.",
        )


def _joined(edits: Iterable[Edit]) -> dict[str, Neurons]:
    """The neurons of several edits, one set an MLP."""
    found: dict[str, list[Neurons]] = {}
    for edit in edits:
        for name, some in edit.neurons.items():
            found.setdefault(name, []).append(some)
    return {name: Neurons.join(parts) for name, parts in found.items()}


def _adder(module: nn.Module, dtype: torch.dtype, a_RI: Tensor, b_OR: Tensor) -> Hook:
    device = next(module.parameters()).device
    a_RI, b_OR = a_RI.to(device, dtype), b_OR.to(device, dtype)

    def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + F.linear(F.linear(args[0], a_RI), b_OR)

    return add
