"""Time from request to Edit, in units of one forward and backward pass of the same tokens, all in one run.

    IBKE_DATA=... python benchmarks/speed.py [--limit 60] [--editor FOLDER]

The unit is the cheapest honest one: whole model, frozen weights, gradient of the answer's NLL back to the embeddings.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from ibke.batch import Batch, collate
from ibke.data.readers import read
from ibke.editors.base import method_class
from ibke.evaluation.machine import describe
from ibke.evaluation.protocols import sample
from ibke.files import data_folder
from ibke.frames import encode_pair
from ibke.models import load_model
from ibke.request import EditRequest


def pass_seconds(model: torch.nn.Module, batch: Batch) -> float:
    """One forward and backward pass of the request's tokens."""
    began = time.perf_counter()
    embedded = model.get_input_embeddings()(batch.ids_RT).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded, attention_mask=batch.attention_RT, use_cache=False)
    logits = model.get_output_embeddings()(hidden.last_hidden_state[batch.predicts_RT]).float()
    F.cross_entropy(logits, batch.labels_N, reduction="sum").backward()
    return time.perf_counter() - began


def main() -> None:
    """Measure and write benchmarks/results/speed.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--editor", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    args = parser.parse_args()
    data = data_folder() / "counterfact/counterfact-val.json"
    # As `ibke eval` hands them to an editor: paraphrases and probes are for examinations.
    requests = [
        EditRequest(request.prompt, request.target_new, request.subject, request.target_true)
        for request in sample(list(read(data, "counterfact", [])), args.limit, 0)
    ]
    lm = load_model("smollm2-135m", dtype=args.dtype)
    method = method_class("ibke")
    bare, refined = (method.for_model(lm, args.editor, refine=refine) for refine in (False, True))
    for editor in (bare, refined):  # warm up: lazy initialisation, base answers of the probes
        editor.edit(requests[:1])
    units, times = [], {"capture_to_edit": [], "bare": [], "refined": []}
    steps = []
    for request in requests:
        pair = encode_pair(request.prompt, request.target_new, "bare", lm.tokenizer)
        batch = collate([pair], lm.tokenizer.pad_token_id)
        units.append(min(pass_seconds(lm.model, batch) for _ in range(3)))
        began = time.perf_counter()
        code, _ = bare.encode([request])
        with torch.no_grad():
            bare.network.decode(code.mean, code.written, bare.site)
        times["capture_to_edit"].append(time.perf_counter() - began)
        for name, editor in (("bare", bare), ("refined", refined)):
            began = time.perf_counter()
            edit = editor.edit([request])
            times[name].append(time.perf_counter() - began)
        steps.append(edit.info.refine_steps)
    report = {
        "n": len(units),
        "unit_seconds": median(units),
        "steps_median": median(steps),
        "machine": describe(lm.device),
    }
    for name, values in times.items():
        ratios = sorted(value / unit for value, unit in zip(values, units, strict=True))
        report[name] = {
            "seconds_median": median(values),
            "ratio_median": median(ratios),
            "ratio_p95": ratios[int(0.95 * (len(ratios) - 1))],
        }
    report["command"] = f"python benchmarks/speed.py --limit {args.limit} --dtype {args.dtype}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
