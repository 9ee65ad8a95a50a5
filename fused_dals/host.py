"""What the host may know without waiting for a device, and small tensors on their way between the two."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def knows(tensor: Tensor) -> bool:
    """Whether a number can be read without waiting; a captured graph would hold it as it is, once and for all."""
    return tensor.device.type == "cpu"


def widest(device: torch.device) -> torch.dtype:
    """The dtype of scalars: double precision, single where the device has no double."""
    return torch.float32 if device.type == "mps" else torch.float64


def scalars_on(device: torch.device, scalars: Tensor) -> Tensor:
    """A few numbers on another device, in the widest dtype there; waits only where the host wants to know them."""
    if device.type == "cuda" and scalars.device.type == "cpu":
        scalars = scalars.pin_memory()  # a copy from pageable memory may wait for the device
    # A copy off the device must be waited for, or the CPU would read values that have not arrived.
    return scalars.to(device, widest(device), non_blocking=device.type != "cpu")


def scalar_on(device: torch.device, scalar: Tensor) -> Tensor:
    """A number on a device: as it is, where it is there in single or double precision."""
    there = scalar.device == device and scalar.dtype in (torch.float32, torch.float64)
    return scalar if there else scalars_on(device, scalar)


def integers(values: Iterable[int]) -> Tensor:
    """int64 on the CPU; with no operation that a graph which is being captured could not hold."""
    return _tensor_of(array("q", values), torch.int64)


def doubles(values: Iterable[float]) -> Tensor:
    """float64 in the same way."""
    return _tensor_of(array("d", values), torch.float64)


def _tensor_of(numbers: array[Any], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype, device="cpu")


def table_on(device: torch.device, table: Tensor) -> Tensor:
    """A table made on the host, in its own dtype on the device, copied without waiting."""
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)
