"""Devices without double precision: every option takes the steps there that it takes on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS
from tests.single_precision import DEVICE, SinglePrecision, on_device

SHAPES = ((5, 3), (7,), (), (4, 2, 2), (3000,), (0,))
#: Of the paths' own difference in float32: norms are summed otherwise.
MOST = 1e-6
STEPS = 5

OPTIONS: dict[str, dict[str, Any]] = {
    "foreach": {},
    "reference": {"foreach": False},
    "warm-up and cosine": {"total_steps": 10, "warmup_fraction": 0.3},
    "restarts": {"restart_steps": 2, "restart_mult": 2},
    "equal restarts": {"restart_steps": 3, "restart_mult": 1},
    "bypass": {"ema_decay": (1.0, 0.6, 0.7)},
    "clipping": {"max_grad_norm": 0.3},
    "dropping": {"skip_nonfinite": True},
    "both": {"max_grad_norm": 0.3, "skip_nonfinite": True},
    "narrow state": {"state_dtype": torch.bfloat16},
    "compensated": {"compensated": True},
    "GradScaler": {"amp_fused": True},
}


class Twins:
    """The same parameters on the CPU and on the device, each with its optimizer."""

    def __init__(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.here = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
        self.there = [on_device(param).requires_grad_() for param in self.here]
        self.optimizers = [
            DALS([(f"layers.{i}.weight", param) for i, param in enumerate(params)], lr=0.05, **options)
            for params in (self.here, self.there)
        ]

    def step(self, loss: float, infinite: bool = False, **scaler: float) -> None:
        for mine, theirs in zip(self.here, self.there, strict=True):
            mine.grad = torch.randn_like(mine)
            if infinite and mine.dim() == 2:
                mine.grad[0, 0] = torch.inf
            theirs.grad = on_device(mine.grad)
        for optimizer in self.optimizers:
            here = optimizer is self.optimizers[0]
            for name, value in scaler.items():
                setattr(optimizer, name, torch.tensor(value) if here else on_device(torch.tensor(value)))
            optimizer.step(loss=torch.tensor(loss) if here else on_device(torch.tensor(loss)))

    def apart(self) -> float:
        """The largest difference of an element, in units of the largest of its tensor."""
        return max(
            float((mine.detach() - theirs.to(torch.device("cpu"))).abs().max() / mine.detach().abs().max())
            for mine, theirs in zip(self.here, self.there, strict=True)
            if mine.numel()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_steps_as_on_the_cpu(options: str, dtype: torch.dtype, seed: int) -> None:
    if options == "compensated" and dtype == torch.float32:
        pytest.skip("float32 parameters have nothing to compensate")
    with SinglePrecision():
        twins = Twins(dtype, OPTIONS[options])
        for t in range(STEPS):
            infinite = t == 2 and ("dropping" in options or options == "both")
            scaler = {"grad_scale": 8.0, "found_inf": float(t == 3)} if options == "GradScaler" else {}
            twins.step(1.0 / (1 + t), infinite, **scaler)
        here, there = twins.optimizers
        # The last bit of a norm may turn a rounding to bfloat16 around.
        exact = dtype == torch.float32 and options != "narrow state"
        assert twins.apart() <= (MOST if exact else 2**-8)
        assert there.skipped_steps == here.skipped_steps == int(options in ("dropping", "both", "GradScaler"))
        assert there.phases() == here.phases()
        assert there.current_lr() == pytest.approx(here.current_lr(), rel=1e-6)
        assert there.trust_ratios() == pytest.approx(here.trust_ratios(), rel=1e-5 if exact else 0.02)


def test_a_run_goes_on_from_its_checkpoint(seed: int) -> None:
    with SinglePrecision():
        twins = Twins(torch.float32, {"total_steps": 20, "max_grad_norm": 1.0})
        for _ in range(2):
            twins.step(0.5)
        for optimizer in twins.optimizers:
            optimizer.load_state_dict(copy.copy(optimizer.state_dict()))
        twins.step(0.4)
        assert twins.apart() <= MOST
        assert all(entry["grad_ema"].device == DEVICE for entry in twins.optimizers[1].state.values())


def test_a_learning_rate_may_live_there(seed: int) -> None:
    with SinglePrecision():
        twins = Twins(torch.float32, {"total_steps": 20})
        twins.optimizers[1].param_groups[0]["lr"] = on_device(torch.tensor(0.05))
        for _ in range(2):
            twins.step(0.5)
        assert twins.apart() <= MOST


def test_the_device_refuses_double_precision() -> None:
    with SinglePrecision():
        on: Tensor = on_device(torch.ones(2))
        for make in (lambda: on.double(), lambda: on.to(torch.float64), lambda: torch.zeros(2, device=DEVICE).double()):
            with pytest.raises(TypeError, match="no double precision"):
                make()
        with pytest.raises(RuntimeError, match="mps:0 and the CPU"):
            on + torch.ones(2)
