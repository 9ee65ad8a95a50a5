"""DALS on one tensor, line for line as in SPEC, section "One step": what every other path is tested against.

Slow and plain on purpose. Works on any device and any real floating dtype; the arithmetic of bfloat16 and float16
parameters is done in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_dals.rounding import Rounding, as_stored, join, split
from fused_dals.update import Update, run_whole


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and state for parameters of ``dtype``: float64 stays, everything narrower is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def l2_norm(tensor: Tensor) -> Tensor:
    """||tensor||, 0-dim, summed in float64 on the CPU, where torch's float32 sum drifts (3e-4 over 25 million)."""
    dtype = torch.float64 if tensor.device.type == "cpu" else compute_dtype(tensor.dtype)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm


def raw_blend(depth: float) -> float:
    """b = 0.3 + 0.4 d: the share of the raw gradient in the update of a tensor at depth d."""
    return 0.3 + 0.4 * depth


def trust_ratio(
    param_norm: Tensor, update_norm: Tensor, trust_coefficient: float, trust_clip: tuple[float, float]
) -> Tensor:
    """r = clamp(gamma ||p|| / ||u||, lo, hi), and 1 where either norm is 0. Elementwise over any shape of norms."""
    lo, hi = trust_clip
    ratio = (trust_coefficient * param_norm / update_norm).clamp(lo, hi)
    return torch.where((param_norm == 0) | (update_norm == 0), 1.0, ratio)


def reference_update(
    param: Tensor,
    grad: Tensor,
    grad_ema: Tensor,
    momentum_buffer: Tensor,
    raw_blend: float,
    *,
    ema_decay: float | Tensor,
    bypass: bool | Tensor,
    weight_decay: float,
    trust_coefficient: float,
    trust_clip: tuple[float, float],
    momentum: float,
    lr: float | Tensor,
    grad_factor: float | Tensor = 1.0,
    compensation: Tensor | None = None,
    rounding: Rounding | None = None,
) -> Update:
    """One step of one tensor, or of a shard of one; writes param, grad_ema and momentum_buffer, returns r (0-dim).

    param, grad, grad_ema and momentum_buffer have one shape; ema_decay, bypass, lr (already multiplied by the
    schedule) and grad_factor (-1 to maximize, the factor of clipping) may be 0-dim tensors on the parameter's device.
    Bypassing the filter is alpha = 1 and b = 1. ``compensation`` is written too; ``rounding`` is for
    state in bfloat16.
    """
    dtype = compute_dtype(param.dtype)
    p, g, h, m = param.to(dtype), grad.to(dtype), grad_ema.to(dtype), momentum_buffer.to(dtype)
    alpha, lambda_, gamma, mu, eta = ema_decay, weight_decay, trust_coefficient, momentum, lr
    b = _blend(raw_blend, bypass, dtype)
    if compensation is not None:
        p = join(param, compensation)
    g = grad_factor * g

    h = alpha * h + (1 - alpha) * g
    u = b * g + (1 - b) * h
    u = u + lambda_ * p
    p_norm, u_norm = yield l2_norm(p), l2_norm(u)  # of the whole tensor, where param is a shard
    r = trust_ratio(p_norm, u_norm, gamma, trust_clip).to(dtype)
    m = as_stored(mu * m + u, momentum_buffer, rounding, half=1).to(dtype)  # p follows the buffer as it is stored
    p = p - eta * r * m

    grad_ema.copy_(as_stored(h, grad_ema, rounding, half=0))
    momentum_buffer.copy_(m)
    if compensation is None:
        param.copy_(p)
    else:
        for stored, half in zip((param, compensation), split(p), strict=True):
            stored.copy_(half)
    return r


def dals_reference_(*tensors: Any, **scalars: Any) -> Tensor:
    """``reference_update`` of a whole tensor; returns the trust ratio (0-dim)."""
    return run_whole(reference_update(*tensors, **scalars))


def _blend(raw_blend: float, bypass: bool | Tensor, dtype: torch.dtype) -> float | Tensor:
    """b, or 1 where the filter is bypassed."""
    if isinstance(bypass, Tensor):
        return torch.where(bypass, 1.0, torch.full_like(bypass, raw_blend, dtype=dtype))
    return 1.0 if bypass else raw_blend
