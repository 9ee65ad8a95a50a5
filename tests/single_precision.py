"""A device without double precision, as Apple's are, played by the CPU: what would fail there fails here.

Its tensors say that they are on "mps", and run their operations on the CPU. It refuses numbers in double precision, and
tensors of the CPU, but for single numbers, beside its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("mps", 0)


class OnDevice(Tensor):
    """A tensor of the device; ``numbers`` is what it holds. Python is told of the device, C++ of the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        if inner.dtype == torch.float64:
            raise TypeError(f"{DEVICE} has no double precision")
        found: OnDevice = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        found.numbers = inner
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the optimizer calls it: device and dtype by position, or one of them."""
        device = next((arg for arg in args if isinstance(arg, torch.device)), DEVICE)
        dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), self.dtype)
        if device == DEVICE and dtype == self.dtype and not kwargs.get("copy"):
            return self
        copied = self.numbers.to(dtype, copy=True)
        return OnDevice(copied) if device == DEVICE else copied


class SinglePrecision(TorchDispatchMode):
    """Within it tensors can be made on the device and moved there."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def on_device(tensor: Tensor) -> Tensor:
    """A copy."""
    return OnDevice(tensor.detach().clone())


def _run(operation: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """On the CPU; what comes out is of the device where something of it went in, or where it was asked to be."""
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = asked == DEVICE.type or (asked is None and any(isinstance(tensor, OnDevice) for tensor in tensors))
    strangers = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim()]
    if there and asked is None and strangers and operation is not torch.ops.aten.copy_.default:
        raise RuntimeError(f"{operation}: tensors on {DEVICE} and the CPU")
    given = {**kwargs, "device": torch.device("cpu")} if asked is not None else dict(kwargs)
    args, given = tree_map_only(OnDevice, lambda tensor: tensor.numbers, (tuple(args), given))
    known = {id(tensor.numbers if isinstance(tensor, OnDevice) else tensor): tensor for tensor in tensors}

    def outside(found: Tensor) -> Tensor:
        # In place: the very tensor that went in.
        if id(found) in known:
            return known[id(found)]
        return OnDevice(found) if there else found

    return tree_map_only(Tensor, outside, operation(*args, **given))
