"""The order in which the fused pass works: which (tensor, chunk, stage) each ticket stands for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fused_dals.kernels import layout

#: Stage A reads g, h and p and leaves partial sums; stage B waits for its tensor's sums and writes p.
STAGE_A, STAGE_B = 0, 1

Item = tuple[int, int, int]


def stage_order(chunks: Sequence[int], window: int) -> Iterator[tuple[int, int]]:
    """(tensor, stage) in the order in which the stages of whole tensors are listed.

    A tensor's stage B comes as late after its stage A as keeps at most ``window`` chunks between the two: B finds its
    inputs in the cache, and other tensors' A items fill the time until the sums are complete.
    """
    waiting: deque[int] = deque()
    in_flight = 0
    for tensor, count in enumerate(chunks):
        while waiting and in_flight + count > window:
            in_flight -= chunks[waiting[0]]
            yield waiting.popleft(), STAGE_B
        yield tensor, STAGE_A
        waiting.append(tensor)
        in_flight += count
    yield from ((tensor, STAGE_B) for tensor in waiting)


def work_list(chunks: Sequence[int], window: int) -> Iterator[Item]:
    """Items (tensor, chunk, stage) in ticket order; ``chunks[t]`` is the number of chunks of tensor t (0 is legal).

    Stage B runs over the chunks newest first: of a tensor larger than the window it finds at least the last ones.
    Every item waits only for items before it in the list, whatever the window; that is what makes progress certain.
    A window of 0 puts each tensor's B right after its A; an infinite one (the sum of chunks) all A before all B, which
    is the plan of two launches.
    """
    for tensor, stage in stage_order(chunks, window):
        order = range(chunks[tensor]) if stage == STAGE_A else reversed(range(chunks[tensor]))
        yield from ((tensor, chunk, stage) for chunk in order)


def packed_chunks(chunks: Sequence[int]) -> Tensor:
    """Every chunk once, as packed stage A items in the order of the tensors: what a scan of the gradients reads."""
    runs = [
        layout.pack_item(t, torch.arange(count, dtype=torch.int64, device="cpu"), STAGE_A)
        for t, count in enumerate(chunks)
    ]
    return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device="cpu")


def packed_work_list(chunks: Sequence[int], window: int) -> Tensor:
    """The same as an int64 tensor on the CPU, as the kernel reads it; 7 billion parameters make 1.6 million items."""
    runs = []
    for tensor, stage in stage_order(chunks, window):
        order = torch.arange(chunks[tensor], dtype=torch.int64, device="cpu")
        if stage == STAGE_B:
            order = order.flip(0)
        runs.append(layout.pack_item(tensor, order, stage))
    return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device="cpu")
