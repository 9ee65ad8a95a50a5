"""One read of all gradients, no write: what global-norm clipping and the dropping of non-finite steps need to know.

Every program goes through the chunks in strides of the grid and leaves one row (sum of squares, number of non-finite
elements), in float64; the prologue adds the rows. No atomics: the same grid gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_dals.kernels.columns import ACCESS, CHUNK_MASK, NUMEL, TENSOR_SHIFT, TENSOR_WIDTH
from fused_dals.kernels.fused_pass import (
    PIECE,
    RUN,
    end_of_chunk,
    end_of_full_tiles,
    offsets_of_piece,
    sums_of_runs,
)


@triton.jit
def _measures(g):
    """Squares, and 1 for what is not finite, elementwise."""
    # Looked at in float32: a float16 or bfloat16 gradient is finite exactly if its float32 copy is.
    g = g.to(tl.float32)
    non_finite = (g != g) | (tl.abs(g) == float("inf"))
    # Squared in float64: those of finite gradients above 1.8e19 leave the range of float32.
    g = g.to(tl.float64)
    return g * g, non_finite.to(tl.int32)


@triton.jit(do_not_specialize=["item_count"])
def grad_scan(
    tensors,  # int64 [n, TENSOR_WIDTH]
    grads,  # int64 [n]: addresses of the gradients, 0 where there is none
    dims,  # int64 [strided tensors, 3 * MAX_DIMS]
    items,  # int64 [item_count], packed: every chunk once
    rows,  # float64 [programs, 2], written
    item_count,
    GRAD_TYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Leave this program's sum of squares and number of non-finite elements."""
    program = tl.program_id(0)
    # Of full tiles, added up as far as one thread has them: reducing each would stop all threads once a tile.
    run_squares = tl.zeros([TILE // RUN], dtype=tl.float64)
    run_non_finite = tl.zeros([TILE // RUN], dtype=tl.int32)
    squares = tl.full([], 0.0, tl.float64)
    non_finite = tl.full([], 0, tl.int32)
    programs = tl.num_programs(0)
    item = tl.load(items + program, mask=program < item_count, other=0)
    for i in range(program, item_count, programs):
        # One ahead: otherwise a chunk's gradients would wait for two loads, one behind the other.
        next_item = tl.load(items + i + programs, mask=i + programs < item_count, other=0)
        tensor = item >> TENSOR_SHIFT
        row = tensors + tensor * TENSOR_WIDTH
        g_address = tl.load(grads + tensor)
        access = tl.load(row + ACCESS)
        start = ((item >> 1) & CHUNK_MASK) * CHUNK
        stop = end_of_chunk(start, tl.load(row + NUMEL), g_address, CHUNK)
        full = end_of_full_tiles(start, stop, access, TILE)
        for tile in range(start, full, TILE):
            g_ptr = tl.multiple_of(g_address.to(tl.pointer_type(GRAD_TYPE)), 16)
            s, n = _measures(tl.load(g_ptr + tile + tl.arange(0, TILE)))
            run_squares += sums_of_runs(s)
            run_non_finite += sums_of_runs(n)
        for piece in range(full, stop, PIECE):
            g_ptr = g_address.to(tl.pointer_type(GRAD_TYPE))
            _, mask, _, g_at = offsets_of_piece(piece, stop, access, dims, row)
            s, n = _measures(tl.load(g_ptr + g_at, mask=mask, other=0.0))
            squares += tl.sum(s)
            non_finite += tl.sum(n)
        item = next_item
    tl.store(rows + 2 * program, squares + tl.sum(run_squares))
    tl.store(rows + 2 * program + 1, (non_finite + tl.sum(run_non_finite)).to(tl.float64))
