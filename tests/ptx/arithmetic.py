"""What the arithmetic instructions of PTX do to vectors, one element per thread. Unknown ones are a KeyError."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TYPES: dict[str, Any] = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "f32": np.float32}
TYPES |= {"f64": np.float64, "bf16": np.uint16, "f16": np.float16, "bf16x2": np.uint32, "f16x2": np.uint32}
TYPES["f32x2"] = np.dtype((np.float32, (2,)))  # two numbers a thread
TYPES |= {f"{kind}{bits}": np.dtype(f"{kind.replace('s', 'i')}{bits // 8}") for kind in "su" for bits in (16, 32, 64)}

_libm_fma = ctypes.CDLL("libm.so.6").fma
_libm_fma.restype, _libm_fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_fma = np.frompyfunc(_libm_fma, 3, 1)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once."""
    if a.dtype == np.float64:
        result: Array = _fma(a, b, c).astype(np.float64)
        return result
    # The product is exact in float64. The sum is rounded to odd there, so that rounding again to float32 is right.
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    even = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    bits += np.where(even, np.where((error > 0) == (total > 0), 1, -1), 0)
    return total.astype(np.float32)


def quotient(a: Array, b: Array) -> Array:
    """Integers, towards zero."""
    q = a // b
    result: Array = q + ((q * b != a) & ((a < 0) != (b < 0)))
    return result


def shift_left(a: Array, n: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, n: Array) -> Array:
    """Of a signed number the sign moves in."""
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    result: Array = shifted if a.dtype.kind == "i" else np.where(n < bits, shifted, a.dtype.type(0))
    return result


def bit_field(a: Array, start: Array, length: Array) -> Array:
    """Of a signed number the upper bit of the field is the sign of the result."""
    bits, start, length = a.dtype.itemsize * 8, start & 255, length & 255
    above = bits - np.minimum(start + length, bits)
    return np.where(length > 0, shift_right(shift_left(a, above), above + start), a.dtype.type(0))


def permute_bytes(a: Array, b: Array, select: Array) -> Array:
    """The first operand holds bytes 0 to 3, the second 4 to 7; 8 more copies the byte's sign."""
    both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros_like(a)
    for at in range(0, 16, 4):
        which = select >> at & 15
        byte = (both >> (8 * (which & 7)).astype(np.uint64)).astype(np.uint32) & 255
        result |= np.where(which < 8, byte, (byte >> 7) * 255) << 2 * at
    return result


def bfloat16(x: Array) -> Array:
    """The bits of float32 numbers rounded to nearest, ties to even; one NaN for all."""
    raw = x.view(np.uint32)
    rounded = (raw + np.uint32(0x7FFF) + (raw >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def float16(x: Array) -> Array:
    return np.where(np.isnan(x), 0x7FFF, x.astype(np.float16).view(np.uint16)).astype(np.uint16)


def to_integer(x: Array, kind: Any) -> Array:
    """Saturated; NaN is 0."""
    limits = np.iinfo(kind)
    above, below = x >= float(limits.max), x <= float(limits.min)
    inside = np.where(above | below | np.isnan(x), 0.0, x).astype(kind)
    return np.where(above, limits.max, np.where(below, limits.min, inside)).astype(kind)


def _widened(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


#: By opcode without its last part, the type. The shift count of shifts and the like has a type of its own, see below.
OPERATIONS: dict[str, Callable[..., Array]] = {
    "add": np.add, "add.rn": np.add, "sub": np.subtract, "sub.rn": np.subtract, "mul": np.multiply,
    "mul.lo": np.multiply, "mul.rn": np.multiply,
    "div": quotient, "div.rn": np.divide, "rem": np.fmod, "neg": np.negative, "abs": np.abs, "sqrt.rn": np.sqrt,
    "min": np.fmin, "max": np.fmax, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "mad.lo": lambda a, b, c: a * b + c, "fma.rn": fused_multiply_add, "shl": shift_left,
    "shr": shift_right, "bfe": bit_field, "prmt": permute_bytes, "selp": lambda a, b, p: np.where(p, a, b),
    "mul.wide": lambda a, b: a.astype(f"{a.dtype.kind}8") * b, "cvta.local": lambda a: a,
    "mad.wide": lambda a, b, c: a.astype(f"{a.dtype.kind}8") * b + c,
    "setp.eq": np.equal, "setp.ne": lambda a, b: (a < b) | (a > b), "setp.lt": np.less, "setp.le": np.less_equal,
    "setp.gt": np.greater, "setp.ge": np.greater_equal, "setp.ltu": lambda a, b: ~(a >= b),
    "setp.leu": lambda a, b: ~(a > b),
}  # fmt: skip

#: cvt, by the parts behind it.
CONVERSIONS: dict[str, Callable[..., Array]] = {
    "f32.bf16": _widened, "f64.bf16": lambda x: _widened(x).astype(np.float64),
    "f32.f16": lambda x: x.view(np.float16).astype(np.float32),
    "f64.f16": lambda x: x.view(np.float16).astype(np.float64), "f64.f32": lambda x: x.astype(np.float64),
    "rn.f32.f64": lambda x: x.astype(np.float32), "rn.bf16.f32": bfloat16, "rn.f16.f32": float16,
    "rn.bf16x2.f32": lambda a, b: bfloat16(a).astype(np.uint32) << np.uint32(16) | bfloat16(b),
    "rn.f16x2.f32": lambda a, b: float16(a).astype(np.uint32) << np.uint32(16) | float16(b),
    "rmi.f64.f64": np.floor, "rn.f64.s32": lambda x: x.astype(np.float64),
    "rni.s32.f64": lambda x: to_integer(np.rint(x), np.int32),
    "rzi.s64.f64": lambda x: to_integer(np.trunc(x), np.int64),
}  # fmt: skip


def operation(parts: tuple[str, ...]) -> tuple[Callable[..., Array], list[Any], Any]:
    """What an opcode does, the types of its sources (the last one is for all further ones), and of its result."""
    name, kind = ".".join(parts[:-1]), TYPES[parts[-1]]
    count = np.dtype(np.uint32)
    if parts[0] == "cvt":
        integers = len(parts) == 3 and {parts[1][0], parts[2][0]} <= {"s", "u"}
        result = TYPES[parts[-2]]
        function = (lambda x: x.astype(result)) if integers else CONVERSIONS[".".join(parts[1:])]
        return function, [kind], result
    sources = {"shl": [kind, count], "shr": [kind, count], "bfe": [kind, count], "selp": [kind, kind, np.bool_]}
    if "wide" in parts:
        wide = np.dtype(f"{np.dtype(kind).kind}8")
        return OPERATIONS[name], [kind, kind] + [wide] * (parts[0] == "mad"), wide
    return OPERATIONS[name], sources.get(parts[0], [kind]), np.bool_ if parts[0] == "setp" else kind
