"""Is the bottleneck real? Swapped codes, and the rate against generality and locality over β.

    IBKE_DATA=... python benchmarks/rate_sweep.py [--steps 200]

Every point goes on from the shipped editor for the same number of steps under another β, on the same episodes, and is
scored as the bare network (no refining) on the same held-out episodes. Controls: β = 0 without noise (no bottleneck at
all) and β = 0 with noise (noise without KL). Points of the same editor and number of steps that are there are not run
again; a killed point is resumed.
"""

import argparse
import json
from pathlib import Path

import torch

from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.ibke.editor import IBKEEditor
from ibke.editors.ibke.shipped import load_editor, shipped_folder
from ibke.evaluation.machine import describe
from ibke.files import write_atomically
from ibke.models import load_model
from ibke.training.settings import TrainSettings
from ibke.training.trainer import (
    Trainer,
    draw_episodes,
    prepare_episodes,
    prepare_ground,
    started_from,
    take_statistics,
    with_words,
)
from ibke.training.validation import validate

BETAS = (0.0, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)


def points() -> dict[str, dict]:
    """Name of each point and the settings that differ."""
    sweep = {f"beta-{beta:g}": {"beta": beta, "beta_schedule": "fixed"} for beta in BETAS}
    return {"no-noise-no-kl": {"beta": 0.0, "beta_schedule": "fixed", "noise": False}} | sweep


def settings_for(change: dict, shipped: dict, args: argparse.Namespace, start: Path, out: Path) -> TrainSettings:
    """The shipped editor's own settings with another β."""
    # Its gate may have been set otherwise since it was trained; what it runs with is what counts.
    config = IBKEConfig.from_dict({**shipped["config"], **change})
    kept = {name: value for name, value in shipped["training"].items() if name != "config"}
    kept |= {"steps": args.steps, "learning_rate": 3e-4, "warmup": 20, "patience": 1000, "validate_every": args.steps}
    kept |= {"data": tuple(kept["data"]), "exclude": tuple(kept["exclude"])}
    kept |= {"start": str(start), "out": str(out), "cache": args.cache, "threads": args.threads}
    return TrainSettings(config=config, **kept)


def known(path: Path, mark: str, steps: int) -> dict:
    """The report so far, if it is of this editor and of points of so many steps; else one without points."""
    report = json.loads(path.read_text()) if path.exists() else {}
    same = (report.get("editor_mark"), report.get("steps")) == (mark, steps)
    return report if same else {"editor_mark": mark, "steps": steps, "points": {}}


def main() -> None:
    """Run what is missing and write benchmarks/results/bottleneck.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("--runs", type=Path, default=Path("runs/bottleneck"))
    parser.add_argument("--only-swap", action="store_true", help="the swapped-code control alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bottleneck.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm = load_model("smollm2-135m")
    folder = shipped_folder(lm)
    network, manifest = load_editor(folder, lm)
    mark = IBKEEditor.for_model(lm, folder).mark
    runs = args.runs / f"{mark}.steps-{args.steps}"
    base = settings_for({}, manifest, args, folder, runs / "base")
    ground = prepare_ground(base)
    drawn = draw_episodes(base)
    statistics = with_words(base, ground, take_statistics(base, ground, drawn[0]), drawn[0], lambda _: None)
    episodes, validation = prepare_episodes(base, ground, statistics, drawn, lambda _: None)
    report = known(args.out, mark, args.steps)
    if not report["points"] or not args.only_swap:  # else what made the points is what is said
        command = "--only-swap" if args.only_swap else f"--steps {args.steps}"
        report["command"] = f"python benchmarks/rate_sweep.py {command}"
    report["machine"], report["seed"] = describe(lm.device), base.seed
    report["shipped"] = validate(network, ground.part, ground.site, validation)
    report["swapped"] = validate(network, ground.part, ground.site, validation, swap=True)
    for name, change in ({} if args.only_swap else points()).items():
        if name in report["points"]:
            continue
        settings = settings_for(change, manifest, args, folder, runs / name)
        Path(settings.out).mkdir(parents=True, exist_ok=True)
        network = started_from(folder, settings, ground)
        trainer = Trainer(settings, ground, network, (episodes, validation), lambda _: None)
        trainer.start(resume=True)
        trainer.run()
        report["points"][name] = validate(trainer.averaged, ground.part, ground.site, validation)
        print(name, report["points"][name], flush=True)
        write(args.out, report)
    write(args.out, report)
    print(json.dumps(report, indent=2))


def write(path: Path, report: dict) -> None:
    """Write the report after every point, so that nothing is lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
