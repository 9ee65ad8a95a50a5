"""The results as pictures: step time, bandwidth and host time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench.contenders import ADAMW, ADAMW_FOREACH, COMPILED, FOREACH, FUSED, LOOP, REFERENCE, SGD, SGD_FOREACH
from bench.figure import RUN_COLORS
from bench.host import COMPILED_WALK, PLAIN
from bench.report.results import HostFile, Results, StepFile
from bench.report.text import has_picture, picture_of
from bench.shapes import MODELS
from bench.timing import Spread, StepRow

#: A colour a path; torch's optimizers are grey. Everybody else is left to the tables.
STYLES: dict[str, tuple[str, str]] = {
    FUSED: (RUN_COLORS[0], "-"),
    FOREACH: (RUN_COLORS[1], "-"),
    REFERENCE: (RUN_COLORS[2], "-"),
    COMPILED: (RUN_COLORS[2], "--"),
    LOOP: (RUN_COLORS[3], "-"),
    ADAMW: ("0.2", "-"),
    ADAMW_FOREACH: ("0.2", "--"),
    SGD: ("0.6", "-"),
    SGD_FOREACH: ("0.6", "--"),
}


def draw(results: Results, folder: Path) -> Iterator[Path]:
    """A picture for each file of step times of several lists, with the host times of its device."""
    for found in filter(has_picture, results.steps):
        path = folder / picture_of(found.name)
        figure = figure_of(found, results.hosts)
        figure.savefig(path, dpi=110)
        yield path


def figure_of(found: StepFile, hosts: Sequence[HostFile]) -> Figure:
    """Three panels: time of models against parameters, bandwidth of equal tensors against their size, host time against
    the number of tensors.
    """
    dtypes, *others = dict.fromkeys(row.dtypes for row in found.rows)
    rows = [row for row in found.rows if row.dtypes == dtypes and row.device_s is not None]
    figure = Figure(figsize=(13, 5), layout="constrained")
    elsewhere = f"; {', '.join(others)} in docs/speed.md" if others else ""
    figure.suptitle(f"{found.environment['device']}, {dtypes}{elsewhere}")
    time, bandwidth, host = figure.subplots(1, 3)
    models = [row for row in rows if row.model in MODELS]
    equal = [row for row in rows if row.model not in MODELS]
    _lines(time, models or rows, lambda row: row.parameters, lambda row: _median(row.device_s, 1e3))
    time.set(title="Step time", xlabel="parameters", ylabel="ms, median")
    _lines(bandwidth, equal or rows, mean_size, lambda row: None if row.bytes_per_s is None else row.bytes_per_s / 1e9)
    if found.copy_bandwidth is not None:
        copy = bandwidth.axhline(
            found.copy_bandwidth / 1e9, color="0.3", ls=":", label="roofline: best copy of the run"
        )
        bandwidth.legend(handles=[copy], loc="lower right", fontsize="small")
    size = "elements per tensor" if equal else "elements per tensor, mean"
    bandwidth.set(title="Bandwidth (least bytes over time)", xlabel=size, ylabel="GB/s, median")
    _lines(host, rows, lambda row: row.tensors, lambda row: _median(row.host_s, 1e6))
    hosts = [file for file in hosts if file.environment["device"] == found.environment["device"]]
    for file in hosts:
        costs = [cost for cost in file.costs if (cost.walk, cost.groups, cost.kind) == (COMPILED_WALK, 1, PLAIN)]
        host.plot(
            [cost.tensors for cost in costs],
            [1e6 * cost.step_s.median for cost in costs],
            color=STYLES[FUSED][0],
            ls=":",
            marker="s",
            ms=4,
            label="DALS fused, no launches",
        )
    host.set(title="Host time", xlabel="tensors", ylabel="us, median")
    if hosts:
        host.legend(handles=host.get_lines()[-len(hosts) :], loc="best", fontsize="small")
    for axis in (time, bandwidth, host):
        axis.set(xscale="log", yscale="log")
        low, high = axis.get_xlim()
        widen = max(1.0, (10 * low / high) ** 0.5)  # to a decade, which has a power of ten in it
        axis.set_xlim(low / widen, high * widen)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(color="0.9", lw=0.6)
    shown = {str(line.get_label()): line for axis in (time, bandwidth) for line in axis.get_lines()}
    handles = [shown[contender] for contender in STYLES if contender in shown]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))
    return figure


def _median(spread: Spread | None, factor: float) -> float | None:
    return None if spread is None else factor * spread.median


def mean_size(row: StepRow) -> float:
    """Elements per tensor; exact for the lists of equal tensors."""
    return row.parameters / max(1, row.tensors)


def _lines(
    axis: Axes, rows: Sequence[StepRow], x_of: Callable[[StepRow], float], y_of: Callable[[StepRow], float | None]
) -> None:
    """A line per contender, its points in the order of x."""
    for contender, (color, style) in STYLES.items():
        points = [(x_of(row), y_of(row)) for row in rows if row.contender == contender]
        found = np.array(sorted((x, y) for x, y in points if y is not None))
        if len(found):
            axis.plot(found[:, 0], found[:, 1], style, color=color, marker="o", ms=4, label=contender)
