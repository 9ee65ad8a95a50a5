"""``python -m bench counters``: bytes that a fused step moves to and from a GPU's memory, by the device's own counters.

Nsight Compute's ``ncu`` reads them, for a process that takes two steps of each list of tensors; the second counts, as
it finds the caches as the first has left them. Its time is of the pass alone, under the profiler.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import environment, extras, record
from bench.byte_table import STEP_DTYPES
from bench.cache_model import plan_in_use
from bench.contenders import FUSED, dals_contenders
from bench.options import HelpFormatter
from bench.shapes import MODELS, SHAPES
from bench.table import format_table
from bench.timing import MEMORY_SHARE, make_parameters, needed_bytes, one_line

#: The counters by the field of a row that each fills, and the unit that ncu has to give them in.
METRICS = {
    "bytes_read": ("dram__bytes_read.sum", "byte"),
    "bytes_written": ("dram__bytes_write.sum", "byte"),
    "nanoseconds": ("gpu__time_duration.sum", "ns"),
}
KERNEL = "fused_pass"
STEPS = 2
#: For all lists; each takes seconds.
MOST_SECONDS = 500.0
SEED = 0
WHAT = (
    "What the device's counters (dram__bytes_read, dram__bytes_write) say of the second step of the fused pass on each "
    "list, with the caches as the first step left them."
)


@dataclass
class Counted:
    """Of one list of tensors; ``error`` says why there is no count."""

    model: str
    dtypes: str
    parameters: int
    bytes_read: float | None = None
    bytes_written: float | None = None
    bytes_per_parameter: float | None = None
    pass_alone_s: float | None = None
    error: str | None = None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench counters",
        description="Bytes per parameter that the fused pass reads from and writes to a GPU's memory, from the "
        "device's counters. Needs a GPU and Nsight Compute's ncu, with the right to read counters.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(MODELS), help="parameter lists")
    parser.add_argument("--dtypes", nargs="+", choices=STEP_DTYPES, default=list(STEP_DTYPES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument("--take-steps", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # what ncu looks at
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("error: no GPU: torch.cuda.is_available() is False on this machine")
    lists = [(model, name) for model in args.shapes for name in args.dtypes]
    device = torch.device("cuda", torch.cuda.current_device())
    if args.take_steps is not None:
        take_steps(device, lists, args.take_steps)
        return 0
    if shutil.which("ncu") is None:
        raise SystemExit("error: ncu missing: it is part of Nsight Compute, which comes with the CUDA toolkit")
    extras.require("tqdm")
    from bench.gpu.machine import CudaMachine

    machine = CudaMachine(device)
    described = environment.of_machine({"l2_bytes": machine.l2_bytes, **machine.describe()})
    del machine
    torch.cuda.empty_cache()
    print(", ".join(f"{key} {value}" for key, value in described.items()) + "\n", flush=True)
    rows = count(lists)
    print(table(rows))
    if args.json is not None:
        found = {
            "environment": described,
            "settings": {"plan": plan_in_use(), "seed": SEED, "steps": STEPS},
            "what": WHAT,
            "counters": [asdict(row) for row in rows],
        }
        record.save(args.json, found)
        print(f"\nresults: {args.json}")
    return int(any(row.error is not None for row in rows))


# -- the process that is looked at -----------------------------------------------------------------------------------


def take_steps(device: torch.device, lists: Sequence[tuple[str, str]], path: Path) -> None:
    """Two steps of each list of (model, dtypes), and a line in the file about each when it is over.

    What fails after a launch ends it: which launch is whose would not be known.
    """
    with path.open("a") as file:
        for model, name in lists:
            row = Counted(model, name, sum(math.prod(shape) for _, shape in SHAPES[model]()))
            taken = _steps_of(device, row)
            print(json.dumps(asdict(row)), file=file, flush=True)
            if row.error is not None and taken:
                return


def _steps_of(device: torch.device, row: Counted) -> int:
    """How many steps were taken; in the row, why not all."""
    from bench.compiled import hyperparameters
    from bench.gpu.contenders import tensor_set
    from bench.gpu.driver import PassDriver
    from fused_dals.launch_plan import IN_USE

    dtypes, taken = STEP_DTYPES[row.dtypes], 0
    try:
        shapes = list(SHAPES[row.model]())
        needed = needed_bytes(shapes, dtypes, dals_contenders(dtypes)[FUSED])
        free = MEMORY_SHARE * _free_bytes(device)
        if needed > free:
            raise MemoryError(f"left out: needs {needed / 1e9:.3g} GB of {free / 1e9:.3g} GB")
        named = make_parameters(shapes, dtypes, device, SEED)
        driver = PassDriver(tensor_set(named, dtypes[2]), IN_USE, hyperparameters(lr=1e-5))
        for _ in range(STEPS):
            driver.step()
            taken += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
    except Exception as error:  # the other lists are still worth a row
        row.error = one_line(error)
    return taken


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(device)[0])


# -- who looks -------------------------------------------------------------------------------------------------------


def count(lists: Sequence[tuple[str, str]]) -> list[Counted]:
    """A row per list, from a process under ncu."""
    with tempfile.TemporaryDirectory(prefix="fused_dals_") as folder:
        path = Path(folder, "steps")
        command = [*ncu_command(), *_steps_command(lists, path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS)
            said, status = done.stdout, ""
            if done.returncode:
                status = f"ncu ended with {done.returncode}: {' '.join((done.stderr or done.stdout).split())}"
        except subprocess.TimeoutExpired as late:
            said, status = _text(late.stdout), f"ncu was not done after {MOST_SECONDS:.0f} s"
        rows = [Counted(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    launches = list(launches_of(said))
    for row in rows:
        if row.error is None:
            own, launches = launches[:STEPS], launches[STEPS:]
            _fill(row, own, status)
    ended = {(row.model, row.dtypes) for row in rows}
    for model, name in lists:
        if (model, name) not in ended:
            rows.append(Counted(model, name, 0, error=status or "not reached"))
    return rows


def ncu_command() -> list[str]:
    """All but the command that is looked at; caches and clocks are left as they are."""
    metrics = ",".join(name for name, _ in METRICS.values())
    options = ["--csv", "--print-units", "base", "--kernel-name", KERNEL, "--metrics", metrics]
    return ["ncu", *options, "--cache-control", "none", "--clock-control", "none"]


def _steps_command(lists: Sequence[tuple[str, str]], path: Path) -> list[str]:
    models, names = (list(dict.fromkeys(some)) for some in zip(*lists, strict=True))
    arguments = ["--shapes", *models, "--dtypes", *names, "--take-steps", str(path)]
    return [sys.executable, "-m", "bench", "counters", *arguments]


def launches_of(said: str) -> Iterator[dict[str, float]]:
    """The metrics of each launch, in the order of the launches, from what ncu wrote among other things."""
    lines = said.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    field_of = {name: (field, unit) for field, (name, unit) in METRICS.items()}
    found: dict[str, dict[str, float]] = {}
    for line in csv.DictReader(lines[start:]):
        if line["Metric Name"] in field_of:
            field, unit = field_of[line["Metric Name"]]
            if line["Metric Unit"] != unit:
                raise ValueError(f"ncu gives {line['Metric Name']} in {line['Metric Unit']}, not in {unit}")
            found.setdefault(line["ID"], {})[field] = float(line["Metric Value"].replace(",", ""))
    yield from found.values()


def _fill(row: Counted, launches: Sequence[dict[str, float]], status: str) -> None:
    if len(launches) < STEPS or METRICS.keys() - launches[-1].keys():
        row.error = status or f"ncu has told of {len(launches)} launches"
        return
    counted = launches[-1]
    row.bytes_read, row.bytes_written = counted["bytes_read"], counted["bytes_written"]
    row.bytes_per_parameter = (row.bytes_read + row.bytes_written) / row.parameters
    row.pass_alone_s = counted["nanoseconds"] / 1e9


def _text(said: Any) -> str:
    return said.decode(errors="replace") if isinstance(said, bytes) else said or ""


def table(rows: Sequence[Counted]) -> str:
    """A line per list; those without a count after it."""
    cells = [
        [
            f"{row.model} {row.dtypes}",
            f"{row.parameters:,}",
            f"{row.bytes_read / row.parameters:.2f}",
            f"{row.bytes_written / row.parameters:.2f}",
            f"{row.bytes_per_parameter:.2f}",
            f"{1e3 * row.pass_alone_s:.3f}",
        ]
        for row in rows
        if row.bytes_read is not None
        and row.bytes_written is not None
        and row.bytes_per_parameter is not None
        and row.pass_alone_s is not None
    ]
    failures = [f"{row.model} {row.dtypes} not counted: {row.error}" for row in rows if row.error is not None]
    header = ["bytes per parameter", "parameters", "read", "written", "together", "ms of the pass"]
    return "\n".join([*([format_table(header, cells)] if cells else []), *failures])
