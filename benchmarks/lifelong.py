"""Streams of many edits with distinct, held-out subjects, one group after another on one model.

    IBKE_DATA=... python benchmarks/lifelong.py run [--method ibke] [--kind mixed] [--size 1000] [--group 100]

Every group's edit is kept under runs/lifelong as soon as it is made, so a run that was stopped goes on from there, with
the same stream and editor. A group whose edit cannot be computed counts as unedited.
After every `--every` edits a sample of all edits so far is asked about, text is read and the update measured; the rows
are in benchmarks/results/lifelong. `stream` only writes the file of edits (`--tuning`: others, for choosing settings).
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rivals import (  # the script beside this one
    ABILITIES,
    COUNTS,
    HARD_SPLIT,
    QUESTIONS,
    SEED,
    ready,
    running_text,
    write_hard_split,
)

from ibke.data.readers import read
from ibke.edit import Edit
from ibke.editors.base import Editor
from ibke.evaluation.baseline import Baseline
from ibke.evaluation.costs import Costs
from ibke.evaluation.examination import Examination
from ibke.evaluation.generate import Together
from ibke.evaluation.machine import describe, peak_memory_mb
from ibke.evaluation.protocols import sample, stay
from ibke.evaluation.sequence import InSequence, summed
from ibke.evaluation.side_effects import Battery, Beside
from ibke.files import data_folder, write_atomically
from ibke.models import load_model
from ibke.request import EditRequest
from ibke.session import set_aside
from ibke.subjects import subject_of

DATA = data_folder()
STREAMS, RUNS, RESULTS = Path("build/streams"), Path("runs/lifelong"), Path("benchmarks/results/lifelong")
TRIED = "tried.json"  # what is known of each group so far
TOKENS = 4096  # of running text
SHARES = {
    "mixed": {"counterfact": 0.4, "zsre": 0.2, "questions": 0.4},
    "counterfact": {"counterfact": 1.0},
    "unmet": {"counterfact": 0.3, "zsre": 0.2, "held-out": 0.5},  # half of relations that training never sees
}
"""By kind of stream, from where its edits come; what a source lacks is made up with questions where there are any."""


def main() -> None:
    """Write a stream, or run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stream", "run"))
    parser.add_argument("--kind", choices=tuple(SHARES), default="mixed")
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--tuning", action="store_true")
    parser.add_argument("--method", default="ibke")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--group", type=int, default=100, help="edits made at once")
    parser.add_argument("--order", type=int, default=0, help="seed of the order")
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--sample", type=int, default=200, help="edits asked about")
    parser.add_argument("--dtype", default="float32", help="of the model; bfloat16 where the CPU computes in it")
    args = parser.parse_args()
    file = stream(args.kind, args.size, args.tuning)
    print(file)
    if args.what == "run":
        run(file, args)


def stream(kind: str, size: int, tuning: bool = False) -> Path:
    """The file of a stream: edits in random order, no subject twice."""
    target = STREAMS / f"{kind}-{size}{'-tuning' if tuning else ''}.jsonl"
    if target.exists() and sources_of(target).exists():
        return target
    chosen: list[EditRequest] = []
    shares, subjects, counts = SHARES[kind], set[str](), dict[str, int]()
    for source in sorted(shares, key="questions".__eq__):  # last
        before = len(chosen)
        wanted = size - len(chosen) if source == "questions" else round(shares[source] * size)
        for request in edits(source, tuning):
            if wanted < 1:
                break
            if (subject := subject_of(request.prompt, request.subject).lower()) not in subjects:
                subjects.add(subject)
                chosen.append(request)
                wanted -= 1
        counts[source] = len(chosen) - before
    random.Random(SEED).shuffle(chosen)
    if len(chosen) < size:
        raise SystemExit(f"The sources have no more than {len(chosen)} edits: {counts}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(sources_of(target), json.dumps(counts).encode())
    write_atomically(target, (f"{json.dumps(request.to_dict())}\n".encode() for request in chosen))
    return target


def sources_of(file: Path) -> Path:
    """Where a stream says how many of its edits are from where."""
    return file.with_suffix(".sources.json")


def digest_of(file: Path) -> str:
    """What a stream holds (SHA-256): its edits, and how many are from where."""
    return hashlib.sha256(file.read_bytes() + sources_of(file).read_bytes()).hexdigest()


def edits(source: str, tuning: bool) -> Iterator[EditRequest]:
    """Edits of a source in random order; those for tuning are no others'.

    Nothing was trained on the rest, but questions about entities are worded as the shipped editor's training has them.
    """
    if source == "counterfact":
        name = "train" if tuning else "val"
        found = list(read(DATA / f"counterfact/counterfact-{name}.json", "counterfact", []))
    elif source == "zsre":
        everything = list(read(DATA / "zsre/zsre_mend_train-1k.json", "zsre", []))
        drawn = {request.prompt for count in COUNTS.values() for request in sample(everything, count, SEED)}
        found = [request for request in everything if (request.prompt in drawn) != tuning]
    elif source == "held-out":
        if tuning:
            raise SystemExit("There are no edits of held-out relations to choose settings by.")
        write_hard_split()
        found = list(read(HARD_SPLIT, "jsonl", []))
    else:
        everything = list(read(DATA / "entityquestions/dev", "entityquestions", []))
        found = [request for index, request in enumerate(everything) if (index % 4 == 0) == tuning]
    random.Random(SEED).shuffle(found)
    yield from (request for request in found if request.rephrase_prompts)


def run(file: Path, args: argparse.Namespace) -> None:
    """Make a stream's edits, group by group, and measure now and then."""
    how = "".join(f".{text}" for text in (*args.set, *([args.dtype] if args.dtype != "float32" else [])))
    name = f"{file.stem}.{args.method}{how}.group-{args.group}.order-{args.order}"
    folder, result = RUNS / name, RESULTS / f"{name}.json"
    requests, sources = list(read(file, "jsonl", [])), json.loads(sources_of(file).read_text())
    held = digest_of(file)
    refuse_another(folder / "stream", held, "on another stream")
    random.Random(f"order {args.order}").shuffle(requests)
    groups = [requests[start : start + args.group] for start in range(0, len(requests), args.group)]
    lm = load_model("smollm2-135m", dtype=args.dtype)
    text, suites = Beside(str(running_text().absolute()), abilities(), QUESTIONS).read()
    battery = Battery(lm, text, TOKENS, suites)
    editor = ready(lm, args.method, *args.set, protocol=f"sequential:{args.group}" if args.group > 1 else "sequential")
    editor_mark = editor.mark  # what it learns of edits is not part of its name
    refuse_another(folder / "editor", editor_mark, "with another editor or other settings")

    def note(number: int, state: Callable[[], Edit | None]) -> None:
        """Measure what so many groups have come to, where it is due and not known."""
        done, before = (min(len(requests), some * args.group) for some in (number, number - 1))
        known = rows(result, editor_mark, held, vars(args))
        due = done // args.every > before // args.every or done == len(requests)
        if not due or any(row["edits"] == done for row in known) or not (whole := state()):
            return
        with set_aside(lm):  # the examination puts edits in force itself, and asks the model without them
            row = measured(battery, whole, requests[:done], args.every, args.sample)
        row |= costs_of(tried[:number], max(1, args.every // args.group))
        everything = sorted([*known, row], key=lambda one: one["edits"])
        report = {"stream": file.name, "stream_sha256": held, "sources": sources, "editor_mark": editor_mark}
        keep(result, report | {"rows": everything}, vars(args), describe(lm.device))

    with InSequence(lm) as sequence:
        tried = tried_in(folder)
        for number in range(1, len(tried)):  # what a run before this one has made but not measured
            note(number, partial(taken_up, folder, tried[:number]))
        editor = go_on(sequence, editor, folder, tried)
        for number in range(len(tried), len(groups)):
            note(number, lambda: sequence.whole)
            editor, attempt = one_more(folder / f"{number:05d}", sequence, editor, groups[number])
            tried.append(attempt)
            write_atomically(folder / TRIED, json.dumps(tried).encode())
            done, each = number * args.group + attempt["count"], f"{attempt['seconds'] / attempt['count']:.2f} s each"
            print(f"{done} of {len(requests)} edits, {attempt['why'] or each}", flush=True)
        note(len(groups), lambda: sequence.whole)


def one_more(
    place: Path, sequence: InSequence, editor: Editor, requests: Sequence[EditRequest]
) -> tuple[Editor, dict[str, Any]]:
    """Make one group's edit, keep it and put it in force; where that cannot be computed, all stays as it was.

    Returns:
        the editor for what follows, and how many requests were tried, in how many seconds all of that took, and why in
        vain.
    """
    costs, began = Costs(), time.perf_counter()
    if edit := costs.make(editor, [request.for_editor() for request in requests]):
        edit.save(place)
        editor = stay(sequence, costs, editor, edit)
    (attempt,) = costs.attempts
    return editor, {"count": attempt.count, "seconds": time.perf_counter() - began, "why": attempt.why}


def costs_of(tried: Sequence[dict[str, Any]], latest: int) -> dict[str, Any]:
    """What the latest groups took, and how many edits of all groups could not be made."""
    some = tried[-latest:]
    return {
        "seconds_per_edit": sum(one["seconds"] for one in some) / sum(one["count"] for one in some),
        "not_made": sum(one["count"] for one in tried if one["why"]),
        "not_made_why": next((one["why"] for one in tried if one["why"]), None),
    }


def refuse_another(place: Path, mark: str, how: str) -> None:
    """A run goes on with the stream and the editor it began with; one of before a mark was kept takes this one.

    Raises:
        SystemExit: it was begun otherwise.
    """
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, mark.encode())
    if place.read_text() != mark:
        raise SystemExit(f"{place.parent} was begun {how}: delete it, or go on as it was begun.")


def abilities() -> tuple[str, ...]:
    """Files of questions whose choices an edit must not move."""
    return tuple(f"ability/{name}" for name in ABILITIES)


def tried_in(folder: Path) -> list[dict[str, Any]]:
    """What is known of each group that was tried before."""
    place = folder / TRIED
    return json.loads(place.read_text()) if place.exists() else []


def kept_of(folder: Path, tried: Sequence[dict[str, Any]]) -> list[Edit]:
    """The edits of some groups; what was saved and not noted down was not in force yet."""
    return [Edit.load(folder / f"{number:05d}") for number, one in enumerate(tried) if not one["why"]]


def taken_up(folder: Path, tried: Sequence[dict[str, Any]]) -> Edit | None:
    """The edits of some groups as one."""
    kept = kept_of(folder, tried)
    return summed(Edit.join(kept)) if kept else None


def go_on(sequence: InSequence, editor: Editor, folder: Path, tried: Sequence[dict[str, Any]]) -> Editor:
    """Put the edits of a run that was stopped in force again; returns the editor for what follows."""
    if type(editor).after is Editor.after:  # it remembers nothing, and joining all at once is quicker
        sequence.back_to(taken_up(folder, tried))
        return editor
    for edit in kept_of(folder, tried):
        sequence.add(edit)
        editor = editor.after(edit)  # what it remembers may be of the model with those before it in force
    return editor


def measured(battery: Battery, whole: Edit, made: Sequence[EditRequest], every: int, size: int) -> dict[str, Any]:
    """One row: a sample of all edits by the block they came in, running text, abilities, and the update's size."""
    lm, draw = battery.lm, random.Random(SEED)
    blocks = [range(start, min(start + every, len(made))) for start in range(0, len(made), every)]
    drawn = [sorted(draw.sample(block, min(len(block), max(1, size // len(blocks))))) for block in blocks]
    by_block = []
    everything: dict[str, list[float]] = {}
    for block, chosen in zip(blocks, drawn, strict=True):
        exam = Examination(lm, [made[index] for index in chosen], ("bare",), 32, None, baseline=Baseline.in_cache(lm))
        exam.examine(range(len(chosen)), Together((whole,)), beside=made)
        scores = exam.tally.core("edited")["generation"]
        found = {name: scores[name]["mean"] for name in ("reliability", "generality", "locality")}
        by_block.append({"from": block.start, "to": block.stop, "n": len(chosen), **found})
        for name, value in found.items():
            if value is not None:
                everything.setdefault(name, []).append(value)
    battery.note([whole])
    means = {name: fmean(values) for name, values in everything.items()}
    rest = {"by_block": by_block, "peak_memory_mb": peak_memory_mb()}
    return {"edits": len(made), **means, **battery.found[-1], **rest}


def rows(result: Path, mark: str, held: str, how: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows known so far of this editor; another's give way.

    Args:
        result: the report.
        mark: the editor's.
        held: what the stream holds (SHA-256).
        how: it is asked.

    Raises:
        SystemExit: it is of another stream, or was asked in another way.
    """
    known = json.loads(result.read_text()) if result.exists() else {}
    if known.get("editor_mark") != mark:
        return []
    if known.get("stream_sha256", held) != held:  # older ones do not know
        raise SystemExit(f"{result} is of another stream of this name: move it away, or bring that one back.")
    if known["config"] != how:
        raise SystemExit(f"{result} was asked in another way ({known['config']}): move it away, or ask as it was.")
    return known["rows"]


def keep(result: Path, report: dict[str, Any], how: dict[str, Any], machine: dict[str, Any]) -> None:
    """Write what is known so far."""
    result.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(result, (json.dumps({**report, "config": how, "machine": machine}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
