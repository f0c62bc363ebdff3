"""Streams of many edits with distinct, held-out subjects, for batch and sequential editing; and what becomes of them.

    IBKE_DATA=... python benchmarks/lifelong.py stream [--tuning] [--size 1000] [--kind mixed]

writes build/streams/KIND-SIZE.jsonl (`-tuning` holds other edits, for choosing settings).
"""

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

from rivals import COUNTS, SEED

from ibke.data.readers import read
from ibke.evaluation.protocols import sample
from ibke.request import EditRequest
from ibke.subjects import subject_of

DATA = Path(os.environ.get("IBKE_DATA", "../shared/data"))
STREAMS = Path("build/streams")
SHARES = {"mixed": {"counterfact": 0.4, "zsre": 0.2, "questions": 0.4}, "counterfact": {"counterfact": 1.0}}
"""By kind of stream, from where its edits come; what a source lacks is made up with questions."""


def main() -> None:
    """Write a stream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stream",))
    parser.add_argument("--kind", choices=tuple(SHARES), default="mixed")
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--tuning", action="store_true")
    args = parser.parse_args()
    print(stream(args.kind, args.size, args.tuning))


def stream(kind: str, size: int, tuning: bool = False) -> Path:
    """The file of a stream: edits in random order, no subject twice."""
    target = STREAMS / f"{kind}-{size}{'-tuning' if tuning else ''}.jsonl"
    if target.exists():
        return target
    shares, chosen, subjects = SHARES[kind], [], set[str]()
    for source in (*shares, "questions"):
        wanted = round(shares.get(source, 0.0) * size) if source != "questions" else size - len(chosen)
        for request in edits(source, tuning):
            if wanted < 1:
                break
            if (subject := subject_of(request.prompt, request.subject).lower()) not in subjects:
                subjects.add(subject)
                chosen.append(request)
                wanted -= 1
    random.Random(SEED).shuffle(chosen)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(request.to_dict()) + "\n" for request in chosen))
    return target


def edits(source: str, tuning: bool) -> Iterator[EditRequest]:
    """Edits of a source in random order; those for tuning are no others' and nothing was trained on the rest."""
    if source == "counterfact":
        name = "train" if tuning else "val"
        found = list(read(DATA / f"counterfact/counterfact-{name}.json", "counterfact", []))
    elif source == "zsre":
        everything = list(read(DATA / "zsre/zsre_mend_train-1k.json", "zsre", []))
        drawn = {request.prompt for count in COUNTS.values() for request in sample(everything, count, SEED)}
        found = [request for request in everything if (request.prompt in drawn) != tuning]
    else:
        everything = list(read(DATA / "entityquestions/dev", "entityquestions", []))
        found = [request for index, request in enumerate(everything) if (index % 4 == 0) == tuning]
    random.Random(SEED).shuffle(found)
    yield from (request for request in found if request.rephrase_prompts)


if __name__ == "__main__":
    main()
