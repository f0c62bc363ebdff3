"""Write edits beside prompts that name their subjects and ask nothing in particular ("Talk to me about …").

    IBKE_DATA=... python benchmarks/mention_edits.py

Held-out edits of three data sets in turn, each with some of the prompts of `mentions.json` that no gate has learned of,
as people type them into a chat; their answers are to stay.
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


def beside_mentions(request: EditRequest, rng: random.Random) -> EditRequest:
    """A request with such prompts as its only ones out of scope, and one other wording."""
    subject = subject_of(request.prompt, request.subject)
    texts = mentions(subject, [request.prompt, *request.rephrase_prompts], kept=True)
    chosen = rng.sample([text for _, text, kind in texts if kind == "chat"], PROBES)
    probes = tuple(Probe(text, family=MENTION) for text in chosen)
    return replace(request, locality=probes, portability=(), rephrase_prompts=request.rephrase_prompts[:1])


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=40, help="edits of each data set")
    parser.add_argument("--out", type=Path, default=Path("build/mentions.jsonl"))
    args = parser.parse_args()
    rng, records = random.Random(SEED), []
    for path, form, _ in DATASETS.values():
        found = [request for request in read(DATA / path, form, []) if request.rephrase_prompts]
        records += [beside_mentions(request, rng).to_dict() for request in rng.sample(found, args.each)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    print(f"{len(records)} requests in {args.out}")


if __name__ == "__main__":
    main()
