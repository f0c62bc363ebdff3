"""What one edit takes, of every method in one run on one machine; run it with nothing else running.

    IBKE_DATA=... python benchmarks/costs.py [--edits 6] [--methods ibke,rome]

Single edits on the pristine model, float32, one thread unless OMP_NUM_THREADS says otherwise, tuned settings where
there are any. The unit is one forward and backward pass of the request's own tokens. A method whose trained weights are
not there (`benchmarks/train_rivals.sh`) is left out and named.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rivals import DATA, DATASETS, METHODS, RESULTS, SEED, ready
from speed import pass_seconds

from ibke.batch import collate
from ibke.data.readers import read
from ibke.errors import IBKEError
from ibke.evaluation.machine import describe
from ibke.evaluation.protocols import sample
from ibke.files import write_atomically
from ibke.frames import encode_pair
from ibke.models import LanguageModel, load_model
from ibke.request import EditRequest

COSTS = RESULTS / "costs.json"
ON = ("counterfact", "zsre")


def main() -> None:
    """Time every method and write COSTS."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=6, help="of each data set")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--out", type=Path, default=COSTS)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    lm = load_model("smollm2-135m", dtype="float32")
    asked = {name: requests(name, args.edits + 1) for name in ON}
    unit = {name: median(passes(lm, some)) for name, some in asked.items()}
    report: dict[str, Any] = {"machine": describe(lm.device), "edits": args.edits, "pass": unit, "methods": {}}
    for method in args.methods.split(","):
        try:
            editor = ready(lm, method)
            # The first edit pays for what is taken once: statistics, beginnings of prompts.
            editor.edit(asked[ON[0]][:1])
            report["methods"][method] = {name: timed(editor, some[1:]) for name, some in asked.items()}
        except IBKEError as error:
            report["methods"][method] = {"left_out": error.what}  # its place is this machine's
        print(method, report["methods"][method], flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, (json.dumps(report, indent=1) + "\n").encode())


def requests(name: str, count: int) -> list[EditRequest]:
    """Some edits of the table's, as an editor is shown them."""
    path, form, _ = DATASETS[name]
    some = sample(list(read(DATA / path, form, [])), 200, SEED)[:count]
    return [request.for_editor() for request in some]


def passes(lm: LanguageModel, some: list[EditRequest]) -> list[float]:
    """Seconds of one forward and backward pass of each request's tokens."""
    pairs = [encode_pair(one.prompt, one.target_new, "bare", lm.tokenizer, one.subject) for one in some]
    return [pass_seconds(lm.model, collate([pair], lm.tokenizer.pad_token_id, lm.device)) for pair in pairs]


def timed(editor: Any, some: list[EditRequest]) -> dict[str, float]:
    """Seconds of each edit: median and largest."""
    seconds = []
    for one in some:
        began = time.perf_counter()
        editor.edit([one])
        seconds.append(time.perf_counter() - began)
    return {"median": median(seconds), "largest": max(seconds)}


if __name__ == "__main__":
    main()
