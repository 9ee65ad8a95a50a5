"""The figures held against what was promised."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bench.byte_table import Dtypes, item_sizes, least_bytes
from bench.contenders import ADAMW, BF16_STATE, COMPILED, FOREACH, FUSED
from bench.gpu.checks import CONTROL, WITHOUT_LOSS, HostRow, LaunchRow
from bench.gpu.contenders import PASS_ALONE
from bench.shapes import NamedShape
from bench.timing import Spread, StepRow, is_left_out

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
#: Fewer samples are no judgement.
LEAST_SAMPLES = 5

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """What was promised, what was measured; `passed` is None where there is no measurement. ``figures``: what the value
    was made of, in seconds, and of how many samples."""

    label: str
    bound: str
    value: str
    passed: bool | None
    figures: dict[str, float] = field(default_factory=dict)


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
    """Targets on device time; ``limits[model, dtypes]``, of all that was to be measured: the time of the plan's bytes.

    Against others in the same rounds, ratios are taken round by round.
    """
    of = {(row.model, row.dtypes, row.contender): row for row in rows}
    for (model, dtypes), limit in limits.items():
        ours = of.get((model, dtypes, FUSED)) or of.get((model, dtypes, BF16_STATE))
        alone = of.get((model, dtypes, PASS_ALONE))
        yield _beside_limit(f"{model} {dtypes}: x time of the plan's bytes at copy speed", ours, limit, alone)
    for model in [model for model, dtypes in limits if dtypes == fp32]:
        ours = of.get((model, fp32, FUSED))
        if model in ADAMW_MULTIPLES:
            adamw, most = of.get((model, fp32, ADAMW)), ADAMW_MULTIPLES[model]
            yield _ratio(f"{model} {fp32}: x AdamW fused", ours, ours, adamw, most=most)
        foreach, least = of.get((model, fp32, FOREACH)), FOREACH_SMALL if model in SMALL_MODELS else FOREACH_LARGE
        yield _ratio(f"{model} {fp32}: times faster than foreach", ours, foreach, ours, least=least)


def compiled_targets(rows: Sequence[StepRow]) -> list[Target]:
    """Of every list for which the compiled reference was there in time, beside the fused path in the same rounds."""
    of = {(row.model, row.dtypes, row.contender): row for row in rows}
    pairs = [
        (model, dtypes, row)
        for (model, dtypes, contender), row in of.items()
        if contender == COMPILED and row.device_s is not None
    ]
    if not pairs:
        return [Target("x reference compiled", "<= 1.00", NOT_MEASURED, None)]
    return [
        _ratio(f"{model} {dtypes}: x reference compiled", ours, ours, theirs, most=1.0)
        for model, dtypes, theirs in pairs
        for ours in (of.get((model, dtypes, FUSED)),)
    ]


def _unmeasured(label: str, bound: str, ours: StepRow | HostRow | LaunchRow | None) -> Target:
    """What went wrong with our own step is a failure, whatever it was; what was left out is not."""
    if ours is None or ours.error is None or is_left_out(ours.error):
        return Target(label, bound, NOT_MEASURED, None)
    return Target(label, bound, f"failed: {ours.error}"[:80], False)


def _ratio(
    label: str,
    ours: StepRow | None,
    row: StepRow | None,
    other: StepRow | None,
    *,
    most: float = math.inf,
    least: float = 0.0,
) -> Target:
    """Time of ``row`` in units of that of ``other``."""
    bound = f">= {least:.2f}" if least else f"<= {most:.2f}"
    if row is None or other is None or row.device_s is None or other.device_s is None:
        return _unmeasured(label, bound, ours)
    samples = min(len(row.device_samples_s), len(other.device_samples_s))
    figures = {"seconds": row.device_s.median, "others_seconds": other.device_s.median, "samples": samples}
    if row.side_by_side and other.side_by_side:
        pairs = zip(row.device_samples_s, other.device_samples_s, strict=False)
        spread = Spread.of([own / theirs for own, theirs in pairs])
        ratio, value = spread.median, f"{spread.median:.3f} ({spread.p10:.3f} to {spread.p90:.3f})"
        figures |= {"p10": spread.p10, "p90": spread.p90}
    else:
        ratio = row.device_s.median / other.device_s.median
        value = f"{ratio:.3f} (in turn)"
    return _judged(label, bound, value, least <= ratio <= most, figures)


def _beside_limit(label: str, ours: StepRow | None, limit: float, alone: StepRow | None) -> Target:
    bound = f"<= {LIMIT_MULTIPLE:.2f}"
    if ours is None or ours.device_s is None:
        return _unmeasured(label, bound, ours)
    ratio = ours.device_s.median / limit
    value = f"{ratio:.3f}"
    figures = {"seconds": ours.device_s.median, "limit_seconds": limit, "samples": len(ours.device_samples_s)}
    if alone is not None and alone.device_s is not None:
        value += f", the pass alone {alone.device_s.median / limit:.3f}"
        figures["pass_alone_seconds"] = alone.device_s.median
    return _judged(label, bound, value, ratio <= LIMIT_MULTIPLE, figures)


def _judged(label: str, bound: str, value: str, passed: bool, figures: dict[str, float]) -> Target:
    few = figures["samples"] < LEAST_SAMPLES
    return Target(label, bound, value + ", too few samples" * few, None if few else passed, figures)


def host_targets(rows: Sequence[HostRow], tensors: int, groups: Sequence[int]) -> Iterator[Target]:
    """Host time, and that it does not grow with groups."""
    found = {row.groups: row for row in rows if row.contender == FUSED}
    fewest, most = min(groups), max(groups)
    for number in dict.fromkeys((fewest, most)):
        label, bound = f"host time per step, {tensors} tensors, {number} groups", f"<= {1e6 * HOST_SECONDS:.0f} us"
        row = found.get(number)
        if row is None or row.host_s is None:
            yield _unmeasured(label, bound, row)
            continue
        seconds = row.host_s.median
        yield Target(label, bound, f"{1e6 * seconds:.0f} us", seconds <= HOST_SECONDS, {"seconds": seconds})
    label, bound = f"host time, {most} groups x {fewest} groups", f"<= {FLAT_MULTIPLE:.2f}"
    one, many = found.get(fewest), found.get(most)
    if one is None or many is None or one.host_s is None or many.host_s is None:
        yield _unmeasured(label, bound, many)
    else:
        ratio = many.host_s.median / one.host_s.median
        yield Target(label, bound, f"{ratio:.2f}", ratio <= FLAT_MULTIPLE)


def launch_targets(rows: Sequence[LaunchRow], counts: Sequence[int]) -> Iterator[Target]:
    """Launches of a step, with a loss to take in and without; where the counter miscounts, nothing is known."""
    of = {(row.contender, row.tensors): row for row in rows}
    bound = f"<= {MOST_LAUNCHES}"
    for tensors in counts:
        control = of.get((CONTROL, tensors))
        if control is not None and control.error is not None:
            yield Target(f"launches per step, {tensors} tensors: control", "2", control.error[:80], False)
        for contender in (FUSED, WITHOUT_LOSS):
            label, row = f"launches per step, {tensors} tensors, {contender}", of.get((contender, tensors))
            if row is None or row.error is not None:
                yield _unmeasured(label, bound, row)
            elif control is None or control.error is not None:
                yield Target(label, bound, NOT_MEASURED, None)
            else:
                yield Target(label, bound, f"{row.launches} + {row.copies} copies", row.launches <= MOST_LAUNCHES)


def own_failures(section: str, rows: Sequence[StepRow | HostRow | LaunchRow]) -> Iterator[Target]:
    """Whatever of ours has failed, also where nothing was promised of it."""
    ours = [row for row in rows if row.contender.startswith("DALS") and row.contender != COMPILED]
    failed = [row for row in ours if row.error is not None and not is_left_out(row.error)]
    if failed:
        value = f"{len(failed)} failed: {failed[0].contender}: {failed[0].error}"[:80]
        yield Target(f"{section}: every step of ours ran", "0 failed", value, False)


def counted(targets: Sequence[Target]) -> str:
    """How many have passed, failed, and not been measured."""
    passed, failed, unknown = (sum(t.passed is verdict for t in targets) for verdict in (True, False, None))
    return f"{passed} passed, {failed} failed, {unknown} not measured"
