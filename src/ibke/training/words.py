"""Which words of running text an editor keeps, so that edits are told to be silent there.

A second moment says how generic keys spread, not where they are. Most words are far from any address, and a few lie
near many: names, foreign syllables, "Union" and "Empire". So addresses of training edits are made beside all words of
a long text, and those kept are the ones that most often came near opening an edit that was not about them.

Shape suffixes: S words, D width of the residual stream.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ibke.editors.ibke.address import Addresser
from ibke.editors.ibke.contexts import About
from ibke.editors.ibke.statistics import COMMON, Common
from ibke.editors.key_statistics import CHUNK, ending_in, lines_of, row_batches, text_rows, words_of
from ibke.errors import SettingError
from ibke.training.checkpoint import write_tensors
from ibke.training.clock import Found, since, unnoticed
from ibke.training.run import OnProgress

READ = 150_000  # tokens of the text
ASKED = 2_000  # training edits that addresses are made for
AT_ONCE = 8  # of them


class CountingAddresser(Addresser):
    """Counts how often each common word came near to opening an edit (``counts_S``)."""

    counts_S: Tensor

    def near(self, over_S: Tensor) -> Tensor:
        """See :meth:`Addresser.near`."""
        found = super().near(over_S)
        self.counts_S[found] += 1
        return found


@torch.no_grad()
def read_words(addresser: Addresser, text: str, progress: Callable[[int, int], None]) -> Common:
    """The words of a text file and what the edited layer's MLP sees at each.

    Raises:
        SettingError: the text cannot be read, or is shorter than ``CHUNK`` tokens.
    """
    part, rows = addresser.part, list(text_rows(addresser.tokenizer, lines_of(text), READ))
    if not rows:
        raise SettingError(f"the text gives not even one row of {CHUNK} tokens.", text, "Name a longer text.")
    keys, ids, done = [], [], 0
    for batch in row_batches(rows, addresser.tokenizer, part.model.device):
        words_RT = words_of(batch)
        keys.append(part.inputs_of(addresser.entrance, batch)[words_RT].float().cpu())
        ids.append(ending_in(batch)[words_RT].cpu())
        done += len(batch.ids_RT)
        progress(done, len(rows))
    return Common(torch.cat(keys), torch.cat(ids))


@torch.no_grad()
def useful_words(
    make: Callable[..., Addresser],
    seen: Common,
    text: str,
    asked: Sequence[About],
    folder: Path,
    report: OnProgress,
    found: Found = unnoticed,
) -> Common:
    """The words that most often come near to opening an edit; chosen once and kept in a folder.

    Args:
        make: an addresser (of a class) that knows some words.
        seen: words that are known beside those of the text.
        text: a file.
        asked: what training edits are about.
        folder: where the choice is kept.
        report: called with progress.
        found: told of the choice where it is there.
    """
    plain = make(Addresser, seen)
    known = (plain.identity, float(plain.shut_S.sum()), float(seen.keys_SD.sum()), len(seen.ids_S2))
    identity = repr((known, "".join(lines_of(text)), READ, ASKED, COMMON, asked))
    path = folder / f"words-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        found(path)
        stored = load_file(path)
        return Common(stored["keys"], stored["ids"])
    began = time.monotonic()
    read = read_words(plain, text, _told(report, "reading words"))
    bank = Common(torch.cat([seen.keys_SD, read.keys_SD]), torch.cat([seen.ids_S2, read.ids_S2]))
    counting = make(CountingAddresser, bank)
    assert isinstance(counting, CountingAddresser)
    counting.counts_S = torch.zeros(len(bank.ids_S2))
    chosen, progress = asked[:ASKED], _told(report, "choosing words")
    for begin in range(0, len(chosen), AT_ONCE):
        counting(chosen[begin : begin + AT_ONCE])
        progress(min(begin + AT_ONCE, len(chosen)), len(chosen))
    order_S = counting.counts_S.argsort(descending=True, stable=True)[:COMMON]
    kept = Common(bank.keys_SD[order_S], bank.ids_S2[order_S])
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"keys": kept.keys_SD, "ids": kept.ids_S2}, since(began))
    return kept


def _told(report: OnProgress, stage: str) -> Callable[[int, int], None]:
    began = time.monotonic()

    def tell(done: int, total: int) -> None:
        left = (time.monotonic() - began) / done * (total - done)
        fields: dict[str, Any] = {"stage": stage, "done": done, "total": total, "seconds_left": left}
        report(fields)

    return tell
