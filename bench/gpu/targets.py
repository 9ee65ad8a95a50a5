"""The figures held against what was promised."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.byte_table import Dtypes, item_sizes, least_bytes
from bench.contenders import ADAMW, COMPILED, FOREACH, FUSED
from bench.gpu.checks import WITHOUT_LOSS, HostRow, LaunchRow, host_time
from bench.gpu.contenders import PASS_ALONE
from bench.shapes import NamedShape
from bench.timing import StepRow

LIMIT_MULTIPLE = 1.15
#: Most time in units of AdamW fused, fp32.
ADAMW_MULTIPLES = {
    "resnet50": 1.0, "vit_b_16": 1.0, "gpt2": 1.0, "vit_l_16": 1.1, "bert_large": 1.1, "llama_7b": 1.3,
}  # fmt: skip
SMALL_MODELS = ("resnet50", "vit_b_16", "gpt2")
FOREACH_SMALL, FOREACH_LARGE = 2.5, 2.0
HOST_SECONDS, MOST_LAUNCHES = 100e-6, 3
#: "Flat": the host time of the most groups over that of one group. The bound is this benchmark's own.
FLAT_MULTIPLE = 1.25


@dataclass(frozen=True)
class Target:
    """What was promised, what was measured; `passed` is None where there is no measurement."""

    label: str
    bound: str
    value: str
    passed: bool | None


def plan_bytes(sizes: Sequence[int], dtypes: Dtypes, l2_bytes: int) -> float:
    """Bytes that a step must move when stage A writes h and m: the least, and p and m again where they have left L2.

    A tensor whose p and m fit into L2 moves the least: g and h are marked to leave first. Of a larger one stage B,
    newest first, finds as much as fits. Ideal, since L2 holds other things too, and marks are wishes.
    """
    p, g, state = item_sizes(dtypes)
    held = l2_bytes / (p + state)
    missed = sum(max(0.0, size - held) for size in sizes)
    return sum(sizes) * least_bytes(p, g, state) + missed * (p + state)


def plan_seconds(shapes: Iterable[NamedShape], dtypes: Dtypes, l2_bytes: int, copy_bytes_per_s: float) -> float:
    """Time for the bytes of the plan at the bandwidth of a copy."""
    return plan_bytes([math.prod(shape) for _, shape in shapes], dtypes, l2_bytes) / copy_bytes_per_s


def step_targets(rows: Sequence[StepRow], limits: Mapping[tuple[str, str], float], fp32: str) -> Iterator[Target]:
    """Targets on device time; ``limits[model, dtypes]`` is the time of the plan's bytes."""
    times = {(row.model, row.dtypes, row.contender): row.device_s.median for row in rows if row.device_s is not None}
    for (model, dtypes), limit in limits.items():
        ours = times.get((model, dtypes, FUSED), times.get((model, dtypes, PASS_ALONE)))
        yield _at_most(f"{model} {dtypes}: x time of the plan's bytes at copy speed", ours, limit, LIMIT_MULTIPLE)
    models = [model for model, dtypes in limits if dtypes == fp32]
    for model in models:
        ours = times.get((model, fp32, FUSED))
        if model in ADAMW_MULTIPLES:
            theirs = times.get((model, fp32, ADAMW))
            yield _at_most(f"{model} {fp32}: x AdamW fused", ours, theirs, ADAMW_MULTIPLES[model])
        needed = FOREACH_SMALL if model in SMALL_MODELS else FOREACH_LARGE
        foreach = times.get((model, fp32, FOREACH))
        faster = None if ours is None or foreach is None else foreach / ours
        value = "not measured" if faster is None else f"{faster:.2f}"
        yield Target(
            f"{model} {fp32}: times faster than foreach",
            f">= {needed}",
            value,
            None if faster is None else faster >= needed,
        )


def compiled_targets(rows: Sequence[StepRow]) -> Iterator[Target]:
    """Of every list for which the compiled reference was there in time, beside the fused path in the same rounds."""
    times = {(row.model, row.dtypes, row.contender): row.device_s.median for row in rows if row.device_s is not None}
    for model, dtypes, contender in times:
        if contender == COMPILED:
            ours = times.get((model, dtypes, FUSED))
            yield _at_most(f"{model} {dtypes}: x reference compiled", ours, times[model, dtypes, COMPILED], 1.0)


def _at_most(label: str, ours: float | None, theirs: float | None, multiple: float) -> Target:
    if ours is None or theirs is None:
        return Target(label, f"<= {multiple:.2f}", "not measured", None)
    return Target(label, f"<= {multiple:.2f}", f"{ours / theirs:.2f}", ours <= multiple * theirs)


def host_targets(rows: Sequence[HostRow]) -> Iterator[Target]:
    """Host time, and that it does not grow with groups."""
    found = host_time(rows)
    asked = [row.groups for row in rows if row.contender == FUSED]
    if not asked:
        yield Target("host time per step", f"<= {1e6 * HOST_SECONDS:.0f} us", "not measured", None)
        return
    fewest, most = min(asked), max(asked)
    tensors = rows[0].tensors
    for groups in (fewest, most):
        label, bound = f"host time per step, {tensors} tensors, {groups} groups", f"<= {1e6 * HOST_SECONDS:.0f} us"
        seconds = found.get(groups)
        value = "not measured" if seconds is None else f"{1e6 * seconds:.0f} us"
        yield Target(label, bound, value, None if seconds is None else seconds <= HOST_SECONDS)
    yield _at_most(f"host time, {most} groups x {fewest} groups", found.get(most), found.get(fewest), FLAT_MULTIPLE)


def launch_targets(rows: Sequence[LaunchRow]) -> Iterator[Target]:
    """Launches of a step, with a loss to take in and without."""
    for row in rows:
        if row.contender in (FUSED, WITHOUT_LOSS):
            label = f"launches per step, {row.tensors} tensors, {row.contender}"
            measured = row.error is None
            yield Target(
                label,
                f"<= {MOST_LAUNCHES}",
                f"{row.launches} + {row.copies} copies" if measured else "not measured",
                row.launches <= MOST_LAUNCHES if measured else None,
            )
