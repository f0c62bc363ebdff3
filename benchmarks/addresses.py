"""Where edits apply, addresses alone: at other wordings, at other questions about the same subject, in running text.

    IBKE_DATA=... python benchmarks/addresses.py [--each 6] [--words 60000] [--out FILE]

Facts of training relations that have a noun phrase ("The currency of Poland is"), so that this can be tuned on. Asked
are their other wordings, where an edit should open, and other phrases about the same subject ("The demonym of Poland
is"), where it should not; those whose phrase is built in (`contexts.json`) are counted apart too. A prompt counts as
open if the edit is in force at any of its tokens.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rivals import DATA, SEED  # the script beside this one

from ibke.data.relations import KINDS, Relation, fits, load_wordings
from ibke.data.triples import Skips, Triple, read_entityquestions, read_facts, read_lre, read_pararel
from ibke.editors.ibke.contexts import About, contexts, names_the_question
from ibke.editors.ibke.editor import IBKEEditor
from ibke.editors.key_statistics import lines_of, row_batches, text_rows, words_of
from ibke.evaluation.machine import describe
from ibke.files import write_atomically
from ibke.frames import Frame, encode_pair
from ibke.models import load_model
from ibke.prefixes import Row

TEXT = "text/wikitext2_valid.txt"
AT_ONCE, ASKED = 16, 4  # edits, and prompts of each kind of one


class Case(NamedTuple):
    """One edit, and prompts at which it should be in force or not."""

    about: About
    wordings: list[tuple[str, Frame]]
    others: list[tuple[str, Frame, bool]]  # the last: whether the phrase is built in


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=6, help="edits of a relation")
    parser.add_argument("--words", type=int, default=60_000, help="tokens of running text")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/addresses.json"))
    args = parser.parse_args()
    lm = load_model("smollm2-135m", dtype="float32")
    editor, found = IBKEEditor.for_model(lm), cases(args.each)
    addresses_ED = [editor.addresser([case.about for case in part]) for part in parts(found)]
    gates_ED = torch.cat(addresses_ED).float() - editor.network.shut_D.cpu().float()
    asked = [(row, text, frame, "wording") for row, case in enumerate(found) for text, frame in case.wordings]
    asked += [
        (row, text, f, "built in" if known else "other") for row, c in enumerate(found) for text, f, known in c.others
    ]
    opened = [opens(editor, gates_ED, part) for part in parts(asked)]
    report = shares([(kind, frame) for _, _, frame, kind in asked], [one for part in opened for one in part])
    report |= {
        "edits": len(found),
        "relations": len({case.about.prompt.split(case.about.subject)[0] for case in found}),
    }
    report["openings_per_word_and_edit"] = in_text(editor, gates_ED, args.words)
    report["machine"] = describe(lm.device)
    print(json.dumps(report, indent=1))
    write_atomically(args.out, (json.dumps(report, indent=1) + "\n").encode())


def parts(items: Sequence[Any]) -> list[Sequence[Any]]:
    """A few at a time."""
    return [items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE)]


def cases(each: int) -> list[Case]:
    """Some facts of every relation that has a noun phrase."""
    draw = random.Random(SEED)
    phrases = {relation.id: relation for relation in load_wordings().values() if phrase(relation, "Xyz")}
    by_relation: dict[str, list[Triple]] = {}
    for read in (read_facts, read_pararel, read_lre, read_entityquestions):
        for triple in read(DATA, skips=Skips()):
            if triple.relation in phrases:
                by_relation.setdefault(triple.relation, []).append(triple)
    return [
        case(phrases[name], triple.subject, phrases.values(), draw)
        for name, triples in sorted(by_relation.items())
        for triple in draw.sample(triples, min(each, len(triples)))
    ]


def case(mine: Relation, subject: str, phrases: Any, draw: random.Random) -> Case:
    """An edit of one fact, its other wordings, and what else is asked about its subject."""
    told: list[tuple[str, Frame]] = [
        (mine.fill(text, subject), "chat" if kind == "chat" else "bare")
        for kind in KINDS
        for text in mine.templates(kind)
    ]
    rest = [
        other
        for other in phrases
        if fits(mine.subject_kind, other.subject_kind) and other.object_kind != mine.object_kind
    ]
    others: list[tuple[str, Frame, bool]] = []
    for other in draw.sample(rest, min(len(rest), ASKED)):
        statement = phrase(other, subject)
        known = any(template.format(subject) in statement for template, _ in contexts()["questions"])
        others += [(f"{statement} is", "bare", known), (f"What is t{statement[1:]}?", "chat", known)]
    return Case(About(f"{phrase(mine, subject)} is", subject), draw.sample(told, min(len(told), ASKED)), others)


def phrase(relation: Relation, subject: str) -> str:
    """As in "The capital of Poland"; nothing where the relation has no phrase of that build."""
    text = relation.noun_phrase
    if not (text.startswith("the ") and text.endswith("{}")):
        return ""
    filled = relation.fill(f"T{text[1:]}", subject)
    return filled if names_the_question(filled, subject) else ""


@torch.no_grad()
def opens(editor: IBKEEditor, gates_ED: torch.Tensor, asked: Sequence[tuple[int, str, Frame, str]]) -> list[bool]:
    """Whether an edit is in force at any token of each prompt but the first, which belongs to no word."""
    rows = [Row((), tuple(encode_pair(text, "-", frame, editor.lm.tokenizer).prompt)) for _, text, frame, _ in asked]
    read = editor.addresser.prefixes.read([editor.site.entrance], rows)
    return [bool((one.fed[-1].cpu()[1:] @ gates_ED[row] > 0).any()) for (row, *_), one in zip(asked, read, strict=True)]


def shares(kinds: Sequence[tuple[str, Frame]], opened: Sequence[bool]) -> dict[str, Any]:
    """Of wordings how many open, and of other phrases how many stay shut (ratios 0–1)."""
    found: dict[str, Any] = {}
    for kind, frame in sorted(set(kinds)):
        some = [one for known, one in zip(kinds, opened, strict=True) if known == (kind, frame)]
        share = sum(some) / len(some)
        found.setdefault(kind, {})[frame] = {"n": len(some), "open": share, "shut": 1 - share}
    return found


@torch.no_grad()
def in_text(editor: IBKEEditor, gates_ED: torch.Tensor, tokens: int) -> float:
    """The share of (word, edit) pairs of running text at which an edit is in force."""
    rows = list(text_rows(editor.lm.tokenizer, lines_of(str(DATA / TEXT)), tokens))
    opened = words = 0
    for batch in row_batches(rows, editor.lm.tokenizer, editor.lm.device):
        words_RT = words_of(batch)
        keys_SD = editor.addresser.part.inputs_of(editor.site.entrance, batch)[words_RT].float().cpu()
        opened += int((keys_SD @ gates_ED.T > 0).sum())
        words += len(keys_SD)
    return opened / (words * len(gates_ED))


if __name__ == "__main__":
    main()
