"""Sixteen-bit storage: stochastic rounding to bfloat16, and a bfloat16 weight with the bits that it lacks beside it.

The rules, which kernels/rounding.py follows bit for bit, but for the payloads of NaN:

- *Stochastic rounding.* A float32 value lies between two bfloat16 neighbours; it goes to the upper one with probability
  (distance to the lower) / (their distance), so that its expectation is itself and small updates are not lost. The
  random bits are a hash of (completed steps, place of the parameter in its group, which shard of it, index of the
  element in that): no generator, no state, the same bits in every rerun and after every resume on as many ranks.
- *Compensation.* A float32 weight w is stored as ``param``, w rounded to the nearest bfloat16, ties away from zero, and
  an int16 ``compensation``, the difference of their bit patterns. Both together are w exactly.
  Ties to even cannot be held this way: 65,537 float32 values round to one even bfloat16, and int16 has 65,536.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_dals.memory_order import in_memory_order, out_of_memory_order

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)

_LOW_32 = 0xFFFFFFFF
_FACTORS = (0x7FEB352D, 0x846CA68B)

#: Elements whose random bits are made at a time, a power of two that divides 2^32. On a CPU what a cache holds: 5 ns an
#: element on two cores; 9 with 2^16, where the calls count.
_PIECE_ON_CPU, _PIECE = 1 << 18, 1 << 30


def place_key(group_index: int, position: int, shard: int = 0) -> int:
    """What tells one parameter's random bits from another's: where it stands in param_groups, and which shard it is."""
    key = _mix((group_index << 20) + position + 1)
    return _mix(key ^ shard) if shard else key


def step_seed(completed_steps: Tensor) -> Tensor:
    """What tells one step's random bits from another's, int64 0-dim in [0, 2^32)."""
    return _mix(completed_steps.to(torch.int64))


def _mix(x: IntOrTensor) -> IntOrTensor:
    """A bijection of 32-bit integers that scatters neighbours; numbers or int64 tensors in [0, 2^32) in and out."""
    x = x & _LOW_32
    x = _times(x ^ (x >> 16), _FACTORS[0])
    x = _times(x ^ (x >> 15), _FACTORS[1])
    return x ^ (x >> 16)


def _times(x: IntOrTensor, factor: int) -> IntOrTensor:
    # int64 products of two 32-bit numbers wrap, which leaves their low 32 bits right.
    return (x * _signed(factor)) & _LOW_32


def _signed(x: int) -> int:
    """The int32 with these 32 bits."""
    return ((x & _LOW_32) ^ (1 << 31)) - (1 << 31)


def _mix_elements_(x: Tensor) -> Tensor:
    """``_mix`` of an int32 tensor, in place, with half the memory; shifts must not bring the sign along."""
    shifted = torch.empty_like(x)
    for shift, mask, factor in ((16, 0xFFFF, _FACTORS[0]), (15, 0x1FFFF, _FACTORS[1]), (16, 0xFFFF, None)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x ^= shifted.bitwise_and_(mask)
        if factor is not None:
            x *= _signed(factor)
    return x


class Rounding(NamedTuple):
    """What the random bits of one parameter in one step are drawn from."""

    key: int
    seed: Tensor


def random_bits(start: int, stop: int, rounding: Rounding) -> Tensor:
    """The 32 random bits, as int32 [stop - start], of elements in memory order that do not straddle 2^32."""
    seed = _mix(rounding.seed ^ rounding.key) ^ _mix(start >> 32)
    at = torch.arange(stop - start, dtype=torch.int32, device=seed.device)
    at += _signed(start)
    at ^= seed.to(torch.int32)
    return _mix_elements_(at)


def stochastic_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """``value`` (float32) as bfloat16, rounded by ``bits`` in [0, 2^16), int32."""
    rounded = (bits + value.view(torch.int32)).bitwise_and_(~0xFFFF)  # infinities come out as they were; NaN might not
    return torch.where(value.isnan(), value, rounded.view(torch.float32)).to(torch.bfloat16)


def as_stored(value: Tensor, buffer: Tensor, rounding: Rounding | None, half: int) -> Tensor:
    """A state value in the dtype of its buffer; bfloat16 by the lower (0) or upper (1) half of its random bits."""
    if buffer.dtype != torch.bfloat16 or rounding is None:
        return value.to(buffer.dtype)
    rounding = Rounding(rounding.key, rounding.seed.to(buffer.device))
    values = in_memory_order(value, buffer)
    stored = torch.empty(values.shape, dtype=buffer.dtype, device=buffer.device)
    piece = _PIECE_ON_CPU if buffer.device.type == "cpu" else _PIECE
    for start in range(0, buffer.numel(), piece):
        stop = min(start + piece, buffer.numel())
        bits = random_bits(start, stop, rounding)
        bits = (bits.bitwise_right_shift_(16) if half else bits).bitwise_and_(0xFFFF)
        stored[start:stop] = stochastic_bfloat16(values[start:stop], bits)
    return out_of_memory_order(stored, buffer)


def join(param: Tensor, compensation: Tensor) -> Tensor:
    """The float32 weight that a bfloat16 parameter and its int16 compensation stand for."""
    upper = param.view(torch.int16).to(torch.int32) << 16
    return (upper + compensation.to(torch.int32)).view(torch.float32)


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 weight as (param, compensation); ``join`` makes it again."""
    raw = weight.view(torch.int32)
    upper = torch.where(weight.isnan(), 0x7FC0, (raw + 0x8000) >> 16)
    lower = torch.where(weight.isnan(), 0, raw - (upper << 16))
    return upper.to(torch.int16).view(torch.bfloat16), lower.to(torch.int16)
