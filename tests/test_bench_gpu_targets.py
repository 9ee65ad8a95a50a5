"""The targets of `bench gpu`, on made-up rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fused_dals.launch_plan import IN_USE, LaunchPlan

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from bench.byte_table import STEP_DTYPES
from bench.contenders import ADAMW, BF16_STATE, COMPILED, FOREACH, FUSED
from bench.gpu import checks as gpu_checks
from bench.gpu.contenders import PASS_ALONE
from bench.gpu.correctness import Check
from bench.gpu.jobs import targets_of
from bench.gpu.runner import Deadline, Job, Results, run_jobs
from bench.gpu.scale import Scale
from bench.gpu.sweep import compiled_variants, fitting
from bench.gpu.targets import (
    Target,
    compiled_targets,
    host_targets,
    launch_targets,
    own_failures,
    plan_bytes,
    step_targets,
)
from bench.timing import Spread, StepRow
from tests.gpu_stand_ins import BF16, FP32, MIXED, CpuMachine

SCALE = Scale(models=("gpt2",))


def test_a_run_of_some_sections_tells_of_those_alone() -> None:
    found = [target.label for target in targets_of(Results([1.0]), 1, replace(SCALE, sections=("races", "compiled")))]
    assert found == ["races: all checks hold", "x reference compiled"]


def test_bytes_of_the_plan() -> None:
    l2 = 1 << 20
    assert [plan_bytes([1000, 0], dtypes, l2) for dtypes in (FP32, MIXED, BF16)] == [28_000, 22_000, 14_000]
    large = 1 << 30
    for dtypes, bytes_per_parameter in ((FP32, 36), (MIXED, 28), (BF16, 18)):
        assert plan_bytes([large], dtypes, l2) / large == pytest.approx(bytes_per_parameter, rel=1e-3)
    # p and m are 8 bytes of float32: of twice as many parameters as fit, half is read again.
    assert plan_bytes([2 * l2 // 8], FP32, l2) == 2 * l2 // 8 * 28 + l2 // 8 * 8


def _step_row(model: str, contender: str, milliseconds: float, dtypes: str = "fp32", samples: int = 5) -> StepRow:
    row = StepRow(model, dtypes, contender, 3, 60, 28, True)
    row.device_samples_s = [milliseconds / 1e3] * samples
    row.device_s = Spread.of(row.device_samples_s)
    return row


def test_targets_on_step_times() -> None:
    rows = [
        _step_row("resnet50", FUSED, 0.2),
        _step_row("resnet50", ADAMW, 0.21),
        _step_row("resnet50", FOREACH, 0.45),
        _step_row("llama_7b", FUSED, 50.0),
        _step_row("llama_7b", ADAMW, 40.0),
    ]
    limits = {("resnet50", "fp32"): 0.18e-3, ("llama_7b", "fp32"): 40e-3}
    found = [(target.value, target.passed) for target in step_targets(rows, limits, "fp32")]
    assert found == [
        ("1.111", True),
        ("1.250", False),
        ("0.952 (0.952 to 0.952)", True),
        ("2.250 (2.250 to 2.250)", False),
        ("1.250 (1.250 to 1.250)", True),
        ("not measured", None),
    ]


def test_ratios_are_taken_round_by_round_where_there_are_rounds() -> None:
    ours, theirs = _step_row("gpt2", FUSED, 1.0), _step_row("gpt2", ADAMW, 1.0)
    ours.device_samples_s, theirs.device_samples_s = [1.0, 2.0, 3.0, 4.0, 9.0], [1.1, 2.2, 3.3, 4.4, 1.0]
    (beside,) = (t for t in step_targets([ours, theirs], {("gpt2", "fp32"): 1.0}, "fp32") if "AdamW" in t.label)
    assert beside.value.startswith("0.909 (0.909 to ") and beside.passed
    assert beside.figures["samples"] == 5 and beside.figures["p10"] == pytest.approx(1 / 1.1)
    ours.side_by_side = theirs.side_by_side = False
    (beside,) = (t for t in step_targets([ours, theirs], {("gpt2", "fp32"): 1.0}, "fp32") if "AdamW" in t.label)
    assert beside.value == "1.000 (in turn)"


def test_few_samples_are_no_judgement() -> None:
    rows = [_step_row("gpt2", name, 1.0, samples=4) for name in (FUSED, ADAMW)]
    targets = list(step_targets(rows, {("gpt2", "fp32"): 1e-3}, "fp32"))
    assert [t.passed for t in targets] == [None] * 3 and "too few samples" in targets[0].value


def test_what_was_to_be_measured_and_was_not_is_told_and_what_broke_has_failed() -> None:
    limits = {("gpt2", "fp32"): 1.0, ("gpt2", "bf16"): 1.0}
    assert [t.passed for t in step_targets([], limits, "fp32")] == [None] * 4
    broken, late = (StepRow("gpt2", "fp32", FUSED, 3, 60, 28, True) for _ in range(2))
    broken.error, late.error = "RuntimeError: CUDA error: misaligned address", "TimeoutError: left out: time is up"
    for row, verdict in ((broken, False), (late, None)):
        targets = list(step_targets([row, _step_row("gpt2", ADAMW, 1.0)], limits, "fp32"))
        assert [t.passed for t in targets] == [verdict, None, verdict, verdict]
        assert [t.passed for t in own_failures("steps", [row])] == [False] * (verdict is False)
    theirs = StepRow("gpt2", "fp32", ADAMW, 3, 60, 28, True, error="RuntimeError: theirs")
    assert not list(own_failures("steps", [theirs]))
    found = step_targets([_step_row("gpt2", FUSED, 1.0), theirs], {("gpt2", "fp32"): 1.0}, "fp32")
    assert [t.passed for t in found] == [True, None, None]


def test_the_path_that_people_run_is_judged_in_bf16() -> None:
    rows = [_step_row("gpt2", PASS_ALONE, 1.0, "bf16"), _step_row("gpt2", BF16_STATE, 1.2, "bf16")]
    (target,) = step_targets(rows, {("gpt2", "bf16"): 1e-3}, "fp32")
    assert (target.value, target.passed) == ("1.200, the pass alone 1.000", False)


def test_targets_beside_the_compiled_reference() -> None:
    rows = [_step_row(model, FUSED, 0.2) for model in ("resnet50", "gpt2", "vit_b_16")]
    assert compiled_targets(rows) == [Target("x reference compiled", "<= 1.00", "not measured", None)]
    rows += [_step_row("resnet50", COMPILED, 0.3), _step_row("gpt2", COMPILED, 0.1)]
    assert [(t.value, t.passed) for t in compiled_targets(rows)] == [
        ("0.667 (0.667 to 0.667)", True),
        ("2.000 (2.000 to 2.000)", False),
    ]


def test_targets_on_host_time_and_launches() -> None:
    rows = [
        gpu_checks.HostRow(FUSED, 300, groups, Spread(seconds, seconds, seconds), [])
        for groups, seconds in ((1, 80e-6), (10, 81e-6), (300, 120e-6))
    ]
    groups = (1, 10, 300)
    assert [target.passed for target in host_targets(rows, 300, groups)] == [True, False, False]
    assert [target.passed for target in host_targets([], 300, groups)] == [None] * 3
    for error, verdict in (("left out: time is up", None), ("RuntimeError: broken", False)):
        row = gpu_checks.HostRow(FUSED, 300, 300, None, [], error)
        assert [target.passed for target in host_targets([rows[0], row], 300, groups)] == [True, verdict, verdict]
    control = gpu_checks.LaunchRow(gpu_checks.CONTROL, 300, kernels=2)
    launches = [control, gpu_checks.LaunchRow(FUSED, 300, kernels=3, copies=1)]
    launches.append(gpu_checks.LaunchRow(gpu_checks.WITHOUT_LOSS, 300, kernels=3, memsets=1))
    launches.append(gpu_checks.LaunchRow(FUSED, 1, error="x"))
    assert [target.passed for target in launch_targets(launches, (300,))] == [True, False]
    assert [target.passed for target in launch_targets(launches, (1, 10))] == [False, None, None, None]
    control.error = "counted 1 launches"
    assert [target.passed for target in launch_targets(launches, (300,))] == [False, None, None]


def test_checks_that_fail_or_were_not_made_fail_their_target() -> None:
    results = Results([1.0])
    assert [target.passed for target in targets_of(results, 1 << 14, SCALE)][:4] == [None] * 4
    results.rows["races"] = [Check("a", True, ""), Check("b", False, "")]
    results.rows["waiting"] = [Check("a", True, "")]
    run_jobs([Job("correctness", "bad", lambda: [][0])], results, Deadline.after(60), CpuMachine())
    late = [Job(section, "late", lambda: [][0]) for section in ("races", "waiting", "features")]
    run_jobs(late, results, Deadline.after(-1), CpuMachine())
    results.to_come.update(races=2, waiting=0)
    targets = targets_of(results, 1 << 14, SCALE)
    assert [target.passed for target in targets[:4]] == [False, False, None, None], "late is not bad, and not right"
    assert [target.value for target in targets[:4]] == [
        "0 checks, 1 bad",
        "2 checks, 1 bad, 1 left out, 2 to come",
        "1 checks, 0 bad, 1 left out",
        "not measured, 1 left out",
    ]


def test_what_has_not_ended_has_not_passed_and_parts_that_fail_are_told() -> None:
    results = Results([1.0])
    results.rows["races"] = [Check("a", True, "")]
    results.to_come["races"] = 1
    assert targets_of(results, 1, SCALE)[1].passed is None
    results.to_come["races"] = 0
    assert targets_of(results, 1, SCALE)[1].passed is True
    run_jobs([Job("steps", "bad", lambda: [][0])], results, Deadline.after(60), CpuMachine())
    assert targets_of(results, 1, SCALE)[4] == Target("steps: all parts ran", "0 failed", "1 failed", False)


def test_a_sweep_tries_what_its_dtypes_leave_open() -> None:
    kinds = {name: compiled_variants(dtypes) for name, dtypes in STEP_DTYPES.items()}
    assert {name: sorted({plan.chunk or 0 for plan in plans}) for name, plans in kinds.items()} == {
        "fp32": [4096, 8192, 16384],
        "mixed": [8192, 16384, 32768],
        "bf16": [8192, 16384, 32768],
    }
    assert {name: {plan.same_runs for plan in plans} for name, plans in kinds.items()} == {
        "fp32": {False},
        "mixed": {False, True},
        "bf16": {False},
    }
    assert {name: {plan.in_pairs for plan in plans} for name, plans in kinds.items()} == {
        "fp32": {True},
        "mixed": {True},
        "bf16": {True, False},
    }
    for plans in kinds.values():
        assert {plan.most_in_b for plan in plans} == {IN_USE.most_in_b, 0}


def test_plans_of_the_sweep_have_registers_for_their_programs() -> None:
    assert fitting(LaunchPlan()).max_registers is None
    found = {programs: fitting(LaunchPlan(programs_per_sm=programs)).max_registers for programs in (1, 2, 3, 4)}
    assert found == {1: None, 2: None, 3: 80, 4: 64}
    assert (
        fitting(LaunchPlan(tile=4096)).max_registers == 128
        and fitting(LaunchPlan(tile=4096, num_warps=4)).max_registers == 255
    )
