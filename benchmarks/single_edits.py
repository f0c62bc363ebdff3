"""Single edits on the pristine model: every cell of the results table.

Refined, with a gate at the prompt's end, and as the bare network:

    IBKE_DATA=... python benchmarks/single_edits.py [--cells counterfact,zsre] [--limit N] [--editor FOLDER]

Each cell is one `ibke eval` and one JSON file under benchmarks/results/single; a cell that is there is not run again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from ibke.files import data_folder

DATA = data_folder()
HELD_OUT = Path("build/heldout-relations.jsonl")

# name: data file, format, edits, how prompts are asked
CELLS = {
    "counterfact": (DATA / "counterfact/counterfact-val.json", "counterfact", 500, "bare"),
    "zsre": (DATA / "zsre/zsre_mend_train-1k.json", "zsre", 200, "bare,chat"),
    "heldout-relations": (HELD_OUT, "jsonl", 300, "chat"),
    "knowedit-recent": (DATA / "knowedit/recent_train.json", "knowedit", 570, "bare"),
}

GATED = ["--method", "ibke-gated"]
VARIANTS = {"refined": [], "gated": GATED, "network": ["--no-refine"], "gated-network": [*GATED, "--no-refine"]}
# The gate that ships has learned of the held-out relations, so a copy with one that has not is measured on them.
LEFT_OUT = "build/without-held-out"
EDITORS = {"heldout-relations": LEFT_OUT}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--limit", type=int, default=0, help="at most so many edits a cell; 0 takes the cell's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--editor", default="", help="folder of a trained editor; the shipped one otherwise")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/single"))
    args = parser.parse_args()
    if not HELD_OUT.exists():
        subprocess.run([sys.executable, "benchmarks/heldout_relations.py", "--out", str(HELD_OUT)], check=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for variant in args.variants.split(","):
        for name in args.cells.split(","):
            data, form, count, frames = CELLS[name]
            target = args.out / f"{name}-{variant}.json"
            if target.exists():
                print(f"{target} is there")
                continue
            editor = args.editor or EDITORS.get(name, "")
            if editor and not Path(editor).exists():
                raise SystemExit(f"{editor} is not there. How {LEFT_OUT} is made: `benchmarks/question_gate.py`.")
            limit = min(count, args.limit) if args.limit else count
            command = ["ibke", "eval", "--data", str(data), "--format", form, "--frames", frames]
            command += ["--limit", str(limit), "--seed", str(args.seed), "--json", str(target)]
            command += ["--editor", editor] if editor else []
            command += VARIANTS[variant]
            print(" ".join(command), flush=True)
            subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)


if __name__ == "__main__":
    main()
