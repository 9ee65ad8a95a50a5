"""Float64 oracle of the DALS update, transcribed line by line from SPEC.md (numpy only)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class OracleGroup:
    """The hyperparameters of one group (SPEC "Symbols"); read anew at every step."""

    names: list[str]
    lr: float
    momentum: float
    weight_decay: float
    _: KW_ONLY
    trust_coefficient: float = 0.02
    trust_clip: tuple[float, float] = (0.2, 5.0)
    ema_decay: tuple[float | None, float, float]  # None: the filter is bypassed in that phase
    phase_thresholds: tuple[float, float]
    total_steps: int | None = None
    warmup_fraction: float = 0.05
    restart_steps: int | None = None
    restart_mult: float = 2
    maximize: bool = False


def oracle_group(
    preset: Literal["dals", "dals_fast", "dals_acc"], names: Sequence[str], **overrides: Any
) -> OracleGroup:
    """Return a row of SPEC "The three members of the family", its schedule off by default."""
    if preset == "dals":
        group = OracleGroup(
            names=list(names),
            lr=0.03,
            momentum=0.9,
            weight_decay=1e-4,
            ema_decay=(0.3, 0.6, 0.7),
            phase_thresholds=(0.01, 0.002),
            warmup_fraction=0.05,
        )
    elif preset == "dals_fast":
        group = OracleGroup(
            names=list(names),
            lr=0.05,
            momentum=0.85,
            weight_decay=1e-4,
            ema_decay=(None, 0.6, 0.7),
            phase_thresholds=(0.01, 0.002),
            warmup_fraction=0.02,
        )
    elif preset == "dals_acc":
        group = OracleGroup(
            names=list(names),
            lr=0.03,
            momentum=0.9,
            weight_decay=5e-4,
            ema_decay=(0.55, 0.7, 0.8),
            phase_thresholds=(0.01, 0.001),
            restart_mult=2,
        )
    else:
        raise ValueError(f"unknown preset {preset!r}")
    return replace(group, **overrides)


def oracle_depths(owners: Sequence[str]) -> list[float]:
    """Return the "auto" depth of each parameter from its owning module (SPEC "Depth")."""
    modules = list(dict.fromkeys(owners))  # the owning modules in registration order
    if len(modules) == 1:
        return [0.5 for _ in owners]
    return [modules.index(owner) / (len(modules) - 1) for owner in owners]


class Oracle:
    """SPEC "One step", "Phase" and "Learning rate", literally, in float64."""

    def __init__(
        self,
        params: Mapping[str, NDArray[Any]],
        groups: Sequence[OracleGroup],
        depths: Mapping[str, float],
    ) -> None:
        """Copy the parameters to float64 and start h and m at 0 (SPEC "Symbols")."""
        self.groups = list(groups)
        self.depths = {name: float(depth) for name, depth in depths.items()}
        self.params: dict[str, Array] = {name: np.array(value, dtype=np.float64) for name, value in params.items()}
        self.grad_ema: dict[str, Array] = {n: np.zeros(p.shape) for n, p in self.params.items()}
        self.momentum_buffer: dict[str, Array] = {n: np.zeros(p.shape) for n, p in self.params.items()}
        self.trust_ratio: dict[str, float] = {}
        self.loss_ema: float | None = None  # E, shared by the groups; None: no loss observed yet
        self.phases: list[int] = [1 for _ in self.groups]  # no loss ever observed: phase 1
        self.step_lr: list[float] = []
        self.completed_steps = 0
        self._cycle_counter = [0 for _ in self.groups]  # c
        self._restarts = [0 for _ in self.groups]  # k

    def step(self, grads: Mapping[str, NDArray[Any] | None], losses: Sequence[float] = ()) -> None:
        """Take one optimizer step; a missing or None gradient leaves its tensor untouched."""
        self._observe(losses)
        self.trust_ratio = {}
        self.step_lr = []
        for index, group in enumerate(self.groups):
            eta = group.lr * self._schedule(index)
            self.step_lr.append(eta)
            for name in group.names:
                grad = grads.get(name)
                if grad is not None:
                    g: Array = np.array(grad, dtype=np.float64)
                    self._update(name, g, group, self.phases[index], eta)
        self.completed_steps += 1

    def _observe(self, losses: Sequence[float]) -> None:
        """Set E and the phases from the losses before the step (SPEC "Phase")."""
        if len(losses) == 0:
            return
        loss = sum(float(value) for value in losses) / len(losses)
        if not math.isfinite(loss):
            return
        if self.loss_ema is None:
            self.loss_ema = loss
            self.phases = [0 for _ in self.groups]
            return
        old = self.loss_ema
        new = 0.95 * old + 0.05 * loss
        drop = (old - new) / max(abs(old), 1e-8)
        self.loss_ema = new
        for index, group in enumerate(self.groups):
            t1, t2 = group.phase_thresholds
            if drop > t1:
                self.phases[index] = 0
            elif drop > t2:
                self.phases[index] = 1
            else:
                self.phases[index] = 2

    def _schedule(self, index: int) -> float:
        """Return s of this step, and advance the restart counter (SPEC "Learning rate")."""
        group = self.groups[index]
        if group.total_steps is not None and group.restart_steps is not None:
            raise ValueError("total_steps and restart_steps exclude each other")
        if group.total_steps is not None:
            t, total = self.completed_steps, group.total_steps
            warmup = math.floor(group.warmup_fraction * total)
            if t >= total:
                return 0.0
            if t < warmup:
                return t / warmup
            return (1 + math.cos(math.pi * min((t - warmup) / max(1, total - warmup), 1))) / 2
        if group.restart_steps is not None:
            self._cycle_counter[index] += 1
            if self._cycle_counter[index] >= self._cycle_length(index, group.restart_steps):
                self._cycle_counter[index] = 0
                self._restarts[index] += 1
            length = self._cycle_length(index, group.restart_steps)
            return (1 + math.cos(math.pi * self._cycle_counter[index] / length)) / 2
        return 1.0

    def _cycle_length(self, index: int, restart_steps: int) -> int:
        """Return floor(T0 M^k), k the number of restarts so far (SPEC "Learning rate")."""
        return math.floor(restart_steps * self.groups[index].restart_mult ** self._restarts[index])

    def _update(self, name: str, g: Array, group: OracleGroup, phase: int, eta: float) -> None:
        """Update one tensor in the six lines of SPEC "One step"."""
        p, h, m = self.params[name], self.grad_ema[name], self.momentum_buffer[name]
        if g.shape != p.shape:
            raise ValueError(f"{name}: gradient {g.shape}, parameter {p.shape}")
        if group.maximize:
            g = np.negative(g)
        alpha = group.ema_decay[phase]
        if alpha is None:  # bypass: h is frozen and u = g
            u = g
        else:
            b = 0.3 + 0.4 * self.depths[name]
            h[...] = alpha * h + (1 - alpha) * g  # line 1
            u = b * g + (1 - b) * h  # line 2
        u = u + group.weight_decay * p  # line 3
        p_norm = math.sqrt(float(np.sum(p * p)))
        u_norm = math.sqrt(float(np.sum(u * u)))
        if p_norm == 0 or u_norm == 0:
            r = 1.0
        else:
            r = float(np.clip(group.trust_coefficient * p_norm / u_norm, *group.trust_clip))
        self.trust_ratio[name] = r  # line 4
        m[...] = group.momentum * m + u  # line 5
        p[...] = p - eta * r * m  # line 6
