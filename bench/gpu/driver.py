"""The fused pass past the optimizer: any state dtype, any work list and launch shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.byte_table import Dtypes
from bench.compiled import even_blends, hyperparameters
from fused_dals.fused import FusedPass
from fused_dals.gather import TensorBatch
from fused_dals.launch_plan import LaunchPlan
from fused_dals.live_groups import GroupsVersion
from fused_dals.loss_signal import StepLoss
from fused_dals.run_state import RunState, StepInputs


@dataclass
class TensorSet:
    """Tensors of one set of dtypes; ``blends`` by position in their group, which is the order of the lists, or other.

    Random bits of stochastic rounding follow the position.
    """

    params: list[Tensor]
    grads: list[Tensor]
    grad_emas: list[Tensor]
    momentum_buffers: list[Tensor]
    blends: list[float]
    positions: list[int] | None = None

    @property
    def dtypes(self) -> Dtypes:
        return self.params[0].dtype, self.grads[0].dtype, self.grad_emas[0].dtype

    def reordered(self, order: Sequence[int]) -> TensorSet:
        """The same tensors, which keep their positions, in another order of the lists."""
        lists = (self.params, self.grads, self.grad_emas, self.momentum_buffers)
        p, g, h, m = ([tensors[i] for i in order] for tensors in lists)
        return TensorSet(p, g, h, m, self.blends, list(order))


class PassDriver:
    """Steps a set of tensors, which must stay where they are, under a plan."""

    def __init__(self, tensors: TensorSet, plan: LaunchPlan, group: dict[str, Any]) -> None:
        self.tensors = tensors  # the pass itself holds addresses
        self.group = group
        device = tensors.params[0].device
        self.fused_pass = FusedPass(device, plan)
        state = {
            param: {"grad_ema": h, "momentum_buffer": m}
            for param, h, m in zip(tensors.params, tensors.grad_emas, tensors.momentum_buffers, strict=True)
        }
        positions = list(range(len(tensors.params))) if tensors.positions is None else tensors.positions
        batch = TensorBatch(0, positions, tensors.params, tensors.grads)
        self.fused_pass.prepare([batch], state, [tensors.blends])
        self.loss = torch.ones((), dtype=torch.float64, device=device)
        self.run_state = RunState()
        self.run_state.move_to(device)

    def step(self) -> Tensor:
        """One step; returns the trust ratios, in memory that the next step writes again."""
        inputs = StepInputs(self.run_state.values, StepLoss(self.loss, 1))
        (measured,) = self.fused_pass.run(inputs, [self.group], groups_version=GroupsVersion(0, 0))
        return measured.values


def compile_variant(device: torch.device, dtypes: Dtypes, plan: LaunchPlan) -> None:
    """Run a tiny step, in a process of its own, so that the compiled kernel is in Triton's cache on disk."""
    kinds = (dtypes[0], dtypes[1], dtypes[2], dtypes[2])
    p, g, h, m = ([torch.ones(64, dtype=kind, device=device)] for kind in kinds)
    PassDriver(TensorSet(p, g, h, m, even_blends(len(p))), plan, hyperparameters()).step()
    if device.type == "cuda":
        torch.cuda.synchronize()
