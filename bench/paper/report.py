"""``python -m bench paper report``: tables and figures of all results, in the terminal and in docs/paper.md."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench import extras
from bench.paper.ablation import ablation_table
from bench.paper.results import RESULTS, Experiment
from bench.paper.strategies import CORRECTED, PUBLISHED
from bench.paper.tables import chaos_table, coverage_table, notes, results_table
from bench.paper.tasks import TASKS, PaperTask

FEWEST_STRATEGIES = 5
#: In the names of folders with runs of which one weight was moved: they have a table of their own, and no other.
NUDGED = "-nudge-"
FIGURES = {"curves": "paper-accuracy.png", "time": "paper-time.png", "ranks": "paper-ranks.png"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench paper report",
        description="Tables of all results. With --docs also figures beside that file, and the tables in it: the text "
        "between the lines '<!-- begin NAME -->' and '<!-- end NAME -->' is replaced, NAME being a folder of the "
        "results, 'ablations', 'chaos', 'coverage' or 'notes'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--docs", type=Path, help="the document to bring up to date, such as docs/paper.md")
    return parser


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    extras.require("matplotlib", "numpy", "scipy", extra="paper")
    folders = found(args.results)
    if not folders:
        raise SystemExit(f"error: no results in {args.results}; python -m bench paper TASK makes some")
    plain = [folder for folder in folders if NUDGED not in folder.name]
    blocks = {folder.name: text_of(folder) for folder in plain}
    blocks["notes"] = "\n".join(notes())
    nudged = [Experiment(folder) for folder in folders if folder.name.startswith(f"synthetic-a{NUDGED}")]
    blocks["chaos"] = chaos_table(Experiment(args.results / "synthetic-a"), nudged, TASKS["synthetic-a"])
    blocks["coverage"] = coverage_table([(folder.name, Experiment(folder)) for folder in folders])
    blocks["ablations"] = ablation_table([(title_of(folder), Experiment(folder)) for folder in plain])
    for name, text in blocks.items():
        print(f"\n{name}\n\n{text}")
    if args.docs is not None:
        args.docs.write_text(filled(args.docs.read_text(), blocks, str(args.docs)))
        draw(plain, args.docs.parent)
        print(f"\nwritten: {args.docs}, {', '.join(FIGURES.values())}")
    return 0


def found(results: Path) -> list[Path]:
    """The experiments' folders, in the order of the tasks; longer names after the plain ones."""
    order = list(TASKS)
    folders = [folder for folder in results.glob("*") if folder.is_dir() and any(folder.glob("*.json"))]
    return sorted(folders, key=lambda folder: (order.index(task_name(folder)), folder.name))


def task_name(folder: Path) -> str:
    for name in sorted(TASKS, key=len, reverse=True):
        if folder.name == name or folder.name.startswith(f"{name}-"):
            return name
    raise SystemExit(f"error: {folder}: the name does not begin with that of a task ({', '.join(TASKS)})")


def title_of(folder: Path) -> str:
    """The task's title and what the folder's name adds to it: "CIFAR-10, 3 epochs"."""
    name = task_name(folder)
    rest = folder.name[len(name) + 1 :].replace("-", " ")
    return f"{TASKS[name].title}, {rest}" if rest else TASKS[name].title


def text_of(folder: Path) -> str:
    """The table of one experiment."""
    experiment, task = Experiment(folder), TASKS[task_name(folder)]
    epochs = epochs_of(experiment, task)
    if folder.name != task_name(folder):
        task = replace(task, published=None)  # something else was trained than what the paper did
    return results_table(experiment, task, epochs)


def epochs_of(experiment: Experiment, task: PaperTask) -> int:
    for strategy in [*PUBLISHED, *CORRECTED]:
        for record in experiment.records(strategy):
            return len(record.accuracy)
    return task.epochs


def draw(folders: Sequence[Path], target: Path) -> None:
    """The three figures; experiments with a handful of strategies only are left out."""
    from bench.paper.figures import draw_curves, draw_ranks

    shown = [
        (title_of(folder), Experiment(folder))
        for folder in folders
        if sum(Experiment(folder).file(name).exists() for name in PUBLISHED) >= FEWEST_STRATEGIES
    ]
    draw_curves(shown, target / FIGURES["curves"])
    draw_curves(shown, target / FIGURES["time"], by_time=True)
    draw_ranks(shown, target / FIGURES["ranks"])


def filled(document: str, blocks: dict[str, str], name: str) -> str:
    """The document with each marked place holding its block, as an indented code block.

    The place of an experiment without results says so.
    """

    def put(match: re.Match[str]) -> str:
        block = match[1]
        if block not in blocks and not block.startswith(tuple(TASKS)):
            raise SystemExit(
                f"error: {name} has a place for {block!r}, which is none of {', '.join(blocks)} and no task"
            )
        lines = "\n".join(f"    {line}".rstrip() for line in blocks.get(block, "not run yet").splitlines())
        return f"<!-- begin {block} -->\n\n{lines}\n\n<!-- end {block} -->"

    return re.sub(r"<!-- begin (\S+) -->\n.*?<!-- end \1 -->", put, document, flags=re.DOTALL)
