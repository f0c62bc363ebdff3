"""The gate at the prompt's end: learned on many relations, measured on others, and made to ship.

    IBKE_DATA=... python benchmarks/question_gate.py collect
    IBKE_DATA=... python benchmarks/question_gate.py compare [--layers 24,29] [--hidden 0,512] [--shares 0,1]
    IBKE_DATA=... python benchmarks/question_gate.py ship [--leave-out --editor runs/shipped]

An edit's key is made of its own prompt's states in three frames; the gate tells of another prompt's states whether the
same is asked (:mod:`ibke.editors.gated.question`). It learns of the relations that there are facts of and of a share of
our own that are only asked about. A sixth of the former is kept for validation, with whatever of ours may ask the same;
thresholds are chosen there, and the evaluation sets only report. Prompts that leave out one answer ("Apart from X, …")
are other questions too, and so are those that name the subject and ask nothing in particular ("Tell me about …"; those
that the evaluation sets are asked are not learned of), and places in running text. `compare` knows none of the held-out
relations, and `ship --leave-out` puts such a gate with an editor that has not met them either (`train_shipped.sh`) into
LEFT_OUT, to be measured on them; what `ship` puts beside the editor itself has learned of them, too, by the same
recipe. Either has in the end learned of validation's.

`collect` can be stopped and gone on with; points that are there, of the same prompts, are not run again. `compare`
reads fewer layers than were collected where it is told to.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from question_others import EXCEPTION, MENTION  # beside this, as the next ones
from question_prompts import MODEL, SEED, collected
from question_training import Case, Known, Prompts, Recipe, train
from single_edits import LEFT_OUT
from torch import Tensor

from ibke.editors.gated.question import QuestionGate, save_gate
from ibke.editors.ibke.shipped import shipped_folder
from ibke.evaluation.machine import describe
from ibke.files import digest, to_json, write_atomically
from ibke.models import load_model

KEPT_OUT = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of validation's other questions that thresholds keep out
LAYERS = (12, 16, 20, 24, 29)
FEWEST = 20  # values that a share is made of
PLACES = "places"  # of running text, counted apart
KEPT_PLACES = 4  # one place of running text in so many is not learned of
APART = {EXCEPTION: "exceptions", "forgetfulness": "exceptions", MENTION: "mentions"}
"""Counted apart from other questions, by how they are marked (exceptions: our own and KnowEdit's)."""
KINDS_APART = tuple(dict.fromkeys(APART.values()))


@torch.no_grad()
def scores(
    gate: QuestionGate, prompts: Prompts, cases: Sequence[Case], places_RLD: Tensor | None = None
) -> dict[str, Tensor]:
    """Scores of other wordings (``own``), of other questions about the subject, of those counted apart, and of places.

    A score is by how much a cosine is above its edit's level.
    """
    query_RK, lean_R = gate.queries(prompts.states_RLD)
    key_BK, level_B = gate.keys(prompts.states_RLD[torch.tensor([case.key for case in cases])])
    found: dict[str, list[float]] = {"own": [], "other": [], **{name: [] for name in KINDS_APART}}
    for case, key_K, level in zip(cases, key_BK, level_B, strict=True):
        for role in ("own", "other"):
            rows = getattr(case, role)
            for row, value in zip(rows, (query_RK[rows] @ key_K + lean_R[rows] - level).tolist(), strict=True):
                apart = APART.get(prompts.asked[row].relation, role) if role == "other" else role
                found[apart].append(value)
    sets = {role: torch.tensor(values) for role, values in found.items()}
    if places_RLD is not None:
        place_PK, lean_P = gate.queries(places_RLD)
        sets[PLACES] = (place_PK @ key_BK.T + lean_P[:, None] - level_B).flatten()
    return sets


def auc(found: dict[str, Tensor]) -> float | None:
    """How often another wording scores above another question (ratio); None where there are few of either."""
    above = found["own"][:, None] > found["other"][None]
    return mean(above) if min(above.shape) >= FEWEST else None


def at(threshold: float, found: dict[str, Tensor]) -> dict[str, float | None]:
    """Of other wordings the share that passes, of other questions the share that is kept out (ratios)."""
    shares = {"wordings_passed": found["own"] > threshold, "others_kept_out": found["other"] <= threshold}
    for name in (*KINDS_APART, PLACES):
        if len(found.get(name, ())):
            shares[f"{name}_kept_out"] = found[name] <= threshold
    return {name: mean(one) for name, one in shares.items()}


def mean(values: Tensor) -> float | None:
    """Their mean, to four digits; None where there are few."""
    return round(values.float().mean().item(), 4) if values.numel() >= FEWEST else None


class Trained(NamedTuple):
    """A gate, and scores of every set by it."""

    gate: QuestionGate
    known: Known
    scores: dict[str, dict[str, Tensor]]
    seconds: float


def trained(parts: dict[str, Prompts], recipe: Recipe) -> Trained:
    """One gate, trained and asked about everything that it has not learned of."""
    begun, known = time.perf_counter(), Known(recipe)
    places, evaluation = parts["text"], parts["evaluation"]
    cut = len(places.asked) // KEPT_PLACES
    text, kept_RLD = Prompts(places.asked[cut:], places.states_RLD[cut:]), places.states_RLD[:cut]
    left_out = {"evaluation", "text"} | ({"held-out", "held-out exceptions"} if recipe.leave_out else set())
    some = [text, *(part for name, part in parts.items() if name not in left_out)]
    learned = Prompts([one for part in some for one in part.asked], torch.cat([part.states_RLD for part in some]))
    gate = train(learned, known, recipe)
    seconds = time.perf_counter() - begun
    sets = {}
    if recipe.validate:
        everything = [*known.names, *known.validation]
        held = [case for case in learned.cases(everything) if case.relation in known.validation]
        sets["validation"] = scores(gate, learned, held, kept_RLD)
    for source in dict.fromkeys(one.source for one in evaluation.asked):
        if recipe.leave_out or source != "heldout":
            cases = [case for case in evaluation.cases() if case.source == source]
            sets[source] = scores(gate, evaluation, cases, kept_RLD)
    return Trained(gate, known, sets, seconds)


def measured(one: Trained) -> dict[str, Any]:
    """What is reported of a gate."""
    thresholds = [torch.quantile(one.scores["validation"]["other"], kept).item() for kept in KEPT_OUT]
    return {
        "relations": len(one.known.with_facts),
        "own_relations": len(one.known.own),
        "validation_relations": len(one.known.validation),
        "seconds": round(one.seconds, 1),
        "asked": {name: {role: len(values) for role, values in found.items()} for name, found in one.scores.items()},
        "auc": {name: auc(found) for name, found in one.scores.items()},
        "thresholds": [
            {"threshold": round(threshold, 4), **{name: at(threshold, found) for name, found in one.scores.items()}}
            for threshold in thresholds
        ],
    }


def ship(parts: dict[str, Prompts], recipe: Recipe, kept: float, editor: Path | None, command: str) -> None:
    """Make a gate that ships, or without the held-out relations one beside a copy of an editor in LEFT_OUT.

    How far the threshold is from the one that was learned is chosen by a gate that has not learned of validation's
    relations; the one that is kept has.

    Args:
        parts: all prompts.
        recipe: how it is made.
        kept: share of validation's other questions that are kept out (ratio 0–1).
        editor: that is copied; None is the one that ships.
        command: that this is made by.
    """
    lm = load_model(MODEL)
    folder = shipped_folder(lm)
    if recipe.leave_out:
        folder = Path(shutil.copytree(editor or folder, LEFT_OUT, dirs_exist_ok=True))
    chooser = trained(parts, recipe._replace(validate=True))
    threshold = torch.quantile(chooser.scores["validation"]["other"], kept).item()
    one = trained(parts, recipe)
    one.gate.threshold.data.add_(threshold)
    about = {
        "command": command,
        "seed": SEED,
        "seconds": round(chooser.seconds + one.seconds, 1),
        "relations": len(one.known.names),
        "validation": shares(threshold, chooser),
        "shares": shares(threshold, one),
    }
    save_gate(folder, one.gate, lm, about)
    print(f"{folder}: {json.dumps(about)}")


def shares(threshold: float, one: Trained) -> dict[str, Any]:
    """What a gate passes and keeps out, by set."""
    return {name: {"auc": auc(some), **at(threshold, some)} for name, some in one.scores.items()}


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    return tuple(map(int, text.split(",")))


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("collect", "compare", "ship"))
    parser.add_argument("--facts", type=int, default=1400, help="edits of tables of facts")
    parser.add_argument("--counterfact", type=int, default=5000, help="edits of CounterFact")
    parser.add_argument("--names", type=int, default=5, help="edits of each relation that is only asked about")
    parser.add_argument("--evaluation", type=int, default=200, help="edits of each evaluation set")
    parser.add_argument("--text", type=int, default=4000, help="places in running text")
    parser.add_argument("--collected", type=numbers, default=LAYERS, help="layers that are collected")
    parser.add_argument("--layers", type=numbers, default=LAYERS, help="of those, layers that the gate reads")
    parser.add_argument("--hidden", type=numbers, default=(512,), help="widths of what is not linear; 0 is none")
    parser.add_argument("--shares", default="1", help="of our own relations")
    parser.add_argument("--kept", type=float, default=0.75, help="share of validation's other questions kept out: ship")
    parser.add_argument("--leave-out", action="store_true", help="the held-out relations: ship")
    parser.add_argument("--editor", type=Path, help="folder of the one that a gate without them goes with: ship")
    parser.add_argument("--seeds", type=numbers, default=(0,))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("build/questions"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/question-gate.json"))
    return parser.parse_args()


def main() -> None:
    """Collect states, and train on them."""
    args = parsed()
    torch.set_num_threads(args.threads)
    counts = {name: getattr(args, name) for name in ("facts", "counterfact", "names", "evaluation", "text")}
    chosen = [args.collected.index(layer) for layer in args.layers]
    parts = {
        name: Prompts(asked, states_RLD[:, chosen])
        for name, (asked, states_RLD) in collected(counts, args.collected, args.cache).items()
    }
    command = " ".join(["python", *sys.argv])
    if args.stage == "ship":
        recipe = Recipe(
            args.layers, args.hidden[0], float(args.shares), args.leave_out, False, args.seeds[0], args.steps
        )
        ship(parts, recipe, args.kept, args.editor, command)
    elif args.stage == "compare":
        compare(parts, args, command)


def compare(parts: dict[str, Prompts], args: argparse.Namespace, command: str) -> None:
    """Measure the points that are missing, each gate without the held-out relations; written after every point."""
    prompts = digest([part.asked for part in parts.values()])
    report = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    if report.get("prompts") != prompts or report.get("steps") != args.steps:
        report = {"model": MODEL, "steps": args.steps, "prompts": prompts, "points": {}}
    report |= {"command": command, "seed": SEED, "machine": describe(torch.device("cpu"))}
    for hidden in args.hidden:
        for share in map(float, args.shares.split(",")):
            for seed in args.seeds:
                layers = "+".join(map(str, args.layers))
                name = f"layers {layers}, hidden {hidden}, {share:g} of our own, seed {seed}"
                if name not in report["points"]:
                    one = trained(parts, Recipe(args.layers, hidden, share, True, True, seed, args.steps))
                    report["points"][name] = measured(one)
                    print(name, json.dumps(report["points"][name]["auc"]), flush=True)
                    write_atomically(args.out, (to_json(report) + "\n").encode())


if __name__ == "__main__":
    main()
