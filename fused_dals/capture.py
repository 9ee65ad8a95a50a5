"""CUDA graphs: whether a step is being captured, what such a step may do, and tables written from inside a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def check_loss_capturable(pending: Tensor | None) -> None:
    """Raise RuntimeError where the losses observed for a captured step are known to the host alone."""
    if pending is not None and host.knows(pending):
        raise RuntimeError(
            "this step is being captured into a graph, and the observed loss is a number or on the CPU, which replays "
            "would not read: observe the loss tensor on the device"
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
