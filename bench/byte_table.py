"""Bytes per parameter that a step must move, by dtypes: what every other figure is held against."""

from __future__ import annotations

import torch

#: Of parameter, gradient and state.
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]

SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}

F32, BF16 = torch.float32, torch.bfloat16
STEP_DTYPES: dict[str, Dtypes] = {"fp32": (F32, F32, F32), "mixed": (BF16, BF16, F32), "bf16": (BF16, BF16, BF16)}


def item_sizes(dtypes: Dtypes) -> tuple[int, int, int]:
    """Bytes of an element of parameter, gradient and state."""
    p, g, state = (dtype.itemsize for dtype in dtypes)
    return p, g, state


def least_bytes(p: int, g: int, state: int) -> int:
    """Bytes per parameter of any step with two states: read p, g, h, m and write p, h, m."""
    return 2 * p + g + 4 * state


def uncached_bytes(p: int, g: int, state: int, stage_a_writes: bool) -> int:
    """The same for two stages of which the second finds nothing of the first in a cache.

    Stage B reads p and m again where stage A wrote h and m, else p, g and h.
    """
    return least_bytes(p, g, state) + p + (state if stage_a_writes else g + state)
