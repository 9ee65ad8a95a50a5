"""Compile-time copies of what layout.py says of the tables: kernels read only constexpr globals."""

from __future__ import annotations

from collections.abc import Sequence

import triton.language as tl

from fused_dals.kernels import layout


def _column(columns: Sequence[str], name: str) -> tl.constexpr:
    return tl.constexpr(columns.index(name))


# The tensors' table.
PARAM = _column(layout.TENSOR_COLUMNS, "PARAM")
GRAD_EMA = _column(layout.TENSOR_COLUMNS, "GRAD_EMA")
MOMENTUM_BUFFER = _column(layout.TENSOR_COLUMNS, "MOMENTUM_BUFFER")
COMPENSATION = _column(layout.TENSOR_COLUMNS, "COMPENSATION")
NUMEL = _column(layout.TENSOR_COLUMNS, "NUMEL")
FIRST_CHUNK = _column(layout.TENSOR_COLUMNS, "FIRST_CHUNK")
CHUNKS = _column(layout.TENSOR_COLUMNS, "CHUNKS")
GROUP = _column(layout.TENSOR_COLUMNS, "GROUP")
ACCESS = _column(layout.TENSOR_COLUMNS, "ACCESS")
DIMS = _column(layout.TENSOR_COLUMNS, "DIMS")
ROUNDING_KEY = _column(layout.TENSOR_COLUMNS, "ROUNDING_KEY")
NORMS_ROW = _column(layout.TENSOR_COLUMNS, "NORMS_ROW")
TENSOR_WIDTH = tl.constexpr(len(layout.TENSOR_COLUMNS))
NOT_STEPPED = tl.constexpr(layout.NOT_STEPPED)
WIDE = tl.constexpr(layout.WIDE)
STRIDED = tl.constexpr(layout.STRIDED)
MAX_DIMS = tl.constexpr(layout.MAX_DIMS)

# The groups' table.
GROUP_LR_SOURCE = _column(layout.GROUP_COLUMNS, "LR_SOURCE")
GROUP_MOMENTUM = _column(layout.GROUP_COLUMNS, "MOMENTUM")
GROUP_WEIGHT_DECAY = _column(layout.GROUP_COLUMNS, "WEIGHT_DECAY")
GROUP_TRUST_COEFFICIENT = _column(layout.GROUP_COLUMNS, "TRUST_COEFFICIENT")
GROUP_CLIP_LOW = _column(layout.GROUP_COLUMNS, "CLIP_LOW")
GROUP_CLIP_HIGH = _column(layout.GROUP_COLUMNS, "CLIP_HIGH")
GROUP_EMA_DECAY_0 = _column(layout.GROUP_COLUMNS, "EMA_DECAY_0")
GROUP_EMA_DECAY_1 = _column(layout.GROUP_COLUMNS, "EMA_DECAY_1")
GROUP_EMA_DECAY_2 = _column(layout.GROUP_COLUMNS, "EMA_DECAY_2")
GROUP_THRESHOLD_1 = _column(layout.GROUP_COLUMNS, "THRESHOLD_1")
GROUP_THRESHOLD_2 = _column(layout.GROUP_COLUMNS, "THRESHOLD_2")
GROUP_TOTAL_STEPS = _column(layout.GROUP_COLUMNS, "TOTAL_STEPS")
GROUP_WARMUP_STEPS = _column(layout.GROUP_COLUMNS, "WARMUP_STEPS")
GROUP_RESTART_STEPS = _column(layout.GROUP_COLUMNS, "RESTART_STEPS")
GROUP_RESTART_MULT = _column(layout.GROUP_COLUMNS, "RESTART_MULT")
GROUP_SIGN = _column(layout.GROUP_COLUMNS, "SIGN")
GROUP_MAX_GRAD_NORM = _column(layout.GROUP_COLUMNS, "MAX_GRAD_NORM")
GROUP_WIDTH = tl.constexpr(len(layout.GROUP_COLUMNS))

# The table of a step's scalars, a row per group.
SCALAR_ALPHA = _column(layout.SCALAR_COLUMNS, "ALPHA")
SCALAR_ONE_MINUS_ALPHA = _column(layout.SCALAR_COLUMNS, "ONE_MINUS_ALPHA")
SCALAR_BYPASS = _column(layout.SCALAR_COLUMNS, "BYPASS")
SCALAR_WEIGHT_DECAY = _column(layout.SCALAR_COLUMNS, "WEIGHT_DECAY")
SCALAR_TRUST_COEFFICIENT = _column(layout.SCALAR_COLUMNS, "TRUST_COEFFICIENT")
SCALAR_CLIP_LOW = _column(layout.SCALAR_COLUMNS, "CLIP_LOW")
SCALAR_CLIP_HIGH = _column(layout.SCALAR_COLUMNS, "CLIP_HIGH")
SCALAR_MOMENTUM = _column(layout.SCALAR_COLUMNS, "MOMENTUM")
SCALAR_ETA = _column(layout.SCALAR_COLUMNS, "ETA")
SCALAR_GRAD_FACTOR = _column(layout.SCALAR_COLUMNS, "GRAD_FACTOR")
SCALAR_INVERSE_SCALE = _column(layout.SCALAR_COLUMNS, "INVERSE_SCALE")
SCALAR_WIDTH = tl.constexpr(len(layout.SCALAR_COLUMNS))

# The run state.
STEP = tl.constexpr(layout.STEP)
LOSS_EMA = tl.constexpr(layout.LOSS_EMA)
LOSS_DROP = tl.constexpr(layout.LOSS_DROP)
SKIPPED_STEPS = tl.constexpr(layout.SKIPPED_STEPS)

# Rows of norms, ticket counters, work items, tiles.
NORMS_WIDTH = tl.constexpr(layout.NORMS_WIDTH)
DROPPED = tl.constexpr(layout.DROPPED)
CHUNK_MASK = tl.constexpr(layout.CHUNK_MASK)
TENSOR_SHIFT = tl.constexpr(layout.TENSOR_SHIFT)
BITS_IN_PAIRS = tl.constexpr(layout.BITS_IN_PAIRS)
