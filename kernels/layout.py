"""Columns of the tables that the kernels and the bucket plan share. Plain numbers; importable without Triton."""

from __future__ import annotations

from typing import Any

#: int64 table with a row per tensor. Addresses in bytes; FIRST_CHUNK counts the chunks of all tensors before this one.
#: Gradients have a table of addresses of their own, because they move from step to step.
TENSOR_COLUMNS = (
    "PARAM",
    "GRAD_EMA",
    "MOMENTUM_BUFFER",
    "COMPENSATION",
    "NUMEL",
    "FIRST_CHUNK",
    "CHUNKS",
    "GROUP",
    "ACCESS",
    "DIMS",
    "ROUNDING_KEY",
    "NORMS_ROW",
)

#: float64 table with a row per parameter of an optimizer that has shards: sums of squares of p and u, over all ranks in
#: the end, and the number of ranks with a gradient.
NORMS_WIDTH = 3
#: In the place of a trust ratio, none of which is negative: the parameter had no gradient, or was not stepped yet.
NOT_STEPPED = -1.0

#: How a tensor is reached: 16-byte accesses, element by element, or through sizes and strides (row DIMS of that table).
WIDE, NARROW, STRIDED = 0, 1, 2

#: Rows of sizes, parameter strides, gradient strides, innermost first, each of this many dimensions.
MAX_DIMS = 6

#: float64 table with a row per group: what the host knows. Learning rates, which schedulers write at every step, have a
#: table of their own.
GROUP_COLUMNS = (
    "LR_SOURCE", "MOMENTUM", "WEIGHT_DECAY", "TRUST_COEFFICIENT", "CLIP_LOW", "CLIP_HIGH",
    "EMA_DECAY_0", "EMA_DECAY_1", "EMA_DECAY_2", "THRESHOLD_1", "THRESHOLD_2",
    "TOTAL_STEPS", "WARMUP_STEPS", "RESTART_STEPS", "RESTART_MULT", "SIGN", "MAX_GRAD_NORM",
)  # fmt: skip

#: float32 table with a row per group: what the prologue makes of it for this step.
SCALAR_COLUMNS = (
    "ALPHA", "ONE_MINUS_ALPHA", "BYPASS", "WEIGHT_DECAY", "TRUST_COEFFICIENT", "CLIP_LOW", "CLIP_HIGH", "MOMENTUM",
    "ETA", "GRAD_FACTOR", "INVERSE_SCALE",
)  # fmt: skip

#: float64 numbers that move while training: completed steps, E and D of the phase rule, steps dropped.
STEP, LOSS_EMA, LOSS_DROP, SKIPPED_STEPS = range(4)

#: What the flags of a step that is dropped are filled with: the ticket counter starts beyond every work list.
DROPPED = 1 << 30

#: A chunk is the unit of work: at least so many bytes of parameter, gradient and state, rounded up to a power of two of
#: elements.
CHUNK_BYTES = 1 << 17
#: Elements of a tile, what a program has in its registers at a time; warps of a program. 2048 float32 elements of 8
#: warps are 8 a thread, two 16-byte loads per tensor.
TILE, NUM_WARPS = 2048, 8
#: Most elements of a tile of stage B where stage A writes, otherwise a whole chunk. No load moves ahead of a store, so
#: that tiles of 2048 would wait for memory four times a chunk. With 8192 a chunk's loads come first (16 of float32), in
#: at most 128 registers, which stage A needs in any case; with 16384 some variants need 134, or spill 28 bytes. With 4
#: warps, and 255 registers, nothing spills but in tiles of 4096, one variant 32 bytes (8 with tiles of that size in B).
MOST_IN_B = 8192
#: Bits of parameter, gradient and state up to which stage A loads two tiles before it works on them: of 16-bit numbers
#: one is 16 KiB, and a multiprocessor has to have some 50 KiB on their way to keep up with an H200's memory. With a
#: compensation two take 154 registers, and where gradients are written back they spill: neither is loaded so, whatever
#: the bits. So do two where state is float32, which is 64 bits.
BITS_IN_PAIRS = 48
#: Tile of the scan, which has one tensor to load and no more than 80 registers.
SCAN_TILE = 4096

#: How Triton compiles the kernels: a * b + c stays two roundings, as in torch and in Triton's interpreter. The compiler
#: would choose anew in every variant and branch which product of a * b + c * d to join, and so give them other bits.
COMPILER_OPTIONS = {"enable_fp_fusion": False}

#: Tensors that one program of ratios_of_norms serves.
RATIOS_BLOCK = 256

#: Work items are packed into 64 bits: stage in bit 0, chunk in bits 1 to 31, tensor above.
CHUNK_BITS = 31
CHUNK_MASK = (1 << CHUNK_BITS) - 1
TENSOR_SHIFT = CHUNK_BITS + 1


def chunk_elements(param_bytes: int, grad_bytes: int, state_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Elements of a chunk, a power of two, by the sizes of an element: 8192 where all are float32, else 16384."""
    return 1 << (-(-chunk_bytes // (param_bytes + grad_bytes + 2 * state_bytes)) - 1).bit_length()


def pack_item(tensor: int, chunk: Any, stage: int) -> Any:
    """A work item as the kernel reads it; ``chunk`` a number or an int64 tensor of them."""
    return (tensor << TENSOR_SHIFT) | (chunk << 1) | stage
