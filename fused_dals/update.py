"""Updates that stop in the middle, where they need norms: of the whole tensors, which a shard alone does not know."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias

from torch import Tensor

#: Yields the norms of p and u of the tensors it was given, is sent those of the whole tensors, returns trust ratios.
Update: TypeAlias = Generator[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]


def finish(update: Update, norms: tuple[Tensor, Tensor]) -> Tensor:
    """Go on with the norms of the whole tensors; returns the trust ratios."""
    try:
        update.send(norms)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("an update asks for norms once")


def run_whole(update: Update) -> Tensor:
    """The trust ratios of an update of whole tensors: the norms that it asks for are those that it has."""
    return finish(update, next(update))
