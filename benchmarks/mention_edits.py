"""Write edits beside prompts that name their subjects but do not ask about them.

    IBKE_DATA=... python benchmarks/mention_edits.py

Held-out edits of three data sets in turn, each with some of the prompts of `mentions.json` that no gate has learned of,
as people type them into a chat ("Talk to me about …"); and those of CounterFact, whose prompts out of scope ask the
same of other subjects, with these behind the edited one's name ("I like … What is the capital of France?"). All answers
are to stay.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from question_others import MENTION, mentions  # beside this, as the next one
from rivals import DATA, DATASETS, SEED

from ibke.data.readers import read
from ibke.files import write_atomically
from ibke.request import EditRequest, Probe
from ibke.subjects import subject_of

PROBES = 4  # of each edit
PASSING = "passing"  # names the edited subject, then asks of another what the edit answers
SAID = ("I like {}.", "We were talking about {} before.", "Leave {} aside.", "I have read about {} already.")
"""What is said of the edited subject before another is asked about."""


def beside_mentions(request: EditRequest, rng: random.Random, others: bool) -> EditRequest:
    """A request with such prompts as its only ones out of scope, and one other wording.

    Args:
        request: it.
        rng: draws.
        others: its own prompts out of scope ask the same of other subjects.
    """
    subject = subject_of(request.prompt, request.subject)
    texts = mentions(subject, [request.prompt, *request.rephrase_prompts], kept=True)
    chosen = rng.sample([text for _, text, kind in texts if kind == "chat"], PROBES)
    probes = [Probe(text, family=MENTION) for text in chosen]
    if others:
        some = zip(rng.sample(SAID, len(SAID)), request.locality, strict=False)
        probes += [Probe(f"{said.format(subject)} {one.prompt}", family=PASSING) for said, one in some]
    return replace(request, locality=tuple(probes), portability=(), rephrase_prompts=request.rephrase_prompts[:1])


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=40, help="edits of each data set")
    parser.add_argument("--out", type=Path, default=Path("build/mentions.jsonl"))
    args = parser.parse_args()
    rng, records = random.Random(SEED), []
    for name, (path, form, _) in DATASETS.items():
        found = [request for request in read(DATA / path, form, []) if request.rephrase_prompts]
        some = rng.sample(found, args.each)
        records += [beside_mentions(request, rng, name == "counterfact").to_dict() for request in some]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    print(f"{len(records)} requests in {args.out}")


if __name__ == "__main__":
    main()
