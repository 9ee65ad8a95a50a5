"""The scalars of one step for the paths of torch operations: alpha, eta and the factor of the gradients per group."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_dals import host
from fused_dals.kernels import layout
from fused_dals.phase import select_by_phase
from fused_dals.reference import compute_dtype
from fused_dals.rounding import step_seed
from fused_dals.run_state import StepInputs
from fused_dals.schedule import schedule_factor, schedule_factor_of_tensor


def clip_factor(grad_norm: Tensor | None, max_grad_norm: float | None) -> Tensor | None:
    """min(1, max / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it; NaN for a norm that is NaN."""
    if grad_norm is None or max_grad_norm is None:
        return None
    return (float(max_grad_norm) / (grad_norm + 1e-6)).clamp(max=1.0)


class StepScalars:
    """What one step takes from its inputs on their device; plain numbers where the host can know them."""

    def __init__(self, inputs: StepInputs) -> None:
        self.inputs = inputs
        self.next_values = inputs.next_values()
        self._on_host = host.knows(inputs.values)
        dropped = inputs.dropped()
        self.dropped: bool | Tensor | None = bool(dropped) if dropped is not None and self._on_host else dropped

    @functools.cached_property
    def seed(self) -> Tensor:
        """This step's, for stochastic rounding."""
        return step_seed(self.inputs.completed_steps)

    def of_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of an update that a group decides."""
        alpha, bypass = self._ema_decay(group)
        return {
            "ema_decay": alpha,
            "bypass": bypass,
            "weight_decay": float(group["weight_decay"]),
            "trust_coefficient": float(group["trust_coefficient"]),
            "trust_clip": tuple(map(float, group["trust_clip"])),
            "momentum": float(group["momentum"]),
            "lr": scheduled_lr(group, self.inputs.completed_steps),  # eta = lr s(t)
            "grad_factor": self._grad_factor(group),
        }

    def unscale_(self, grads: list[Tensor]) -> None:
        """Divide the gradients by a GradScaler's scale, in place, where there is one.

        In float32 at least: a device takes the scale in the dtype of what it divides, and 65536 is infinite in float16.
        """
        if self.inputs.grad_scale is None:
            return
        dtype = compute_dtype(grads[0].dtype)
        scale = self.inputs.grad_scale.reshape(()).to(dtype)
        if grads[0].dtype == dtype:
            torch._foreach_div_(grads, scale)
        else:
            torch._foreach_copy_(grads, torch._foreach_div([grad.to(dtype) for grad in grads], scale))

    def _ema_decay(self, group: Mapping[str, Any]) -> tuple[float | Tensor, bool | Tensor]:
        """alpha of the present phase, and whether it bypasses the filter."""
        values = self.next_values
        alpha = select_by_phase(
            values[layout.LOSS_EMA], values[layout.LOSS_DROP], group["phase_thresholds"], group["ema_decay"]
        )
        if self._on_host:
            number = alpha.item()
            return number, number == 1
        return alpha, alpha == 1 if 1 in group["ema_decay"] else False

    def _grad_factor(self, group: Mapping[str, Any]) -> float | Tensor:
        """Sign and clipping of the gradients, and the inverse of a GradScaler's scale."""
        sign = -1.0 if group["maximize"] else 1.0
        factor = clip_factor(self.inputs.grad_norm(), group["max_grad_norm"])
        if self.inputs.grad_scale is not None:
            inverse = 1 / self.inputs.grad_scale.reshape(()).to(self.inputs.values.dtype)
            factor = inverse if factor is None else factor * inverse
        if factor is None:
            return sign
        return sign * (factor.item() if self._on_host else factor)


def scheduled_lr(group: Mapping[str, Any], completed_steps: Tensor) -> float | Tensor:
    """lr s(t), a number where the host knows t and lr, else 0-dim on the device of t."""
    schedule = {key: group[key] for key in ("total_steps", "warmup_fraction", "restart_steps", "restart_mult")}
    lr = group["lr"]
    device = completed_steps.device
    if isinstance(lr, Tensor):
        lr = lr.detach().reshape(())
        lr = lr.item() if host.knows(lr) else lr.to(device, non_blocking=device.type != "cpu")
    else:
        lr = float(lr)  # a number of NumPy's would multiply in a precision of its own
    if host.knows(completed_steps):
        return lr * schedule_factor(int(completed_steps), **schedule)  # type: ignore[no-any-return]
    eta: float | Tensor = lr * schedule_factor_of_tensor(completed_steps, **schedule)
    return eta
