"""The tuning sweep: chunk, tile and warps, then programs, then how 16-bit numbers are read, then stage B's tiles, then
window, writes and marks, each at the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from bench.byte_table import SHORT_NAMES, Dtypes
from bench.cache_model import chunk_of, window_chunks
from bench.compiled import hyperparameters
from bench.gpu.contenders import tensor_set
from bench.gpu.driver import PassDriver
from bench.machine import Machine
from bench.shapes import NamedShape
from bench.timing import Sampler, Spread, make_parameters, one_line
from fused_dals.kernels.layout import CHUNK_BYTES
from fused_dals.launch_plan import IN_USE, LaunchPlan

#: Of the bytes of a chunk in use.
CHUNKS = (0.5, 1.0, 2.0)
TILES, WARPS, PROGRAMS = (2048, 4096), (4, 8), (1, 2, 3, 4)
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


def fitting(plan: LaunchPlan) -> LaunchPlan:
    """With registers for all its programs per SM, where these, or a thread's share of a tile, are more than by default.

    The compiler would take more, for larger tiles up to 179 a thread, and the programs would run one after the other.
    """
    same_tile = plan.tile * IN_USE.num_warps <= IN_USE.tile * plan.num_warps
    if same_tile and plan.num_warps * plan.programs_per_sm <= IN_USE.num_warps * IN_USE.programs_per_sm:
        return replace(plan, max_registers=None)
    share = REGISTERS_PER_SM // (32 * plan.num_warps * plan.programs_per_sm)
    return replace(plan, max_registers=min(255, share // REGISTERS_AT_A_TIME * REGISTERS_AT_A_TIME))


def are_mixed(dtypes: Dtypes) -> bool:
    """Whether parameters and state differ in size, so that ``same_runs`` makes a difference."""
    return dtypes[0].itemsize != dtypes[2].itemsize


def shapes_from(plan: LaunchPlan, dtypes: Dtypes) -> list[LaunchPlan]:
    """With other chunks, tiles and warps."""
    chunks = [chunk_of(dtypes, round(factor * CHUNK_BYTES)) for factor in CHUNKS]
    return [fitting(replace(plan, chunk=c, tile=t, num_warps=w)) for c, t, w in product(chunks, TILES, WARPS)]


def reads_from(plan: LaunchPlan, dtypes: Dtypes) -> list[LaunchPlan]:
    """With other ways to read 16-bit numbers: beside float32 ones, or two tiles at a time where there are no others."""
    if are_mixed(dtypes):
        return [replace(plan, same_runs=same) for same in (False, True)]
    return [replace(plan, in_pairs=pairs) for pairs in (True, False)] if dtypes[2].itemsize == 2 else []


def tiles_of_b_from(plan: LaunchPlan) -> list[LaunchPlan]:
    """With whole chunks in stage B, and with the tiles of stage A."""
    return [replace(plan, most_in_b=most) for most in (IN_USE.most_in_b, 0)]


def ways_from(plan: LaunchPlan) -> list[LaunchPlan]:
    """With other ways of writing and marking."""
    return [replace(plan, stage_a_writes=writes, evict_first=marks) for writes, marks in WRITES_AND_MARKS]


def compiled_variants(dtypes: Dtypes) -> list[LaunchPlan]:
    """The plans of a sweep that differ in machine code and are worth compiling ahead.

    All but chunk, tile and warps is tried with one choice of these, most likely the default one; whether runs are the
    same, in all of them.
    """
    usual = IN_USE.decided(*dtypes)
    shapes = shapes_from(usual, dtypes)
    runs = [plan for shape in shapes for plan in reads_from(shape, dtypes)] if are_mixed(dtypes) else []
    others = [*reads_from(usual, dtypes), *tiles_of_b_from(usual), *ways_from(usual)]
    return list(dict.fromkeys([*shapes, *runs, *others]))


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
    best: tuple[float, LaunchPlan, float | None] = (math.inf, IN_USE.decided(*dtypes), None)
    measured: set[tuple[LaunchPlan, float | None]] = set()

    def stages(stage: int, plan: LaunchPlan, multiple: float | None) -> Iterator[tuple[LaunchPlan, float | None]]:
        if stage == 0:
            yield from ((other, multiple) for other in shapes_from(plan, dtypes))
        elif stage == 1:
            yield from ((fitting(replace(plan, programs_per_sm=programs)), multiple) for programs in PROGRAMS)
        elif stage == 2:
            yield from ((other, multiple) for other in reads_from(plan, dtypes))
        elif stage == 3:
            yield from ((other, multiple) for other in tiles_of_b_from(plan))
        else:
            yield from ((other, w) for other in ways_from(plan) for w in WINDOWS)

    for stage in range(5):
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
                programs = plan.programs(machine.device)
                row.plan = asdict(replace(plan, window=window_chunks(multiple, programs)))
            try:
                driver = PassDriver(tensors, LaunchPlan(**row.plan), hyperparameters(lr=1e-5))
                sampler = Sampler(machine, driver.step)
                row.device_s = Spread.of([sampler.sample() for _ in range(samples)])
            except Exception as error:
                row.error = one_line(error)
            else:
                if row.device_s.median < best[0]:
                    best = row.device_s.median, plan, multiple
            yield row
