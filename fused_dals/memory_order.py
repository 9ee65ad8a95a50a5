"""Tensors as one dimension in the order of somebody's memory, and back."""

from __future__ import annotations

from torch import Tensor


def in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """All elements in the order in which ``like``, of the same shape, holds them: no copy where ``tensor`` does too."""
    return tensor.permute(_outermost_first(like)).reshape(-1)


def out_of_memory_order(flat: Tensor, like: Tensor) -> Tensor:
    """A view of ``flat`` in the shape of ``like``: what ``in_memory_order`` makes ``flat`` of."""
    order = _outermost_first(like)
    places = sorted(range(like.dim()), key=order.__getitem__)
    return flat.view([like.shape[dim] for dim in order]).permute(places)


def _outermost_first(like: Tensor) -> list[int]:
    return sorted(range(like.dim()), key=like.stride, reverse=True)
