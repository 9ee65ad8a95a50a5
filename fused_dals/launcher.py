"""Kernels that are launched over and over, past Triton's preparation of a launch once that has been done."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter, or_
from typing import Any

from torch import Tensor

from fused_dals.kernels.layout import COMPILER_OPTIONS

#: Triton compiles another kernel for a pointer that is not aligned to so many bytes.
ALIGNMENT = 16

_dtype = attrgetter("dtype")


@dataclass
class _Prepared:
    """What Triton made of a kernel, and its compile-time constants in the order of the signature."""

    kernel: Any
    compiled: Any
    constants: tuple[object, ...]


@dataclass
class Launched:
    """A launch that can be made again, on the stream of the moment, as long as all tensors stay in their memory."""

    run: Callable[..., None]
    arguments: list[Any]  # in the order of the signature; tensors as addresses

    def again(self) -> None:
        self.run(*self.arguments)

    def again_with(self, place: int, address: int) -> bool:
        """With a tensor elsewhere, of the dtype of the one in this place; False where Triton compiles for it anew."""
        if address % ALIGNMENT != 0:
            return False
        self.arguments[place] = address
        self.run(*self.arguments)
        return True


class Launcher:
    """Launches kernels on one device, whose number arguments must not be specialized for.

    ``kernel[grid](...)`` binds and inspects every argument, and compares every global that the kernel uses with what it
    was: a fifth of a small step's time. It returns the compiled kernel, which can be launched as it is with all
    arguments in order (Triton's tutorial on the fused softmax does) while all stays the same that it was compiled for:
    constants, dtypes, and the alignment of pointers. Tensors are handed over as addresses then, which Triton takes as
    they are: it would ask the driver about every tensor.
    """

    def __init__(self) -> None:
        self._prepared: dict[tuple[Hashable, ...], _Prepared] = {}

    def launch(
        self,
        kernel: Any,
        programs: int,
        arguments: tuple[Any, ...],
        *,
        num_warps: int,
        max_registers: int | None = None,
        **constants: Any,
    ) -> Launched | None:
        """Launch so many programs; ``constants`` are the compile-time arguments, which stand last in the signature.

        ``max_registers`` of a thread that the compiler may use, as many as it likes where None; NVIDIA only.

        Returns what launches the same again; None where Triton has to look at the arguments each time, as it had to in
        this launch.
        """
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        addresses = list(map(Tensor.data_ptr, tensors))
        aligned = reduce(or_, addresses) % ALIGNMENT == 0
        key = (id(kernel), num_warps, max_registers, *constants.values(), *map(_dtype, tensors))
        known = self._prepared.get(key) if aligned else None
        if known is not None and known.kernel is kernel:
            pointers = iter(addresses)
            plain = [next(pointers) if isinstance(argument, Tensor) else argument for argument in arguments]
            launched = Launched(known.compiled[programs, 1, 1], [*plain, *known.constants])
            launched.again()
            return launched
        options = {**COMPILER_OPTIONS, **({} if max_registers is None else {"maxnreg": max_registers})}
        compiled = kernel[(programs,)](*arguments, **constants, num_warps=num_warps, **options)
        if aligned and compiled is not None:  # the interpreter compiles nothing
            in_order = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
            self._prepared[key] = _Prepared(kernel, compiled, in_order)
        return None
