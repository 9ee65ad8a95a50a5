"""The tuning sweep: chunk, tile and warps, then programs, then how 16-bit numbers are read beside float32, then window,
writes and marks, each at the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from bench.byte_table import SHORT_NAMES, Dtypes
from bench.cache_model import window_chunks
from bench.compiled import hyperparameters
from bench.gpu.contenders import tensor_set
from bench.gpu.driver import PassDriver, Plan
from bench.machine import Machine
from bench.shapes import NamedShape
from bench.timing import Sampler, Spread, make_parameters, one_line
from fused_dals.fused import programs_on

CHUNKS, TILES, WARPS, PROGRAMS = (4096, 8192, 16384), (2048, 4096), (4, 8), (1, 2, 3, 4)
#: As multiples of the number of programs.
WINDOWS = (0.0, 0.5, 1.0, 1.5, 2.0, math.inf)
#: 32-bit registers of a multiprocessor, of every NVIDIA GPU that the kernels run on.
REGISTERS_PER_SM = 65536
#: A thread is given so many more at a time: of 85 for three programs with 8 warps it would get 88, and two would run.
REGISTERS_AT_A_TIME = 8
#: Whether stage A writes h and m, and whether data that is not needed again is marked "evict first".
WRITES_AND_MARKS = ((True, True), (True, False), (False, True))


@dataclass
class SweepRow:
    """One plan's time on one list of tensors; `window_per_program` chunks, None for the default window."""

    model: str
    dtypes: str
    plan: dict[str, Any]
    window_per_program: float | None  # infinite: all A before all B
    device_s: Spread | None = None
    error: str | None = None


def fitting(plan: Plan) -> Plan:
    """With registers for all its programs per SM, where these, or a thread's share of a tile, are more than by default.

    The compiler would take more, for larger tiles up to 179 a thread, and the programs would run one after the other.
    """
    usual = Plan()
    same_tile = plan.tile * usual.num_warps <= usual.tile * plan.num_warps
    if same_tile and plan.num_warps * plan.programs_per_sm <= usual.num_warps * usual.programs_per_sm:
        return replace(plan, max_registers=None)
    share = REGISTERS_PER_SM // (32 * plan.num_warps * plan.programs_per_sm)
    return replace(plan, max_registers=min(255, share // REGISTERS_AT_A_TIME * REGISTERS_AT_A_TIME))


def are_mixed(dtypes: Dtypes) -> bool:
    """Whether parameters and state differ in size, so that ``same_runs`` makes a difference."""
    return dtypes[0].itemsize != dtypes[2].itemsize


def compiled_variants(dtypes: Dtypes) -> list[Plan]:
    """The plans of a sweep that differ in machine code and are worth compiling ahead.

    The other ways of writing and marking are tried with one chunk and number of warps, most likely the default ones.
    """
    shapes = [fitting(Plan(chunk=c, tile=t, num_warps=w)) for c, t, w in product(CHUNKS, TILES, WARPS)]
    ways = [Plan(stage_a_writes=writes, evict_first=marks) for writes, marks in WRITES_AND_MARKS]
    runs = [replace(plan, same_runs=True) for plan in shapes] if are_mixed(dtypes) else []
    return list(dict.fromkeys([*shapes, *runs, *ways]))


def sweep(
    machine: Machine,
    model: str,
    dtypes: Dtypes,
    shapes: Sequence[NamedShape],
    samples: int,
    time_is_up: Callable[[], bool],
    seed: int,
) -> Iterator[SweepRow]:
    """Rows in the order in which they were measured; ends early when time is up, and says so in its last row."""
    named = make_parameters(shapes, dtypes, machine.device, seed)
    tensors = tensor_set(named, dtypes[2])
    dtypes_name = "/".join(SHORT_NAMES[dtype] for dtype in dtypes)
    best: tuple[float, Plan, float | None] = (math.inf, Plan(), None)
    measured: set[tuple[Plan, float | None]] = set()

    def stages(stage: int, plan: Plan, multiple: float | None) -> Iterator[tuple[Plan, float | None]]:
        if stage == 0:
            shapes = product(CHUNKS, TILES, WARPS)
            yield from ((fitting(replace(plan, chunk=c, tile=t, num_warps=w)), multiple) for c, t, w in shapes)
        elif stage == 1:
            yield from ((fitting(replace(plan, programs_per_sm=programs)), multiple) for programs in PROGRAMS)
        elif stage == 2:
            yield from ((replace(plan, same_runs=same), multiple) for same in (False, True)[: 1 + are_mixed(dtypes)])
        else:
            plans = (replace(plan, stage_a_writes=a, evict_first=marks) for a, marks in WRITES_AND_MARKS)
            yield from ((other, w) for other in plans for w in WINDOWS)

    for stage in range(4):
        for plan, multiple in stages(stage, best[1], best[2]):
            if (plan, multiple) in measured:
                continue
            measured.add((plan, multiple))
            row = SweepRow(model, dtypes_name, asdict(plan), multiple)
            if time_is_up():
                row.error = "left out from here on: time is up"
                yield row
                return
            if multiple is not None:
                programs = programs_on(machine.device, plan.programs_per_sm)
                row.plan = asdict(replace(plan, window=window_chunks(multiple, programs)))
            try:
                driver = PassDriver(tensors, Plan(**row.plan), hyperparameters(lr=1e-5))
                sampler = Sampler(machine, driver.step)
                row.device_s = Spread.of([sampler.sample() for _ in range(samples)])
            except Exception as error:
                row.error = one_line(error)
            else:
                if row.device_s.median < best[0]:
                    best = row.device_s.median, plan, multiple
            yield row
