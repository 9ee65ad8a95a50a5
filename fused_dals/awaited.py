"""Parameters whose gradients come and go, as those of experts and of layers that are dropped at random.

Sets of gradients that differ from step to step would have every step checked and prepared anew, at 30 us a tensor. So
the kernels' tables keep whoever had a gradient once, and a step tells them who has none: the address 0 (buckets.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_dals.gather import STATE_KEYS, TensorBatch, lay_out_alike, problem_of, state_dtypes
from fused_dals.overlap import find_overlap
from fused_dals.sharding import Place

State = Mapping[Tensor, dict[str, Tensor]]


def awaited_batches(
    groups: Sequence[dict[str, Any]],
    state: State,
    had_grads: Iterable[Place],
    present: Sequence[TensorBatch],
    served: Callable[[dict[str, Any], Tensor, Tensor], bool],
) -> list[TensorBatch]:
    """Batches of those at ``had_grads`` that have no gradient now, to be prepared with the ones that are ``present``.

    Their gradients are stand-ins on the meta device, laid out as autograd would lay them out. Nobody is awaited who
    trains no more or could not be stepped: what is wrong is said when there is a gradient. ``served(group, parameter,
    gradient)``: whether the kernels serve them.
    """
    devices = {batch.device for batch in present}
    batches: dict[tuple[Any, ...], TensorBatch] = {}
    for group_index, position in sorted(had_grads):
        group = groups[group_index] if group_index < len(groups) else {"params": ()}
        if position >= len(group["params"]):
            continue
        param = group["params"][position]
        entry, values = state.get(param), param.detach()
        if param.grad is not None or not param.requires_grad or param.device not in devices or not entry:
            continue
        if problem_of(param, values, group, entry) or not served(group, param, values):
            continue
        lay_out_alike(param, entry, [key for key in state_dtypes(param, group) if key in entry])
        batch = batches.setdefault((group_index, param.device, param.dtype), TensorBatch(group_index, absent=True))
        batch.positions.append(position)
        batch.params.append(param)
        batch.grads.append(torch.empty_like(values, device="meta"))
        batch.owners.append(param)
    found = list(batches.values())
    everybody = [*present, *found]
    tensors = [param for batch in everybody for param in batch.params]
    tensors += [value for batch in everybody for key in STATE_KEYS for value in batch.state_of(state, key)]
    return found if found and find_overlap(tensors) is None else []
