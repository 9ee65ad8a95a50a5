"""The built-in schedules against the SPEC's words, and beside torch's schedulers."""

from __future__ import annotations

import itertools
import math
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fused_dals import DALS, DALSAcc, host
from fused_dals.schedule import cosine_restarts, schedule_factor, schedule_factor_of_tensor, warmup_cosine
from tests.helpers import mlp


def test_warmup_then_cosine_to_zero() -> None:
    factors = [warmup_cosine(t, 100, 0.05) for t in range(103)]
    assert factors[:6] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[52] == pytest.approx((1 + math.cos(math.pi * 47 / 95)) / 2)
    assert factors[99] > 0 and factors[100:] == [0.0, 0.0, 0.0]
    assert all(a > b for a, b in itertools.pairwise(factors[5:101]))


@pytest.mark.parametrize(("total", "fraction"), [(1, 0.0), (1, 1.0), (3, 0.05), (10, 1.0)])
def test_short_and_extreme_warmups(total: int, fraction: float) -> None:
    assert all(0 <= warmup_cosine(t, total, fraction) <= 1 for t in range(total + 2))


@pytest.mark.parametrize(("first", "mult"), [(1, 1), (1, 2), (4, 1), (4, 2), (5, 1.5), (7, 3)])
def test_restarts_equal_a_counter(first: int, mult: float) -> None:
    """The closed form against the counter of the SPEC, which goes up before each step."""
    counter, cycle, length = 0, 0, first
    for t in range(300):
        counter += 1
        if counter >= length:
            counter, cycle = 0, cycle + 1
            length = math.floor(first * mult**cycle)
        assert cosine_restarts(t, first, mult) == (1 + math.cos(math.pi * counter / length)) / 2


@pytest.mark.parametrize(("first", "mult"), [(1, 1), (4, 2), (5, 1.5), (3, 1 + 1e-9), (5, 1e308)])
def test_a_device_finds_the_same_factors(first: int, mult: float) -> None:
    """Where the host does not know t; and a factor just above 1 does not list cycles for ever."""
    schedule: dict[str, Any] = {"total_steps": None, "warmup_fraction": 0.0, "restart_steps": first}
    for t in [*range(50), 10**6]:
        there = schedule_factor_of_tensor(torch.tensor(float(t), dtype=torch.float64), **schedule, restart_mult=mult)
        assert float(there) == pytest.approx(cosine_restarts(t, first, mult), abs=1e-12)


def test_no_schedule_unless_asked() -> None:
    nothing: dict[str, Any] = {"total_steps": None, "restart_steps": None}
    assert {schedule_factor(t, warmup_fraction=0.5, restart_mult=2, **nothing) for t in range(9)} == {1.0}


def step(optimizer: DALS) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)


def test_current_lr_is_that_of_the_next_step_and_lr_is_never_written() -> None:
    optimizer = DALS(mlp(3, 3, 2), lr=0.4, total_steps=10, warmup_fraction=0.2)
    seen = []
    for t in range(12):
        seen += optimizer.current_lr()
        with pytest.warns(UserWarning, match="total_steps=10") if t == 10 else nullcontext():
            step(optimizer)
        assert optimizer.param_groups[0]["lr"] == 0.4
    assert seen == pytest.approx([0.4 * warmup_cosine(t, 10, 0.2) for t in range(12)])


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64])
def test_numbers_of_numpy_are_scheduled_in_double_precision(number: Any) -> None:
    """As a scheduler that counts with NumPy writes them."""
    optimizer = DALS(mlp(3, 3, 2), total_steps=1000, warmup_fraction=0.0)
    optimizer.param_groups[0]["lr"] = number(1e-3)
    for _ in range(3):
        step(optimizer)
    assert optimizer.current_lr() == [float(number(1e-3)) * warmup_cosine(3, 1000, 0.0)]
    assert type(optimizer.state_dict()["param_groups"][0]["lr"]) is float, "which torch.load takes"


def test_steps_beyond_total_steps_are_warned_of_once() -> None:
    model = mlp(3, 2)
    groups = [{"params": [pair], "total_steps": n} for pair, n in zip(model.named_parameters(), (9, 3), strict=True)]
    optimizer = DALS(groups)
    for _ in range(3):
        step(optimizer)
    with pytest.warns(UserWarning, match=r"group 1: more than total_steps=3 .* in optimizer.param_groups") as seen:
        step(optimizer)
    assert len(seen) == 1 and seen[0].filename == __file__
    step(optimizer)
    optimizer.param_groups[1]["total_steps"] = 6
    step(optimizer)
    with pytest.warns(UserWarning, match="group 1: more than total_steps=6"):
        step(optimizer)
    for group in optimizer.param_groups:
        group["total_steps"] = None
    step(optimizer)


def test_a_checkpoint_brings_its_own_total_steps() -> None:
    model = mlp(3, 2)
    optimizer, longer = DALS(model, total_steps=2), DALS(model, total_steps=4)
    step(optimizer)
    step(optimizer)
    longer.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match=r"more than total_steps=2 .*: set it after loading"):
        step(longer)
    again = DALS(model, total_steps=4)
    again.load_state_dict(optimizer.state_dict())
    again.param_groups[0]["total_steps"] = 4
    step(again)
    assert again.current_lr()[0] > 0


def test_dropped_steps_do_not_bring_the_end_of_the_schedule_nearer() -> None:
    model = mlp(3, 2)
    optimizer = DALS(model, total_steps=2, skip_nonfinite=True)
    for value in (1.0, math.inf, math.inf, 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.step(loss=1.0)
    with pytest.warns(UserWarning, match="total_steps=2"):
        step(optimizer)


def test_every_schedule_that_ends_is_told_of() -> None:
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [("a", a)], "total_steps": 2}, {"params": [("b", b)], "total_steps": 4}]
    optimizer = DALS(groups)
    with pytest.warns(UserWarning) as seen:
        for _ in range(7):
            a.grad, b.grad = torch.ones(2), torch.ones(2)
            optimizer.step(loss=1.0)
    said = [str(warning.message) for warning in seen]
    assert all(
        f"group {i}: more than total_steps={n} steps" in text
        for (i, n), text in zip(((0, 2), (1, 4)), said, strict=True)
    )


def test_the_end_of_the_schedule_is_seen_without_asking_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host does not know the count of steps, it goes by its calls."""
    optimizer = DALS(mlp(3, 2), total_steps=2)
    monkeypatch.setattr("fused_dals.stepper.host", SimpleNamespace(**{**vars(host), "knows": lambda tensor: False}))
    monkeypatch.setattr(optimizer._runtime.state, "numbers", lambda: pytest.fail("asks the device"))
    step(optimizer)
    step(optimizer)
    with pytest.warns(UserWarning, match="total_steps=2"):
        step(optimizer)


def test_first_step_of_a_warmup_moves_state_but_no_weight() -> None:
    model = mlp(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = DALS(model, total_steps=100)
    step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(optimizer.state[p]["momentum_buffer"].abs().sum() > 0 for p in model.parameters())


def test_groups_may_have_their_own_schedules() -> None:
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [
        {"params": [("a", a)]},
        {"params": [("b", b)], "total_steps": 4, "lr": 1.0},
        {"params": [("c", c)], "restart_steps": 3, "lr": 2.0},
    ]
    optimizer = DALS(groups, lr=0.5, warmup_fraction=0.0)
    step(optimizer)
    assert optimizer.current_lr() == pytest.approx([0.5, warmup_cosine(1, 4, 0.0), 2 * cosine_restarts(1, 3, 2)])


def test_acc_restarts_by_default_and_can_be_told_not_to() -> None:
    p = [("p", torch.nn.Parameter(torch.ones(1)))]
    assert DALSAcc(p).param_groups[0]["restart_steps"] == 1000
    assert DALSAcc(p, restart_steps=None, total_steps=9).current_lr() == [0.03]


SCHEDULERS = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 5)),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
    "PolynomialLR": lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 10),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_torch_schedulers_drive_the_step(name: str, tensor_lr: bool) -> None:
    """What the scheduler writes is what the step uses: p moves by lr r m, and the lr stays a tensor if it was one."""
    p = torch.nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))
    lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
    optimizer = DALS([("p", p)], lr=lr, weight_decay=0.0)
    scheduler: Any = SCHEDULERS[name](optimizer)
    used = set()
    for _ in range(8):
        before, current = p.detach().clone(), float(optimizer.param_groups[0]["lr"])
        step(optimizer)
        moved = optimizer.trust_ratios()["p"] * optimizer.state[p]["momentum_buffer"] * current
        torch.testing.assert_close(before - p, moved, rtol=1e-10, atol=1e-14)
        used.add(current)
        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == tensor_lr
    assert len(used) > 1


def test_one_cycle_momentum_is_read_live() -> None:
    optimizer = DALS([("p", torch.nn.Parameter(torch.ones(2)))])
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    assert optimizer.param_groups[0]["momentum"] == 0.95


def test_lr_may_become_a_tensor_or_a_number_at_any_time() -> None:
    optimizer = DALS(mlp(3, 2), lr=torch.tensor(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lr in (torch.tensor(0.2), 0.3, torch.tensor([0.4]), 1):
            optimizer.param_groups[0]["lr"] = lr
            step(optimizer)
            assert optimizer.current_lr() == pytest.approx([float(lr)])
    lr = optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    step(optimizer)
    lr.fill_(-1.0)
    with pytest.raises(ValueError, match="group 0: lr must be"):
        step(optimizer)
