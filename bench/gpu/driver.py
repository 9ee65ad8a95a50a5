"""The fused pass past the optimizer: any state dtype, any work list and launch shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.byte_table import Dtypes
from bench.cache_model import chunk_of
from bench.compiled import even_blends, hyperparameters
from fused_dals import fused
from fused_dals.buckets import Bucket
from fused_dals.fused import FusedPass, programs_on
from fused_dals.gather import TensorBatch
from fused_dals.live_groups import GroupsVersion
from fused_dals.loss_signal import StepLoss
from fused_dals.run_state import RunState, StepInputs


@dataclass(frozen=True)
class Plan:
    """What is free to choose about a launch; none of it may change a result. ``window`` counts chunks.

    A tile larger than the chunk becomes the chunk. Where chunk or window are None, they are what the optimizer takes.
    """

    chunk: int | None = None
    tile: int = fused.TILE
    window: int | None = None
    stage_a_writes: bool = True
    evict_first: bool = True
    same_runs: bool = False
    num_warps: int = fused.NUM_WARPS
    programs_per_sm: int = fused.PROGRAMS_PER_SM
    max_registers: int | None = None


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

    def __init__(self, tensors: TensorSet, plan: Plan, group: dict[str, Any]) -> None:
        self.tensors = tensors  # the pass itself holds addresses
        self.group = group
        device = tensors.params[0].device
        param, grad, state_dtype = tensors.dtypes
        chunk = plan.chunk or chunk_of(tensors.dtypes)
        self.plan = replace(plan, tile=min(plan.tile, chunk))
        self.fused_pass = FusedPass(
            device,
            plan.window,
            plan.stage_a_writes,
            plan.evict_first,
            plan.same_runs,
            plan.max_registers,
            programs_on(device, plan.programs_per_sm),
        )
        bucket = Bucket(device, chunk, self.fused_pass.window)
        self.fused_pass.buckets[param, grad, state_dtype, False] = bucket
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
        with _launch_shape(self.plan):
            (measured,) = self.fused_pass.run(inputs, [self.group], groups_version=GroupsVersion(0, 0))
        return measured.values


@contextmanager
def _launch_shape(plan: Plan) -> Iterator[None]:
    before = fused.TILE, fused.NUM_WARPS
    fused.TILE, fused.NUM_WARPS = plan.tile, plan.num_warps
    try:
        yield
    finally:
        fused.TILE, fused.NUM_WARPS = before


def compile_variant(device: torch.device, dtypes: Dtypes, plan: Plan) -> None:
    """Run a tiny step, in a process of its own, so that the compiled kernel is in Triton's cache on disk."""
    kinds = (dtypes[0], dtypes[1], dtypes[2], dtypes[2])
    p, g, h, m = ([torch.ones(64, dtype=kind, device=device)] for kind in kinds)
    PassDriver(TensorSet(p, g, h, m, even_blends(len(p))), plan, hyperparameters()).step()
    if device.type == "cuda":
        torch.cuda.synchronize()
