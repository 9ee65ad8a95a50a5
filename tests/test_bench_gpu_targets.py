"""The targets of `bench gpu`, on made-up rows."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from bench.cache_model import window_chunks
from bench.contenders import (
    ADAMW,
    COMPILED,
    FOREACH,
    FUSED,
)
from bench.gpu import checks as gpu_checks
from bench.gpu.correctness import (
    Check,
)
from bench.gpu.jobs import targets_of
from bench.gpu.runner import Deadline, Job, Results, run_jobs
from bench.gpu.targets import Target, compiled_targets, host_targets, launch_targets, plan_bytes, step_targets
from bench.timing import Spread, StepRow
from tests.gpu_stand_ins import BF16, FP32, MIXED, CpuMachine


def test_bytes_of_the_plan() -> None:
    l2 = 1 << 20
    assert [plan_bytes([1000, 0], dtypes, l2) for dtypes in (FP32, MIXED, BF16)] == [28_000, 22_000, 14_000]
    large = 1 << 30
    for dtypes, bytes_per_parameter in ((FP32, 36), (MIXED, 28), (BF16, 18)):
        assert plan_bytes([large], dtypes, l2) / large == pytest.approx(bytes_per_parameter, rel=1e-3)
    # p and m are 8 bytes of float32: of twice as many parameters as fit, half is read again.
    assert plan_bytes([2 * l2 // 8], FP32, l2) == 2 * l2 // 8 * 28 + l2 // 8 * 8


def _step_row(model: str, contender: str, milliseconds: float) -> StepRow:
    row = StepRow(model, "fp32", contender, 3, 60, 28, True)
    row.device_s = Spread(milliseconds / 1e3, milliseconds / 1e3, milliseconds / 1e3)
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
    found = {target.label: (target.value, target.passed) for target in step_targets(rows, limits, "fp32")}
    assert list(found.values()) == [
        ("1.11", True),
        ("1.25", False),
        ("0.95", True),
        ("2.25", False),
        ("1.25", True),
        ("not measured", None),
    ]


def test_targets_beside_the_compiled_reference() -> None:
    rows = [_step_row(model, FUSED, 0.2) for model in ("resnet50", "gpt2", "vit_b_16")]
    assert list(compiled_targets(rows)) == []
    rows += [_step_row("resnet50", COMPILED, 0.3), _step_row("gpt2", COMPILED, 0.1)]
    assert [(t.value, t.passed) for t in compiled_targets(rows)] == [("0.67", True), ("2.00", False)]


def test_targets_on_host_time_and_launches() -> None:
    rows = [
        gpu_checks.HostRow(FUSED, 300, groups, Spread(seconds, seconds, seconds), [])
        for groups, seconds in ((1, 80e-6), (10, 81e-6), (300, 120e-6))
    ]
    assert [target.passed for target in host_targets(rows)] == [True, False, False]
    assert [target.passed for target in host_targets([])] == [None]
    failed = gpu_checks.HostRow(FUSED, 300, 300, None, [], "left out")
    assert [target.passed for target in host_targets([rows[0], failed])] == [True, None, None]
    launches = [gpu_checks.LaunchRow(FUSED, 300, kernels=3, copies=1), gpu_checks.LaunchRow(FUSED, 1, error="x")]
    launches.append(gpu_checks.LaunchRow(gpu_checks.WITHOUT_LOSS, 1, kernels=3, memsets=1))
    assert [target.passed for target in launch_targets(launches)] == [True, None, False]


def test_checks_that_fail_or_were_not_made_fail_their_target() -> None:
    results = Results([1.0])
    assert [target.passed for target in targets_of(results, 1 << 14)][:4] == [None] * 4
    results.rows["races"] = [Check("a", True, ""), Check("b", False, "")]
    results.rows["waiting"] = [Check("a", True, "")]
    run_jobs([Job("correctness", "bad", lambda: [][0])], results, Deadline.after(60), CpuMachine())
    late = [Job(section, "late", lambda: [][0]) for section in ("races", "waiting", "features")]
    run_jobs(late, results, Deadline.after(-1), CpuMachine())
    results.to_come.update(races=2, waiting=0)
    targets = targets_of(results, 1 << 14)
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
    assert targets_of(results, 1)[1].passed is None
    results.to_come["races"] = 0
    assert targets_of(results, 1)[1].passed is True
    run_jobs([Job("steps", "bad", lambda: [][0])], results, Deadline.after(60), CpuMachine())
    assert targets_of(results, 1)[4] == Target("steps: all parts ran", "0 failed", "1 failed", False)


def test_windows_of_the_sweep() -> None:
    assert window_chunks(0.5, 60 << 20, FP32, 4096) == 480
    assert window_chunks(0.5, 60 << 20, MIXED, 4096) == 640
    assert window_chunks(math.inf, 60 << 20, FP32, 4096) >= 10**9
