"""DALSFast and DALSAcc: the same class with other defaults. SPEC, "The three members of the family"."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from fused_dals.hyperparameters import DALSOptions
from fused_dals.optimizer import DALS, Params


class DALSFast(DALS):
    """DALS with the presets of DALS-Fast: lr 0.05, momentum 0.85, ema_decay (1, 0.6, 0.7), warmup_fraction 0.02.

    Every argument of DALS, with its meaning; only these defaults differ (SPEC, "The three members of the family").
    """

    PRESET: ClassVar[DALSOptions] = {"momentum": 0.85, "ema_decay": (1.0, 0.6, 0.7), "warmup_fraction": 0.02}

    def __init__(self, params: Params, lr: float | Tensor = 0.05, **options: Unpack[DALSOptions]) -> None:
        merged: DALSOptions = {**self.PRESET, **options}
        super().__init__(params, lr, **merged)


class DALSAcc(DALS):
    """DALS with the presets of DALS-Acc: weight_decay 5e-4, ema_decay (0.55, 0.7, 0.8), phase_thresholds (0.01, 0.001),
    restart_steps 1000, restart_mult 2.

    Every argument of DALS, with its meaning; only these defaults differ (SPEC, "The three members of the family").
    The restarts are on by default: pass ``restart_steps=None`` to use ``total_steps`` or a torch scheduler alone.
    """

    PRESET: ClassVar[DALSOptions] = {
        "weight_decay": 5e-4,
        "ema_decay": (0.55, 0.7, 0.8),
        "phase_thresholds": (0.01, 0.001),
        "restart_steps": 1000,
        "restart_mult": 2,
    }

    def __init__(self, params: Params, lr: float | Tensor = 0.03, **options: Unpack[DALSOptions]) -> None:
        merged: DALSOptions = {**self.PRESET, **options}
        super().__init__(params, lr, **merged)
