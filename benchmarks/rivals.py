"""The comparison of docs/results.md: rivals tuned on validation edits, then all methods on the same held-out ones.

    IBKE_DATA=... python benchmarks/rivals.py tune [--methods rome,memit] [--protocols single,batch:100,sequential]
    IBKE_DATA=... python benchmarks/rivals.py table [--methods ...] [--data ...] [--protocols ...]
    IBKE_DATA=... python benchmarks/rivals.py summary

All are `ibke bench` commands, which are printed; what is finished is not run again. The winner of a method's
candidates is the one of the largest score, mean over data sets, and is written to TUNED, for each protocol by itself:
what suits a single edit need not suit a hundred. Where a method was not tuned under one, what won on single edits runs.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean

from ibke.cli.settings import parse
from ibke.data.readers import read
from ibke.editors.base import Editor, method_class
from ibke.evaluation.protocols import sample
from ibke.files import data_folder, digest, write_atomically
from ibke.models import LanguageModel
from ibke.training.hypernetwork.settings import HypernetworkSettings

DATA = data_folder()
RESULTS = Path("benchmarks/results/rivals")
TUNED = RESULTS / "tuned.json"
TUNING = Path("build/tuning")
EDITS = {"single": 16, "batch:100": 32, "sequential": 32, "sequential:100": 200}  # of each data set in tuning
QUICK = ("ultraedit",)  # edits take so little that whole batches of 100 are tuned on
SEED = 0
COUNTS = {"single": 200, "batch:100": 200, "sequential": 500}  # edits of a cell of the table

# name: file under IBKE_DATA, format, file of validation edits (the same: those of it that no cell of the table draws)
DATASETS: dict[str, tuple[str, str, str]] = {
    "counterfact": ("counterfact/counterfact-val.json", "counterfact", "counterfact/counterfact-train.json"),
    "zsre": ("zsre/zsre_mend_train-1k.json", "zsre", "zsre/zsre_mend_train-1k.json"),
    "knowedit": ("knowedit/recent_train.json", "knowedit", "knowedit/recent_train.json"),
}
SMALL = ("knowedit",)  # what cells leave of it is enough to tune on single edits only
PROTOCOLS = ",".join(f"{protocol}/{count}" for protocol, count in COUNTS.items())
RIVALS = "ft,ft-l,lora,rome,memit,alphaedit,mend,malmen,rledit,ultraedit,grace,wise,serac,ike,ike-retrieval"
METHODS = f"ibke,ibke-gated,{RIVALS}"
ALONE = ("ike", "ike-retrieval")  # all facts stand in front of every question: single edits only
ABILITIES = ("boolq.jsonl", "natural_language_inference.tsv", "truthfulqa_fold0_test.csv")
LOOKS, QUESTIONS = 2, 20  # edited models of a cell that are asked other things, and how many of each kind
UNREAD = 1500  # last lines of WikiText's validation text, of which nothing went into anybody's statistics
# Generic keys are of the text that IBKE's statistics read too, and not of what perplexity is measured on (UNREAD).
TEXT = "text/wikitext2_valid.txt"
# What IBKE and the hypernetworks are trained on (train_shipped.sh, train_rivals.sh), and what they must not see.
# Requests are as many as theirs, with those that their checkpoints are chosen by.
HARD_SPLIT = Path("build/heldout-relations.jsonl")
MIXTURE = "facts=1,pararel=2,lre=1,entityquestions=3,counterfact:counterfact/counterfact-train.json=3"
EXCLUDED = ",".join([*(f"{form}:{path}" for path, form, _ in DATASETS.values()), f"jsonl:{HARD_SPLIT}"])
ALWAYS: dict[str, dict[str, object]] = {
    **dict.fromkeys(("rome", "memit", "alphaedit"), {"text": TEXT}),
    "serac": {"sources": MIXTURE, "requests": 5096, "exclude": EXCLUDED},
}

# As many edits to be shown as there are, of the data that IBKE is trained on.
STORE = {"store": "counterfact/counterfact-train.json", "format": "counterfact"}

# UltraEdit's layers for Llama-3-8B, at the same depth.
LIKE_LLAMA = {"gate_layers": "10,11,12,13,14", "value_layers": "17,18,19,20,21,22"}

# Beside its own defaults, which are the published settings where the paper's model is of another size.
CANDIDATES: dict[str, list[dict[str, object]]] = {
    "ft": [
        {"learning_rate": 2e-3},
        {"learning_rate": 5e-3},
        {"layer": 10},
        {"layer": 20},
        {"layer": 20, "learning_rate": 1e-3},
        {"layer": 20, "learning_rate": 2e-3},
        {"layer": 20, "stop_at_answer": True},
    ],
    "ft-l": [
        {"bound": 2e-3},
        {"bound": 1e-2},
        {"layer": 20, "bound": 2e-3},
        {"bound": 2e-3, "stop_at_answer": True},
        {"layer": 21, "bound": 1e-2, "learning_rate": 2e-3},
    ],
    "lora": [
        {"learning_rate": 1e-3},
        {"learning_rate": 2e-4},
        {"learning_rate": 1e-3, "stop_at_answer": True},
        {"rank": 2, "learning_rate": 1e-3, "stop_at_answer": True},
        {"stop_loss": 0.0},
    ],
    "rome": [
        {"clamp": 10.0, "learning_rate": 1.0},
        {"layer": 8, "clamp": 10.0, "learning_rate": 1.0},
        {"layer": 12, "clamp": 10.0, "learning_rate": 1.0},
        {"layer": 8, "clamp": 10.0, "learning_rate": 2.0},
        {"layer": 8, "clamp": 10.0, "learning_rate": 1.0, "weight_decay": 1e-3},
    ],
    "memit": [
        {"clamp": 4.0, "learning_rate": 1.0},
        {"clamp": 10.0, "learning_rate": 1.0},
        {"clamp": 10.0, "learning_rate": 1.0, "moment_weight": 0.1},
        {"clamp": 10.0, "learning_rate": 1.0, "layers": "8,9,10,11,12"},
        {"clamp": 10.0, "learning_rate": 1.0, "layers": "8,9,10,11,12", "weight_decay": 1e-3},
    ],
    "alphaedit": [
        {"clamp": 4.0, "learning_rate": 1.0},
        {"clamp": 10.0, "learning_rate": 1.0},
        {"clamp": 10.0, "learning_rate": 1.0, "threshold": 0.2},
        {"clamp": 10.0, "learning_rate": 1.0, "threshold": 0.2, "ridge": 1.0},
        {"clamp": 10.0, "learning_rate": 1.0, "ridge": 1.0},
        {"clamp": 10.0, "learning_rate": 1.0, "ridge": 0.1},
        {"clamp": 10.0, "learning_rate": 1.0, "weight_decay": 1e-3},
    ],
    "ultraedit": [
        {"learning_rate": 1e-5},
        {"learning_rate": 3e-5},
        {"learning_rate": 1e-4},
        {"learning_rate": 3e-4},
        {"learning_rate": 1e-3},
        {"learning_rate": 1e-4, **LIKE_LLAMA},
        {"learning_rate": 3e-4, **LIKE_LLAMA},
    ],
    "grace": [{"radius": 5.0}, {"radius": 20.0}, {"layer": 10, "radius": 5.0}, {"layer": 20, "radius": 20.0}],
    "wise": [{"layer": 20, "alpha": 20.0, "beta": 40.0, "gamma": 20.0, "ratio": 0.8}, {"layer": 20}],
    "serac": [{"width": 256}, {"layer": 8}, {"steps": 1000}, {"layer": 8, "steps": 1000}],
    # Trained once (TRAINED); what can be told afterwards is how much of their updates is taken.
    **dict.fromkeys(("mend", "malmen", "rledit"), [{"scale": 0.25}, {"scale": 0.5}, {"scale": 2.0}, {"scale": 4.0}]),
    "ike-retrieval": [
        {"copies": 0, "updates": 0, "retains": 6},
        {"copies": 2, "updates": 2, "retains": 6},
        {"copies": 2, "updates": 4, "retains": 8, **STORE},
        {"copies": 4, "updates": 12, "retains": 16, **STORE},
    ],
}
"""Settings tried for a method, beside its defaults."""

# Fine-tuning by a few edits a step, so that a hundred of them take more than the 25 steps of as many epochs.
TOGETHER: dict[str, list[dict[str, object]]] = {
    "ft": [
        {"batch_size": 10},
        {"learning_rate": 2e-3, "batch_size": 10},
        {"layer": 20, "learning_rate": 1e-3, "batch_size": 10},
        {"layer": 20, "batch_size": 1},
    ],
    "ft-l": [{"bound": 2e-3, "batch_size": 10}, {"layer": 20, "bound": 1e-2, "batch_size": 10}],
    "lora": [{"batch_size": 10}, {"learning_rate": 1e-3, "batch_size": 10}, {"learning_rate": 1e-3, "batch_size": 1}],
}
"""Settings tried beside these for batches."""

PUBLISHED = {
    "ft": "one layer at .69 of the depth (22 of Llama-3-8B's 32), Adam 5e-4, at most 25 epochs, no bound",
    "ft-l": "layer 0, ε 5e-4 (GPT-2 XL), Adam 5e-4, at most 25 epochs",
    "lora": "Adam 5e-3, 70 epochs without an early stop (our default has one, at 1e-2), rank 8, α 32, queries and "
    "values of all layers (EasyEdit, Llama-3-8B)",
    "rome": "layer 5 of 32, 25 steps of .5, clamp 4",
    "memit": "layers 4 to 8 of 32, 25 steps of .5, clamp .75, λ of 1 in units of d_in",
    "alphaedit": "layers 4 to 8 of 32, clamp .75, threshold .02, ridge 10",
    "mend": "Adam 1e-6, ten single edits a step, clip 100, until 20,000 steps bring nothing; rank 1920, 2 blocks, "
    "α from 1e-4, weights .1 and 1, both projections of the last 3 layers of GPT-J's 28",
    "malmen": "Adam 1e-5, 512 edits a step, clip 1; rank 1920, 2 blocks, η from 1e-6, weights 1 and 1, last 6 layers "
    "of GPT-J's 28",
    "rledit": "Adam 1e-5, one step in all, of 400 turns; rank 1024, 4 blocks, η from 1e-6, weights 1 and .6, decay .95 "
    "over 10 turns, penalty 1e-4, layers 22 to 30 of Llama-3-8B's 32",
    "ultraedit": "η 1e-6, gates of layers 18 to 26 of 28 (Qwen2.5-7B)",
    "grace": "layer 27 of 32, ε 1, Adam 1, 100 steps",
    "wise": "layer 27 of 32, margins 5/20/10, ratio .88, ρ .2",
    "serac": "a classifier fine-tuned from DistilBERT; a counterfactual model",
    "ike-retrieval": "32 demonstrations, 4 : 12 : 16",
}
"""What the papers, or the settings that their authors ship, say; layers are taken at the same depth here."""
TRAINED = ("mend", "malmen", "rledit")  # by benchmarks/train_rivals.sh, under one setting of training


def main() -> None:
    """Tune or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "table", "summary"))
    parser.add_argument("--methods", default="")
    parser.add_argument("--data", default=",".join(DATASETS))
    parser.add_argument("--protocols", default="", help=f"of tuning: {', '.join(EDITS)}; of the table: {PROTOCOLS}")
    args = parser.parse_args()
    if args.what == "tune":
        for protocol in (args.protocols or "single").split(","):
            for method in args.methods.split(",") if args.methods else CANDIDATES:
                tune(method, protocol)
    elif args.what == "summary":
        summary()
    else:
        methods = args.methods.split(",") if args.methods else METHODS.split(",")
        table(methods, args.data.split(","), args.protocols or PROTOCOLS)


def tune(method: str, protocol: str) -> None:
    """Find a method's best settings under a protocol among its candidates."""
    more = TOGETHER.get(method, []) if protocol.startswith("batch") else []
    candidates: dict[str, dict[str, object]] = {method: {}} | {
        f"{method}-{number}": given for number, given in enumerate([*CANDIDATES[method], *more], 1)
    }
    out = Path("build/tuned") / f"{method}.{protocol.replace(':', '-')}"
    count = 100 if protocol == "batch:100" and method in QUICK else EDITS[protocol]
    names = [name for name in DATASETS if protocol == "single" or name not in SMALL]
    data = [f"{name}={validation_edits(name, count)}:jsonl" for name in names]
    run({label: (method, {"single": settings}) for label, settings in candidates.items()}, data, protocol, out)
    rows = json.loads((out / "summary.json").read_text())["rows"]
    found = {
        label: [row["generation"]["score"]["mean"] for row in rows if row["method"] == label] for label in candidates
    }
    # One that failed somewhere is out of the running.
    scores = {label: fmean(some) for label, some in found.items() if len(some) == len(data) and None not in some}
    if not scores:
        raise SystemExit(f"No candidate of {method} came through; see {out}.")
    best = max(scores, key=lambda label: scores[label])
    known = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    known.setdefault(method, {})[protocol] = {
        "settings": candidates[best],
        "edits": f"{count} each of {', '.join(names)}",
        "tried": [{"settings": candidates[label], "score": round(score, 4)} for label, score in scores.items()],
    }
    TUNED.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(TUNED, (json.dumps(dict(sorted(known.items())), indent=1) + "\n").encode())
    print(method, protocol, candidates[best], scores[best])


def validation_edits(name: str, count: int) -> Path:
    """A file of so many edits that no cell of the table draws."""
    path, form, source = DATASETS[name]
    # Which edits are left over depends on what the cells draw, and from where.
    target = TUNING / f"{name}-{count}.{digest([COUNTS, source])[:8]}.jsonl"
    if not target.exists():
        requests = list(read(DATA / source, form, []))
        cells = COUNTS.values() if source == path else ()
        drawn = {request.prompt for limit in cells for request in sample(requests, limit, SEED)}
        usable = [request for request in requests if request.prompt not in drawn and request.rephrase_prompts]
        chosen = random.Random(SEED).sample(usable, count)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, "".join(json.dumps(request.to_dict()) + "\n" for request in chosen).encode())
    return target


def table(methods: list[str], names: list[str], protocols: str) -> None:
    """Run the cells of the table that are missing, and sum up all that are there."""
    alone = ",".join(text for text in protocols.split(",") if text.startswith("single"))
    for some, how in (([m for m in methods if m not in ALONE], protocols), ([m for m in methods if m in ALONE], alone)):
        if some and how:
            run(labelled(some), sources(names), how, RESULTS, *side_effects())
    summary()


def summary() -> None:
    """Sum up all cells of the table that are there."""
    run(labelled(METHODS.split(",")), sources(DATASETS), PROTOCOLS, RESULTS, *side_effects(), "--finished")


def side_effects() -> list[str]:
    """What is put to edited models beside the requests' own questions."""
    found = ["--text", str(running_text()), "--looks", str(LOOKS), "--questions", str(QUESTIONS)]
    return found + [part for name in ABILITIES for part in ("--abilities", f"ability/{name}")]


def labelled(methods: Iterable[str]) -> dict[str, tuple[str, dict[str, dict[str, object]]]]:
    """Methods with the settings they were found to be best with, by protocol."""
    tuned = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    return {
        method: (method, {protocol: found["settings"] for protocol, found in tuned.get(method, {}).items()})
        for method in methods
    }


def trained(method: str) -> str:
    """What a method of TRAINED is trained with here, in the words of PUBLISHED."""
    kind = method_class(method)
    assert kind.Config
    config = kind.Config()
    run = HypernetworkSettings("", ("facts",), method=method, config=config)
    said = [
        f"Adam {run.learning_rate:g}",
        f"{run.batch} edits a step",
        f"clip {run.clip:g}",
        f"{run.minutes:g} minutes",
    ]
    said += [f"rank {config.rank}", f"{config.blocks} blocks", f"step size from {config.step_size:g}"]
    said += [f"weights {config.generality_weight:g} and {config.locality_weight:g}"]
    if config.turns > 1:
        said[1] = f"{config.turns} turns of {run.batch} edits a step"
        said += [f"decay {config.decay:g} over {config.depth} turns", f"penalty {config.penalty:g}"]
    return ", ".join(said)


def settings_under(protocol: str, tuned: Mapping[str, Mapping[str, object]]) -> Mapping[str, object]:
    """Of the settings found by protocol those for one, or for the most like it."""
    like = [protocol, *(["batch:100"] if protocol.endswith(":100") else []), "single"]
    return next((tuned[name] for name in like if name in tuned), {})


def ready(lm: LanguageModel, method: str, *more: str, protocol: str = "single") -> Editor:
    """A method as the table has it under a protocol, with more settings as NAME=VALUE.

    Raises:
        IBKEError: what it was trained to is not there, or a setting is none.
    """
    kind = method_class(method)
    hard_split([method])
    ((_, tuned),) = labelled([method]).values()
    settings = {**ALWAYS.get(method, {}), **settings_under(protocol, tuned)}
    texts = [f"{name}={value}" for name, value in settings.items()]
    (given,) = parse([*texts, *more], kind.Settings) if kind.Settings else ({},)
    return kind.for_model(lm, **given)


def sources(names: Iterable[str]) -> list[str]:
    """Data sets as `ibke bench` takes them."""
    return [f"{name}={DATASETS[name][0]}:{DATASETS[name][1]}" for name in names]


def running_text() -> Path:
    """Text to measure perplexity on."""
    target = Path("build/text.txt")
    if not target.exists():
        lines = (DATA / "text/wikitext2_valid.txt").read_text().splitlines(keepends=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, "".join(lines[-UNREAD:]).encode())
    return target


def hard_split(methods: Iterable[str]) -> None:
    """Write the requests of the hard split, where a method is told to keep them out of its training."""
    if any(str(HARD_SPLIT) in str(ALWAYS.get(method, {}).get("exclude")) for method in methods):
        write_hard_split()


def write_hard_split() -> None:
    """Write the requests of the hard split, if they are not there."""
    if not HARD_SPLIT.exists():
        subprocess.run([sys.executable, "benchmarks/heldout_relations.py", "--out", str(HARD_SPLIT)], check=True)


def run(
    labels: Mapping[str, tuple[str, Mapping[str, Mapping[str, object]]]],
    data: list[str],
    protocols: str,
    out: Path,
    *more: str,
) -> None:
    """One `ibke bench` of methods under their labels, with their settings by protocol."""
    command = ["ibke", "bench", "--methods", ",".join(f"{label}={method}" for label, (method, _) in labels.items())]
    command += [part for item in data for part in ("--data", item)]
    command += ["--protocols", protocols, "--seeds", str(SEED), "--out", str(out), *more]
    for label, (method, tuned) in labels.items():
        for protocol in (text.partition("/")[0] for text in protocols.split(",")):
            settings = {**ALWAYS.get(method, {}), **settings_under(protocol, tuned)}
            command += [
                part for key, value in settings.items() for part in ("--set", f"{label}@{protocol}.{key}={value}")
            ]
    hard_split(method for method, _ in labels.values())
    print(" ".join(command), flush=True)
    done = subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]])
    if done.returncode not in (0, 1):  # 1: a cell has failed, which the summary says
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
