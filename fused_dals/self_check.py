"""Whether the kernels are the default for a parameter: they are on a GPU on which they have just been seen to work."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fused_dals.fused import FUSED_DTYPES, FusedPass, triton_is_installed
from fused_dals.gather import TensorBatch
from fused_dals.kernels import layout
from fused_dals.live_groups import GroupsVersion
from fused_dals.loss_signal import StepLoss
from fused_dals.reference import dals_reference_, raw_blend
from fused_dals.run_state import RunState, StepInputs
from fused_dals.scalars import StepScalars

_SIZES = (layout.chunk_elements(4, 4, 4) + layout.TILE + 5, 3)
_DEPTH, _LOSS = 0.5, 1.0
_GROUP: dict[str, Any] = {
    "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02, "trust_clip": (0.2, 5.0),
    "ema_decay": (0.3, 0.6, 0.7), "phase_thresholds": (0.01, 0.002), "total_steps": None, "warmup_fraction": 0.0,
    "restart_steps": None, "restart_mult": 2, "maximize": False, "max_grad_norm": None,
}  # fmt: skip


def serves_by_default(param: Tensor) -> bool:
    """Whether ``fused=None`` means the kernels for this parameter."""
    if param.device.type != "cuda" or param.dtype not in FUSED_DTYPES or not triton_is_installed():
        return False
    return not why_kernels_fail(param.device)


@functools.cache
def why_kernels_fail(device: torch.device) -> str:
    """Step two small tensors through the kernels and compare with the reference; empty if all is well.

    Triton compiles at run time, for which a machine may lack something (a C compiler, a driver that fits). Found out
    here, once per device and process, that costs a warning and not a training run. Waits for the device.
    """
    try:
        with torch.random.fork_rng(devices=[]), _waiting_allowed(device):
            error = _error_of_kernels(device)
        reason = "" if error < 1e-4 else f"their result is off by {error:.1e} of the update"
    except Exception as failure:  # whatever a compiler or driver may raise
        reason = f"{type(failure).__name__}: {failure}"
    if reason:
        warnings.warn(f"DALS goes on without its Triton kernels on {device}: {reason}", stacklevel=2)
    return reason


@contextmanager
def _waiting_allowed(device: torch.device) -> Iterator[None]:
    """Without torch's debug mode for waits, in which this check would fail and the kernels be left out for good."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _error_of_kernels(device: torch.device) -> float:
    """The largest error of a fused step of small tensors against the reference, over the largest change."""
    drawn = [torch.randn(2, size, dtype=torch.float32, device="cpu") for size in _SIZES]
    start, grads = [pair[0].to(device) for pair in drawn], [pair[1].to(device) for pair in drawn]
    loss = torch.tensor(_LOSS, dtype=torch.float64, device=device)
    inputs = StepInputs(RunState().values.to(device), StepLoss(loss, 1))
    scalars = StepScalars(inputs).of_group(_GROUP)
    expected = [p.clone() for p in start]
    for p, g in zip(expected, grads, strict=True):
        dals_reference_(p, g, torch.zeros_like(p), torch.zeros_like(p), raw_blend(_DEPTH), **scalars)
    params = [p.clone() for p in start]
    state = {p: {"grad_ema": torch.zeros_like(p), "momentum_buffer": torch.zeros_like(p)} for p in params}
    fused = FusedPass(device)
    fused.prepare([TensorBatch(0, [0, 1], params, grads)], state, [[raw_blend(_DEPTH)] * 2])
    fused.run(inputs, [_GROUP], GroupsVersion(0, 0))
    change = max(float((e - s).abs().max()) for e, s in zip(expected, start, strict=True))
    return max(float((p - e).abs().max()) for p, e in zip(params, expected, strict=True)) / change
