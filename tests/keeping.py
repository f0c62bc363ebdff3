"""What tests of guard and keeper have in common."""

from __future__ import annotations

from ibke.edit import Edit
from ibke.evaluation.generate import Together, generate
from ibke.frames import encode_pair
from ibke.ledger.guard import Limits
from ibke.models import LanguageModel

PROBES = [("Water boils when", "bare"), ("What is the capital of Canada?", "question"), ("A triangle has", "bare")]
LOOSE = Limits(changed=1.0, drift=1.0, kl_nats=1e9, perplexity=1e9)


def said(lm: LanguageModel, prompt: str, state: Edit | None = None) -> str:
    """What a model answers."""
    ids = [encode_pair(prompt, "-", "bare", lm.tokenizer).prompt]
    return generate(lm, ids, Together((state,)) if state else None)[0].text
