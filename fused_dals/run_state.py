"""The numbers that move while training: completed steps, the loss's running mean and drop, dropped steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_dals import host
from fused_dals.hyperparameters import COUNTERS
from fused_dals.kernels import layout
from fused_dals.loss_signal import StepLoss
from fused_dals.outside_inference import outside_inference_mode
from fused_dals.phase import NO_LOSS_YET, update_loss_ema


class RunState:
    """One float64 tensor (STEP, LOSS_EMA, LOSS_DROP, SKIPPED_STEPS) on the device of the parameters.

    It lives there, not on the host, so that steps of a captured graph move it, and so that the device can drop a step
    without anybody waiting for it. It stays in its memory, which captured graphs write to.
    """

    @outside_inference_mode
    def __init__(self) -> None:
        self.values = torch.tensor([0.0, NO_LOSS_YET, 0.0, 0.0], dtype=torch.float64, device="cpu")
        #: Steps that were asked for, which the host knows: those that were taken, the dropped ones too, and none of
        #: those that a graph replays.
        self.calls = 0

    def numbers(self) -> dict[str, float]:
        """All as plain numbers, by the names they have in param groups; waits for the device."""
        numbers = dict(zip(COUNTERS, self.values.tolist(), strict=True))
        return {**numbers, "step": int(numbers["step"]), "skipped_steps": int(numbers["skipped_steps"])}

    def restore(self, numbers: Mapping[str, float]) -> None:
        """Go on from the plain numbers of a checkpoint."""
        self.values.copy_(torch.tensor([float(numbers[name]) for name in COUNTERS], dtype=torch.float64, device="cpu"))
        self.calls = int(numbers["step"])

    def move_to(self, device: torch.device) -> None:
        """Live on ``device`` from now on."""
        if self.values.device != device:
            self.values = host.scalars_on(device, self.values)


@dataclass
class StepInputs:
    """What decides over one step besides gradients and hyperparameters; everything but the flags on one device."""

    values: Tensor  # the run state before the step, float64 [4]
    loss: StepLoss = field(default_factory=StepLoss)  # the losses observed since the last step
    found_inf: Tensor | None = None  # from a GradScaler: drop the step unless 0, 0-dim
    grad_scale: Tensor | None = None  # from a GradScaler: the gradients are multiplied by it, 0-dim
    scan: Tensor | None = None  # float64 [k, 2]: sums of squares and counts of non-finite elements of all gradients
    skip_nonfinite: bool = False

    def nothing_but_a_loss(self) -> bool:
        """Whether neither a GradScaler nor a scan of the gradients has a say."""
        return self.found_inf is None and self.grad_scale is None and self.scan is None and not self.skip_nonfinite

    def on(self, device: torch.device) -> StepInputs:
        """The same on ``device``; ``values`` is the original only on its own device."""
        if self.values.device == device:
            return self
        moved: dict[str, Any] = {
            name: host.scalars_on(device, value)
            for name in ("values", "found_inf", "grad_scale", "scan")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved, loss=self.loss.on(device))

    @property
    def completed_steps(self) -> Tensor:
        """t of the schedules, before this step."""
        return self.values[layout.STEP]

    def dropped(self) -> Tensor | None:
        """Whether the step changes nothing, 0-dim; None where that cannot be."""
        dropped = None if self.found_inf is None else self.found_inf.reshape(()) != 0
        if self.skip_nonfinite and self.scan is not None:
            non_finite = self.scan[:, 1].sum() > 0
            dropped = non_finite if dropped is None else dropped | non_finite
        return dropped

    def grad_norm(self) -> Tensor | None:
        """The L2 norm of all unscaled gradients, where they have been scanned."""
        if self.scan is None:
            return None
        norm = self.scan[:, 0].sum().sqrt()
        return norm if self.grad_scale is None else norm / self.grad_scale.reshape(())

    def next_values(self) -> Tensor:
        """The run state after the step: the same as the prologue kernel makes it."""
        step, loss_ema, loss_drop, skipped = self.values.unbind()
        loss = self.loss.mean()
        if loss is not None:
            loss_ema, loss_drop = update_loss_ema(loss_ema, loss_drop, loss)
        taken = torch.stack([step + 1, loss_ema, loss_drop, skipped])
        dropped = self.dropped()
        if dropped is None:
            return taken
        counted = self.values.clone()
        counted[layout.SKIPPED_STEPS] += 1
        return torch.where(dropped, counted, taken)
