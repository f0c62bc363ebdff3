"""Prompts of edits, of the same question in other words and of other questions, and the states they leave behind.

What benchmarks/question_gate.py learns from and is measured on. No subject or prompt that an edit of the evaluation
sets is about is among what is learned from; the held-out relations are a part of their own, which a gate that is
measured on them must not see. Our own relations that are only asked about (`asked.json`) ask about names alone.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from question_others import EXCEPTION, excepting, mentions  # beside this, as the next one
from rivals import DATA, DATASETS, EXCLUDED, HARD_SPLIT, TEXT, UNREAD
from safetensors.torch import load_file, save

from ibke.data.mixture import Source, Split, requests, triples
from ibke.data.readers import Skipped, read
from ibke.data.relations import KINDS, Relation, fits, load_asked, load_subjects, load_wordings
from ibke.data.split import SAME_AS, held_out
from ibke.data.triples import Triple
from ibke.editors.gated.question import prompt_states
from ibke.files import digest, find_file, write_atomically
from ibke.frames import FRAMES, Frame, encode_pair
from ibke.models import load_model
from ibke.partial import PartialModel
from ibke.prefixes import frame_prefixes
from ibke.request import EditRequest
from ibke.subjects import subject_of
from ibke.training.episodes import FRAME_WEIGHTS

MODEL = "smollm2-135m"
SEED = 5
HELD_OUT_SHARE = 0.2
TABLES = {"facts": 1, "pararel": 2, "lre": 1, "entityquestions": 3}  # shares, as in training
OWN, OTHERS, MENTIONS = 4, 4, 2  # of an edit: other wordings, other questions, prompts that mention its subject
CONTEXTS = 0.3  # how often running text stands before a bare one; two in five of them come out blank
SETS: dict[str, Frame] = {"heldout": "chat", "knowedit": "bare", "counterfact": "bare", "zsre": "chat"}
"""Evaluation sets, and how their other wordings are put."""
SHARD = 512
EVERYTHING = 10**6
RUNNING = "running text"  # what a place in the middle of a text is marked as: nothing is asked there
LONGEST = 100  # words before such a place
MID_WORD = 0.5  # how often a place is in the middle of a word
PASSAGES = "text/squad_val.json"

Wording = tuple[str, str, str]
"""What is asked (a relation), in which words, and the kind of wording."""


class Asked(NamedTuple):
    """One prompt.

    Args:
        source: where its edit comes from.
        case: which edit of the source.
        role: ``key`` (the edit's own prompt), ``own`` (it is asked in other words) or ``other`` (something else is).
        relation: what is asked; in evaluation sets, which do not say, the family of the probe.
        text: the prompt.
        frame: how it is put.
        context: running text before it.
    """

    source: str
    case: int
    role: str
    relation: str
    text: str
    frame: Frame
    context: str = ""


class Drawn:
    """Prompts of one part, drawn reproducibly.

    Args:
        seed: decides every draw.
        split: what must not be seen.
    """

    def __init__(self, seed: int, split: Split):
        self.seed, self.split = seed, split
        self.rng = random.Random(seed)
        self.asked: list[Asked] = []
        self.cases = 0
        self.sentences = [
            sentence if seen else ""
            for seen, line in wikitext()
            for sentence in (f"{part.strip()}." for part in line.split(" . "))
            if 20 < len(sentence) - 1 < 120 and "=" not in sentence
        ]

    def add(self, source: str, subject: str, edit: Wording, own: Sequence[Wording], others: Sequence[Wording]) -> None:
        """An edit in every frame, and some of what else can be asked of its subject."""
        rng = self.rng
        self.asked += [Asked(source, self.cases, "key", edit[0], edit[1], frame) for frame in FRAMES]
        rest = mentions(subject, [text for _, text, _ in (edit, *own)])
        own = [one for one in own if one[1] != edit[1]]
        for role, some, most in (("own", own, OWN), ("other", others, OTHERS), ("other", rest, MENTIONS)):
            for wording in rng.sample(some, min(most, len(some))):
                frame = self.frame(wording)
                context = rng.choice(self.sentences) if frame == "bare" and rng.random() < CONTEXTS else ""
                self.asked.append(Asked(source, self.cases, role, *wording[:2], frame, context))
        self.cases += 1

    def frame(self, wording: Wording) -> Frame:
        """How a wording of its kind is put."""
        return self.rng.choices(FRAMES, FRAME_WEIGHTS[wording[2]])[0]

    def one_each(self, relations: Iterable[Relation], subject: str) -> list[Wording]:
        """A wording of each relation."""
        return [self.rng.choice(filled(relation, subject)) for relation in relations]


def wikitext() -> list[tuple[bool, str]]:
    """Lines of WikiText's validation text, and whether they may be seen: perplexity is measured on the last ones."""
    lines = find_file(TEXT).read_text(encoding="utf-8").splitlines()
    return [(row < len(lines) - UNREAD, line) for row, line in enumerate(lines)]


def canonical(relation: str) -> str:
    """One name for what several tables ask alike."""
    return SAME_AS.get(relation, relation)


def filled(relation: Relation, subject: str) -> list[Wording]:
    """All wordings of a relation, of one subject."""
    name = canonical(relation.id)
    return [(name, relation.fill(text, subject), kind) for kind in KINDS for text in relation.templates(kind)]


def relations_of_facts() -> dict[str, Relation]:
    """Relations that there are facts of, with the tables' own templates."""
    return load_wordings(templates_from=DATA)


def kept_out(relation: str) -> bool:
    """Whether it is one of the held-out relations."""
    return held_out(relation, HELD_OUT_SHARE)


def said(relation: Relation) -> set[str]:
    """Its name and wordings; another relation that has one of them may ask the same."""
    return {relation.label.casefold(), *(text.casefold() for kind in KINDS for text in relation.templates(kind))}


def of_facts(drawn: Drawn, facts: int, counterfact: int, of_held_out: bool) -> None:
    """Edits of tables of facts, relation by relation in turn, and some of CounterFact's.

    Args:
        drawn: what is added to.
        facts: edits of the tables.
        counterfact: edits of CounterFact.
        of_held_out: edits of the held-out relations, beside questions of all; otherwise those are in neither.
    """
    relations = {name: one for name, one in relations_of_facts().items() if of_held_out or not kept_out(name)}
    wanted = {name for name in relations if kept_out(name) == of_held_out}
    texts = {name: said(one) for name, one in relations.items()}

    def others(name: str, subject: str) -> list[Wording]:
        mine = relations[name]
        rest = [
            one
            for one in relations.values()
            if (fits(mine.subject_kind, one.subject_kind) or fits(one.subject_kind, mine.subject_kind))
            and canonical(one.id) != canonical(name)
            and not texts[name] & texts[one.id]
        ]
        return drawn.one_each(drawn.rng.sample(rest, min(OTHERS, len(rest))), subject)

    for table, share in TABLES.items():
        for fact in in_turn(drawn, table, wanted, round(facts * share / sum(TABLES.values()))):
            told = filled(relations[fact.relation], fact.subject)
            drawn.rng.shuffle(told)
            drawn.add(table, fact.subject, told[0], told[1:], others(fact.relation, fact.subject))
    for name, request in of_counterfact(drawn, wanted, counterfact):
        subject = request.subject or ""
        own = [(canonical(name), text, "statement") for text in request.rephrase_prompts]
        own += drawn.rng.sample(filled(relations[name], subject), 2)
        edit = (canonical(name), request.prompt, "statement")
        drawn.add("counterfact", subject, edit, own, others(name, subject))


def of_counterfact(drawn: Drawn, wanted: set[str], count: int) -> Iterator[tuple[str, EditRequest]]:
    """Requests that are of one relation for certain, with it."""
    source = Source.parse(f"counterfact:{DATASETS['counterfact'][2]}")
    # Which relations they are of is decided here.
    for request, _ in requests(source, drawn.seed, EVERYTHING, Split(0.0, EXCLUDED.split(","))):
        names = drawn.split.relations_of(request)
        if count and len(names) == 1 and names <= wanted:
            yield min(names), request
            count -= 1


def in_turn(drawn: Drawn, table: str, wanted: set[str], count: int) -> Iterator[Triple]:
    """Facts of a table, of one relation after the other; fewer where it has no more."""
    by_relation: dict[str, list[Triple]] = {}
    for fact in triples(Source.parse(table), 0.0):
        if fact.relation in wanted and not drawn.split.excludes(fact.subject):
            by_relation.setdefault(fact.relation, []).append(fact)
    for facts in by_relation.values():
        drawn.rng.shuffle(facts)
    while count and by_relation:
        for name in sorted(by_relation)[:count]:
            yield by_relation[name].pop()
            count -= 1
        by_relation = {name: facts for name, facts in by_relation.items() if facts}


def of_text(drawn: Drawn, places: int) -> None:
    """Places in running text, where nothing is asked."""
    passages = json.loads(find_file(PASSAGES).read_text(encoding="utf-8"))
    texts = [
        "\n".join(line for seen, line in wikitext() if seen).split(" "),
        "\n".join(one["context"] for one in passages).split(" "),
    ]
    while len(drawn.asked) < places:
        words = drawn.rng.choice(texts)
        begin, count = drawn.rng.randrange(len(words) - LONGEST), drawn.rng.randint(1, LONGEST)
        text = " ".join(words[begin : begin + count]).strip()
        if drawn.rng.random() < MID_WORD:
            text = text[: -drawn.rng.randint(1, 3)].strip() or text
        if text:
            drawn.asked.append(Asked(RUNNING, 0, "other", RUNNING, text, "bare"))


def of_names(drawn: Drawn, each: int) -> None:
    """Our own relations that are only asked about, each asked of some names."""
    relations, subjects = load_asked(), load_subjects()
    texts = {name: said(one) for name, one in relations.items()}
    for name, mine in relations.items():
        kinds = [kind for kind, some in subjects.items() if mine.subject_kind in (kind, some.wider)]
        for _ in range(each):
            kind = drawn.rng.choice(kinds)
            subject = drawn.rng.choice([name for name in subjects[kind].names if not drawn.split.excludes(name)])
            rest = [one for one in relations.values() if one.subject_kind in (kind, subjects[kind].wider)]
            rest = [one for one in rest if not texts[name] & texts[one.id]]
            told = filled(mine, subject)
            drawn.rng.shuffle(told)
            others = drawn.one_each(drawn.rng.sample(rest, min(OTHERS, len(rest))), subject)
            drawn.add("own", subject, told[0], told[1:], others)


def of_exceptions(drawn: Drawn, asked: Sequence[Asked]) -> None:
    """For each edit of other parts, one of its other wordings with an answer left out, which asks something else."""
    names = [name for some in load_subjects().values() for name in some.names]
    wordings: dict[tuple[str, int], list[Asked]] = {}
    for one in asked:
        if one.role == "own" and not one.context:
            wordings.setdefault((one.source, one.case), []).append(one)
    for some in wordings.values():
        one = drawn.rng.choice(some)
        text = excepting(one.text, drawn.rng.choice(names), drawn.rng)
        drawn.asked.append(one._replace(role="other", relation=EXCEPTION, text=text))


def of_evaluation(drawn: Drawn, each: int) -> None:
    """Edits of the evaluation sets; paraphrases as they are, in the frame they are met in."""
    files = {name: (path, form) for name, (path, form, _) in DATASETS.items()}
    files["heldout"] = (str(HARD_SPLIT), "jsonl")
    for name, frame in SETS.items():
        path, form = files[name]
        skipped: list[Skipped] = []
        found = list(read(find_file(path), form, skipped))
        for case, request in enumerate(drawn.rng.sample(found, min(each, len(found)))):
            subject = subject_of(request.prompt, request.subject)
            drawn.asked += [Asked(name, case, "key", "", request.prompt, one) for one in FRAMES]
            drawn.asked += [Asked(name, case, "own", "", text, frame) for text in request.rephrase_prompts[:OWN]]
            drawn.asked += [
                Asked(name, case, "other", probe.family or "", probe.prompt, frame)
                for probe in request.locality
                if subject.lower() in probe.prompt.lower() and probe.prompt != request.prompt
            ]
            rest = mentions(subject, [request.prompt, *request.rephrase_prompts], kept=True)
            drawn.asked += [
                Asked(name, case, "other", *one[:2], drawn.frame(one)) for one in drawn.rng.sample(rest, OTHERS)
            ]


def states(asked: Sequence[Asked], layers: tuple[int, ...], folder: Path) -> torch.Tensor:
    """What the MLPs of some layers are fed at each prompt's last token (R × L × D); in shards, and gone on with.

    Args:
        asked: prompts.
        layers: in order.
        folder: where shards are kept, by what they hold.
    """
    folder = folder / digest([MODEL, layers, SHARD, asked])
    folder.mkdir(parents=True, exist_ok=True)
    shards = [
        (folder / f"{start:06}.safetensors", asked[start : start + SHARD]) for start in range(0, len(asked), SHARD)
    ]
    missing = [(path, some) for path, some in shards if not path.exists()]
    if missing:
        lm = load_model(MODEL, dtype="float32")
        part = PartialModel(lm.model, lm.architecture.layers, layers[-1])
        prefixes = frame_prefixes(part, lm.tokenizer)
    for path, some in missing:
        pairs = [encode_pair(one.text, "-", one.frame, lm.tokenizer, None, one.context) for one in some]
        states_RLD = prompt_states(lm, layers, pairs, prefixes)
        write_atomically(path, save({"states": states_RLD.half().cpu()}))
        print(f"{path}: {len(some)} prompts", flush=True)
    return torch.cat([load_file(path)["states"] for path, _ in shards]).float()


def collected(
    counts: dict[str, int], layers: tuple[int, ...], folder: Path
) -> dict[str, tuple[list[Asked], torch.Tensor]]:
    """Prompts and states by part.

    Args:
        counts: edits of tables of ``facts``, of ``counterfact``, of each of our own relations (``names``) and of each
            set for ``evaluation``; places in running ``text``. Of the held-out relations there are as many edits as
            their share of all relations.
        layers: that are read.
        folder: where states are kept.

    Returns:
        ``facts`` (relations that there are facts of, but for the held-out ones), ``held-out`` (those, beside questions
        of all), ``own``, ``evaluation``, ``exceptions`` and ``held-out exceptions`` to the former, and ``text``.
    """
    split = Split(HELD_OUT_SHARE, EXCLUDED.split(","))
    parts = {
        name: Drawn(SEED, split)
        for name in ("facts", "own", "evaluation", "exceptions", "held-out", "held-out exceptions", "text")
    }
    more = HELD_OUT_SHARE / (1 - HELD_OUT_SHARE)
    of_facts(parts["facts"], counts["facts"], counts["counterfact"], of_held_out=False)
    parts["held-out"].cases = parts["facts"].cases  # edits of one source are told apart by number
    of_facts(parts["held-out"], round(more * counts["facts"]), round(more * counts["counterfact"]), of_held_out=True)
    of_names(parts["own"], counts["names"])
    of_evaluation(parts["evaluation"], counts["evaluation"])
    of_exceptions(parts["exceptions"], parts["facts"].asked + parts["own"].asked)
    of_exceptions(parts["held-out exceptions"], parts["held-out"].asked)
    of_text(parts["text"], counts["text"])
    return {name: (part.asked, states(part.asked, layers, folder)) for name, part in parts.items()}
