"""Rows of step times as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bench.contenders import BASELINE, GRAPH, is_graph
from bench.table import format_table
from bench.timing import Spread, StepRow, ratios

#: What the columns mean, where work is queued on a device, and where it is not.
DEVICE_NOTES = """\
ms: CUDA events around several steps back to back, behind other work, so that the host's time is hidden as far as the
queue of launches is long; *: the device waited for the host all the same, whose time it is. host: step() into an
empty queue, without waiting. A loop of steps takes the larger one."""
HOST_NOTES = """\
ms: wall clock of a step, of several where one is short. What updates in place may be faster than a copy, which also
reads the lines that it writes."""
STEP_NOTES = """\
p10, p90: percentiles of the samples. x: time in units of the baseline's, round by round.
GB/s: bytes that the optimizer must move at least (28, 22 or 14 per parameter for DALS, one gradient more to clip, 4
bytes more with a compensation, less where AdamW and SGD keep their state in bf16) over the time. copy: share of the
bandwidth of large copies in this run, read plus written.
All step the same tensors; "in turn" where memory does not hold all their states at once, else round by round."""


def notes(queues_work: bool) -> str:
    """What the columns of a table mean."""
    return f"{DEVICE_NOTES if queues_work else HOST_NOTES}\n{STEP_NOTES}"


def steps_text(rows: Sequence[StepRow], copy_bandwidth: float | None) -> str:
    """A table per model and dtypes."""
    blocks = [] if copy_bandwidth is None else [f"copy: {copy_bandwidth / 1e9:.1f} GB/s, read plus written\n"]
    for key in dict.fromkeys((row.model, row.dtypes) for row in rows):
        members = [row for row in rows if (row.model, row.dtypes) == key]
        blocks.append(f"{title(members[0])}\n" + "\n".join(_lines(members, copy_bandwidth)) + "\n")
    return "\n".join(blocks)


def title(row: StepRow) -> str:
    how = "round by round" if row.side_by_side else "in turn"
    return f"{row.model} {row.dtypes}: {row.tensors:,} tensors, {row.parameters:,} parameters, {how}"


def _lines(rows: Sequence[StepRow], copy_bandwidth: float | None) -> Iterator[str]:
    header, cells = step_cells(rows, copy_bandwidth)
    if cells:
        yield format_table(header, cells)
    yield from (f"{row.contender} failed: {row.error}" for row in rows if row.error is not None)


def step_cells(rows: Sequence[StepRow], copy_bandwidth: float | None) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the rows that have figures; columns that none of them has are left out."""
    measured = [row for row in rows if row.device_s is not None]
    relative = ratios(rows, BASELINE)

    def spread(row: StepRow) -> Spread:
        assert row.device_s is not None
        return row.device_s

    columns: dict[str, Callable[[StepRow], str | None]] = {
        "contender": lambda row: row.contender,
        "ms": lambda row: f"{1e3 * spread(row).median:.3f}" + "*" * waits_for_host(row, rows),
        "p10": lambda row: f"{1e3 * spread(row).p10:.3f}",
        "p90": lambda row: f"{1e3 * spread(row).p90:.3f}",
        f"x {BASELINE}": lambda row: f"{relative[row.contender].median:.2f}" if row.contender in relative else None,
        "host us": lambda row: None if row.host_s is None else f"{1e6 * row.host_s.median:.0f}",
        "GB/s": lambda row: None if row.bytes_per_s is None else f"{row.bytes_per_s / 1e9:.1f}",
        "copy": lambda row: _share(row, copy_bandwidth),
        "extra MiB": _extra_memory,
        "launches": lambda row: None if row.launches is None else str(row.launches),
    }
    found = {name: [cell(row) for row in measured] for name, cell in columns.items()}
    kept = {name: cells for name, cells in found.items() if any(cell is not None for cell in cells)}
    return list(kept), [[cell or "-" for cell in line] for line in zip(*kept.values(), strict=True)]


#: A replay launches what its contender does, and nothing can be much faster than that but by not waiting.
MOST_BY_WAITING = 1.5


def waits_for_host(row: StepRow, rows: Sequence[StepRow]) -> bool:
    """Whether a row's time is the host's: as the sampler found, or as the same steps in a graph tell."""
    if row.host_bound:
        return True
    key = row.model, row.dtypes, row.contender + GRAPH
    replayed = next((some for some in rows if (some.model, some.dtypes, some.contender) == key), None)
    if row.device_s is None or replayed is None or replayed.device_s is None:
        return False
    return row.device_s.median > MOST_BY_WAITING * replayed.device_s.median


def launches_text(rows: Sequence[StepRow]) -> str:
    """What each contender's step launches, a line per model and dtypes."""
    lines = ["launches per step"]
    for key in dict.fromkeys((row.model, row.dtypes) for row in rows):
        members = [row for row in rows if (row.model, row.dtypes) == key]
        counts = [f"{row.contender} {row.launches}" for row in members if row.launches]
        lines.append(f"{' '.join(key)}: {', '.join(counts) or 'not counted'}")
        lines += [f"{row.contender} not counted: {row.launches_error}" for row in members if row.launches_error]
    return "\n".join(lines)


def _share(row: StepRow, copy_bandwidth: float | None) -> str | None:
    if row.bytes_per_s is None or copy_bandwidth is None:
        return None
    return f"{100 * row.bytes_per_s / copy_bandwidth:.0f} %"


def _extra_memory(row: StepRow) -> str | None:
    """Not of graphs, for which older files have the 0 bytes of a replay."""
    return None if row.peak_extra_bytes is None or is_graph(row.contender) else f"{row.peak_extra_bytes / 2**20:.1f}"


def row_from(saved: Mapping[str, Any]) -> StepRow:
    """A row as it was before it went to JSON."""
    spreads = {name: None if saved[name] is None else Spread(**saved[name]) for name in ("device_s", "host_s")}
    return StepRow(**{**saved, **spreads})
