"""Time from request to Edit, in units of one forward and backward pass of the same tokens, all in one run.

    IBKE_DATA=... python benchmarks/speed.py [--limit 60] [--together 200] [--editor FOLDER]

The unit is the cheapest honest one: whole model, frozen weights, gradient of the answer's NLL back to the embeddings.
For edits made together it is that of their prompts in batches of like length.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from ibke.batch import Batch, by_length, collate
from ibke.data.readers import read
from ibke.editors.base import Editor
from ibke.editors.gated.editor import GatedIBKE
from ibke.editors.ibke.editor import IBKEEditor
from ibke.evaluation.machine import describe
from ibke.evaluation.protocols import sample
from ibke.files import data_folder, write_atomically
from ibke.frames import encode_pair
from ibke.models import LanguageModel, load_model
from ibke.request import EditRequest


def pass_seconds(model: Any, batch: Batch) -> float:
    """One forward and backward pass of the request's tokens."""
    began = time.perf_counter()
    embedded = model.get_input_embeddings()(batch.ids_RT).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded, attention_mask=batch.attention_RT, use_cache=False)
    logits = model.get_output_embeddings()(hidden.last_hidden_state[batch.predicts_RT]).float()
    F.cross_entropy(logits, batch.labels_N, reduction="sum").backward()
    return time.perf_counter() - began


def taken(work: Callable[[], object]) -> float:
    """Seconds that something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def encoded(editor: IBKEEditor, request: EditRequest) -> None:
    """From capture to what an edit consists of."""
    code, _ = editor.encode([request])
    with torch.no_grad():
        editor.network.decode(code.mean, code.written, editor.site)


def together(lm: LanguageModel, editors: dict[str, Editor], requests: Sequence[EditRequest]) -> dict[str, object]:
    """Many edits made by one call: how many are made in the time in which their prompts are passed once (ratio)."""
    pairs = [encode_pair(request.prompt, request.target_new, "bare", lm.tokenizer) for request in requests]
    batches = [
        collate([pairs[row] for row in rows], lm.tokenizer.pad_token_id) for rows in by_length([*map(len, pairs)])
    ]
    unit = min(sum(pass_seconds(lm.model, batch) for batch in batches) for _ in range(3)) / len(requests)
    report: dict[str, object] = {"n": len(requests), "unit_seconds": unit}
    for name, editor in editors.items():
        seconds = taken(partial(editor.edit, requests)) / len(requests)
        report[name] = {"seconds": seconds, "rate": unit / seconds}
    return report


def main() -> None:
    """Measure and write benchmarks/results/speed.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--together", type=int, default=200, help="edits made by one call")
    parser.add_argument("--editor", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    args = parser.parse_args()
    data = data_folder() / "counterfact/counterfact-val.json"
    everything = list(read(data, "counterfact", []))
    requests, many = (
        [request.for_editor() for request in sample(everything, limit, 0)] for limit in (args.limit, args.together)
    )
    lm = load_model("smollm2-135m", dtype=args.dtype)
    bare = IBKEEditor.for_model(lm, args.editor, refine=False)
    editors: dict[str, Editor] = {
        "bare": bare,
        "refined": IBKEEditor.for_model(lm, args.editor),
        "gated bare": GatedIBKE.for_model(lm, args.editor, refine=False),
        "gated": GatedIBKE.for_model(lm, args.editor),
    }
    for editor in editors.values():  # warm up: lazy initialisation, base answers of the probes
        editor.edit(requests[:1])
    units: list[float] = []
    times: dict[str, list[float]] = {"capture_to_edit": [], **{name: [] for name in editors}}
    steps: list[int] = []
    for request in requests:
        pair = encode_pair(request.prompt, request.target_new, "bare", lm.tokenizer)
        batch = collate([pair], lm.tokenizer.pad_token_id)
        units.append(min(pass_seconds(lm.model, batch) for _ in range(3)))
        times["capture_to_edit"].append(taken(partial(encoded, bare, request)))
        for name, editor in editors.items():
            began = time.perf_counter()
            edit = editor.edit([request])
            times[name].append(time.perf_counter() - began)
            if name == "refined":
                steps.append(edit.info.refine_steps)
    report = {
        "n": len(units),
        "unit_seconds": median(units),
        "steps_median": median(steps),
        "machine": describe(lm.device),
        "together": together(lm, editors, many),
    }
    for name, values in times.items():
        ratios = sorted(value / unit for value, unit in zip(values, units, strict=True))
        report[name] = {
            "seconds_median": median(values),
            "ratio_median": median(ratios),
            "ratio_p95": ratios[int(0.95 * (len(ratios) - 1))],
        }
    how = f"--limit {args.limit} --together {args.together} --dtype {args.dtype}"
    report["command"] = f"python benchmarks/speed.py {how}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, (json.dumps(report, indent=2) + "\n").encode())
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
