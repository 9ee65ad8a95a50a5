"""``python -m bench gpu``: are the kernels right on this GPU, and how fast is a step; table, JSON."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench import environment, extras, record
from bench.shapes import SHAPES

if TYPE_CHECKING:
    from bench.gpu.jobs import Job, Scale
    from bench.machine import Machine


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description="On a GPU, in at most eight minutes: correctness of the compiled kernels, a race hunt, waiting, "
        "launches, host time, graphs, GradScaler, clipping, narrow state, step time beside other optimizers, a tuning "
        "sweep; then the targets, passed or not.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results, after each part anew")
    parser.add_argument("--quick", action="store_true", help="three models, fewer samples, no sweep: two minutes")
    parser.add_argument("--models", nargs="+", choices=SHAPES, metavar="MODEL", help=f"of {', '.join(SHAPES)}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("error: no GPU: torch.cuda.is_available() is False on this machine")
    if find_spec("triton") is None:
        raise SystemExit("error: triton missing: pip install triton (Linux)")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("error: TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    extras.require("tqdm")
    from bench.gpu.jobs import COMPILE_WORKERS, scale_for
    from bench.gpu.machine import CudaMachine

    workers = max(1, min(COMPILE_WORKERS, (os.cpu_count() or 1) // 2))
    machine = CudaMachine(torch.device("cuda", torch.cuda.current_device()))
    return run(machine, scale_for(args.models, args.quick), args.json, workers)


def run(machine: Machine, scale: Scale, path: Path | None, workers: int) -> int:
    """Run everything, print section by section; 0 if no check and no target failed."""
    from tqdm import tqdm

    from bench.gpu import report
    from bench.gpu.jobs import Deadline, Results, jobs_of, run_jobs, targets_of
    from bench.gpu.machine import DeviceHung

    described = environment.of_machine(machine.describe())
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    results = Results([machine.copy_bandwidth() for _ in range(scale.copy_samples)])
    deadline = Deadline(scale.seconds)
    jobs = jobs_of(machine, scale, results, deadline, workers)
    last = {job.section: job for job in jobs}

    def save(ended: str) -> None:
        if path is not None:
            record.save(path, report.record(described, scale, results, targets_of(results, machine), ended))

    with tqdm(total=len(jobs), unit="part") as bar:

        def after(job: Job) -> None:
            bar.set_description(job.section)
            bar.update()
            if last[job.section] is job:
                bar.write("\n" + report.section_text(job.section, results))
            save(f"stopped after {job.section}, {job.label}")

        try:
            run_jobs(jobs, results, deadline, after, machine.release)
        except DeviceHung as hung:
            print(f"error: {hung}", file=sys.stderr)
            save(str(hung))
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(1)  # leaving in order would wait for the device
    targets = targets_of(results, machine)
    print("\n" + report.target_table(targets))
    save("complete")
    if path is not None:
        print(f"\nresults: {path}")
    failed = any(target.passed is False for target in targets)
    return 1 if failed else 0
