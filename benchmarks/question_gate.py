"""The gate at the prompt's end: learned on many relations, measured on others, and made to ship.

    IBKE_DATA=... python benchmarks/question_gate.py collect
    IBKE_DATA=... python benchmarks/question_gate.py compare [--layers 24,29] [--hidden 0,512] [--shares 0,1]
    IBKE_DATA=... python benchmarks/question_gate.py ship

An edit's key is made of its own prompt's states in three frames; the gate tells of another prompt's states whether the
same is asked (:mod:`ibke.editors.gated.question`). It learns of the relations that there are facts of and of a share of
our own that are only asked about. A sixth of the former is kept for validation, with whatever of ours may ask the same;
thresholds are chosen there, and the evaluation sets only report. None of the held-out relations is known to training;
those of the other sets may be. Prompts that leave out one answer ("Apart from X, …") are
other questions too. `collect` can be stopped and gone on with; points that are there, of the same prompts,
are not run again. `compare` reads fewer layers than were collected where it is told to.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from question_prompts import EXCEPTION, MODEL, SEED, Asked, canonical, collected, known_relations, said  # beside this
from torch import Tensor, nn
from torch.nn import functional

from ibke.data.relations import load_asked
from ibke.editors.gated.question import QuestionConfig, QuestionGate, save_gate
from ibke.editors.ibke.shipped import shipped_folder
from ibke.evaluation.machine import describe
from ibke.files import digest, to_json, write_atomically
from ibke.frames import FRAMES
from ibke.models import load_model

VALIDATION = 6  # one in so many of the relations that there are facts of
KEPT_OUT = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of validation's other questions that thresholds keep out
LAYERS = (12, 16, 20, 24, 29)
SIZE, BEND, DROPOUT, DEEP_DROPOUT, DECAY, RATE = 128, 16, 0.6, 0.3, 0.05, 1e-3
EPSILON = 1e-3  # of the mean variance, added to each before whitening
BATCH, BATCH_COUNTERFACT, PROMPTS = 128, 32, 2  # edits of a step, CounterFact's among them, prompts of each role of one
FEWEST = 20  # values that a share is made of
APART = "exceptions"  # prompts that ask the same but for one answer are counted apart
EXCEPTIONS = (EXCEPTION, "forgetfulness")  # how our own and KnowEdit's are marked


class Case(NamedTuple):
    """One edit: numbers of its prompts."""

    source: str
    relation: str
    key: list[int]
    own: list[int]
    other: list[int]


class Prompts(NamedTuple):
    """Prompts and the states that they leave behind."""

    asked: list[Asked]
    states_RLD: Tensor

    def cases(self, relations: Iterable[str] | None = None) -> list[Case]:
        """Edits of some relations, with other questions of those alone; all of both where none are named."""
        wanted = None if relations is None else {*relations, EXCEPTION}
        found: dict[tuple[str, int], Case] = {}
        for row, one in enumerate(self.asked):
            if one.role == "key":
                found.setdefault((one.source, one.case), Case(one.source, one.relation, [], [], [])).key.append(row)
            elif one.role != "other" or wanted is None or one.relation in wanted:
                getattr(found[one.source, one.case], one.role).append(row)
        return [case for case in found.values() if wanted is None or case.relation in wanted]


class Known:
    """Relations in training, and which of them can be told apart.

    Args:
        share: how much of our own is known (ratio); a smaller share is part of a larger one of the same seed.
        seed: decides which.
    """

    def __init__(self, share: float, seed: int):
        texts: dict[str, set[str]] = {}
        for one in known_relations().values():
            texts.setdefault(canonical(one.id), set()).update(said(one))
        with_facts = sorted(texts)
        self.validation = set(random.Random(SEED).sample(with_facts, len(with_facts) // VALIDATION))
        unseen = {text for name in self.validation for text in texts[name]}
        own = {name: said(one) for name, one in load_asked().items()}
        usable = sorted(name for name in own if not own[name] & unseen)
        random.Random(seed).shuffle(usable)
        self.own = usable[: round(share * len(usable))]
        self.with_facts = [name for name in with_facts if name not in self.validation]
        self.names = [*self.with_facts, *self.own]
        texts |= own
        # One of ours may ask what one of the others asks: across the two, only questions about one subject are known
        # to differ. Within them, relations that share a wording are not told apart.
        count = len(self.with_facts)
        apart_NN = torch.tensor(
            [
                [(i < count) == (j < count) and not texts[one] & texts[other] for j, other in enumerate(self.names)]
                for i, one in enumerate(self.names)
            ]
        )
        self.apart_NT = functional.pad(apart_NN, (0, 1), value=True)  # the last column is of exceptions


class Step(NamedTuple):
    """What one step of training looks at."""

    key_BF: Tensor
    row_R: Tensor
    edit_B: Tensor
    topic_R: Tensor
    mine_BR: Tensor


class Lessons:
    """Draws steps: CounterFact's edits, and for the rest one relation is as likely as another.

    Args:
        prompts: all that can be asked.
        known: relations in training.
        seed: decides every draw.
    """

    def __init__(self, prompts: Prompts, known: Known, seed: int):
        self.draw, self.number = random.Random(seed), {name: at for at, name in enumerate(known.names)}
        self.topic_R = torch.tensor([self.number.get(one.relation, -1) for one in prompts.asked])
        cases = [case for case in prompts.cases(known.names) if case.own]
        self.rows = [row for case in cases for row in (*case.key, *case.own, *case.other)]
        self.counterfact = [case for case in cases if case.source == "counterfact"]
        self.by_relation: dict[str, list[Case]] = {}
        for case in cases:
            if case.source != "counterfact":
                self.by_relation.setdefault(case.relation, []).append(case)

    def step(self) -> Step:
        """One batch of edits, and for each some prompts that ask the same and some that ask something else."""
        draw = self.draw
        some = draw.sample(self.counterfact, min(BATCH_COUNTERFACT, len(self.counterfact)))
        names = draw.choices(list(self.by_relation), k=BATCH - len(some))
        some += [draw.choice(self.by_relation[name]) for name in names]
        asked = [(at, draw.choice(case.own)) for at, case in enumerate(some) for _ in range(PROMPTS)]
        asked += [(at, draw.choice(case.other)) for at, case in enumerate(some) for _ in range(PROMPTS) if case.other]
        edit_R, row_R = torch.tensor(asked).T
        mine_BR = torch.arange(len(some))[:, None] == edit_R
        edit_B = torch.tensor([self.number[case.relation] for case in some])
        return Step(torch.tensor([case.key for case in some]), row_R, edit_B, self.topic_R[row_R], mine_BR)


def train(prompts: Prompts, known: Known, hidden: int, layers: tuple[int, ...], steps: int, seed: int) -> QuestionGate:
    """A gate that has learned of the known relations alone."""
    torch.manual_seed(seed)
    lessons = Lessons(prompts, known, seed)
    width = prompts.states_RLD.shape[-1]
    gate = QuestionGate(QuestionConfig(layers, width, len(FRAMES), SIZE, hidden, BEND), DEEP_DROPOUT)
    whiten(gate, prompts.states_RLD[lessons.rows])
    white_RS = gate.white(prompts.states_RLD)
    scale = nn.Parameter(torch.tensor(10.0))
    weights = [*gate.parameters(), scale]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(steps):
        step = lessons.step()
        key_BK, level_B = gate.keys_of_white(functional.dropout(white_RS[step.key_BF], DROPOUT))
        query_RK, lean_R = gate.queries_of_white(functional.dropout(white_RS[step.row_R], DROPOUT))
        score_BR = (key_BK @ query_RK.T + lean_R - level_B[:, None]) * scale.clamp(1, 60)
        same_BR = step.edit_B[:, None] == step.topic_R
        optimizer.zero_grad()
        loss(score_BR, same_BR, step.mine_BR, known.apart_NT[step.edit_B][:, step.topic_R]).backward()
        optimizer.step()
        schedule.step()
    return gate.eval()


def whiten(gate: QuestionGate, states_RLD: Tensor) -> None:
    """Have a gate take out of each layer's states their mean and covariance."""
    gate.mean_LD.copy_(states_RLD.mean(0))
    for layer, states_RD in enumerate(states_RLD.unbind(1)):
        spread_D, basis_DD = torch.linalg.eigh(torch.cov(states_RD.T, correction=0))
        gate.whiten_LDD[layer] = basis_DD / (spread_D + EPSILON * spread_D.mean()).sqrt()


def loss(score_BR: Tensor, same_BR: Tensor, mine_BR: Tensor, apart_BR: Tensor) -> Tensor:
    """Cross-entropies of the same question and of others, each about one subject and about all, by their mean."""
    open_BR, shut_BR = functional.softplus(-score_BR), functional.softplus(score_BR)
    other_BR = ~same_BR & (apart_BR | mine_BR)
    about_one = open_BR[same_BR & mine_BR].mean() + shut_BR[other_BR & mine_BR].mean()
    return about_one + 0.5 * open_BR[same_BR].mean() + shut_BR[other_BR].mean()


@torch.no_grad()
def scores(gate: QuestionGate, prompts: Prompts, cases: Sequence[Case]) -> dict[str, Tensor]:
    """Scores of other wordings (``own``), of other questions about the subject and of those counted apart.

    A score is by how much a cosine is above its edit's level.
    """
    query_RK, lean_R = gate.queries(prompts.states_RLD)
    key_BK, level_B = gate.keys(prompts.states_RLD[torch.tensor([case.key for case in cases])])
    found: dict[str, list[float]] = {"own": [], "other": [], APART: []}
    for case, key_K, level in zip(cases, key_BK, level_B, strict=True):
        for role in ("own", "other"):
            rows = getattr(case, role)
            for row, value in zip(rows, (query_RK[rows] @ key_K + lean_R[rows] - level).tolist(), strict=True):
                apart = role == "other" and prompts.asked[row].relation in EXCEPTIONS
                found[APART if apart else role].append(value)
    return {role: torch.tensor(values) for role, values in found.items()}


def auc(found: dict[str, Tensor]) -> float | None:
    """How often another wording scores above another question (ratio); None where there are few of either."""
    above = found["own"][:, None] > found["other"][None]
    return mean(above) if min(above.shape) >= FEWEST else None


def at(threshold: float, found: dict[str, Tensor]) -> dict[str, float | None]:
    """Of other wordings the share that passes, of other questions the share that is kept out (ratios)."""
    shares = {"wordings_passed": found["own"] > threshold, "others_kept_out": found["other"] <= threshold}
    if len(found[APART]):
        shares[f"{APART}_kept_out"] = found[APART] <= threshold
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


def trained(
    learned: Prompts, evaluation: Prompts, layers: tuple[int, ...], share: float, seed: int, hidden: int, steps: int
) -> Trained:
    """One gate, trained and asked about everything."""
    begun, known = time.perf_counter(), Known(share, seed)
    gate = train(learned, known, hidden, layers, steps, seed)
    seconds = time.perf_counter() - begun
    everything = [*known.names, *known.validation]
    held = [case for case in learned.cases(everything) if case.relation in known.validation]
    sets = {"validation": scores(gate, learned, held)}
    for source in dict.fromkeys(one.source for one in evaluation.asked):
        sets[source] = scores(gate, evaluation, [case for case in evaluation.cases() if case.source == source])
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


def ship(one: Trained, kept: float, command: str) -> None:
    """Put a gate beside the editor that ships, with the threshold that keeps out some of validation's other questions.

    Args:
        one: the gate.
        kept: their share (ratio 0–1).
        command: that this is made by.
    """
    lm = load_model(MODEL)
    threshold = torch.quantile(one.scores["validation"]["other"], kept).item()
    one.gate.threshold.data.add_(threshold)
    shares = {name: {"auc": auc(some), **at(threshold, some)} for name, some in one.scores.items()}
    about = {"command": command, "seed": SEED, "seconds": round(one.seconds, 1), "shares": shares}
    folder = shipped_folder(lm)
    save_gate(folder, one.gate, lm, about)
    print(f"{folder}: {json.dumps(shares)}")


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
    parser.add_argument("--collected", type=numbers, default=LAYERS, help="layers that are collected")
    parser.add_argument("--layers", type=numbers, default=LAYERS, help="of those, layers that the gate reads")
    parser.add_argument("--hidden", type=numbers, default=(512,), help="widths of what is not linear; 0 is none")
    parser.add_argument("--shares", default="1", help="of our own relations")
    parser.add_argument("--kept", type=float, default=0.75, help="share of validation's other questions kept out: ship")
    parser.add_argument("--seeds", type=numbers, default=(0,))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("build/questions"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/question-gate.json"))
    return parser.parse_args()


def main() -> None:
    """Collect states; train and measure what is missing, and write it after every point."""
    args = parsed()
    torch.set_num_threads(args.threads)
    counts = (args.facts, args.counterfact, args.names, args.evaluation)
    parts = collected(counts, args.collected, args.cache)
    if args.stage == "collect":
        return
    chosen = [args.collected.index(layer) for layer in args.layers]
    facts, own, evaluation, exceptions = (Prompts(asked, states_RLD[:, chosen]) for asked, states_RLD in parts)
    learned = Prompts(
        facts.asked + own.asked + exceptions.asked,
        torch.cat([facts.states_RLD, own.states_RLD, exceptions.states_RLD]),
    )
    command = " ".join(["python", *sys.argv])
    if args.stage == "ship":
        share, seed, hidden = float(args.shares), args.seeds[0], args.hidden[0]
        ship(trained(learned, evaluation, args.layers, share, seed, hidden, args.steps), args.kept, command)
        return
    prompts = digest([learned.asked, evaluation.asked])
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
                    one = trained(learned, evaluation, args.layers, share, seed, hidden, args.steps)
                    report["points"][name] = measured(one)
                    print(name, json.dumps(report["points"][name]["auc"]), flush=True)
                    write_atomically(args.out, (to_json(report) + "\n").encode())


if __name__ == "__main__":
    main()
