"""Gradients before the update, in torch operations: their norm, whether they are finite, and their scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_dals import host
from fused_dals.foreach import norms
from fused_dals.reference import compute_dtype
from fused_dals.sharding import like, local


def scan_gradients(grads: list[Tensor]) -> Tensor:
    """(sum of squares, number of tensors with a non-finite element) of gradients of one device and dtype, [1, 2]."""
    present = [grad for grad in grads if grad.numel()]
    widest = host.widest(grads[0].device)
    if not present:
        return torch.zeros(1, 2, dtype=widest, device=grads[0].device)
    squares = norms(present, compute_dtype(present[0].dtype)).to(widest).square().sum()
    # The largest magnitude says it exactly: a sum of squares overflows for finite gradients, too.
    largest = torch.stack(torch._foreach_norm(present, math.inf))
    non_finite = (~largest.isfinite()).sum().to(widest)
    return torch.stack([squares, non_finite]).reshape(1, 2)


def own_gradients(groups: Sequence[Mapping[str, Any]]) -> None:
    """Give gradients that are to be written memory of their own, where elements or parameters share it."""
    seen: set[int] = set()
    for group in groups:
        for param in group["params"]:
            if param.grad is None or param.grad.layout != torch.strided:
                continue
            grad = local(param.grad)
            if not grad.numel():
                continue
            expanded = not grad.is_contiguous() and any(
                stride == 0 and size > 1 for size, stride in zip(grad.shape, grad.stride(), strict=True)
            )
            if expanded or grad.data_ptr() in seen:
                param.grad = like(param, torch.empty_like(local(param), dtype=grad.dtype).copy_(grad))
            seen.add(grad.data_ptr())
