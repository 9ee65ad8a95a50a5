"""From the losses that a training loop hands over to the phase: what is pending, the running mean, the hook."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fused_dals.phase import NO_LOSS_YET, select_by_phase, update_loss_ema

NO_LOSS_WARNING = (
    "{optimizer} has not been given a loss: it stays in phase 1 (ema_decay {ema_decay}). Pass it in one of four ways: "
    "optimizer.step(loss=loss), optimizer.observe_loss(loss) before step(), optimizer.step(closure), or once "
    "optimizer.watch_loss(model_or_criterion)."
)


class LossSignal:
    """E and D of the phase rule, with the losses observed since the last step.

    Everything is a 0-dim tensor on the device where the losses come from; nothing waits for it.
    """

    def __init__(self) -> None:
        self.restore(NO_LOSS_YET, 0.0)

    def restore(self, loss_ema: float, loss_drop: float) -> None:
        """Go on from the plain numbers of a checkpoint."""
        self.loss_ema = torch.tensor(loss_ema, dtype=torch.float64, device="cpu")
        self.loss_drop = torch.tensor(loss_drop, dtype=torch.float64, device="cpu")
        self.ever_observed = not math.isinf(loss_ema)
        self._pending: Tensor | None = None
        self._pending_count = 0

    def observe(self, loss: Tensor | float) -> None:
        """Add one loss to those of the coming step."""
        value = _as_scalar(loss)
        # The sum is a new tensor: the loss may be written in place afterwards, and its graph must not be kept.
        if self._pending is None:
            self._pending = value.clone()
        else:
            self._pending = self._pending + value.to(self._pending.device, non_blocking=True)
        self._pending_count += 1
        self.ever_observed = True

    def commit(self, device: torch.device) -> None:
        """Move E and D by the mean of the pending losses, on ``device``; leave them where there is none."""
        self.loss_ema = _to(self.loss_ema, device)
        self.loss_drop = _to(self.loss_drop, device)
        if self._pending is None:
            return
        loss = _to(self._pending, device).to(self.loss_ema.dtype) / self._pending_count
        self.loss_ema, self.loss_drop = update_loss_ema(self.loss_ema, self.loss_drop, loss)
        self._pending, self._pending_count = None, 0

    def select(self, phase_thresholds: tuple[float, float], values: tuple[float, float, float]) -> Tensor:
        """The value that belongs to the present phase, 0-dim."""
        return select_by_phase(self.loss_ema, self.loss_drop, phase_thresholds, values)


class WatchLoss:
    """The forward hook of ``watch_loss``: observes the loss that a module returns.

    It holds the signal weakly, and a copy or pickle of the watched module carries a hook that watches nothing: an
    averaged copy of a model must not feed the optimizer of the original.
    """

    def __init__(self, signal: LossSignal | None) -> None:
        self._signal = (lambda: None) if signal is None else weakref.ref(signal)

    def __reduce__(self) -> tuple[type[WatchLoss], tuple[None]]:
        return WatchLoss, (None,)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        signal = self._signal()
        if signal is None or not module.training or not torch.is_grad_enabled():
            return
        loss = output
        if not isinstance(output, Tensor):
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
        if loss is None:  # a model called without labels
            return
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"watch_loss: {type(module).__name__} returned {what}, neither a scalar loss nor an output with a "
                "scalar .loss; watch the criterion instead, or call observe_loss(loss) in the training loop"
            )
        signal.observe(loss)


def watch(module: nn.Module, signal: LossSignal) -> RemovableHandle:
    """Register the hook; the handle's ``remove()`` takes it off again."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"watch_loss: expected a torch.nn.Module, got {type(module).__name__}")
    return module.register_forward_hook(WatchLoss(signal))


def _as_scalar(loss: Tensor | float) -> Tensor:
    """``loss`` detached, 0-dim and in double precision (single where the device has no double)."""
    if not isinstance(loss, Tensor):
        if not hasattr(loss, "__float__"):
            raise TypeError(f"loss must be a number or a scalar tensor, got {type(loss).__name__}")
        return torch.tensor(float(loss), dtype=torch.float64, device="cpu")
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}; pass its mean, loss.mean()")
    if loss.is_complex():
        raise TypeError(f"loss must be real, got {loss.dtype}")
    return loss.detach().reshape(()).to(_widest(loss.device))


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _to(scalar: Tensor, device: torch.device) -> Tensor:
    # A copy off the device must be waited for, or the CPU would read a value that has not arrived.
    return scalar.to(device, _widest(device), non_blocking=device.type != "cpu")
