"""Flattened layer buckets: what one launch of the fused pass works on, and the memory that belongs to it.

A bucket serves the tensors of one device and one set of dtypes, whatever their groups. Parameters and gradients stay
where the user put them and are reached through tables of addresses; state that the optimizer made itself lies in flat,
padded buffers, loaded state where it was loaded to. Nothing about a tensor is taken for granted from one step to the
next: fingerprint.py compares, and the tables are written again when something changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from fused_dals.gather import COMPENSATION_KEY, STATE_KEYS, TensorBatch
from fused_dals.host import integers, table_on
from fused_dals.kernels import layout
from fused_dals.memory_order import same_strides
from fused_dals.sharding import Place
from fused_dals.worklist import STAGE_B, packed_chunks, packed_work_list

#: Integers of a segment of the flags, a multiple of 128 bytes.
SYNC_PADDING = 32

#: What a 16-byte access asks of an address.
WIDE_BYTES = 16
#: Stands for the address of a gradient without elements: any that is aligned but 0, which stands for no gradient.
NO_ELEMENTS = 16


@dataclass(slots=True)
class FusedTensor:
    """A parameter with its gradient and state, and what the table says of it."""

    param: Tensor
    grad: Tensor
    grad_ema: Tensor
    momentum_buffer: Tensor
    compensation: Tensor | None = None
    group: int = 0
    blend: float = 0.5
    rounding_key: int = 0
    norms_row: int = 0
    split_over: tuple[Any, ...] = ()  # the process groups that hold the rest of it


@dataclass
class WorkList:
    """What one launch works on, in the order of its tickets."""

    items: Tensor
    count: int


class Bucket:
    """The tables, work list and scratch memory of one launch; they live until the tensors change."""

    def __init__(self, device: torch.device, chunk: int, window: int) -> None:
        """``chunk``: elements, a power of two (random bits take the upper half of an index from its chunk); ``window``:
        chunks between stages A and B, see ``worklist.runs``."""
        assert chunk & (chunk - 1) == 0, chunk
        self.device = device
        self.chunk = chunk
        self.window = window
        self.sizes: list[int] = []
        self.sharded = False
        self.split_over: list[tuple[Any, ...]] = []

    def refresh(self, tensors: Sequence[FusedTensor], sharded: bool = False) -> None:
        """Write the tables for these tensors, and the work list where their sizes are new.

        Where some tensors are shards, stages A and B are apart, as the norms of the ranks are added up between them.

        Raises RuntimeError, before anything is written, where strides leave too many dimensions.
        """
        sizes = [some.param.numel() for some in tensors]
        chunks = [-(-size // self.chunk) for size in sizes]
        rows: list[tuple[int, ...]] = []
        dims: list[list[int]] = []
        first_chunk = 0
        for some, size, count in zip(tensors, sizes, chunks, strict=True):
            access, row_of_dims = _access(some), 0
            if access == layout.STRIDED:
                row_of_dims = len(dims)
                dims.append(_dims_row(some.param, some.grad, some.grad_ema))
            addresses = (
                some.param.data_ptr(),
                some.grad_ema.data_ptr(),
                some.momentum_buffer.data_ptr(),
                0 if some.compensation is None else some.compensation.data_ptr(),
            )
            plan = size, first_chunk, count, some.group, access, row_of_dims
            rows.append((*addresses, *plan, some.rounding_key, some.norms_row))
            first_chunk += count
        split_over = [some.split_over for some in tensors]
        if (sizes, sharded, split_over) != (self.sizes, self.sharded, self.split_over):
            self.sizes, self.chunks, self.sharded, self.split_over = sizes, chunks, sharded, split_over
            self._plan()
        self.tensors = self._upload(rows)
        self.dims = self._upload(dims or [[1] * (3 * layout.MAX_DIMS)])
        self.blends = self._upload([some.blend for some in tensors], torch.float32)
        # A tensor without elements has no chunk that would write its ratio.
        self.ratios = self._upload([layout.NOT_STEPPED if size else 1.0 for size in sizes], torch.float32)
        self.refresh_grads(integers(grad_address(some.grad) for some in tensors))

    def refresh_grads(self, addresses: Tensor) -> None:
        """Point to gradients elsewhere, of the same strides and as well aligned; the table keeps its memory.

        ``addresses``: int64 on the CPU, in list order, 0 for a missing gradient, whose parameter is left as it is.
        """
        self.grads.copy_(addresses if self.device.type == "cpu" else addresses.pin_memory(), non_blocking=True)

    def _plan(self) -> None:
        """The work list and the scratch memory, which depend on sizes alone."""
        if self.sharded:
            stage_a = packed_chunks(self.chunks)
            lists = [stage_a, stage_a.flip(0) | STAGE_B]  # newest first: what of it is left in the cache is read there
        else:
            lists = [packed_work_list(self.chunks, self.window)]
        self.lists = [WorkList(self._upload(items if len(items) else [0]), len(items)) for items in lists]
        self.partials = torch.empty(2 * max(1, sum(self.chunks)), dtype=torch.float32, device=self.device)
        self.grads = torch.empty(len(self.sizes), dtype=torch.int64, device=self.device)
        self._scan_lists: dict[tuple[Any, ...], Tensor] = {}

    def scan_lists(self) -> dict[tuple[Any, ...], Tensor]:
        """Every chunk once, by the process groups that its tensor is split over, packed as in the work list.

        Made on the host when first asked for, so that nobody waits.
        """
        if not self._scan_lists:
            ways = dict.fromkeys(self.split_over)
            self._scan_lists = {way: self._upload(packed_chunks(self._chunks_of(way))) for way in ways}
        return self._scan_lists

    def _chunks_of(self, way: tuple[Any, ...]) -> list[int]:
        return [count if over == way else 0 for count, over in zip(self.chunks, self.split_over, strict=True)]

    def memory(self) -> list[Tensor]:
        """All that a launch reads and writes besides the user's tensors and the gradients' addresses."""
        lists = [some.items for some in self.lists]
        return [self.tensors, self.dims, self.blends, *lists, self.partials, self.ratios, *self._scan_lists.values()]

    @property
    def sync_count(self) -> int:
        """Integers that programs agree by: arrivals and ready flag per tensor, a ticket counter per work list."""
        return sum(self._sync_parts())

    def _sync_parts(self) -> list[int]:
        # Padded, because Triton compiles a variant of its own for pointers that are not aligned to 16 bytes.
        per_tensor = -(-len(self.sizes) // SYNC_PADDING) * SYNC_PADDING
        return [per_tensor, per_tensor, SYNC_PADDING * len(self.lists)]

    def use_sync(self, sync: Tensor) -> None:
        """Take these sync_count integers, which the prologue clears."""
        self.arrivals, self.ready, counters = sync.split(self._sync_parts())
        self.counters = counters.split(SYNC_PADDING)  # one per work list

    def _upload(self, values: Sequence[object] | Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        return table_on(self.device, torch.as_tensor(values, dtype=dtype, device="cpu"))


def tensors_of(
    batches: Iterable[TensorBatch],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    blends: Sequence[Sequence[float]],
    norms_row: Mapping[Place, int],
) -> list[FusedTensor]:
    """The batches of one bucket, one after the other; ``blends[g]`` has a raw blend per parameter of group g.

    ``norms_row``: the row of every parameter's norms, where some are added up over ranks.
    """
    found = []
    for batch in batches:
        grad_emas, momentum_buffers = (batch.state_of(state, key) for key in STATE_KEYS)
        of_each = zip(
            batch.params,
            batch.grads,
            grad_emas,
            momentum_buffers,
            batch.state_of(state, COMPENSATION_KEY) or repeat(None),
            repeat(batch.group_index),
            [blends[batch.group_index][position] for position in batch.positions],
            batch.rounding_keys() if grad_emas[0].dtype == torch.bfloat16 else repeat(0),
            [norms_row.get(place, 0) for place in batch.places],
            repeat(batch.split_over),
            strict=False,
        )
        found += [FusedTensor(*one) for one in of_each]
    return found


def grad_address(grad: Tensor) -> int:
    """For the kernels; 0 for one on the meta device, which stands for a missing one."""
    return 0 if grad.is_meta else grad.data_ptr() or NO_ELEMENTS


def _access(tensor: FusedTensor) -> int:
    """How the kernel may reach a tensor; its state is dense and alike, which gather.py sees to."""
    p, g, h, m, c = tensor.param, tensor.grad, tensor.grad_ema, tensor.momentum_buffer, tensor.compensation
    if p.numel() > 0 and not (same_strides(p, h) and same_strides(g, h)):
        return int(layout.STRIDED)
    aligned = all(t is None or t.data_ptr() % WIDE_BYTES == 0 for t in (p, g, h, m, c))
    return int(layout.WIDE if aligned else layout.NARROW)


def joined_dims(p: Tensor, g: Tensor, h: Tensor) -> list[tuple[int, int, int]]:
    """(size, parameter stride, gradient stride) in the order of the state's memory, innermost first.

    Neighbouring dimensions that are one run in both tensors are joined.
    """
    order = sorted((d for d in range(p.dim()) if p.shape[d] != 1), key=h.stride)
    joined: list[tuple[int, int, int]] = []
    for d in order:
        size, p_stride, g_stride = p.shape[d], p.stride(d), g.stride(d)
        if joined:
            last, p_last, g_last = joined[-1]
            if p_stride == p_last * last and g_stride == g_last * last:
                joined[-1] = (last * size, p_last, g_last)
                continue
        joined.append((size, p_stride, g_stride))
    return joined


def _dims_row(p: Tensor, g: Tensor, h: Tensor) -> list[int]:
    """The same as a row of the table: all sizes, all parameter strides, all gradient strides."""
    joined = joined_dims(p, g, h)
    if len(joined) > layout.MAX_DIMS:
        raise RuntimeError(f"{len(joined)} dimensions are left, and the kernel follows {layout.MAX_DIMS}")
    joined += [(1, 0, 0)] * (layout.MAX_DIMS - len(joined))
    return [value for column in zip(*joined, strict=True) for value in column]
