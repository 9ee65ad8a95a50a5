"""The sections of the GPU benchmark as a list of small jobs: one that fails is a row, and the others still run."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.byte_table import STEP_DTYPES, Dtypes
from bench.compiled import CompileBudget
from bench.gpu.checks import HostRow, LaunchRow, check_waiting, count_launches, time_host
from bench.gpu.contenders import contenders_for
from bench.gpu.correctness import (
    DTYPES,
    Check,
    Spec,
    check_grid,
    check_optimizer,
    dtypes_label,
    grid,
)
from bench.gpu.driver import Plan, compile_variant
from bench.gpu.features import FEATURES, KERNELS, compile_kernels, features
from bench.gpu.races import Crowd, hunt_races
from bench.gpu.sweep import compiled_variants, sweep
from bench.gpu.targets import Target, host_targets, launch_targets, plan_seconds, step_targets
from bench.machine import Machine
from bench.shapes import SHAPES
from bench.timing import StepRow, one_line, time_contenders
from fused_dals.buckets import CHUNK
from fused_dals.host_walk import HOST_WALK

SWEEP_MODELS, SWEEP_DTYPES = ("resnet50", "vit_l_16", "gpt2_xl"), ("fp32", "mixed")
MODELS = ("resnet50", "vit_b_16", "vit_l_16", "bert_large", "gpt2", "gpt2_xl", "llama_7b")
QUICK_MODELS = ("resnet50", "vit_b_16", "gpt2")
CROWD = Crowd(tiny=4000, tiny_elements=3000, huge=3, huge_elements=40_000_000)
#: What the largest model becomes where p, g, h and m do not fit.
SMALLER = {"llama_7b": "llama_1b"}

#: In the order of a run. The profiler counts launches, and once it was there the host may stay slower (pytorch issue
#: 146604: 10 to 20 %), so that times of the host come before.
SECTIONS = ("compile", "correctness", "races", "waiting", "host", "steps", "launches", "features", "sweep")
CHECKED = ("correctness", "races", "waiting", "features")

#: Kernels are compiled in so many processes beforehand, for at most so long.
COMPILE_WORKERS, COMPILE_SECONDS = 8, 90.0


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    models: tuple[str, ...]
    specs: tuple[Spec, ...] = tuple(grid(CHUNK, 300))
    grid_dtypes: tuple[Dtypes, ...] = tuple(DTYPES)
    chunk: int = CHUNK
    crowd: Crowd = CROWD
    reruns: tuple[int, int] = (100, 25)
    launch_counts: tuple[int, ...] = (1, 300, 10_000)
    host_tensors: int = 300
    host_groups: tuple[int, ...] = (1, 10, 100, 300)
    host_samples: int = 100
    features: tuple[str, ...] = FEATURES
    step_dtypes: tuple[str, ...] = tuple(STEP_DTYPES)
    samples: int = 25
    copy_samples: int = 10
    compile_budget: tuple[float, float] = (120.0, 100.0)
    sweep_models: tuple[str, ...] = SWEEP_MODELS
    sweep_samples: int = 5
    seconds: float = 430.0
    seed: int = 0


def scale_for(models: Sequence[str] | None, quick: bool) -> Scale:
    """The whole benchmark, or a look in a minute or two without sweep and large models."""
    if quick:
        return Scale(
            models=tuple(models or QUICK_MODELS),
            reruns=(100, 5),
            step_dtypes=("fp32", "mixed"),
            samples=10,
            compile_budget=(40.0, 40.0),
            sweep_models=(),
            seconds=240.0,
        )
    return Scale(models=tuple(models or MODELS))


@dataclass
class Failure:
    """A job that has no rows to show, and why."""

    label: str
    error: str


@dataclass(frozen=True)
class Job:
    """A part of a section."""

    section: str
    label: str
    run: Callable[[], Iterable[Any]]


@dataclass
class Results:
    """Rows by section, the failures of each, and this run's copy bandwidth in bytes per second."""

    copy_samples: list[float]
    rows: dict[str, list[Any]] = field(default_factory=lambda: {section: [] for section in SECTIONS})
    failures: dict[str, list[Failure]] = field(default_factory=lambda: {section: [] for section in SECTIONS})
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECTIONS, 0.0))

    @property
    def copy_bandwidth(self) -> float:
        """The best sample: no step is let off because the machine was slow for a moment."""
        return max(self.copy_samples)


class Deadline:
    """When the run has to be at its end."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def passed(self) -> bool:
        return time.monotonic() > self.end


def jobs_of(machine: Machine, scale: Scale, results: Results, deadline: Deadline, workers: int) -> list[Job]:
    """Everything to do, in order: what must be right first, what is only worth knowing last."""
    jobs = [Job("compile", "kernels", lambda: compile_ahead(machine.device, compilations_of(scale), workers))]
    for dtypes in scale.grid_dtypes:
        jobs.append(Job("correctness", dtypes_label(dtypes), _grid_job(machine, scale, dtypes)))
    jobs.append(Job("correctness", "optimizer", lambda: [check_optimizer(machine, scale.seed)]))
    many, few = scale.reruns
    for name, writes, reruns in (("fp32", True, many), ("fp32", False, few), ("mixed", True, few)):
        jobs.append(
            Job(
                "races", f"{name}, A {'writes' if writes else 'reads'}", _race_job(machine, scale, name, writes, reruns)
            )
        )
    jobs.append(Job("waiting", "sync debug mode", lambda: check_waiting(machine, scale.host_tensors)))
    jobs.append(
        Job("host", "groups", lambda: time_host(machine, scale.host_tensors, scale.host_groups, scale.host_samples))
    )
    budget = CompileBudget(*scale.compile_budget)
    for model in scale.models:
        for name in scale.step_dtypes:
            jobs.append(Job("steps", f"{model} {name}", _step_job(machine, scale, results, model, name, budget)))
    for count in scale.launch_counts:
        jobs.append(Job("launches", f"{count} tensors", _launch_job(machine, count)))
    checks = features(machine, scale.samples, CompileBudget(*scale.compile_budget), scale.seed)
    jobs += [Job("features", name, checks[name]) for name in scale.features]
    for model in scale.sweep_models:
        for name in SWEEP_DTYPES:
            jobs.append(Job("sweep", f"{model} {name}", _sweep_job(machine, scale, model, name, deadline)))
    return jobs


def run_jobs(
    jobs: Sequence[Job], results: Results, deadline: Deadline, after: Callable[[Job], None], release: Callable[[], None]
) -> None:
    """Run them one after the other; an error, or too little time, is a failure of its section."""
    for job in jobs:
        start = time.monotonic()
        try:
            if deadline.passed():
                raise TimeoutError("left out: time is up")
            for row in job.run():
                results.rows[job.section].append(row)
        except Exception as error:  # whatever it is, the next job may work
            results.failures[job.section].append(Failure(job.label, one_line(error)))
        results.seconds[job.section] += time.monotonic() - start
        try:
            release()
        except Exception as error:
            results.failures[job.section].append(Failure(f"{job.label}, releasing memory", one_line(error)))
        after(job)


# -- jobs ------------------------------------------------------------------------------------------------------------


def _grid_job(machine: Machine, scale: Scale, dtypes: Dtypes) -> Callable[[], Iterable[Check]]:
    return lambda: check_grid(machine, dtypes, scale.specs, scale.chunk, scale.seed)


def _race_job(machine: Machine, scale: Scale, name: str, writes: bool, reruns: int) -> Callable[[], Iterable[Check]]:
    plan = Plan(chunk=scale.chunk, stage_a_writes=writes)
    return lambda: [hunt_races(machine, STEP_DTYPES[name], scale.crowd, plan, reruns, scale.seed)]


def _launch_job(machine: Machine, count: int) -> Callable[[], Iterable[LaunchRow]]:
    return lambda: count_launches(machine, count)


def _step_job(
    machine: Machine, scale: Scale, results: Results, model: str, name: str, budget: CompileBudget
) -> Callable[[], Iterable[StepRow]]:
    def run() -> list[StepRow]:
        dtypes = STEP_DTYPES[name]
        fitting = fitting_model(machine, model)
        shapes = list(SHAPES[fitting]())
        contenders = contenders_for(dtypes, len(shapes), budget)
        results.copy_samples += [machine.copy_bandwidth() for _ in range(scale.copy_samples)]
        return time_contenders(machine, fitting, dtypes, name, shapes, contenders, scale.samples, scale.seed)

    return run


def fitting_model(machine: Machine, model: str) -> str:
    """The model, or the smaller one in its place where fp32 p, g, h and m do not fit."""
    if model not in SMALLER:
        return model
    parameters = sum(torch.Size(shape).numel() for _, shape in SHAPES[model]())
    return model if 16.5 * parameters < machine.free_bytes() else SMALLER[model]


def _sweep_job(
    machine: Machine, scale: Scale, model: str, name: str, deadline: Deadline
) -> Callable[[], Iterator[Any]]:
    shapes = list(SHAPES[model]())
    return lambda: sweep(machine, model, STEP_DTYPES[name], shapes, scale.sweep_samples, deadline.passed, scale.seed)


# -- compiling ahead -------------------------------------------------------------------------------------------------

Variant = tuple[Dtypes, Plan]


def variants_of(scale: Scale) -> list[Variant]:
    """Kernels that the run needs; how many tensors there are makes no difference to them."""
    ways = [Plan(chunk=scale.chunk, stage_a_writes=writes) for writes in (True, False)]
    found = [(dtypes, plan) for plan in ways for dtypes in scale.grid_dtypes]
    found += [(STEP_DTYPES[name], plan) for plan in ways for name in ("fp32", "mixed")]
    found += [(STEP_DTYPES[name], Plan()) for name in ("fp32", *scale.step_dtypes)]
    if scale.sweep_models:
        found += [(STEP_DTYPES[name], plan) for name in SWEEP_DTYPES for plan in compiled_variants()]
    return list(dict.fromkeys(found))


#: What it is called, and what a process runs for it: a function and its arguments after the device.
Compilation = tuple[str, Callable[..., None], tuple[Any, ...]]


def compilations_of(scale: Scale) -> list[Compilation]:
    """All that is to be compiled: variants of the pass, and the kernels of what the optimizer offers beyond it."""
    found: list[Compilation] = [
        (f"{dtypes_label(dtypes)}, {plan}", compile_variant, (dtypes, plan)) for dtypes, plan in variants_of(scale)
    ]
    return found + [(name, compile_kernels, (name,)) for name in (KERNELS if scale.features else ())]


def compile_ahead(device: torch.device, compilations: Sequence[Compilation], workers: int) -> list[Check]:
    """Compile in several processes, whose results later steps find on disk; without workers, here.

    Beside them the walk over tensors is compiled, so that no compiler runs while steps are timed.
    """
    start = time.monotonic()
    HOST_WALK.want()
    done, errors = 0, []
    if workers:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:  # leaving ends the processes
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


# -- targets ---------------------------------------------------------------------------------------------------------


def targets_of(results: Results, machine: Machine) -> list[Target]:
    """Everything that was promised, with what this run says about it."""
    targets = []
    for section in CHECKED:
        checks: list[Check] = results.rows[section]
        bad = sum(not check.passed for check in checks) + len(results.failures[section])
        value = f"{len(checks)} checks, {bad} bad" if checks or bad else "not measured"
        targets.append(Target(f"{section}: all checks hold", "0 bad", value, not bad if checks or bad else None))
    launches: list[LaunchRow] = results.rows["launches"]
    hosts: list[HostRow] = results.rows["host"]
    steps: list[StepRow] = results.rows["steps"]
    limits = {
        (row.model, row.dtypes): plan_seconds(
            SHAPES[row.model](), STEP_DTYPES[row.dtypes], machine.l2_bytes, results.copy_bandwidth
        )
        for row in steps
    }
    return [*targets, *launch_targets(launches), *host_targets(hosts), *step_targets(steps, limits, "fp32")]
