"""``python -m bench gpu``: are the kernels right on this GPU, and how fast is a step; table, JSON."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench import environment, extras, record
from bench.gpu.runner import SECTIONS, Deadline, DeviceLost, Job, run_jobs
from bench.shapes import SHAPES
from bench.timing import one_line
from fused_dals.host_walk import HOST_WALK

if TYPE_CHECKING:
    from bench.gpu.scale import Scale
    from bench.gpu.supervisor import Progress, Store
    from bench.gpu.targets import Target
    from bench.machine import Machine


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description="On a GPU, in at most eight minutes: correctness of the compiled kernels, a race hunt, waiting, "
        "GradScaler, clipping, narrow state, graphs, host time, step time beside other optimizers, launches, the "
        "compiled reference, a tuning sweep; then the targets, passed or not. A part that hangs or breaks the device "
        "is a failure, and the others still run.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results, after each part anew")
    parser.add_argument("--quick", action="store_true", help="three models, fewer samples, no sweep: two minutes")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, help="time for the whole run instead of 430, or 240 with --quick")
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
    from bench.gpu.scale import scale_for
    from bench.gpu.supervisor import Store, supervise

    scale = scale_for(args.models, args.quick, args.sections, args.seconds)
    with tempfile.TemporaryDirectory(prefix="fused_dals_") as folder:
        store = Store(Path(folder, "progress"))
        give_up = partial(_give_up, args.json, scale)
        return supervise(store, Deadline.after(scale.seconds), partial(_run_on_gpu, scale, args.json), give_up)


def _targets(progress: Progress, scale: Scale) -> list[Target] | None:
    """None where what was found defies them: the rows are to be had nevertheless."""
    from bench.gpu.jobs import targets_of

    try:
        return targets_of(progress.results, progress.described["l2_bytes"], scale)
    except Exception as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return None


def _give_up(path: Path | None, scale: Scale, progress: Progress, why: str) -> None:
    """What there is where no process comes to the end: tables that nobody has seen, targets, file."""
    from bench.gpu import report

    _write(path, scale, progress, why)
    if progress.described:
        for section in scale.sections:
            if section not in progress.shown and progress.begun:
                print("\n" + report.section_text(section, progress.results))
        print("\n" + report.target_table(_targets(progress, scale) or []), flush=True)


def _write(path: Path | None, scale: Scale, progress: Progress, ended: str) -> None:
    """What there is, as JSON; nothing where no process has come as far as to tell what it runs on."""
    from bench.gpu import report

    if path is not None and progress.described:
        found = report.record(progress.described, scale, progress.results, _targets(progress, scale) or [], ended)
        record.save(path, found)


def _run_on_gpu(scale: Scale, path: Path | None, store: Store, deadline: Deadline) -> int:
    from bench.gpu.compile_ahead import COMPILE_WORKERS
    from bench.gpu.machine import CudaMachine

    if "compile" not in scale.sections or store.load().begun > 0:
        HOST_WALK.want(wait=True)  # or the first steps would be timed without it, beside its compiler
    workers = max(1, min(COMPILE_WORKERS, (os.cpu_count() or 1) // 2))
    machine = CudaMachine(torch.device("cuda", torch.cuda.current_device()))
    return run(machine, scale, path, workers, store, deadline)


def run(machine: Machine, scale: Scale, path: Path | None, workers: int, store: Store, deadline: Deadline) -> int:
    """Run what is left to do, print section by section; 0 if no check and no target failed.

    Where the device is lost the process ends at once, with what there is in the store and in the file.
    """
    from tqdm import tqdm

    from bench.gpu import report
    from bench.gpu.jobs import jobs_of

    progress = store.load()
    results = progress.results
    first = not progress.described
    progress.described = {"l2_bytes": machine.l2_bytes, **environment.of_machine(machine.describe())}
    if first:
        print(", ".join(f"{key} {value}" for key, value in progress.described.items()), flush=True)
    results.note_conditions(machine, "start")
    results.copy_samples += [machine.copy_bandwidth() for _ in range(scale.copy_samples)]
    jobs = jobs_of(machine, scale, results, deadline, workers)
    last = {job.section: index for index, job in enumerate(jobs)}
    if first:
        results.to_come.update(Counter(job.section for job in jobs))

    def attempt(work: Callable[[], None]) -> None:
        """What cannot be shown or written now may be later, with all that is still to come."""
        try:
            work()
        except Exception as error:
            tqdm.write(f"error: {one_line(error)}", file=sys.stderr)

    def save(ended: str) -> None:
        attempt(lambda: _write(path, scale, progress, ended))

    def save_rows() -> None:
        attempt(lambda: store.save(progress))
        save("in the midst of a part")

    def show(section: str) -> None:
        tqdm.write("\n" + report.section_text(section, results))
        sys.stdout.flush()

    def show_ended() -> None:
        """Sections that are over, those of a process that came to no end among them."""
        for section, index in last.items():
            if index < progress.begun and section not in progress.shown:
                progress.shown.append(section)
                attempt(partial(show, section))

    with tqdm(total=len(jobs), initial=progress.begun, unit="part") as bar:

        def before(job: Job) -> None:
            bar.set_description(job.section)
            store.begin(progress, job, deadline)
            save(f"while at {job.section}, {job.label}")

        def after(job: Job) -> None:
            bar.update()
            show_ended()
            store.end(progress)
            save(f"after {job.section}, {job.label}")

        try:
            run_jobs(jobs[progress.begun :], results, deadline, machine, before, after, save_rows)
        except DeviceLost as lost:
            print(f"error: {lost}", file=sys.stderr, flush=True)
            store.end(progress)
            save(str(lost))
            sys.stdout.flush()
            os._exit(1)  # leaving in order would wait for the device
    show_ended()
    targets = _targets(progress, scale)
    print("\n" + report.target_table(targets or []))
    attempt(lambda: results.note_conditions(machine, "end"))
    save("complete")
    if path is not None:
        print(f"\nresults: {path}")
    sys.stdout.flush()
    progress.status = int(targets is None or any(target.passed is False for target in targets))
    store.end(progress)
    return progress.status
