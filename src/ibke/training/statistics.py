"""Spectra of generic keys and typical output norms, taken once from running text and from prompts.

Shape suffixes: R rows, T tokens, I d_in, O d_out, L modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ibke.editors.ibke.statistics import KeySpectrum, key_spectrum

CHUNK = 64  # tokens of running text seen at a time


class KeyMoments:
    """Second moments Σ k kᵀ of module inputs and mean norms of outputs, gathered over forward passes.

    The first position of each row is left out: in many models it holds a massive activation that belongs to no word and
    would fill the spectrum.

    Args:
        modules: linear modules by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = modules
        self.moment: dict[str, Tensor] = {}
        self.norms: dict[str, list[Tensor]] = {name: [] for name in modules}
        self.tokens = dict.fromkeys(modules, 0)

    @contextmanager
    def gathering(self, attention_RT: Tensor, weight: float = 1.0) -> Iterator[None]:
        """While active, every forward pass of rows with this mask is counted."""
        mask = attention_RT.bool().clone()
        mask[:, 0] = False

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                rows = (*mask.shape, -1)  # some models flatten rows and tokens before a linear module
                keys_NI = args[0].reshape(rows)[mask].float()
                self.moment[name] = self.moment.get(name, 0.0) + weight * (keys_NI.T @ keys_NI)
                self.norms[name].append(out.reshape(rows)[mask].float().norm(dim=-1).mean())
                self.tokens[name] += int(weight * len(keys_NI))

            return hook

        handles = [module.register_forward_hook(note(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def spectra(self, rank: int) -> list[KeySpectrum]:
        """The leading directions of C₀ for every module."""
        return [key_spectrum(self.moment[name].cpu() / self.tokens[name], rank) for name in self.modules]

    def output_scale(self) -> Tensor:
        """Typical norm of each module's output (L)."""
        return torch.stack([torch.stack(values).mean() for values in self.norms.values()]).cpu()


@torch.no_grad()
def gather_text(moments: KeyMoments, model: Any, tokenizer: Any, texts: Iterable[str], tokens: int) -> None:
    """Count running text, ``tokens`` of it at most."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) >= tokens:
            break
    rows = len(ids[:tokens]) // CHUNK
    for begin in range(0, rows, 16):
        count = min(16, rows - begin)
        block = torch.tensor(ids[begin * CHUNK : (begin + count) * CHUNK]).view(count, CHUNK)
        with moments.gathering(torch.ones_like(block)):
            model.base_model(input_ids=block.to(next(model.parameters()).device), use_cache=False)
