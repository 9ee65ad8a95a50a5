"""One read of all gradients, no write: what global-norm clipping and the dropping of non-finite steps need to know.

Every program goes through the chunks in strides of the grid and leaves one row (sum of squares, number of non-finite
elements), in float64; the prologue adds the rows. No atomics: the same grid gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_dals.kernels.fused_pass import (
    ACCESS,
    CHUNK_MASK,
    DIMS,
    MAX_DIMS,
    NUMEL,
    PIECE,
    STRIDED,
    TENSOR_SHIFT,
    TENSOR_WIDTH,
    WIDE,
    strided_offsets,
)


@triton.jit
def _sums(g):
    # Counted on float32: a float16 or bfloat16 gradient is finite exactly if its float32 copy is.
    non_finite = (g != g) | (tl.abs(g) == float("inf"))
    # Squared in float64: those of finite gradients above 1.8e19 leave the range of float32.
    g = g.to(tl.float64)
    return tl.sum(g * g), tl.sum(non_finite.to(tl.float64))


@triton.jit(do_not_specialize=["item_count"])
def grad_scan(
    tensors,  # int64 [n, TENSOR_WIDTH]
    grads,  # int64 [n]: addresses of the gradients
    dims,  # int64 [strided tensors, 3 * MAX_DIMS]
    items,  # int64 [item_count], packed: every chunk once
    rows,  # float64 [programs, 2], written
    item_count,
    GRAD_TYPE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Leave this program's sum of squares and number of non-finite elements."""
    program = tl.program_id(0)
    squares = 0.0
    squares = squares.to(tl.float64)
    non_finite = squares
    for i in range(program, item_count, tl.num_programs(0)):
        item = tl.load(items + i)
        tensor = item >> TENSOR_SHIFT
        row = tensors + tensor * TENSOR_WIDTH
        g_address = tl.load(grads + tensor)
        numel = tl.load(row + NUMEL)
        access = tl.load(row + ACCESS)
        start = ((item >> 1) & CHUNK_MASK) * CHUNK
        if (access == WIDE) & (start + CHUNK <= numel):
            g_ptr = tl.multiple_of(g_address.to(tl.pointer_type(GRAD_TYPE)), 16)
            s, n = _sums(tl.load(g_ptr + start + tl.arange(0, CHUNK)).to(tl.float32))
            squares += s
            non_finite += n
        else:
            g_ptr = g_address.to(tl.pointer_type(GRAD_TYPE))
            stop = tl.minimum(start + CHUNK, numel)
            for piece in range(start, stop, PIECE):
                at = piece + tl.arange(0, PIECE).to(tl.int64)
                g_at = at
                if access == STRIDED:
                    _, g_at = strided_offsets(at, dims + tl.load(row + DIMS) * (3 * MAX_DIMS))
                s, n = _sums(tl.load(g_ptr + g_at, mask=at < stop, other=0.0).to(tl.float32))
                squares += s
                non_finite += n
    tl.store(rows + 2 * program, squares)
    tl.store(rows + 2 * program + 1, non_finite)
