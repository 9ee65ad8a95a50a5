"""The judge of `bench gpu`: passes what is right, and sees wrong elements, bits, writes, races and waiting."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import pytest
import torch

from fused_dals.launch_plan import LaunchPlan

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from bench.gpu import checks as gpu_checks
from bench.gpu import correctness as gpu_correctness
from bench.gpu.correctness import (
    Check,
    Originals,
    Outcome,
    Placed,
    Spec,
    check_grid,
    grid,
    judge,
    reference_step,
    relative_error,
)
from bench.gpu.driver import PassDriver
from bench.gpu.races import Crowd, hunt_races
from tests.gpu_stand_ins import CPU, FP32, MIXED, CpuMachine, interpreted


def test_the_grid_has_every_layout_and_ends_with_an_empty_tensor() -> None:
    specs = grid(64, 3)
    tensors = Originals(specs, FP32, 0).tensors
    assert {spec.param_form for spec in specs} | {spec.grad_form for spec in specs} == set(gpu_correctness.FORMS)
    assert specs[-1] == Spec((0,)) and {0, 1, 63, 64, 65, 192, 197} <= {p.numel() for p in tensors.params}
    assert any(g.stride() == (0, 0) for g in tensors.grads)
    placed = Placed(Originals([Spec((70,), "plain", "plain", 1, 3, 5)], FP32, 0), CPU)
    own = placed.tensors
    kinds = (own.params, own.grads, own.grad_emas, own.momentum_buffers)
    assert [kind[0].data_ptr() % 16 for kind in kinds] == [4, 12, 4, 4]


def test_the_judge_passes_torch_and_fails_what_is_wrong() -> None:
    originals = Originals([Spec((2000,)), Spec((5,)), Spec((0,))], MIXED, 0)
    plain, truth = originals.plain, originals.truth
    assert judge(plain, plain, truth, rounds=True)[0]
    for kind, factor in (("param", 1.05), ("grad_ema", 1 + 1e-6), ("momentum_buffer", 1 + 1e-6), ("param", math.nan)):
        wrong = reference_step(originals.tensors, None)
        wrong.of_kind(kind)[1].mul_(factor)
        passed, shares = judge(wrong, plain, truth, rounds=True)
        assert not passed and not shares[kind] <= 1
    wrong = reference_step(originals.tensors, None)
    wrong.ratios = wrong.ratios * (1 + 2e-6)
    assert not judge(wrong, plain, truth, rounds=True)[0]
    unstepped = reference_step(originals.tensors, None)
    unstepped.params[0][-1] = originals.tensors.params[0][-1]
    passed, shares = judge(unstepped, plain, truth, rounds=True)
    norm = relative_error(unstepped.params[0], truth.params[0]) / relative_error(plain.params[0], truth.params[0])
    assert not passed and shares["param"] > 1 and norm < gpu_correctness.MULTIPLE_OF_MANY, "the norm alone hides it"
    truncated = reference_step(originals.tensors, None)
    bits = truth.params[0].float().view(torch.int32)
    truncated.params[0] = (bits & ~0xFFFF).view(torch.float32).bfloat16()
    assert not judge(truncated, plain, truth, rounds=True)[0]
    assert judge(truncated, plain, truth, rounds=False)[0]


@interpreted
def test_the_grid_holds_where_state_is_rounded_stochastically() -> None:
    """Random bits follow a tensor's position, not its place in a list that is permuted."""
    specs = [Spec((70,)), Spec((5,)), Spec((3, 40), "transposed", "plain"), Spec((64,))]
    checks = list(check_grid(CpuMachine(), (torch.float32, torch.float32, torch.bfloat16), specs, 64, 0))
    assert len(checks) == 2 and all(check.passed for check in checks), checks


def test_a_write_beside_a_tensor_is_seen() -> None:
    placed = Placed(Originals([Spec((4, 6), "every second"), Spec((7,), grad_offset=1)], FP32, 0), CPU)
    for own in (placed.tensors.params, placed.tensors.momentum_buffers):
        own[0].mul_(2)
    assert placed.guards_intact()
    param, gradient = placed.tensors.params[0], placed.tensors.grads[1]
    for wrong in (param.as_strided((1,), (1,), param.storage_offset() + 1), gradient[3:4]):
        before = wrong.clone()
        wrong.fill_(1.0)
        assert not placed.guards_intact()
        wrong.copy_(before)


def _checks_of_a_faulty_plan(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """The grid's checks, with the reference in the kernel's place and a fault under window 0."""

    def step(placed: Placed, plan: LaunchPlan, order: Any = None) -> Outcome:
        outcome = reference_step(placed.tensors, None)
        if plan.window == 0:
            outcome.momentum_buffers[0][0] *= 1 + 1e-6
        return outcome

    monkeypatch.setattr(Placed, "step", step)
    return list(check_grid(CpuMachine(), FP32, [Spec((9,))], 64, 0))


def test_other_bits_under_another_window_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for check in _checks_of_a_faulty_plan(monkeypatch):
        assert not check.passed and check.detail.startswith("window 0: other bits than the first run; error / bound")


def test_a_race_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def step(driver: PassDriver) -> torch.Tensor:
        calls.append(driver)
        (launch,) = driver.fused_pass.launches
        if len(calls) == 3:
            launch.owners[2][0] += 1
        return torch.ones(len(launch.owners))

    monkeypatch.setattr(PassDriver, "step", step)
    check = hunt_races(CpuMachine(), FP32, Crowd(3, 10, 1, 100), LaunchPlan(chunk=64), 6, 0)
    assert not check.passed and "1 of 6 reruns differ: [2]" in check.detail
    assert "an error is above its bound" in check.detail  # nothing was updated
    steps = itertools.count()
    late = hunt_races(CpuMachine(), FP32, Crowd(3, 10, 1, 100), LaunchPlan(chunk=64), 50, 0, lambda: next(steps) >= 2)
    assert "7 reruns of 4 tensors" in late.detail, (
        "every window once, the first twice, and two asked before it was late"
    )


def test_waiting_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = CpuMachine()
    machine.uses = 1
    monkeypatch.setattr(gpu_checks, "QUEUE_S", 60.0)

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    check = gpu_checks._without_waiting(machine, "x", lambda: None, waits)
    assert not check.passed and "synchronizing" in check.detail
    monkeypatch.setattr(gpu_checks, "QUEUE_S", 0.02)
    check = gpu_checks._without_waiting(machine, "x", lambda: None, lambda: time.sleep(0.02))
    assert not check.passed and "behind a queue of 20 ms" in check.detail
