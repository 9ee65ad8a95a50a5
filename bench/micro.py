"""``python -m bench micro``: time one optimizer step, all contenders side by side, on a GPU or on the CPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import environment, extras, record
from bench.byte_table import STEP_DTYPES, Dtypes
from bench.cache_model import plan_in_use
from bench.compiled import CompileBudget, CompiledReference
from bench.contenders import (
    BASELINE,
    COMPILED,
    LOOP,
    Contender,
    dals_contenders,
    in_graphs,
    loop_contender,
    torch_contenders,
)
from bench.find import find_machine
from bench.machine import Machine
from bench.options import HelpFormatter, add_timing_options, check_timing_options
from bench.peers import peer_contenders
from bench.shapes import SHAPES
from bench.step_table import launches_text, notes, steps_text
from bench.timing import WARMUP_STEPS, StepRow, count_launches, time_contenders

#: Samples of the copy bandwidth before each list of tensors; the best of the run counts.
COPY_SAMPLES = 5
SEED = 0
QUICK = ("resnet50",)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench micro",
        description="Time one optimizer step: all contenders in one process on the same tensors, one sample each in "
        f"turn, after {WARMUP_STEPS} steps of warm-up. A contender that is missing, fails or does not fit into memory "
        "is a line that says why.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=["all", *SHAPES], default=None, help="parameter lists (default: all on a "
        "GPU, resnet50 on a CPU)",
    )  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=STEP_DTYPES, default=list(STEP_DTYPES))
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only these (default: all)")
    add_timing_options(parser, of_each="contender", compile_seconds=120.0, compile_of="each list", after_each="list")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_timing_options(parser, args)
    extras.require("tqdm", "numpy")
    torch.set_num_threads(args.threads)
    machine = find_machine()
    shapes = args.shapes or default_shapes(machine)
    if args.contenders:
        dtypes = STEP_DTYPES[args.dtypes[0]]
        known = contenders_of(dtypes, machine, CompiledReference(dtypes, CompileBudget(0.0, 0.0)))
        unknown = [name for name in args.contenders if name not in known]
        if unknown:
            parser.error(f"--contenders: no {', '.join(map(repr, unknown))}; here are {', '.join(map(repr, known))}")
    lists = [(model, dtypes) for model in (SHAPES if "all" in shapes else shapes) for dtypes in args.dtypes]
    run(machine, lists, args.repeats, args.contenders, args.compile_seconds, args.json)
    return 0


def default_shapes(machine: Machine) -> list[str]:
    """All lists on a GPU, one on a CPU."""
    return list(SHAPES) if machine.queues_work else list(QUICK)


def run(
    machine: Machine,
    lists: Sequence[tuple[str, str]],
    repeats: int,
    only: Sequence[str] | None,
    compile_seconds: float,
    path: Path | None,
) -> list[StepRow]:
    """Time the lists of (model, dtypes) one after the other; prints tables, saves after each."""
    from tqdm import tqdm

    described = environment.of_machine(machine.describe())
    print(", ".join(f"{key} {value}" for key, value in described.items()) + "\n")
    rows: list[StepRow] = []
    copies: list[float] = []
    compiled = {
        (model, name): CompiledReference(STEP_DTYPES[name], CompileBudget(compile_seconds, compile_seconds))
        for model, name in lists
    }

    def save() -> None:
        if path is not None:
            record.save(path, record_of(described, repeats, copies, rows))

    with tqdm(total=len(lists), unit="list") as lists_bar:
        for model, name in lists:
            shapes = list(SHAPES[model]())
            contenders = contenders_of(STEP_DTYPES[name], machine, compiled[model, name])
            if only is not None:
                contenders = {chosen: contenders[chosen] for chosen in contenders if chosen in only}
            copies += [machine.copy_bandwidth() for _ in range(COPY_SAMPLES)]
            lists_bar.set_description(f"{model} {name}")
            with tqdm(total=len(contenders) * (repeats + 1), unit="sample", leave=False) as bar:
                found = time_contenders(
                    machine, model, STEP_DTYPES[name], name, shapes, contenders, repeats, SEED, bar.update
                )
            rows += found
            lists_bar.write(steps_text(found, max(copies)))
            lists_bar.update()
            save()
    if machine.queues_work:
        count_all_launches(machine, compiled, rows, save)
        print(launches_text(rows) + "\n")
    print(notes(machine.queues_work))
    if path is not None:
        print(f"\nresults: {path}")
    return rows


def count_all_launches(
    machine: Machine,
    compiled: Mapping[tuple[str, str], CompiledReference],
    rows: Sequence[StepRow],
    after_each: Callable[[], object],
) -> None:
    """Launches of every row of the lists of (model, dtypes); ``after_each`` list."""
    from tqdm import tqdm

    for (model, name), reference in tqdm(compiled.items(), unit="list", desc="launches"):
        contenders = contenders_of(STEP_DTYPES[name], machine, reference)
        own = [row for row in rows if (row.model, row.dtypes) == (model, name)]
        count_launches(machine, own, list(SHAPES[model]()), STEP_DTYPES[name], contenders, SEED)
        after_each()


def contenders_of(dtypes: Dtypes, machine: Machine, compiled: CompiledReference) -> dict[str, Contender]:
    """Everybody, on a GPU in CUDA graphs, too."""
    eager = {
        **torch_contenders(dtypes),
        **dals_contenders(dtypes),
        LOOP: loop_contender(dtypes),
        COMPILED: compiled.contender(),
        **peer_contenders(dtypes, machine.device),
    }
    return {**eager, **(in_graphs(eager, machine) if machine.queues_work else {})}


def record_of(
    described: dict[str, Any], repeats: int, copies: Sequence[float], rows: Sequence[StepRow]
) -> dict[str, Any]:
    """Everything, ready for JSON."""
    return {
        "environment": described,
        "settings": {"repeats": repeats, "baseline": BASELINE, "seed": SEED, "plan": plan_in_use()},
        "copy_bytes_per_s": {"best": max(copies, default=None), "samples": list(copies)},
        "steps": [asdict(row) for row in rows],
    }
