"""What ``python -m bench gpu`` does, as a list of small jobs, and what was promised beside what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from bench.byte_table import STEP_DTYPES, Dtypes, item_sizes
from bench.compiled import CompileBudget
from bench.gpu.checks import LaunchRow, check_waiting, count_launches, time_host
from bench.gpu.compile_ahead import compilations_of, compile_ahead
from bench.gpu.contenders import beside_compiled, contenders_for
from bench.gpu.correctness import Check, check_grid, check_optimizer, dtypes_label
from bench.gpu.features import LATE_FEATURES, features
from bench.gpu.races import hunt_races
from bench.gpu.runner import LONG_SECONDS, SECTIONS, Deadline, DeviceLost, Job, Results
from bench.gpu.scale import SWEEP_DTYPES, Scale
from bench.gpu.sweep import SweepRow, sweep
from bench.gpu.targets import (
    Target,
    compiled_targets,
    host_targets,
    launch_targets,
    own_failures,
    plan_seconds,
    step_targets,
)
from bench.machine import Machine
from bench.shapes import SHAPES
from bench.timing import StepRow, finished, time_contenders
from fused_dals.launch_plan import LaunchPlan

#: What the largest model becomes where p, g, h and m do not fit.
SMALLER = {"llama_7b": "llama_1b"}

CHECKED = ("correctness", "races", "waiting", "features")


def jobs_of(machine: Machine, scale: Scale, results: Results, deadline: Deadline, workers: int) -> list[Job]:
    """Everything to do, in order: what must be right first, what is only worth knowing last."""
    time_is_up = deadline.passed
    compiling = Job(
        "compile", "kernels", lambda: compile_ahead(machine.device, compilations_of(scale), workers), LONG_SECONDS
    )
    checks = features(machine, scale.samples, CompileBudget(*scale.compile_budget), scale.seed)
    jobs = [compiling]
    for dtypes in scale.grid_dtypes:
        jobs.append(Job("correctness", dtypes_label(dtypes), _grid_job(machine, scale, dtypes)))
    jobs.append(Job("correctness", "optimizer", lambda: [check_optimizer(machine, scale.seed)]))
    many, few = scale.reruns
    for name, writes, reruns in (("fp32", True, many), ("fp32", False, few), ("mixed", True, few)):
        label = f"{name}, A {'writes' if writes else 'reads'}"
        jobs.append(Job("races", label, _race_job(machine, scale, name, writes, reruns, time_is_up)))
    jobs.append(Job("waiting", "sync debug mode", lambda: check_waiting(machine, scale.host_tensors)))
    jobs += [Job("features", name, checks[name]) for name in scale.features if name not in LATE_FEATURES]
    jobs.append(
        Job(
            "host",
            "groups",
            lambda: time_host(machine, scale.host_tensors, scale.host_groups, scale.host_samples, time_is_up),
        )
    )
    for model in scale.models:
        for name in scale.step_dtypes:
            run = _step_job(machine, scale, results, model, name, deadline)
            jobs.append(Job("steps", f"{model} {name}", run, LONG_SECONDS))
    for count in scale.launch_counts:
        jobs.append(Job("launches", f"{count} tensors", _launch_job(machine, count)))
    jobs += [Job("features", name, checks[name], LONG_SECONDS) for name in scale.features if name in LATE_FEATURES]
    budget = CompileBudget(*scale.compile_budget)
    for model in (*scale.quick_to_compile, *scale.models) if "fp32" in scale.step_dtypes else ():
        run = _step_job(machine, scale, results, model, "fp32", deadline, budget)
        jobs.append(Job("compiled", f"{model} fp32", run, LONG_SECONDS))
    for model in scale.sweep_models:
        for name in SWEEP_DTYPES:
            run_sweep = _sweep_job(machine, scale, model, name, time_is_up)
            jobs.append(Job("sweep", f"{model} {name}", run_sweep, LONG_SECONDS))
    return [job for job in jobs if job.section in scale.sections]


# -- jobs ------------------------------------------------------------------------------------------------------------


def _grid_job(machine: Machine, scale: Scale, dtypes: Dtypes) -> Callable[[], Iterable[Check]]:
    return lambda: check_grid(machine, dtypes, scale.specs, scale.chunk, scale.seed)


def _race_job(
    machine: Machine, scale: Scale, name: str, writes: bool, reruns: int, time_is_up: Callable[[], bool]
) -> Callable[[], Iterable[Check]]:
    plan = LaunchPlan(chunk=scale.chunk, stage_a_writes=writes)
    return lambda: [hunt_races(machine, STEP_DTYPES[name], scale.crowd, plan, reruns, scale.seed, time_is_up)]


def _launch_job(machine: Machine, count: int) -> Callable[[], Iterable[LaunchRow]]:
    return lambda: count_launches(machine, count)


def _step_job(
    machine: Machine,
    scale: Scale,
    results: Results,
    model: str,
    name: str,
    deadline: Deadline,
    compile_budget: CompileBudget | None = None,
) -> Callable[[], Iterable[StepRow]]:
    """Everybody, or with a budget the compiled reference, which may take a minute to be there, and the fused path."""

    def run() -> list[StepRow]:
        dtypes = STEP_DTYPES[name]
        fitting = fitting_model(machine, model, dtypes)
        shapes = list(SHAPES[fitting]())
        if compile_budget is None:
            contenders = contenders_for(dtypes)
            if name == "fp32":
                results.note_conditions(machine, model)
            results.copy_samples += [machine.copy_bandwidth() for _ in range(scale.copy_samples)]
        else:
            compile_budget.left_s = min(compile_budget.left_s, max(0.0, deadline.left_s()))
            contenders = beside_compiled(dtypes, compile_budget)
        rows: list[StepRow] = []
        try:
            time_contenders(
                machine,
                fitting,
                dtypes,
                name,
                shapes,
                contenders,
                scale.samples,
                scale.seed,
                time_is_up=deadline.passed,
                rows=rows,
            )
        except (DeviceLost, Exception):
            results.rows["steps" if compile_budget is None else "compiled"] += finished(rows)
            raise
        return rows

    return run


def fitting_model(machine: Machine, model: str, dtypes: Dtypes) -> str:
    """The model, or the smaller one in its place where p, g, h and m do not fit."""
    if model not in SMALLER:
        return model
    parameters = sum(torch.Size(shape).numel() for _, shape in SHAPES[model]())
    p, g, state = item_sizes(dtypes)
    return model if (p + g + 2 * state + 0.5) * parameters < machine.free_bytes() else SMALLER[model]


def _sweep_job(
    machine: Machine, scale: Scale, model: str, name: str, time_is_up: Callable[[], bool]
) -> Callable[[], Iterator[SweepRow]]:
    shapes = list(SHAPES[model]())
    return lambda: sweep(machine, model, STEP_DTYPES[name], shapes, scale.sweep_samples, time_is_up, scale.seed)


# -- targets ---------------------------------------------------------------------------------------------------------


def targets_of(results: Results, l2_bytes: int, scale: Scale) -> list[Target]:
    """Everything that was promised of the sections of this run, with what it says about it."""
    targets = []
    for section in (section for section in CHECKED if section in scale.sections):
        checks: list[Check] = results.rows[section]
        bad = sum(not check.passed for check in checks) + len(results.failures[section])
        missing, to_come = len(results.left_out[section]), results.to_come[section]
        value = f"{len(checks)} checks, {bad} bad" if checks or bad else "not measured"
        value += f", {missing} left out" * (missing > 0) + f", {to_come} to come" * (to_come > 0)
        passed = False if bad else None if missing or to_come > 0 or not checks else True
        targets.append(Target(f"{section}: all checks hold", "0 bad", value, passed))
    for section in SECTIONS:
        failed = len(results.failures[section])
        if failed and section not in CHECKED:
            targets.append(Target(f"{section}: all parts ran", "0 failed", f"{failed} failed", False))
    rows = results.rows
    for section in ("launches", "host", "steps", "compiled"):
        targets += own_failures(section, rows[section])
    if "launches" in scale.sections:
        targets += launch_targets(rows["launches"], scale.launch_counts)
    if "host" in scale.sections:
        targets += host_targets(rows["host"], scale.host_tensors, scale.host_groups)
    if "steps" in scale.sections and results.copy_samples:
        steps: list[StepRow] = rows["steps"]
        # Also those of which there are no rows, and the smaller model where the asked one does not fit.
        lists = [(model, name) for model in scale.models for name in scale.step_dtypes]
        lists = list(dict.fromkeys([*lists, *((row.model, row.dtypes) for row in steps)]))
        copy = results.copy_bandwidth
        limits = {
            (model, name): plan_seconds(SHAPES[model](), STEP_DTYPES[name], l2_bytes, copy) for model, name in lists
        }
        targets += step_targets(steps, limits, "fp32")
    if "compiled" in scale.sections:
        targets += compiled_targets(rows["compiled"])
    return targets
