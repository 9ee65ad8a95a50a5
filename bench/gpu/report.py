"""The GPU benchmark's results as text and as one JSON record."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench import environment
from bench.gpu.checks import HostRow, LaunchRow
from bench.gpu.correctness import Check
from bench.gpu.jobs import SECTIONS, Results, Scale
from bench.gpu.machine import Machine
from bench.gpu.sweep import SweepRow
from bench.gpu.targets import Target
from bench.gpu.timing import StepRow
from bench.table import format_table

STEP_NOTES = """\
device: CUDA events around several steps back to back, behind other work, so that the host's time is hidden as far as
the queue of launches is long. host: step() into an empty queue, without waiting. A loop of steps takes the larger one.
GB/s: bytes that the optimizer must move at least (28, 22 or 14 per parameter for DALS, one gradient more to clip, 4
bytes more with a compensation, less where AdamW and SGD keep their state in bf16) over device time. copy: share of the
bandwidth of large copies in this run, read plus written.
All step the same tensors; "in turn" where memory does not hold all their states at once, else round by round."""


def section_text(section: str, results: Results) -> str:
    """A section's table, its failures below."""
    rows = results.rows[section]
    if not rows and not results.failures[section]:
        return f"{section}: nothing to do"
    makers: dict[str, Any] = {
        "launches": launch_table,
        "host": host_table,
        "steps": lambda rows: steps_text(rows, results.copy_bandwidth),
        "sweep": sweep_table,
    }
    lines = [f"{section} ({results.seconds[section]:.0f} s)"]
    if rows:
        lines.append(makers.get(section, check_table)(rows))
    lines += [f"{failure.label} failed: {failure.error}" for failure in results.failures[section]]
    return "\n".join(lines)


def check_table(rows: Sequence[Check]) -> str:
    return "\n".join(f"{'ok  ' if row.passed else 'BAD '} {row.label}: {row.detail}".rstrip(": ") for row in rows)


def launch_table(rows: Sequence[LaunchRow]) -> str:
    cells = [
        [row.contender, str(row.tensors), str(row.kernels), str(row.memsets), str(row.copies)]
        for row in rows
        if row.error is None
    ]
    failures = [f"{row.contender}, {row.tensors} tensors failed: {row.error}" for row in rows if row.error is not None]
    return "\n".join([format_table(["launches per step", "tensors", "kernels", "memsets", "copies"], cells), *failures])


def host_table(rows: Sequence[HostRow]) -> str:
    cells = [
        [row.contender, str(row.tensors), str(row.groups)]
        + [f"{1e6 * value:.0f}" for value in (row.host_s.median, row.host_s.p10, row.host_s.p90)]
        for row in rows
        if row.host_s is not None
    ]
    failures = [f"{row.contender}, {row.groups} groups failed: {row.error}" for row in rows if row.error is not None]
    return "\n".join([format_table(["host time", "tensors", "groups", "us", "p10", "p90"], cells), *failures])


def steps_text(rows: Sequence[StepRow], copy_bandwidth: float) -> str:
    """A table per model and dtypes."""
    blocks = [f"copy: {copy_bandwidth / 1e9:.0f} GB/s, read plus written"]
    for key in dict.fromkeys((row.model, row.dtypes) for row in rows):
        members = [row for row in rows if (row.model, row.dtypes) == key]
        first = members[0]
        how = "round by round" if first.side_by_side else "in turn"
        blocks.append(
            f"\n{first.model} {first.dtypes}: {first.tensors} tensors, {first.parameters:,} parameters, {how}\n"
            + "\n".join(_step_lines(members, copy_bandwidth))
        )
    return "\n".join([*blocks, "", STEP_NOTES])


def _step_lines(rows: Sequence[StepRow], copy_bandwidth: float) -> Iterator[str]:
    cells = []
    for row in rows:
        if row.device_s is None or row.host_s is None or row.bytes_per_s is None or row.peak_extra_bytes is None:
            continue
        device = [f"{1e3 * value:.3f}" for value in (row.device_s.median, row.device_s.p10, row.device_s.p90)]
        share = f"{100 * row.bytes_per_s / copy_bandwidth:.0f} %"
        rate, extra = f"{row.bytes_per_s / 1e9:.0f}", f"{row.peak_extra_bytes / 2**20:.1f}"
        cells.append([row.contender, *device, f"{1e6 * row.host_s.median:.0f}", rate, share, extra])
    yield format_table(["contender", "device ms", "p10", "p90", "host us", "GB/s", "copy", "extra MiB"], cells)
    yield from (f"{row.contender} failed: {row.error}" for row in rows if row.error is not None)


def sweep_table(rows: Sequence[SweepRow]) -> str:
    """Sorted by time within each list of tensors."""
    cells, failures = [], []
    for row in sorted(rows, key=lambda row: (row.model, row.dtypes, row.device_s.median if row.device_s else 0.0)):
        share = "default" if row.window_share is None else f"{row.window_share:g}"
        plan = row.plan
        settings = [str(plan["chunk"]), str(plan["num_warps"]), str(plan["programs_per_sm"]), share]
        settings.append("A" if plan["stage_a_writes"] else "B")
        if row.device_s is None:
            failures.append(f"{row.model} {row.dtypes} {', '.join(settings)} failed: {row.error}")
            continue
        times = [f"{1e3 * value:.3f}" for value in (row.device_s.median, row.device_s.p10, row.device_s.p90)]
        cells.append([f"{row.model} {row.dtypes}", *settings, *times])
    header = ["sweep", "chunk", "warps", "programs/SM", "window x L2", "h, m by", "device ms", "p10", "p90"]
    return "\n".join([format_table(header, cells), *failures])


def target_table(targets: Sequence[Target]) -> str:
    marks = {True: "pass", False: "FAIL", None: "-"}
    cells = [[target.label, target.bound, target.value, marks[target.passed]] for target in targets]
    return format_table(["target", "bound", "measured", ""], cells)


def describe(machine: Machine) -> dict[str, Any]:
    """The machine and the versions of everything that matters."""
    host = environment.describe(torch.get_num_threads())
    versions: dict[str, str | None] = {}
    for package in ("triton", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {**host, "cpu": host["device"], **versions, **machine.describe(), "kernel": platform.release()}


def record(
    described: dict[str, Any], scale: Scale, results: Results, targets: Sequence[Target], ended: str
) -> dict[str, Any]:
    """Everything, ready for JSON; `ended` is "complete", or why the run stopped early."""
    settings = {key: value for key, value in asdict(scale).items() if key not in ("specs", "grid_dtypes")}
    return {
        "environment": described,
        "settings": settings,
        "ended": ended,
        "copy_bytes_per_s": {"best": max(results.copy_samples, default=None), "samples": results.copy_samples},
        "targets": [asdict(target) for target in targets],
        "seconds": results.seconds,
        **{section: [asdict(row) for row in results.rows[section]] for section in SECTIONS},
        "failures": {section: [asdict(failure) for failure in rows] for section, rows in results.failures.items()},
        "notes": STEP_NOTES,
    }


def save(path: Path, record: dict[str, Any]) -> None:
    """Write beside it and rename, so that a run that is killed leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")
    scratch.replace(path)


def _finite(value: Any) -> Any:
    """The same, with numbers that JSON does not have as text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
