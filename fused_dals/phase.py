"""The training phase, read off the loss: pure functions on 0-dim tensors, with no branch on their values.

Nothing here waits for the device: the same lines serve a loss that lives on the CPU and one that lives on a GPU.
Source: SPEC, section "Phase, from the loss, before the step".

What the phase measures, in plain words: for a non-negative loss the drop is ``0.05 (1 - L / E)``, so phase 0 means
that this minibatch's loss is under 0.8 of the running mean: a detector of batch noise more than of trend.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXPLORATION, EXPLOITATION, REFINEMENT = 0, 1, 2

LOSS_EMA_DECAY, LOSS_EMA_WEIGHT = 0.95, 0.05

#: ``loss_ema`` before any loss has been observed; any finite loss replaces it.
NO_LOSS_YET = math.inf


def update_loss_ema(loss_ema: Tensor, loss_drop: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """One observation: ``E' = 0.95 E + 0.05 L`` and the relative drop ``D = (E - E') / max(|E|, 1e-8)``.

    The first observed loss sets E itself and an infinite drop, which is phase 0 under any thresholds.
    A loss that is not finite leaves both as they were. All three are 0-dim and on one device; returns (E', D).
    """
    first = torch.isinf(loss_ema)
    next_ema = torch.where(first, loss, LOSS_EMA_DECAY * loss_ema + LOSS_EMA_WEIGHT * loss)
    drop = torch.where(first, math.inf, (loss_ema - next_ema) / loss_ema.abs().clamp(min=1e-8))
    finite = torch.isfinite(loss)
    return torch.where(finite, next_ema, loss_ema), torch.where(finite, drop, loss_drop)


def select_by_phase(
    loss_ema: Tensor,
    loss_drop: Tensor,
    phase_thresholds: tuple[float, float],
    values: tuple[float, float, float],
) -> Tensor:
    """The one of three values that belongs to the present phase, as a 0-dim tensor of loss_drop's dtype.

    Phase 0 if ``D > t1``, else 1 if ``D > t2``, else 2; phase 1 while no loss has been observed.
    """
    t1, t2 = map(float, phase_thresholds)
    exploration, exploitation, refinement = (torch.full_like(loss_drop, float(value)) for value in values)
    chosen = torch.where(loss_drop > t1, exploration, torch.where(loss_drop > t2, exploitation, refinement))
    return torch.where(torch.isinf(loss_ema), exploitation, chosen)
