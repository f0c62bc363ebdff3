"""What a hypernetwork learns from: edits made by it, and what they do to prompts in scope and out of it.

A step has one turn or several, each with a batch of edits made at the model as the turns before have left it. With ΔW_t
the update of turn t and W_t = W + Σ_{s≤t} ΔW_s, the loss of a turn is

    L_t = Σ_{j≤depth} decay^j [ c_e NLL(o of turn t−j, in scope) + c_loc KL(base‖W_t, out of scope of turn t−j) ]
          + penalty ‖ΔW_t‖²,

means over tokens (nats). In scope are an edit's own prompt and its other wordings. The gradient of L_t reaches ΔW_t
alone: W_{t−1}, and keys and gradients taken there, are given. The model is passed backwards only as far as ∂L/∂ΔW; from
there the network is, so the two graphs are never held together (Tan et al. 2024, section 4).

Shape suffixes: B edits, R rows, K tokens of an edit, N tokens, I d_in, O d_out, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ibke.editors.hypernetwork.editor import HypernetworkEditor
from ibke.editors.hypernetwork.network import Hypernetwork
from ibke.editors.hypernetwork.tokens import Tokens, take_tokens
from ibke.editors.row_statistics import History, joined
from ibke.partial import row_updates
from ibke.rows import EDIT, INSIDE, OUTSIDE, RowGroup, RowTerms, row_terms
from ibke.training.cache import RowCache

KINDS = (EDIT, INSIDE, OUTSIDE)
LOGGED = {EDIT: "reliability_nats", INSIDE: "generality_nats", OUTSIDE: "locality_nats"}

Updates = dict[str, tuple[Tensor, Tensor]]
"""By module, A and B: N × I and N × O of one joint edit, or B × K × I and B × K × O of edits each on its own model."""

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


class Lessons:
    """Plays turns of edits on the frozen base.

    Args:
        editor: whose modules are changed; its own network is not used.
        episodes: cached rows.
    """

    def __init__(self, editor: HypernetworkEditor, episodes: RowCache):
        self.part, self.modules, self.episodes = editor.part, editor.modules, episodes
        self.device = editor.lm.device

    def learn(self, network: Hypernetwork, turns: Sequence[Sequence[int]]) -> dict[str, float]:
        """Add the gradient of some turns' losses to the network's.

        Args:
            network: in training; it takes what it sees into its statistics.
            turns: the episodes of each turn.

        Returns:
            NLL in scope and KL out of scope, a token, by kind (``LOGGED``), and the mean step size.
        """
        config = network.config
        standing: dict[str, Tensor] = {}
        asked: list[list[RowGroup]] = []
        record = dict.fromkeys(LOGGED.values(), 0.0)
        for chosen in turns:
            with standing_updates(self.modules, standing):
                tokens = self._tokens(network, chosen)
                network.observe(tokens)
                made = _updates(network, tokens, network.statistics, len(chosen))
                leaves = {name: (_leaf(a), _leaf(b)) for name, (a, b) in made.items()}
                asked.append(self._groups(chosen, KINDS))
                for back, groups in enumerate(reversed(asked[-1 - config.depth :])):
                    found = self._backward(network, leaves, groups, config.decay**back)
                    for kind, name in LOGGED.items() if not back else ():
                        record[name] += found[kind] / len(turns)
            if config.penalty:
                (config.penalty * _squared_norm(leaves)).backward()
            ends = [tensor for pair in made.values() for tensor in pair]
            grads = [tensor.grad for pair in leaves.values() for tensor in pair]
            torch.autograd.backward(ends, grads)
            if len(turns) > 1:
                standing = _stand(standing, leaves)
        return record | {"step_size": network.log_step.detach().exp().mean().item()}

    @torch.no_grad()
    def examine(self, network: Hypernetwork, turns: Sequence[Sequence[int]]) -> dict[int, list[float]]:
        """Which prompts are answered exactly as they should be after the last turn (1 or 0), by kind."""
        standing: dict[str, Tensor] = {}
        update: Updates = {}
        known = network.statistics
        for chosen in turns:
            with standing_updates(self.modules, standing):
                tokens = self._tokens(network, chosen)
            if network.goes_on:
                known = joined(known, network.statistics_of(tokens))
            update = _updates(network, tokens, known, len(chosen))
            if network.joint:
                standing, update = _stand(standing, update), {}
        right: dict[int, list[float]] = {kind: [] for kind in KINDS}
        with standing_updates(self.modules, standing):
            for group in (group for chosen in turns for group in self._groups(chosen, KINDS)):
                rows = self._terms(update, group)
                for kind, found in right.items():
                    found += rows.right_R[rows.kind_R == kind].float().tolist()
        return right

    def _groups(self, chosen: Sequence[int], kinds: Sequence[int]) -> list[RowGroup]:
        return [group.to(self.device) for group in self.episodes.groups(chosen, kinds)]

    def _tokens(self, network: Hypernetwork, chosen: Sequence[int]) -> dict[str, Tokens]:
        rows = [(group.hidden_RTD, group.batch, group.owner_R) for group in self._groups(chosen, (EDIT,))]
        return take_tokens(self.part, self.modules, rows, answers_only=network.answers_only)[0]

    def _terms(self, update: Updates, group: RowGroup) -> RowTerms:
        with updates(self.modules, update, group.owner_R):
            return row_terms(self.part.suffix(group.hidden_RTD, group.batch, group.past), group)

    def _backward(
        self, network: Hypernetwork, leaves: Updates, groups: Sequence[RowGroup], weight: float
    ) -> dict[int, float]:
        """Add the gradient at the updates; returns NLL in scope and KL out of scope, by kind (nats a token)."""
        config = network.config
        kind_N = torch.cat([group.kind_R[group.batch.row_N] for group in groups])
        counts = {kind: int((kind_N == kind).sum()) for kind in KINDS}
        inside, outside = max(1, counts[EDIT] + counts[INSIDE]), max(1, counts[OUTSIDE])
        found = dict.fromkeys(KINDS, 0.0)
        for group in groups:
            rows = self._terms(leaves, group)
            loss = config.generality_weight * rows.nll_R.sum() / inside
            loss = loss + config.locality_weight * rows.forward_R.sum() / outside
            (weight * loss).backward()
            for kind in KINDS:
                values_R = rows.forward_R if kind == OUTSIDE else rows.nll_R
                found[kind] += values_R.detach()[rows.kind_R == kind].sum().item() / max(1, counts[kind])
        return found


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _updates(network: Hypernetwork, tokens: Mapping[str, Tokens], known: History, edits: int) -> Updates:
    """The network's updates: one for all edits, or one for each."""
    made = network(tokens, known)
    if network.joint:
        return made
    return {
        name: (_per_edit(a_NI, tokens[name].edit_N, edits), _per_edit(b_NO, tokens[name].edit_N, edits))
        for name, (a_NI, b_NO) in made.items()
    }


def _per_edit(rows_NF: Tensor, edit_N: Tensor, edits: int) -> Tensor:
    """Rows of each edit, padded with zeros (B × K × F)."""
    return pad_sequence(list(rows_NF.split(torch.bincount(edit_N, minlength=edits).tolist())), batch_first=True)


def _squared_norm(update: Updates) -> Tensor:
    """Σ ‖Bᵀ A‖², from Gram matrices."""
    return torch.stack([((a @ a.mT) * (b @ b.mT)).sum() for a, b in update.values()]).sum()


@torch.no_grad()
def _stand(standing: Mapping[str, Tensor], update: Updates) -> dict[str, Tensor]:
    """The dense sum of what stands and one more joint update (O × I)."""
    return {name: standing.get(name, 0.0) + b_NO.T @ a_NI for name, (a_NI, b_NO) in update.items()}


@contextmanager
def updates(modules: Mapping[str, nn.Module], update: Updates, owner_R: Tensor) -> Iterator[None]:
    """Put an update in force: the same for all rows, or each row its owner's."""
    if all(a.dim() == 3 for a, _ in update.values()):
        with row_updates(modules, {name: (a[owner_R], b[owner_R]) for name, (a, b) in update.items()}):
            yield
        return

    def hook(a_NI: Tensor, b_NO: Tensor) -> Hook:
        def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + F.linear(F.linear(args[0], a_NI.to(out.dtype)), b_NO.T.to(out.dtype))

        return add

    with _hooks(modules, {name: hook(a_NI, b_NO) for name, (a_NI, b_NO) in update.items()}):
        yield


@contextmanager
def standing_updates(modules: Mapping[str, nn.Module], deltas: Mapping[str, Tensor]) -> Iterator[None]:
    """Put dense updates (O × I) in force on all rows."""

    def hook(delta_OI: Tensor) -> Hook:
        def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + F.linear(args[0], delta_OI.to(out.dtype))

        return add

    with _hooks(modules, {name: hook(delta_OI) for name, delta_OI in deltas.items()}):
        yield


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], hooks: Mapping[str, Hook]) -> Iterator[None]:
    handles = [modules[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
