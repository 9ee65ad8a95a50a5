"""Sixteen-bit storage: stochastic rounding to bfloat16, and a bfloat16 weight with the bits that it lacks beside it.

The rules, which kernels/rounding.py follows bit for bit:

- *Stochastic rounding.* A float32 value lies between two bfloat16 neighbours; it goes to the upper one with probability
  (distance to the lower) / (their distance), so that its expectation is itself and small updates are not lost. The
  random bits are a hash of (completed steps, place of the parameter in its group, which shard of it, index of the
  element in that): no generator, no state, the same bits in every rerun and after every resume on as many ranks.
- *Compensation.* A float32 weight w is stored as ``param``, w rounded to the nearest bfloat16, ties away from zero, and
  an int16 ``compensation``, the difference of their bit patterns. Both together are w exactly, NaN payloads apart.
  Ties to even cannot be held this way: 65,537 float32 values round to one even bfloat16, and int16 has 65,536.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)

_LOW_32 = 0xFFFFFFFF


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
    x = _times(x ^ (x >> 16), 0x7FEB352D)
    x = _times(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def _times(x: IntOrTensor, factor: int) -> IntOrTensor:
    # int64 products of two 32-bit numbers wrap, which leaves their low 32 bits right.
    if factor >= 1 << 31:
        factor -= 1 << 32
    return (x * factor) & _LOW_32


def random_bits(like: Tensor, key: int, seed: Tensor) -> Tensor:
    """32 random bits per element as int64, in the memory order of ``like``, which is dense."""
    at = torch.arange(like.numel(), dtype=torch.int64, device=like.device)
    bits = _mix(at ^ _mix(at >> 32) ^ _mix(seed.to(like.device) ^ key))
    return bits.as_strided(like.shape, like.stride())


def stochastic_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """``value`` (float32) as bfloat16, rounded by ``bits`` in [0, 2^16)."""
    raw = value.view(torch.int32)
    rounded = (raw + bits.to(torch.int32)) & ~0xFFFF
    return torch.where(value.isfinite(), rounded.view(torch.float32), value).to(torch.bfloat16)


class Rounding(NamedTuple):
    """What the random bits of one parameter in one step are drawn from."""

    key: int
    seed: Tensor


def as_stored(value: Tensor, buffer: Tensor, rounding: Rounding | None, half: int) -> Tensor:
    """A state value in the dtype of its buffer; bfloat16 by the lower (0) or upper (1) half of its random bits."""
    if buffer.dtype == torch.bfloat16 and rounding is not None:
        bits = random_bits(buffer, rounding.key, rounding.seed)
        return stochastic_bfloat16(value, bits >> 16 if half else bits & 0xFFFF)
    return value.to(buffer.dtype)


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
