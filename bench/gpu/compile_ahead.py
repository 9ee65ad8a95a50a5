"""All kernels that a run needs, compiled in several processes beforehand."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.byte_table import STEP_DTYPES, Dtypes
from bench.gpu.correctness import Check, dtypes_label
from bench.gpu.driver import compile_variant
from bench.gpu.features import KERNELS, compile_kernels
from bench.gpu.scale import SWEEP_DTYPES, Scale
from bench.gpu.sweep import compiled_variants
from bench.timing import one_line
from fused_dals.host_walk import HOST_WALK, OFF
from fused_dals.launch_plan import IN_USE, LaunchPlan

#: Processes at most, and seconds that they have.
COMPILE_WORKERS, COMPILE_SECONDS = 8, 90.0

Variant = tuple[Dtypes, LaunchPlan]

#: What it is called, and what a process runs for it: a function and its arguments after the device.
Compilation = tuple[str, Callable[..., None], tuple[Any, ...]]


def variants_of(scale: Scale) -> list[Variant]:
    """Kernels that the run needs; how many tensors there are makes no difference to them."""
    ways = [LaunchPlan(chunk=scale.chunk, stage_a_writes=writes) for writes in (True, False)]
    found = [(dtypes, plan) for plan in ways for dtypes in scale.grid_dtypes]
    found += [(STEP_DTYPES[name], plan) for plan in ways for name in ("fp32", "mixed")]
    found += [(STEP_DTYPES[name], IN_USE) for name in ("fp32", *scale.step_dtypes)]
    if scale.sweep_models:
        sets = [STEP_DTYPES[name] for name in SWEEP_DTYPES]
        found += [(dtypes, plan) for dtypes in sets for plan in compiled_variants(dtypes)]
    return list(dict.fromkeys((dtypes, plan.decided(*dtypes)) for dtypes, plan in found))


def compilations_of(scale: Scale) -> list[Compilation]:
    """All that is to be compiled: variants of the pass, and the kernels of what the optimizer offers beyond it."""
    found: list[Compilation] = [
        (f"{dtypes_label(dtypes)}, {plan}", compile_variant, (dtypes, plan)) for dtypes, plan in variants_of(scale)
    ]
    return found + [(name, compile_kernels, (name,)) for name in (KERNELS if scale.features else ())]


def _without_walk() -> None:
    os.environ[OFF] = "0"


def compile_ahead(device: torch.device, compilations: Sequence[Compilation], workers: int) -> list[Check]:
    """Compile in several processes, whose results later steps find on disk; without workers, here.

    Beside them the walk over tensors is compiled, so that no compiler runs while steps are timed.
    """
    start = time.monotonic()
    HOST_WALK.want()
    done, errors = 0, []
    if workers:
        # Leaving ends the processes, but no compiler of a walk of their own, so that they have none.
        with multiprocessing.get_context("spawn").Pool(workers, _without_walk) as pool:
            calls = [pool.apply_async(run, (device, *arguments)) for _, run, arguments in compilations]
            for call, (label, _, _) in zip(calls, compilations, strict=True):
                try:
                    call.get(timeout=max(0.1, COMPILE_SECONDS - (time.monotonic() - start)))
                    done += 1
                except Exception as error:
                    errors.append(f"{label}: {one_line(error)}")
    else:
        for _, run, arguments in compilations:
            run(device, *arguments)
            done += 1
    taken = time.monotonic() - start
    detail = "; ".join([f"{done} of {len(compilations)} variants in {taken:.0f} s, {workers} processes", *errors[:3]])
    walk = "used by every step from here on" if HOST_WALK.want(wait=True) is not None else HOST_WALK.why_not
    return [
        Check("kernels compiled", not errors, detail, {"seconds": taken, "variants": done}),
        Check("walk over tensors compiled", HOST_WALK.compiled is not None, walk, {}),
    ]
