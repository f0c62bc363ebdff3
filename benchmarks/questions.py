"""Is a question told from others the better, the more relations are known? A gate learned on growing numbers of them.

    IBKE_DATA=... python benchmarks/questions.py collect
    IBKE_DATA=... python benchmarks/questions.py train [--shares 0,0.5,1] [--seeds 0] [--gates cos,lin] [--steps 2500]

An edit's key is made of its own prompt's state in three frames; the gate tells of another prompt's state whether the
same is asked. It learns of the relations that there are facts of and of a share of our own that are only asked about.
A sixth of the former is kept for validation, with whatever of ours may ask the same; thresholds are chosen there, and
the evaluation sets only report. None of the held-out relations is known to training; those of the other sets may be.
`collect` can be stopped and gone on with; points that are there, of the same settings and prompts, are not run again.
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
from question_prompts import LAYER, MODEL, SEED, Asked, canonical, collected, known_relations, said  # beside this
from torch import Tensor, nn
from torch.nn import functional

from ibke.data.relations import load_asked
from ibke.evaluation.machine import describe
from ibke.files import digest, to_json, write_atomically

VALIDATION = 6  # one in so many of the relations that there are facts of
KEPT_OUT = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of validation's other questions that thresholds keep out
SIZE, HIDDEN, DROPOUT, DECAY, RATE = 128, 16, 0.5, 0.05, 1e-3
DEEP, DEEP_DROPOUT = 512, 0.3  # of towers that are not linear: hidden width, and dropout within
BATCH, BATCH_COUNTERFACT, PROMPTS = 128, 32, 2  # edits of a step, CounterFact's among them, prompts of each role of one
FEWEST = 20  # values that a share is made of
APART = "forgetfulness"  # a family of probes that ask the same but for one answer, so it is counted apart


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
    states_RD: Tensor

    def cases(self, relations: Iterable[str] | None = None) -> list[Case]:
        """Edits of some relations, with other questions of those alone; all of both where none are named."""
        wanted = None if relations is None else set(relations)
        found: dict[tuple[str, int], Case] = {}
        for row, one in enumerate(self.asked):
            if one.role == "key":
                found.setdefault((one.source, one.case), Case(one.source, one.relation, [], [], []))
            if one.role != "other" or wanted is None or one.relation in wanted:
                getattr(found[one.source, one.case], one.role).append(row)
        return [case for case in found.values() if wanted is None or case.relation in wanted]


class Tower(nn.Module):
    """A map of whitened states to keys or queries: linear, and where it is deep with a correction that begins at 0."""

    def __init__(self, width: int, deep: bool):
        super().__init__()
        self.linear = nn.Linear(width, SIZE, bias=False)
        nn.init.orthogonal_(self.linear.weight)
        last = nn.Linear(DEEP, SIZE)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.more = nn.Sequential(nn.Linear(width, DEEP), nn.GELU(), nn.Dropout(DEEP_DROPOUT), last) if deep else None

    def forward(self, white_RD: Tensor) -> Tensor:
        """Keys or queries (R × K)."""
        out_RK = self.linear(white_RD)
        return out_RK if self.more is None else out_RK + self.more(0.5 * white_RD)


class Gate(nn.Module):
    """Tells whether a prompt asks what an edit's prompt asks, by the angle between a key and a query.

    Args:
        states_RD: states whose mean and covariance are taken out of what is read.
        kind: ``cos`` normalises queries; ``lin`` does not, so that the gate is linear in the (whitened) state and could
            be a row of a weight matrix; ``deep`` is as ``cos``, of keys and queries that are not linear.
    """

    mean_D: Tensor
    whiten_DD: Tensor

    def __init__(self, states_RD: Tensor, kind: str):
        super().__init__()
        self.kind = kind
        self.register_buffer("mean_D", states_RD.mean(0))
        spread_D, basis_DD = torch.linalg.eigh(torch.cov(states_RD.T, correction=0))
        self.register_buffer("whiten_DD", basis_DD / (spread_D + 1e-3 * spread_D.mean()).sqrt())
        width = states_RD.shape[1]
        self.asks, self.answers = Tower(width, kind == "deep"), Tower(width, kind == "deep")
        self.answers.linear.weight.data.copy_(self.asks.linear.weight.data)
        last, self.level = nn.Linear(HIDDEN, SIZE + 1), nn.Linear(width, 1)
        for layer in (last, self.level):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.bend = nn.Sequential(nn.Linear(3 * width, HIDDEN), nn.GELU(), last)
        self.scale, self.threshold = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(0.4))

    def read(self, states_RD: Tensor) -> Tensor:
        """Whitened states."""
        return (states_RD - self.mean_D) @ self.whiten_DD

    def forward(self, edits_B3D: Tensor, asked_RD: Tensor) -> Tensor:
        """How much each edit is asked about by each prompt (B × R), of whitened states; above 0 it is."""
        bent = self.bend(0.3 * edits_B3D.flatten(1))
        mean_BK = functional.normalize(self.answers(edits_B3D), dim=-1).mean(1)
        key_BK = functional.normalize(mean_BK + bent[:, :-1], dim=-1)
        query_RK, threshold = self.asks(asked_RD), self.threshold
        if self.kind != "lin":
            query_RK = functional.normalize(query_RK, dim=-1)
        else:
            query_RK = query_RK / SIZE**0.5
            threshold = threshold * (1 + self.level(asked_RD)[:, 0])
        return key_BK @ query_RK.T - threshold + bent[:, -1:]


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
        self.apart_NN = torch.tensor(
            [
                [(i < count) == (j < count) and not texts[one] & texts[other] for j, other in enumerate(self.names)]
                for i, one in enumerate(self.names)
            ]
        )


def train(prompts: Prompts, known: Known, kind: str, steps: int, seed: int) -> Gate:
    """A gate that has learned of the known relations alone."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    number = {name: at for at, name in enumerate(known.names)}
    cases = [case for case in prompts.cases(known.names) if case.own]
    seen = [row for case in cases for row in (*case.key, *case.own, *case.other)]
    gate = Gate(prompts.states_RD[seen], kind)
    white_RD = gate.read(prompts.states_RD)
    counterfact = [case for case in cases if case.source == "counterfact"]
    by_relation: dict[str, list[Case]] = {}
    for case in cases:
        if case.source != "counterfact":
            by_relation.setdefault(case.relation, []).append(case)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(steps):
        some = draw.sample(counterfact, min(BATCH_COUNTERFACT, len(counterfact)))
        some += [draw.choice(by_relation[name]) for name in draw.choices(list(by_relation), k=BATCH - len(some))]
        asked = [(at, draw.choice(case.own)) for at, case in enumerate(some) for _ in range(PROMPTS)]
        asked += [(at, draw.choice(case.other)) for at, case in enumerate(some) for _ in range(PROMPTS) if case.other]
        edit_R, row_R = torch.tensor(asked).T
        edits_B3D = functional.dropout(white_RD[torch.tensor([case.key for case in some])], DROPOUT)
        score_BR = gate(edits_B3D, functional.dropout(white_RD[row_R], DROPOUT)) * gate.scale.clamp(1, 60)
        mine_BR = torch.arange(len(some))[:, None] == edit_R
        edit_B = torch.tensor([number[case.relation] for case in some])
        topic_R = torch.tensor([number[prompts.asked[row].relation] for row in row_R.tolist()])
        same_BR = edit_B[:, None] == topic_R
        optimizer.zero_grad()
        loss(score_BR, same_BR, mine_BR, known.apart_NN[edit_B][:, topic_R]).backward()
        optimizer.step()
        schedule.step()
    return gate.eval()


def loss(score_BR: Tensor, same_BR: Tensor, mine_BR: Tensor, apart_BR: Tensor) -> Tensor:
    """Cross-entropies of the same question and of others, each about one subject and about all, by their mean."""
    open_BR, shut_BR = functional.softplus(-score_BR), functional.softplus(score_BR)
    other_BR = ~same_BR & (apart_BR | mine_BR)
    about_one = open_BR[same_BR & mine_BR].mean() + shut_BR[other_BR & mine_BR].mean()
    return about_one + 0.5 * open_BR[same_BR].mean() + shut_BR[other_BR].mean()


@torch.no_grad()
def scores(gate: Gate, prompts: Prompts, cases: Sequence[Case]) -> dict[str, Tensor]:
    """Scores of other wordings (``own``), of other questions about the subject and of the family kept apart."""
    white_RD = gate.read(prompts.states_RD)
    found: dict[str, list[float]] = {"own": [], "other": [], APART: []}
    for case in cases:
        for role in ("own", "other"):
            if rows := getattr(case, role):
                values = gate(white_RD[case.key][None], white_RD[rows])[0].tolist()
                for row, value in zip(rows, values, strict=True):
                    family = prompts.asked[row].relation
                    found[APART if role == "other" and family == APART else role].append(value)
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


def point(learned: Prompts, evaluation: Prompts, share: float, seed: int, kind: str, steps: int) -> dict[str, Any]:
    """One gate, trained and measured."""
    begun, known = time.perf_counter(), Known(share, seed)
    gate = train(learned, known, kind, steps, seed)
    seconds = time.perf_counter() - begun
    everything = [*known.names, *known.validation]
    held = [case for case in learned.cases(everything) if case.relation in known.validation]
    sets = {"validation": scores(gate, learned, held)}
    for source in dict.fromkeys(one.source for one in evaluation.asked):
        sets[source] = scores(gate, evaluation, [case for case in evaluation.cases() if case.source == source])
    thresholds = [torch.quantile(sets["validation"]["other"], kept).item() for kept in KEPT_OUT]
    return {
        "relations": len(known.with_facts),
        "own_relations": len(known.own),
        "validation_relations": len(known.validation),
        "seconds": round(seconds, 1),
        "asked": {name: {role: len(values) for role, values in found.items()} for name, found in sets.items()},
        "auc": {name: auc(found) for name, found in sets.items()},
        "thresholds": [
            {"threshold": round(threshold, 4), **{name: at(threshold, found) for name, found in sets.items()}}
            for threshold in thresholds
        ],
    }


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("collect", "train"))
    parser.add_argument("--facts", type=int, default=1400, help="edits of tables of facts")
    parser.add_argument("--counterfact", type=int, default=800, help="edits of CounterFact")
    parser.add_argument("--names", type=int, default=5, help="edits of each relation that is only asked about")
    parser.add_argument("--evaluation", type=int, default=200, help="edits of each evaluation set")
    parser.add_argument("--shares", default="0,0.5,1", help="of our own relations")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--gates", default="cos,lin", help="of cos, lin and deep")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("build/questions"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/questions.json"))
    return parser.parse_args()


def main() -> None:
    """Collect states; train and measure what is missing, and write it after every point."""
    args = parsed()
    torch.set_num_threads(args.threads)
    counts = (args.facts, args.counterfact, args.names, args.evaluation)
    parts = [Prompts(*part) for part in collected(*counts, args.cache)]
    if args.stage == "collect":
        return
    learned = Prompts(parts[0].asked + parts[1].asked, torch.cat([parts[0].states_RD, parts[1].states_RD]))
    evaluation = parts[2]
    identity = {
        "model": MODEL,
        "layer": LAYER,
        "steps": args.steps,
        "prompts": digest([learned.asked, evaluation.asked]),
    }
    report = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    if {name: report.get(name) for name in identity} != identity:
        report = {**identity, "points": {}}
    report |= {"command": " ".join(["python", *sys.argv]), "seed": SEED, "machine": describe(torch.device("cpu"))}
    for kind in args.gates.split(","):
        for share in map(float, args.shares.split(",")):
            for seed in map(int, args.seeds.split(",")):
                name = f"{kind}, {share:g} of our own, seed {seed}"
                if name not in report["points"]:
                    report["points"][name] = point(learned, evaluation, share, seed, kind, args.steps)
                    print(name, json.dumps(report["points"][name]["auc"]), flush=True)
                    write_atomically(args.out, (to_json(report) + "\n").encode())


if __name__ == "__main__":
    main()
