"""A gate at the prompt's end, learned on many relations at once.

What benchmarks/question_gate.py trains: each step draws edits, for each some prompts that ask the same and some that
ask something else, and beside them places in running text, where none of them is asked.

Shape suffixes: B edits, F frames, R prompts, L layers, D width, S state (all layers side by side), N relations.
"""

import random
from collections.abc import Iterable
from typing import NamedTuple

import torch
from question_others import EXCEPTION, MENTION  # beside this, as the next one
from question_prompts import RUNNING, SEED, Asked, canonical, kept_out, relations_of_facts, said
from torch import Tensor, nn
from torch.nn import functional

from ibke.data.relations import load_asked
from ibke.editors.gated.question import QuestionConfig, QuestionGate
from ibke.frames import FRAMES

VALIDATION = 6  # one in so many of the relations that there are facts of
SIZE, BEND, DROPOUT, DEEP_DROPOUT, DECAY, RATE = 128, 16, 0.6, 0.3, 0.05, 1e-3
EPSILON = 1e-3  # of the mean variance, added to each before whitening
BATCH, BATCH_COUNTERFACT, PROMPTS = 128, 32, 2  # edits of a step, CounterFact's among them, prompts of each role of one
BATCH_TEXT = 128  # places in running text of a step, which are other questions to every edit
NOBODY = -1  # stands for an edit where a prompt is about none's subject


class Recipe(NamedTuple):
    """How a gate is made.

    Args:
        layers: it reads.
        hidden: width of what is not linear; 0 is none.
        share: of our own relations that it learns of (ratio).
        leave_out: the held-out relations.
        validate: keep some of the other relations for validation.
        seed: decides every draw.
        steps: of training.
    """

    layers: tuple[int, ...]
    hidden: int
    share: float
    leave_out: bool
    validate: bool
    seed: int
    steps: int


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
        wanted = None if relations is None else {*relations, EXCEPTION, MENTION}
        found: dict[tuple[str, int], Case] = {}
        for row, one in enumerate(self.asked):
            if one.role == "key":
                found.setdefault((one.source, one.case), Case(one.source, one.relation, [], [], [])).key.append(row)
            elif one.relation != RUNNING and (one.role != "other" or wanted is None or one.relation in wanted):
                getattr(found[one.source, one.case], one.role).append(row)
        return [case for case in found.values() if wanted is None or case.relation in wanted]


class Known:
    """Relations in training, and which of them can be told apart.

    A smaller share of our own is part of a larger one of the same seed. Which relations are kept for validation is the
    same for all.
    """

    def __init__(self, recipe: Recipe):
        texts: dict[str, set[str]] = {}
        for one in relations_of_facts().values():
            if not (recipe.leave_out and kept_out(one.id)):
                texts.setdefault(canonical(one.id), set()).update(said(one))
        with_facts = sorted(texts)
        choice = [name for name in with_facts if not kept_out(name)]
        count = len(choice) // VALIDATION if recipe.validate else 0
        self.validation = set(random.Random(SEED).sample(choice, count))
        unseen = {text for name in self.validation for text in texts[name]}
        own = {name: said(one) for name, one in load_asked().items()}
        usable = sorted(name for name in own if not own[name] & unseen)
        random.Random(recipe.seed).shuffle(usable)
        self.own = usable[: round(recipe.share * len(usable))]
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
        # The last column, which is number -1 too, is of exceptions, mentions and text.
        self.apart_NT = functional.pad(apart_NN, (0, 1), value=True)


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
        self.text = [row for row, one in enumerate(prompts.asked) if one.relation == RUNNING]
        self.rows = [row for case in cases for row in (*case.key, *case.own, *case.other)] + self.text
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
        asked += [(NOBODY, row) for row in draw.choices(self.text, k=BATCH_TEXT)] if self.text else []
        edit_R, row_R = torch.tensor(asked).T
        mine_BR = torch.arange(len(some))[:, None] == edit_R
        edit_B = torch.tensor([self.number[case.relation] for case in some])
        return Step(torch.tensor([case.key for case in some]), row_R, edit_B, self.topic_R[row_R], mine_BR)


def train(prompts: Prompts, known: Known, recipe: Recipe) -> QuestionGate:
    """A gate that has learned of the known relations alone."""
    torch.manual_seed(recipe.seed)
    lessons = Lessons(prompts, known, recipe.seed)
    config = QuestionConfig(recipe.layers, prompts.states_RLD.shape[-1], len(FRAMES), SIZE, recipe.hidden, BEND)
    gate = QuestionGate(config, DEEP_DROPOUT)
    whiten(gate, prompts.states_RLD[lessons.rows])
    white_RS = gate.white(prompts.states_RLD)
    scale = nn.Parameter(torch.tensor(10.0))
    weights = [*gate.parameters(), scale]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, recipe.steps)
    for _ in range(recipe.steps):
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
