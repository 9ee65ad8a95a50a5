"""Which variants of the kernels there are to compile ahead of time, for reading their machine code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from fused_dals.kernels.fused_pass import fused_pass, ratios_of_norms
from fused_dals.kernels.grad_scan import grad_scan
from fused_dals.kernels.layout import MOST_IN_B, NUM_WARPS, RATIOS_BLOCK, SCAN_TILE, TILE, chunk_elements
from fused_dals.kernels.prologue import prologue

PASS_SIGNATURE = {
    "tensors": "*i64", "grads": "*i64", "dims": "*i64", "blends": "*fp32", "scalars": "*fp32", "items": "*i64",
    "partials": "*fp32", "norms": "*fp64", "ratios": "*fp32", "arrivals": "*i32", "ready": "*i32", "counter": "*i32",
    "seed": "*i32", "item_count": "i32",
}  # fmt: skip
PROLOGUE_SIGNATURE = {
    "groups": "*fp64", "lrs": "*fp64", "lr_addresses": "*i64", "scalars": "*fp32", "seed": "*i32", "state": "*fp64",
    "loss_sum": "*fp64", "loss_count": "fp32", "found_inf": "*fp32", "grad_scale": "*fp32", "scan": "*fp64",
    "scan_count": "i32", "skip_nonfinite": "fp32", "group_count": "i32", "sync": "*i32", "sync_count": "i32",
}  # fmt: skip
SCAN_SIGNATURE = {
    "tensors": "*i64", "grads": "*i64", "dims": "*i64", "items": "*i64", "rows": "*fp64", "item_count": "i32",
}  # fmt: skip

RATIOS_SIGNATURE = {
    "tensors": "*i64", "norms": "*fp64", "scalars": "*fp32", "ratios": "*fp32", "ready": "*i32", "counter": "*i32",
    "count": "i32",
}  # fmt: skip

#: parameter, gradient, state; compensated; written back unscaled; shards
PASSES = [
    ((tl.float32, tl.float32, tl.float32), False, False, False),
    ((tl.float32, tl.float32, tl.float32), False, False, True),
    ((tl.bfloat16, tl.bfloat16, tl.float32), False, False, False),
    ((tl.bfloat16, tl.bfloat16, tl.bfloat16), False, False, False),
    ((tl.bfloat16, tl.bfloat16, tl.bfloat16), False, False, True),
    ((tl.bfloat16, tl.bfloat16, tl.bfloat16), True, False, False),
    ((tl.float16, tl.float16, tl.bfloat16), False, True, False),
    ((tl.float16, tl.float16, tl.float32), False, True, False),
]


def codegen_variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Label, kernel, signature of the run-time arguments, constants, number of warps."""
    for dtypes, compensated, unscale, sharded in PASSES:
        for a_writes in (True,) if sharded else (True, False):
            constants = dict(zip(("PARAM_TYPE", "GRAD_TYPE", "STATE_TYPE"), dtypes, strict=True))
            constants |= {"COMPENSATED": compensated, "UNSCALE": unscale, "SHARDED": sharded}
            chunk = chunk_elements(*(dtype.primitive_bitwidth // 8 for dtype in dtypes))
            constants |= {"CHUNK": chunk, "TILE": TILE, "A_WRITES": a_writes, "EVICT_FIRST": True}
            constants |= {"SAME_RUNS": False, "MOST_IN_B": MOST_IN_B, "PAIRS": True}
            label = ",".join(map(str, dtypes)) + " compensated" * compensated + " unscaled" * unscale
            label += " shards" * sharded
            label += " A writes h m" if a_writes else " A reads"
            yield label, fused_pass, PASS_SIGNATURE, constants, NUM_WARPS
    for dtype in (tl.float32, tl.bfloat16):
        size = dtype.primitive_bitwidth // 8
        constants = {"GRAD_TYPE": dtype, "CHUNK": chunk_elements(size, size, size), "TILE": SCAN_TILE}
        yield f"grad_scan {dtype}", grad_scan, SCAN_SIGNATURE, constants, NUM_WARPS
    yield "ratios_of_norms", ratios_of_norms, RATIOS_SIGNATURE, {"BLOCK": RATIOS_BLOCK}, 4
    yield "prologue", prologue, PROLOGUE_SIGNATURE, {}, 4
    yield "prologue, loss in fp32", prologue, {**PROLOGUE_SIGNATURE, "loss_sum": "*fp32"}, {}, 4
