"""How tensors lie in memory, and tensors as one dimension in the order of somebody's memory, and back."""

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


def has_memory(tensor: Tensor) -> bool:
    """Whether it has elements in memory: a wrapper around other tensors has none, nor have autograd's zeros."""
    try:  # of the storage, because a tensor's own address is that plus an offset
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False


def is_plain(tensor: Tensor) -> bool:
    """Whether its numbers, if it has any, lie at its address, and it is no view that negates what it reads there."""
    return (has_memory(tensor) or tensor.numel() == 0) and not tensor.is_neg()


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a piece of memory, each in a place of its own."""
    return tensor.permute(_outermost_first(tensor)).is_contiguous()


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Of two tensors of one shape, wherever strides mean something."""
    return all(size == 1 or own == other for size, own, other in zip(a.shape, a.stride(), b.stride(), strict=True))


def _outermost_first(like: Tensor) -> list[int]:
    return sorted(range(like.dim()), key=like.stride, reverse=True)
