"""``python -m bench paper report``: tables and figures of all results, in the terminal and in docs/paper.md."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench import extras
from bench.options import HelpFormatter
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
        description="Tables of all results; with --figures or --docs the figures, too. --docs puts the tables into "
        "that file: the text between the lines '<!-- begin NAME -->' and '<!-- end NAME -->' is replaced, NAME being a "
        "folder of the results, 'ablations', 'chaos', 'coverage' or 'notes'.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--docs", type=Path, help="the document to bring up to date, such as docs/paper.md")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="folder for the figures (default: that of --docs)")
    return parser


def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    extras.require("matplotlib", extra="paper")
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
    written: list[str] = []
    if args.docs is not None:
        document = filled(args.docs.read_text(), blocks, str(args.docs))
        args.docs.write_text(document)
        written.append(str(args.docs))
        for name in blocks:
            if f"<!-- begin {name} -->" not in document:
                print(f"\n{args.docs} has no place for {name}: add the lines '<!-- begin {name} -->' and its end")
    figures = args.figures or (args.docs.parent if args.docs is not None else None)
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        written += draw(plain, figures)
    if written:
        print(f"\nwritten: {', '.join(written)}")
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


def draw(folders: Sequence[Path], target: Path) -> list[str]:
    """The three figures, if any experiment has more than a handful of strategies; returns what was drawn."""
    from bench.paper.figures import draw_curves, draw_ranks

    shown = [
        (title_of(folder), Experiment(folder))
        for folder in folders
        if sum(Experiment(folder).file(name).exists() for name in PUBLISHED) >= FEWEST_STRATEGIES
    ]
    if not shown:
        print(f"\nno figures: no experiment has {FEWEST_STRATEGIES} of the paper's strategies yet")
        return []
    draw_curves(shown, target / FIGURES["curves"])
    draw_curves(shown, target / FIGURES["time"], by_time=True)
    draw_ranks(shown, target / FIGURES["ranks"])
    return [str(target / name) for name in FIGURES.values()]


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
