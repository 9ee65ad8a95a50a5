"""Whether replicas still hold the same weights: for finding out what made them part, not for every day.

Nothing re-synchronises replicas while training. A loss that each rank observes for itself, a parameter that one rank
initialised otherwise, a rank on another kind of GPU: each makes them part, and nothing fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fused_dals.gather import parameter_label
from fused_dals.sharding import is_distributed_tensor, local

#: Elements that are hashed at a time: a few times 32 MiB of memory, and not several copies of the weights.
PIECE = 1 << 22

#: Odd multipliers: 2^64 over the golden ratio for places, that of a well-known 64-bit LCG for mixing.
_PLACE, _MIX = -7046029254386353131, 6364136223846793005

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas_every(optimizer: Optimizer, steps: int, process_group: Any = None) -> RemovableHandle:
    """Compare the weights of all replicas after every ``steps``-th step; a difference is an error on all its ranks.

    Args:
        optimizer: any optimizer, also a ZeroRedundancyOptimizer.
        steps: how often, >= 1. A look costs a read of all weights, one collective of 16 bytes a parameter, and waiting.
        process_group: the ranks that hold replicas of plain (not distributed) parameters; None: all ranks. Those of a
            DTensor are the ranks along the dimensions of its mesh on which it is replicated.

    Returns a handle whose ``remove()`` ends it.

    Raises:
        ValueError: steps is not a positive integer. RuntimeError, from ``step``, on the ranks that hold replicas that
            differ: it names the first such parameter, in the order of the groups.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"check_replicas_every: steps must be a positive integer, got {steps!r}")
    taken = 0

    def look(*_: object) -> None:
        nonlocal taken
        taken += 1
        if taken % steps == 0:
            check_replicas(optimizer, process_group)

    return optimizer.register_step_post_hook(look)


@torch.no_grad()
def check_replicas(optimizer: Optimizer, process_group: Any = None) -> None:
    """Compare the weights of all replicas now; arguments and errors as of ``check_replicas_every``."""
    if not torch.distributed.is_initialized():
        return
    named: dict[Any, list[tuple[str, Tensor]]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            for replicas in _replica_groups(param, process_group):
                named.setdefault(replicas, []).append((parameter_label(group, index, position), param))
    for replicas, some in named.items():
        differs = _compare([hash_of(local(param)) for _, param in some], replicas)
        if differs is not None:
            label, param = some[differs]
            raise RuntimeError(
                f"after this step the replicas of parameter {label!r} (shape {tuple(param.shape)}) differ between the "
                f"ranks {torch.distributed.get_process_group_ranks(replicas)}; usual causes: losses that are not "
                "averaged over the ranks (loss_group), other initial weights, gradients that are not reduced"
            )


def _replica_groups(param: Any, process_group: Any) -> list[Any]:
    if not is_distributed_tensor(param):
        return [process_group if process_group is not None else torch.distributed.group.WORLD]
    mesh = param.device_mesh
    dims = [dim for dim, placement in enumerate(param.placements) if placement.is_replicate() and mesh.size(dim) > 1]
    return [mesh.get_group(dim) for dim in dims]


def _compare(hashes: Sequence[Tensor], group: Any) -> int | None:
    """Index of the first hash that is not the same on all ranks of the group, found by all of them alike."""
    mine = torch.stack(list(hashes))
    # The largest of h and of ~h, which is the smallest of h: one collective for both ends.
    both = torch.stack([mine, ~mine])
    torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX, group=group)
    differ = torch.nonzero(both[0] != ~both[1]).flatten().tolist()
    return differ[0] if differ else None


def hash_of(tensor: Tensor) -> Tensor:
    """A 64-bit hash of size, order and bits of a tensor, 0-dim int64 on its device; integer sums, so always the same.

    Every element's bits are mixed with its place by steps that can be undone, so that a single changed element always
    changes the sum.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.full((), flat.numel(), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), PIECE):
        piece = bits[start : start + PIECE].to(torch.int64)
        place = torch.arange(start, start + piece.numel(), dtype=torch.int64, device=flat.device)
        mixed = piece + place * _PLACE
        for _ in range(2):
            mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * _MIX
        total = total + mixed.sum()
    return total
