"""Parameters whose gradients come and go, as those of experts and of layers that are dropped at random.

Sets of gradients that differ from step to step would have every step checked and prepared anew, at 30 us a tensor. So
the kernels' tables keep whoever had a gradient once, and a step tells them who has none: the address 0 (buckets.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fused_dals.gather import STATE_KEYS, Joined, TensorBatch, has_state, lay_out_alike, problem_of, state_dtypes
from fused_dals.kernels.layout import MAX_DIMS
from fused_dals.overlap import find_overlap
from fused_dals.sharding import Place

#: Dtype and strides of the gradient that a parameter had when tables were last written with one.
LastGrads: TypeAlias = dict[Place, tuple[torch.dtype, tuple[int, ...]]]


def note_grads(last: LastGrads, batches: Sequence[TensorBatch]) -> None:
    """Take down what the gradients of these batches are like."""
    for batch in batches:
        for place, grad in zip(batch.places, batch.grads, strict=True):
            last[place] = grad.dtype, grad.stride()


def stand_in(param: Tensor, place: Place, last: LastGrads) -> Tensor | None:
    """A gradient without memory, on the meta device, like the last one; None where that had other dimensions."""
    dtype, strides = last[place]
    if len(strides) != param.dim():
        return None
    return torch.empty_strided(param.shape, strides, dtype=dtype, device="meta")


def awaited_batches(
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Tensor]],
    last: LastGrads,
    present: Sequence[TensorBatch],
    joined: Joined,
    served: Callable[[dict[str, Any], Tensor], bool],
) -> list[TensorBatch]:
    """Batches of those that had a gradient and have none now, to be prepared with the ones that are ``present``.

    Nobody is awaited who does not train, or could not be stepped by the kernels: what is wrong is said when there is a
    gradient. ``served(group, parameter)``: whether the kernels are to serve it, with a gradient that they can read.
    """
    devices = {batch.device for batch in present}
    batches: dict[tuple[Any, ...], TensorBatch] = {}
    for place in sorted(last):
        group_index, position = place
        if group_index >= len(groups) or position >= len(groups[group_index]["params"]):
            continue  # groups were taken out
        group = groups[group_index]
        param = group["params"][position]
        entry = state.get(param)
        if param.grad is not None or not param.requires_grad or param.device not in devices or not has_state(entry):
            continue
        if not param.numel():
            continue  # no chunk of it would say that it was not stepped
        grad = stand_in(param, place, last)
        # Beyond MAX_DIMS it depends on strides whether kernels can follow; that is asked of real gradients.
        if grad is None or param.dim() > MAX_DIMS or joined.why_flattened(param, place, len(group["params"])):
            continue
        if problem_of(param, grad, group, entry) or not served(group, param):
            continue
        lay_out_alike(param, entry, [key for key in state_dtypes(param, group) if key in entry])
        key = group_index, param.device, param.dtype, grad.dtype
        batch = batches.setdefault(key, TensorBatch(group_index, absent=True))
        batch.positions.append(position)
        batch.params.append(param)
        batch.grads.append(grad)
        batch.owners.append(param)
    found = list(batches.values())
    everybody = [*present, *found]
    tensors = [param for batch in everybody for param in batch.params]
    tensors += [value for batch in everybody for key in STATE_KEYS for value in batch.state_of(state, key)]
    return found if found and find_overlap(tensors) is None else []
