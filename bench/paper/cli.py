"""The command line of the paper's benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import extras, published
from bench.options import HelpFormatter
from bench.paper import report
from bench.paper.problem import Options
from bench.paper.results import RESULTS, Experiment
from bench.paper.runner import Plan, run_all
from bench.paper.strategies import ABLATIONS, CORRECTED, PUBLISHED, STRATEGIES
from bench.paper.tables import notes, results_table
from bench.paper.tasks import RATES, TASKS, experiment_name, with_model

SEED_STEP = 100
GROUPS = {"published": PUBLISHED, "corrected": CORRECTED, "ablations": ABLATIONS}


def build_parser() -> argparse.ArgumentParser:
    tasks = ", ".join(f"{name} {task.epochs}" for name, task in TASKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench paper",
        description="Train a task of arXiv:2604.27295 with the paper's strategies. Runs that are finished are kept in "
        "the results folder and not done again; one that was killed goes on from its last epoch. "
        "'python -m bench paper report' makes tables and figures of all results.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=f"one of {', '.join(TASKS)}")
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=["published", "corrected"],
        metavar="NAME",
        help=f"names in quotes, or {', '.join(GROUPS)}; names: {', '.join(STRATEGIES)}",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help=f"number of runs per strategy, with seeds {published.SEED}, {published.SEED + SEED_STEP}, ...",
    )
    parser.add_argument(
        "--epochs", type=int, default=argparse.SUPPRESS, help=f"length of the run and its schedules (default: {tasks})"
    )
    parser.add_argument("--data-dir", type=Path, help="folder with the files of the data set, for the real tasks")
    parser.add_argument(
        "--model",
        default=Options.model,
        help="for texts: a name of the Hugging Face hub or a folder, to be fine-tuned; 'scratch' for a small encoder "
        "with a vocabulary of the training set",
    )
    parser.add_argument(
        "--rates", choices=RATES, default=argparse.SUPPRESS, help="for texts: learning rates (default: by --model)"
    )
    parser.add_argument(
        "--nudge",
        type=int,
        default=0,
        metavar="N",
        help="change the last bit of the N-th initial weight, to see how chaotic training is; results of their own",
    )
    parser.add_argument("--device", type=usable_device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU; the published figures need 1")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    return parser


def usable_device(text: str) -> torch.device:
    """The device, if a tensor can be put there."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def chosen_strategies(names: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Strategies by name or by group, each once, in the order of the command line."""
    chosen: dict[str, None] = {}
    for name in names:
        if name in GROUPS:
            chosen |= dict.fromkeys(GROUPS[name])
        elif name in STRATEGIES:
            chosen[name] = None
        else:
            parser.error(
                f"--strategies: {name!r} is neither a group ({', '.join(GROUPS)}) nor one of {list(STRATEGIES)}"
            )
    return list(chosen)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        return report.main(argv[1:])
    parser = build_parser()
    args = parser.parse_args(argv)
    options = Options(data_dir=args.data_dir, model=args.model, nudge=args.nudge)
    rates: str | None = getattr(args, "rates", None)
    task = with_model(TASKS[args.task], options, rates)
    strategies = chosen_strategies(args.strategies, parser)
    epochs: int = getattr(args, "epochs", task.epochs)
    if not TASKS[args.task].packages and (rates is not None or args.model != Options.model):
        parser.error(f"--model and --rates are for texts, and {args.task} is none")
    if args.nudge < 0:
        parser.error(f"--nudge must be at least 0, not {args.nudge}")
    for option, value in (("--epochs", epochs), ("--seeds", args.seeds), ("--threads", args.threads)):
        if value < 1:
            parser.error(f"{option} must be at least 1, not {value}")
    extras.require(*task.packages, extra="paper")
    torch.set_num_threads(args.threads)
    experiment = Experiment(args.results / experiment_name(args.task, task, options, rates, epochs))
    plan = Plan(
        task_name=args.task,
        task=task,
        strategies=strategies,
        seeds=[published.SEED + SEED_STEP * i for i in range(args.seeds)],
        epochs=epochs,
        options=options,
        device=args.device,
        threads=args.threads,
    )
    run_all(plan, experiment)
    print(f"\n{task.title}, {epochs} epochs\n")
    print(results_table(experiment, task, epochs), "\n")
    print("\n".join(notes()))
    print(f"\nresults: {experiment.folder}")
    return 0
