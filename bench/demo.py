"""``python -m bench demo``: train a small task with five optimizers; table, figure, JSON."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench import environment, extras, published, record
from bench.options import HelpFormatter
from bench.strategies import STRATEGIES
from bench.table import reading_notes, results_table
from bench.tasks import TASKS
from bench.training import first_epochs


def build_parser() -> argparse.ArgumentParser:
    defaults = ", ".join(f"{name} {task.default_epochs} of {task.horizon}" for name, task in TASKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench demo",
        description="Train a small task on the CPU with DALS, DALS-Fast, DALS-Acc, SGD and AdamW, "
        "print a table, and write a figure (PNG) and the results (JSON).",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--task", choices=TASKS, default="synthetic-a", help="what to train on")
    parser.add_argument(
        "--epochs",
        type=int,
        default=argparse.SUPPRESS,
        help="epochs to train, at most the length of the learning rate schedules, which stays the same "
        f"(default: {defaults})",
    )
    parser.add_argument("--seed", type=int, default=published.SEED, help="random seed")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread of its own")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    epochs: int = getattr(args, "epochs", task.default_epochs)
    if not 1 <= epochs <= task.horizon:
        parser.error(f"--epochs must be from 1 to {task.horizon} for {args.task}, not {epochs}")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {args.jobs}")
    extras.require("matplotlib", "tqdm", *task.modules)
    from bench.figure import draw
    from bench.pool import train_all

    runs = train_all(list(STRATEGIES), args.task, args.seed, epochs, args.jobs)

    notes = reading_notes(epochs, task.horizon, task.test_rows, task.published)
    print(f"\n{task.title}, {epochs} of {task.horizon} epochs, seed {args.seed}\n")
    print(results_table(runs, task.published), "\n")
    print("\n".join(notes))

    args.out.mkdir(parents=True, exist_ok=True)
    figure_path = args.out / f"demo-{args.task}.png"
    json_path = figure_path.with_suffix(".json")
    draw(runs, f"{task.title}: {epochs} of {task.horizon} epochs, seed {args.seed}", figure_path)
    found = {
        "task": args.task,
        "seed": args.seed,
        "epochs": epochs,
        "schedule_epochs": task.horizon,
        "environment": environment.describe(threads=1) | {"jobs": args.jobs},
        "notes": notes,
        "runs": [
            {
                "best": max(run.accuracy),
                "last": run.accuracy[-1],
                "first_epochs": first_epochs(run.accuracy, published.THRESHOLDS),
                "published_best": published.BEST_SYNTHETIC.get(run.strategy) if task.published else None,
                "published_first_epochs": published.FIRST_EPOCHS.get(run.strategy) if task.published else None,
                **asdict(run),
            }
            for run in runs
        ],
    }
    record.save(json_path, found)
    print(f"\nfigure:  {figure_path}\nresults: {json_path}")
    return 0
