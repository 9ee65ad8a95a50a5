"""Sixteen-bit storage: stochastic rounding to bfloat16, and a bfloat16 weight with the bits that it lacks beside it.

The same bits as fused_dals/rounding.py, which explains the rules.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """A bijection of 32-bit integers that scatters neighbours (two multiplications, three shifts)."""
    x = x.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return x.to(tl.int32, bitcast=True)


@triton.jit
def random_bits(at, key):
    """32 random bits for each element index, of which the lower half counts; ``key`` has the upper one mixed in."""
    return mix(at.to(tl.int32) ^ key)


@triton.jit
def stochastic_bfloat16(x, bits):
    """float32 to bfloat16, up or down with the probability of what is cut off; ``bits`` in [0, 2^16)."""
    raw = x.to(tl.int32, bitcast=True)
    rounded = raw + bits
    # Infinities and NaN have no neighbours to choose from.
    special = (raw & 0x7F800000) == 0x7F800000
    quiet = tl.where((raw & 0x007FFFFF) != 0, raw | 0x00400000, raw)
    return (tl.where(special, quiet, rounded) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def join(p, compensation):
    """The float32 weight whose upper half is ``p`` (bfloat16) and whose lower half ``compensation`` (int16) adds."""
    upper = p.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (upper + compensation.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def split(w):
    """A float32 weight as bfloat16 (nearest, ties away from zero) and int16, from which ``join`` makes it again."""
    raw = w.to(tl.int32, bitcast=True)
    is_nan = (raw & 0x7FFFFFFF) > 0x7F800000
    upper = tl.where(is_nan, 0x7FC0, (raw + 0x8000) >> 16)
    lower = tl.where(is_nan, 0, raw - (upper << 16))
    return upper.to(tl.int16).to(tl.bfloat16, bitcast=True), lower.to(tl.int16)
