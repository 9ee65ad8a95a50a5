"""The GPU benchmark's results as text and as one JSON record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.cache_model import plan_in_use
from bench.gpu.checks import HostRow, LaunchRow
from bench.gpu.correctness import Check
from bench.gpu.runner import SECTIONS, Results
from bench.gpu.scale import Scale
from bench.gpu.sweep import SweepRow
from bench.gpu.targets import Target, counted
from bench.step_table import notes, steps_text
from bench.table import format_table


def section_text(section: str, results: Results) -> str:
    """A section's table, its failures below."""
    rows = results.rows[section]
    if not rows and not results.failures[section] and not results.left_out[section]:
        return f"{section}: nothing to do"
    makers: dict[str, Any] = {
        "launches": launch_table,
        "host": host_table,
        "steps": lambda rows: steps_text(rows, results.copy_bandwidth) + notes(True),
        "compiled": lambda rows: steps_text(rows, results.copy_bandwidth),
        "sweep": sweep_table,
    }
    lines = [f"{section} ({results.seconds[section]:.0f} s)"]
    if rows:
        lines.append(makers.get(section, check_table)(rows))
    lines += [f"{failure.label} failed: {failure.error}" for failure in results.failures[section]]
    if results.left_out[section]:
        lines.append(f"left out: {'; '.join(results.left_out[section])}")
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


def sweep_table(rows: Sequence[SweepRow]) -> str:
    """Sorted by time within each list of tensors."""
    cells, failures = [], []
    for row in sorted(rows, key=lambda row: (row.model, row.dtypes, row.device_s.median if row.device_s else 0.0)):
        window = "default" if row.window_per_program is None else f"{row.window_per_program:g}"
        plan = row.plan
        settings = [str(plan[name]) for name in ("chunk", "tile", "num_warps", "programs_per_sm")] + [window]
        settings += ["A" if plan["stage_a_writes"] else "B", "yes" if plan["evict_first"] else "no"]
        settings.append("same" if plan["same_runs"] else "widest")
        settings += ["chunk" if plan["most_in_b"] else "as A's", "yes" if plan["in_pairs"] else "no"]
        if row.device_s is None:
            failures.append(f"{row.model} {row.dtypes} {', '.join(settings)} failed: {row.error}")
            continue
        times = [f"{1e3 * value:.3f}" for value in (row.device_s.median, row.device_s.p10, row.device_s.p90)]
        cells.append([f"{row.model} {row.dtypes}", *settings, *times])
    header = [
        "sweep",
        "chunk",
        "tile",
        "warps",
        "programs/SM",
        "window / programs",
        "h, m by",
        "evict first",
        "runs",
        "B's tiles",
        "pairs",
        "device ms",
        "p10",
        "p90",
    ]
    return "\n".join([format_table(header, cells), *failures])


def target_table(targets: Sequence[Target]) -> str:
    marks = {True: "pass", False: "FAIL", None: "-"}
    cells = [[target.label, target.bound, target.value, marks[target.passed]] for target in targets]
    return format_table(["target", "bound", "measured", ""], cells) + "\n\n" + counted(targets)


def record(
    described: dict[str, Any], scale: Scale, results: Results, targets: Sequence[Target], ended: str
) -> dict[str, Any]:
    """Everything, ready for JSON; `ended` is "complete", or why the run stopped early."""
    settings = {key: value for key, value in asdict(scale).items() if key not in ("specs", "grid_dtypes")}
    return {
        "environment": described,
        "settings": {**settings, "plan": plan_in_use()},
        "ended": ended,
        "conditions": results.conditions,
        "copy_bytes_per_s": {"best": max(results.copy_samples, default=None), "samples": results.copy_samples},
        "targets": [asdict(target) for target in targets],
        "seconds": results.seconds,
        **{section: [asdict(row) for row in results.rows[section]] for section in SECTIONS},
        "failures": {section: [asdict(failure) for failure in rows] for section, rows in results.failures.items()},
        "left_out": results.left_out,
        "to_come": results.to_come,
        "notes": notes(True),
    }
