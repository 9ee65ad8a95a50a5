"""All presets and paths against the independent float64 transcription of the SPEC."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_dals.foreach as foreach
from fused_dals import DALS, DALSAcc
from tests.helpers import PATHS, PRESETS, ConvNet, follow_oracle, oracle_of

STEPS = 200
SCHEDULES: dict[str, dict[str, Any]] = {
    "none": {"restart_steps": None},
    "warmup_cosine": {"restart_steps": None, "total_steps": 180, "warmup_fraction": 0.1},
    "restarts": {"restart_steps": 20, "restart_mult": 2},
}
#: Roundings in a trust ratio: usually 8, but b g + (1 - b) h may cancel in a tensor of three (seen: 38).
RATIO = 1024
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def run(preset: str, path: str, dtype: torch.dtype, steps: int = STEPS, *, resync: bool = False, **options: Any) -> Any:
    model = ConvNet().to(dtype)
    oracle = oracle_of(model, preset, **options)
    optimizer = PRESETS[preset](model, foreach=PATHS[path], **options)
    seen = set()
    errors = follow_oracle(
        model, optimizer, oracle, steps, resync=resync, each_step=lambda _: seen.add(optimizer.phases()[0])
    )
    assert seen == {0, 1, 2}, "the run must pass through all phases"
    return errors


@pytest.mark.filterwarnings("ignore:.*the built-in schedule is over")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("preset", PRESETS)
def test_float64_follows_the_oracle(preset: str, path: str, schedule: str, seed: int) -> None:
    errors = run(preset, path, torch.float64, **SCHEDULES[schedule])
    assert max(errors.worst(), errors.trust_ratio) < 1e-12, errors


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("preset", PRESETS)
def test_float32_drifts_by_rounding_only(preset: str, path: str, seed: int) -> None:
    """Over 200 free-running steps, whose errors add up; seen: up to 16 roundings (1.8e-6)."""
    errors = run(preset, path, torch.float32, **SCHEDULES["none"])
    assert errors.worst() < 256 * EPS[torch.float32], errors
    assert errors.trust_ratio < RATIO * EPS[torch.float32], errors


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_step_rounds_once(dtype: torch.dtype, preset: str, path: str, maximize: bool, seed: int) -> None:
    """Judged step by step: float32 state to a few float32 roundings, the parameter to one rounding of its dtype."""
    # Ascent leaves the range of float32 within 40 to 90 steps for nearly every draw.
    steps = 30 if maximize else STEPS
    errors = run(preset, path, dtype, steps, resync=True, maximize=maximize, **SCHEDULES["none"])
    assert max(errors.grad_ema, errors.momentum_buffer) < 4 * EPS[torch.float32], errors
    assert errors.trust_ratio < RATIO * EPS[torch.float32], errors
    # 64: the rounding of a badly conditioned trust ratio reaches the parameter (seen: 13).
    assert errors.param < 64 * EPS[torch.float32] + (0 if dtype == torch.float32 else 0.51 * EPS[dtype]), errors


@pytest.mark.parametrize(
    "wrong",
    [{"momentum": 0.9001}, {"weight_decay": 2e-4}, {"ema_decay": (0.3, 0.6, 0.71)}, {"trust_coefficient": 0.0201}],
)
def test_the_comparison_can_fail(wrong: dict[str, Any], seed: int) -> None:
    """Negative control: an optimizer that is off by a little is found out by the float32 bound."""
    model = ConvNet().double()
    oracle = oracle_of(model, "dals")
    errors = follow_oracle(model, DALS(model, **wrong), oracle, 50)
    assert errors.worst() > 256 * EPS[torch.float32], errors


def test_restart_keeps_the_buffers(seed: int) -> None:
    """A cycle's last step is not the first one's: 19 steps, then the schedule is back at 1 with m as it was."""
    model = ConvNet().double()
    optimizer = DALSAcc(model, restart_steps=20)
    oracle = oracle_of(model, "dals_acc", restart_steps=20)
    before: dict[int, float] = {}
    follow_oracle(model, optimizer, oracle, 21, each_step=lambda t: before.update({t: optimizer.current_lr()[0]}))
    assert before[18] < 0.001 * 0.03 * 10 and before[19] == pytest.approx(0.03)
    assert all(optimizer.state[p]["momentum_buffer"].abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "can_bypass"), [(0.3, False), (0.3, True), (1.0, True)])
def test_device_scalars_give_the_same_step(dtype: torch.dtype, alpha: float, can_bypass: bool, seed: int) -> None:
    """The path of a GPU, where alpha, bypass and lr are tensors that nobody waits for, run on CPU tensors."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(5, 7), (3,), (0,), (2, 3, 4)]
    tensors = [[torch.randn(s, dtype=d) for s in shapes] for d in (dtype, dtype, state, state)]
    copies = [[t.clone() for t in group] for group in tensors]
    fixed: dict[str, Any] = {
        "weight_decay": 1e-2, "trust_coefficient": 0.02, "trust_clip": (0.2, 5.0), "momentum": 0.9,
    }  # fmt: skip
    blends = [0.3, 0.4, 0.5, 0.7]
    on_host = foreach.dals_foreach_(*tensors, blends, ema_decay=alpha, bypass=alpha == 1, lr=0.1, **fixed)
    scalar = torch.tensor(alpha, dtype=torch.float64)
    on_device = foreach.dals_foreach_(
        *copies,
        blends,
        ema_decay=scalar,
        bypass=scalar == 1 if can_bypass else False,
        lr=torch.tensor(0.1, dtype=torch.float64),
        **fixed,
    )
    eps = torch.finfo(state).eps
    torch.testing.assert_close(on_host, on_device, rtol=RATIO * eps, atol=0)
    for a, b, like in zip(tensors, copies, (dtype, dtype, state, state), strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=16 * eps if like == state else torch.finfo(like).eps, atol=16 * eps)
