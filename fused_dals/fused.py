"""DALS through the Triton kernels: a prologue and one pass per bucket, whatever the number of tensors and groups."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_dals.buckets import WIDE_BYTES, Bucket, joined_dims, tensors_of, to_device
from fused_dals.gather import TensorBatch
from fused_dals.kernels import layout
from fused_dals.loss_signal import LossSignal
from fused_dals.stats import TrustRatios

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

NUM_WARPS: int = layout.NUM_WARPS

#: Resident programs per multiprocessor that the registers of the kernel allow with 8 warps (128 x 256 x 2 = 65536).
PROGRAMS_PER_SM = 2


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def triton_is_installed() -> bool:
    """Looked up once: a missing module takes 90 us to miss."""
    return importlib.util.find_spec("triton") is not None


def why_not_fused(param: Tensor, grad: Tensor) -> str:
    """What the kernels lack for this parameter and its gradient; empty where they can serve them."""
    if not triton_is_installed():
        return "Triton is not installed (pip install triton; it exists for Linux with a GPU)"
    if param.device.type != "cuda" and not (interpreted() and param.device.type == "cpu"):
        return f"it is on {param.device}, and the kernels run on CUDA and ROCm devices"
    if param.dtype not in FUSED_DTYPES:
        return f"it is {param.dtype}, and the kernels serve float32, bfloat16 and float16"
    if param.dim() > layout.MAX_DIMS:
        left = len(joined_dims(param, grad, torch.empty_like(param, device="meta")))
        if left > layout.MAX_DIMS:
            return (
                f"its strides and those of its gradient leave {left} of its {param.dim()} dimensions, and the kernels "
                f"follow at most {layout.MAX_DIMS}; use foreach=True for its group"
            )
    return ""


@dataclass
class Launch:
    """One launch of the pass: a bucket, its dtypes, its tensors and where they stand in the groups."""

    bucket: Bucket
    dtypes: tuple[torch.dtype, ...]
    params: list[Tensor]
    members: list[tuple[int, list[int]]]

    def trust_ratios(self) -> list[TrustRatios]:
        """Views of the ratios that the launch leaves on the device; the next one writes them anew."""
        values = self.bucket.ratios.split([len(positions) for _, positions in self.members])
        return [
            TrustRatios(group_index, positions, ratio)
            for (group_index, positions), ratio in zip(self.members, values, strict=True)
        ]


class FusedPass:
    """The buckets and scalar tables of an optimizer on one device; built at the first step, never copied or saved."""

    def __init__(self, device: torch.device, window: int | None = None, stage_a_writes: bool | None = None) -> None:
        """``window`` in chunks, chosen from the device where None; ``stage_a_writes``: h and m are written in stage A.

        Stage A writing h and m moves fewer bytes; stage A only reading leaves a step droppable. None chooses the first,
        except on AMD, where Triton's barrier before the arrival does not wait for the other waves' stores to memory.
        """
        self.device = device
        self.window = window
        self.stage_a_writes = torch.version.hip is None if stage_a_writes is None else stage_a_writes
        self.buckets: dict[tuple[torch.dtype, ...], Bucket] = {}
        self.launches: list[Launch] = []
        self.preparations = 0  # how often the tables were written in full
        self._group_rows: list[tuple[float, ...]] = []
        self._lr_addresses: list[int] = []
        self._step = -1  # what the device's counter stands at
        self._grad_addresses: list[int] = []

    def prepare(
        self,
        batches: Sequence[TensorBatch],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        blends: Sequence[Sequence[float]],
    ) -> None:
        """Write the tables for these batches of this device; ``blends[g]`` has b per parameter of group g.

        The tables hold addresses: the caller keeps parameters, gradients and state alive until the step has run.
        """
        by_dtypes: dict[tuple[torch.dtype, ...], list[TensorBatch]] = {}
        for batch in batches:
            dtypes: tuple[torch.dtype, ...]
            dtypes = (batch.params[0].dtype, batch.grads[0].dtype, state[batch.params[0]]["grad_ema"].dtype)
            by_dtypes.setdefault(dtypes, []).append(batch)
        self.launches = []
        self.preparations += 1
        for dtypes, members in by_dtypes.items():
            if dtypes not in self.buckets:
                self.buckets[dtypes] = Bucket(self.device, window=self.window)
            tensors = tensors_of(members, state, blends)
            self.buckets[dtypes].refresh(tensors)
            places = [(batch.group_index, batch.positions) for batch in members]
            self.launches.append(Launch(self.buckets[dtypes], dtypes, tensors.params, places))
        counts = [launch.bucket.sync_count for launch in self.launches]
        self.sync = torch.empty(sum(counts), dtype=torch.int32, device=self.device)
        for launch, sync in zip(self.launches, self.sync.split(counts), strict=True):
            launch.bucket.use_sync(sync)
        in_order = sorted(
            (batch.group_index, position, grad.data_ptr())
            for batch in batches
            for position, grad in zip(batch.positions, batch.grads, strict=True)
        )
        self._grad_addresses = [address for _, _, address in in_order]
        rank = {(group_index, position): i for i, (group_index, position, _) in enumerate(in_order)}
        self._grad_places = [
            [rank[group_index, position] for group_index, positions in launch.members for position in positions]
            for launch in self.launches
        ]

    def follow_grads(self, addresses: list[int]) -> bool:
        """Point the tables to gradients at new addresses, in the order of the groups; False if that needs prepare().

        It does where a gradient is aligned otherwise than before, which decides how the kernel may read it.
        """
        if addresses == self._grad_addresses:
            return True
        if any((new ^ old) % WIDE_BYTES for new, old in zip(addresses, self._grad_addresses, strict=True)):
            return False
        for launch, places in zip(self.launches, self._grad_places, strict=True):
            launch.bucket.refresh_grads([addresses[place] for place in places])
        self._grad_addresses = addresses
        return True

    def run(self, groups: Sequence[Mapping[str, Any]], completed_steps: int, loss: LossSignal) -> list[TrustRatios]:
        """Launch what was prepared, and move the phase."""
        # Triton launches on the current device, whatever device its arguments are on.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return self._run(groups, completed_steps, loss)

    def _run(self, groups: Sequence[Mapping[str, Any]], completed_steps: int, loss: LossSignal) -> list[TrustRatios]:
        self._launch_prologue(groups, completed_steps, loss)
        measured = []
        for launch in self.launches:
            self._launch_pass(launch.bucket, launch.dtypes)
            # Autograd must notice the writes that it cannot see.
            torch.autograd.graph.increment_version(launch.params)
            measured += launch.trust_ratios()
        return measured

    def step(
        self,
        batches: Sequence[TensorBatch],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        blends: Sequence[Sequence[float]],
        completed_steps: int,
        loss: LossSignal,
    ) -> list[TrustRatios]:
        """Prepare and run."""
        self.prepare(batches, state, blends)
        return self.run(groups, completed_steps, loss)

    def _launch_prologue(self, groups: Sequence[Mapping[str, Any]], completed_steps: int, loss: LossSignal) -> None:
        from fused_dals.kernels.prologue import prologue

        self._refresh_scalars(groups)
        if completed_steps != self._step:
            self.device_step = torch.full((1,), completed_steps, dtype=torch.int64, device=self.device)
        self._step = completed_steps + 1
        total, count = loss.take(self.device)
        prologue[(1,)](
            self.group_table,
            self.lr_addresses,
            self.scalars,
            self.device_step,
            loss.loss_ema,
            loss.loss_drop,
            loss.loss_ema if total is None else total,
            float(count),
            len(groups),
            self.sync,
            self.sync.numel(),
            num_warps=4,
        )

    def _refresh_scalars(self, groups: Sequence[Mapping[str, Any]]) -> None:
        rows, addresses = [], []
        for group in groups:
            lr, source, address = group["lr"], 0, 0
            if isinstance(lr, Tensor) and lr.device == self.device and lr.dtype in (torch.float32, torch.float64):
                source, address, lr = (1 if lr.dtype == torch.float32 else 2), lr.data_ptr(), 0.0
            total_steps = group["total_steps"] or 0
            rows.append(
                (
                    float(lr),
                    source,
                    group["momentum"],
                    group["weight_decay"],
                    group["trust_coefficient"],
                    *group["trust_clip"],
                    *group["ema_decay"],
                    *group["phase_thresholds"],
                    total_steps,
                    math.floor(group["warmup_fraction"] * total_steps),
                    group["restart_steps"] or 0,
                    group["restart_mult"],
                    -1.0 if group["maximize"] else 1.0,
                )
            )
            addresses.append(address)
        if rows != self._group_rows:
            table = torch.tensor(rows, dtype=torch.float64)
            self.group_table = to_device(table, self.device)
            if len(rows) != len(self._group_rows):
                self.scalars = torch.empty(len(rows) * len(layout.SCALAR_COLUMNS), device=self.device)
            self._group_rows = rows
        if addresses != self._lr_addresses:
            self.lr_addresses = to_device(torch.tensor(addresses, dtype=torch.int64), self.device)
            self._lr_addresses = addresses

    def _launch_pass(self, bucket: Bucket, dtypes: tuple[torch.dtype, ...]) -> None:
        import triton.language as tl

        from fused_dals.kernels.fused_pass import fused_pass

        names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        fused_pass[(self._programs(),)](
            bucket.tensors,
            bucket.grads,
            bucket.dims,
            bucket.blends,
            self.scalars,
            bucket.items,
            bucket.partials,
            bucket.ratios,
            bucket.arrivals,
            bucket.ready,
            bucket.counter,
            bucket.item_count,
            PARAM_TYPE=names[dtypes[0]],
            GRAD_TYPE=names[dtypes[1]],
            STATE_TYPE=names[dtypes[2]],
            CHUNK=bucket.chunk,
            A_WRITES=self.stage_a_writes,
            num_warps=NUM_WARPS,
        )

    def _programs(self) -> int:
        if self.device.type != "cuda":
            return 2
        return PROGRAMS_PER_SM * torch.cuda.get_device_properties(self.device).multi_processor_count
