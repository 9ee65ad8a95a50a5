"""``python -m bench train``: whole training steps with each optimizer, and the optimizer's share of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

import torch

from bench import environment, extras, record
from bench.compiled import CompileBudget
from bench.find import find_machine
from bench.options import HelpFormatter, add_timing_options, check_timing_options
from bench.table import format_table
from bench.train.models import TASKS
from bench.train.steps import MODES, OPTIMIZERS, PEAK_OF_STEPS, SEED, TrainRow, time_training

NOTES = """\
step: forward, backward and optimizer, device time; all models of a mode take turns. optimizer: its step alone along the
gradients of the last backward pass, in a graph of its own where the whole step is one. peak: memory of model,
gradients, state and activations. On a GPU matrix products are in bfloat16 (autocast), weights, gradients and state in
float32."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench train",
        description="Time whole training steps of models of the sizes of GPT-2 small and ViT-B, on random tokens and "
        "images, with each optimizer: eager, under torch.compile, and as a CUDA graph.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--size", choices=("full", "small", "tiny"), help="(default: full on a GPU, small on a CPU)")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="(default: all on a GPU, eager on a CPU)")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    add_timing_options(parser, of_each="optimizer", compile_seconds=300.0, compile_of="all", after_each="mode")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_timing_options(parser, args)
    extras.require("tqdm", "numpy")
    from tqdm import tqdm

    torch.set_num_threads(args.threads)
    machine = find_machine()
    size = args.size or ("full" if machine.queues_work else "small")
    modes = args.modes or (MODES if machine.queues_work else MODES[:1])
    budget = CompileBudget(args.compile_seconds, args.compile_seconds)
    described = environment.of_machine(machine.describe())
    print(", ".join(f"{key} {value}" for key, value in described.items()) + "\n")
    rows: list[TrainRow] = []
    attempts = 1 + args.repeats + 1  # to build it, its samples, those of the optimizer alone
    with tqdm(total=len(args.models) * len(modes) * len(args.optimizers) * attempts, unit="sample") as bar:
        for model in args.models:
            for mode in modes:
                bar.set_description(f"{model} {mode}")
                found = time_training(machine, model, size, mode, args.optimizers, args.repeats, budget, bar.update)
                rows += found
                bar.write(f"{title(found[0])}\n{train_table(found)}\n")
                if args.json is not None:
                    record.save(
                        args.json,
                        {
                            "environment": described,
                            "settings": {
                                "repeats": args.repeats,
                                "size": size,
                                "seed": SEED,
                                "peak_of_steps": PEAK_OF_STEPS,
                            },
                            "training_steps": [asdict(row) for row in rows],
                        },
                    )
    print(NOTES)
    if args.json is not None:
        print(f"\nresults: {args.json}")
    return 0


def title(row: TrainRow) -> str:
    return f"{row.model} {row.size}, {row.mode}: {row.tensors} tensors, {row.parameters:,} parameters"


def train_table(rows: Sequence[TrainRow]) -> str:
    """Milliseconds, the optimizer's share, memory; failures below."""
    cells = []
    for row in rows:
        if row.step_s is None:
            continue
        step = [f"{1e3 * value:.3f}" for value in (row.step_s.median, row.step_s.p10, row.step_s.p90)]
        alone = ["-", "-"]
        if row.optimizer_s is not None:
            share = row.optimizer_s.median / row.step_s.median
            alone = [f"{1e3 * row.optimizer_s.median:.3f}", f"{100 * share:.0f} %"]
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        cells.append([row.contender, *step, *alone, peak])
    header = ["optimizer", "step ms", "p10", "p90", "optimizer ms", "share", "peak MiB"]
    failures = [f"{row.contender} failed: {row.error}" for row in rows if row.error is not None]
    return "\n".join([*([format_table(header, cells)] if cells else []), *failures])
