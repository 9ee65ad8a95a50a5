"""CUDA graphs: whether a step is being captured, what such a step may do, and tables written from inside a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_dals import host


def is_capturing(device: torch.device) -> bool:
    """Whether the work of the current stream goes into a graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_capturable(groups: Sequence[Mapping[str, Any]], *, has_state: bool) -> None:
    """Raise RuntimeError, saying what to do, where a step cannot be captured so that its replays do the same."""
    for index, group in enumerate(groups):
        where = f"group {index}: this step is being captured into a graph, "
        if not group["capturable"]:
            raise RuntimeError(f"{where}which needs capturable=True")
        lr = group["lr"]
        if isinstance(lr, Tensor) and host.knows(lr):
            raise RuntimeError(
                f"{where}and lr is a tensor on the CPU, which replays would not read: put it on the parameters' device"
            )
    if not has_state:
        raise RuntimeError(
            "this step is being captured into a graph, and the optimizer has not stepped yet: take one or more steps "
            "before capture (on a side stream), so that state and tables exist"
        )


def check_nothing_to_prepare(device: torch.device) -> None:
    """Raise RuntimeError where a step that is being captured would first have to write tables from the host."""
    if is_capturing(device):
        raise RuntimeError(
            "this step is being captured into a graph, and hyperparameters changed since the last one so that it needs "
            "other tables (clipping or dropping was turned on): take one more step before capture"
        )


def check_losses_capturable(losses: Iterable[object], seen_outside: bool) -> None:
    """Raise RuntimeError where replays would not see the losses of a captured step.

    ``seen_outside``: one was observed before capture began. It is no part of the graph, and its memory goes to somebody
    else afterwards.
    """
    for loss in losses:
        if not isinstance(loss, Tensor) or host.knows(loss):
            raise RuntimeError(
                "this step is being captured into a graph, and the observed loss is a number or on the CPU, which "
                "replays would not read: observe the loss tensor on the device"
            )
    if seen_outside:
        raise RuntimeError(
            "this step is being captured into a graph, and a loss was observed before capture began: take a step with "
            "it first, or observe the loss inside"
        )


class BakedTable:
    """An int64 table on the device whose values stand in the launches that write it, not in host memory.

    A copy from the host cannot be captured safely: a replay would read host memory that has moved on. Scalars of
    foreach calls are part of the launch, so each replay writes the same values again.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.values = torch.empty(count, dtype=torch.int64, device=device)

    def write(self, values: Sequence[int]) -> None:
        """Write ``values``, one per element."""
        if values:
            cells = self.values.unbind()
            torch._foreach_zero_(cells)
            torch._foreach_add_(cells, list(values))
