"""The order in which the fused pass works: which (tensor, chunk, stage) each ticket stands for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_dals.kernels import layout

#: Stage A reads g, h and p and leaves partial sums; stage B waits for its tensor's sums and writes p.
STAGE_A, STAGE_B = 0, 1

Item = tuple[int, int, int]


@dataclass(frozen=True)
class Run:
    """Neighbouring chunks of a tensor in one stage, in the order in which they are listed."""

    tensor: int
    stage: int
    chunks: range


def runs(chunks: Sequence[int], window: int) -> Iterator[Run]:
    """The work list as runs of chunks; ``chunks[t]`` is the number of chunks of tensor t (0 is legal).

    A tensor's stage B comes as soon as ``window`` chunks of other tensors' stage A stand behind its own last one, or
    all that there are. They give programs something to do until the sums are complete: with none, whoever has drawn a
    B item waits for the last A items of its tensor, which have just been drawn.
    """
    waiting: deque[tuple[int, int]] = deque()  # tensors, and how many chunks of stage A are to come before their B
    listed = 0
    for tensor, count in enumerate(chunks):
        begin = listed
        while waiting and waiting[0][1] < begin + count:
            other, due = waiting.popleft()
            if due > listed:
                yield Run(tensor, STAGE_A, range(listed - begin, due - begin))
                listed = due
            yield _newest_first(other, chunks[other])
        yield Run(tensor, STAGE_A, range(listed - begin, count))
        listed = begin + count
        waiting.append((tensor, listed + window))
    yield from (_newest_first(tensor, chunks[tensor]) for tensor, _ in waiting)


def _newest_first(tensor: int, count: int) -> Run:
    return Run(tensor, STAGE_B, range(count - 1, -1, -1))


def work_list(chunks: Sequence[int], window: int) -> Iterator[Item]:
    """Items (tensor, chunk, stage) in ticket order.

    Stage B runs over the chunks newest first: of a tensor larger than the L2 cache it finds at least the last ones.
    Every item waits only for items before it in the list, whatever the window; that is what makes progress certain.
    A window of 0 puts each tensor's B right after its A; an infinite one (the sum of chunks) all A before all B, which
    is the plan of two launches.
    """
    for run in runs(chunks, window):
        yield from ((run.tensor, chunk, run.stage) for chunk in run.chunks)


def packed_chunks(chunks: Sequence[int]) -> Tensor:
    """Every chunk once, as packed stage A items in the order of the tensors: what a scan of the gradients reads."""
    packed = [
        layout.pack_item(t, torch.arange(count, dtype=torch.int64, device="cpu"), STAGE_A)
        for t, count in enumerate(chunks)
    ]
    return torch.cat(packed) if packed else torch.empty(0, dtype=torch.int64, device="cpu")


def packed_work_list(chunks: Sequence[int], window: int) -> Tensor:
    """The same as an int64 tensor on the CPU, as the kernel reads it; 7 billion parameters make 1.6 million items."""
    packed = []
    for run in runs(chunks, window):
        of_run = run.chunks
        order = torch.arange(of_run.start, of_run.stop, of_run.step, dtype=torch.int64, device="cpu")
        packed.append(layout.pack_item(run.tensor, order, run.stage))
    return torch.cat(packed) if packed else torch.empty(0, dtype=torch.int64, device="cpu")
