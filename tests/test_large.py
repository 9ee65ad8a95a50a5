"""Tensors of more than 2^31 elements: the plan's arithmetic, and the kernel on memory that exists as addresses only.

No page is touched but those of a few chunks, so that 2^32 elements need no more memory than a few thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fused_dals.buckets import Bucket, FusedTensor, WorkList, joined_dims
from fused_dals.gather import TensorBatch
from fused_dals.kernels import layout
from fused_dals.launch_plan import LaunchPlan
from fused_dals.live_groups import GroupsVersion
from fused_dals.loss_signal import StepLoss
from fused_dals.rounding import Rounding, place_key, random_bits, step_seed, stochastic_bfloat16
from fused_dals.run_state import RunState, StepInputs
from fused_dals.worklist import STAGE_A, STAGE_B, packed_work_list, runs

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")
CHUNK = layout.chunk_elements(2, 2, 2)  # as large as with any 16-bit parameters
BEYOND = [2**31 + 1, 2**31 + 3 * CHUNK + 77, 2**32, 2**32 + CHUNK - 1]


def unpack(item: int) -> tuple[int, int, int]:
    """(tensor, chunk, stage) as the kernel takes an item apart."""
    return item >> layout.TENSOR_SHIFT, (item >> 1) & layout.CHUNK_MASK, item & 1


def plan(sizes: Sequence[int]) -> Bucket:
    """The tables of tensors of these sizes, each a single element that is repeated without memory."""
    bucket = Bucket(CPU, CHUNK, window=1)
    bucket.refresh([FusedTensor(*(torch.zeros(1).expand(size) for _ in range(4))) for size in sizes])
    return bucket


@pytest.mark.parametrize("stage", [STAGE_A, STAGE_B])
@pytest.mark.parametrize("tensor", [0, 1, 9_999, 2**31 - 1])
def test_items_hold_the_largest_chunk_and_tensor(tensor: int, stage: int) -> None:
    """8.8e12 elements in a tensor, 2^31 tensors; no sign bit is used."""
    chunks = [0, 1, 2**19, 2**20, 2**31 - 1]
    packed = layout.pack_item(tensor, torch.tensor(chunks, dtype=torch.int64), stage)
    assert packed.dtype == torch.int64
    assert [unpack(item) for item in packed.tolist()] == [(tensor, chunk, stage) for chunk in chunks]
    assert packed.tolist() == [layout.pack_item(tensor, chunk, stage) for chunk in chunks]


def test_the_work_list_of_tensors_beyond_2_to_the_32() -> None:
    """All chunks of both stages, in order; taken apart as tensors, for there are four million."""
    chunks = [3, 2**32 // CHUNK + 1, 0, 2**31 // CHUNK + 2]
    items = packed_work_list(chunks, window=5)
    assert len(items) == 2 * sum(chunks)
    listed = list(runs(chunks, window=5))
    assert len(listed) == 10  # A and B of each, and the A of the large ones in two
    for run, packed in zip(listed, items.split([len(run.chunks) for run in listed]), strict=True):
        order = torch.arange(run.chunks.start, run.chunks.stop, run.chunks.step)
        assert torch.equal((packed >> 1) & layout.CHUNK_MASK, order)
        assert bool((packed >> layout.TENSOR_SHIFT == run.tensor).all()) and bool((packed & 1 == run.stage).all())


@pytest.mark.parametrize("size", BEYOND)
def test_the_table_of_large_tensors(size: int) -> None:
    """Chunks cover a tensor exactly, and the next one's partial sums begin after them."""
    bucket = plan([5, size, 2**31, 7])
    rows = [dict(zip(layout.TENSOR_COLUMNS, row, strict=True)) for row in bucket.tensors.tolist()]
    assert [row["NUMEL"] for row in rows] == [5, size, 2**31, 7]
    first_chunk = 0
    for row in rows:
        assert row["FIRST_CHUNK"] == first_chunk
        assert 0 <= row["CHUNKS"] * CHUNK - row["NUMEL"] < CHUNK
        first_chunk += row["CHUNKS"]
    (work,) = bucket.lists
    assert bucket.partials.numel() == 2 * first_chunk and work.count == 2 * first_chunk == len(work.items)
    last = max(chunk * CHUNK for tensor, chunk, _ in map(unpack, work.items[:2000].tolist()) if tensor <= 1)
    assert last < size


def test_sizes_and_strides_of_large_tensors() -> None:
    """Products of sizes and strides stay integers of any length on the way into the table of int64."""
    h = torch.empty(3, 2**16, 2**17, device="meta")
    g = torch.empty_strided(h.shape, (2**33, 1, 2**16), device="meta")
    p = torch.empty(1, device="meta").expand(h.shape)
    assert joined_dims(h, g, h) == [(2**17, 1, 2**16), (2**16, 2**17, 1), (3, 2**33, 2**33)]
    assert joined_dims(h, p, h) == [(3 * 2**33, 1, 0)]


class Touched(NamedTuple):
    """What a run left in the chunks that it was given: p, h, m in order, their partial sums, the ratio."""

    tensors: list[Tensor]
    partials: Tensor
    ratio: float


def run_chunks(p: Tensor, g: Tensor, h: Tensor, m: Tensor, chunks: list[int], stage_a_writes: bool) -> Touched:
    """Both stages of the real kernel on these chunks of one tensor alone; the others count as done, with sums of 0.

    All that this file knows about launching.
    """
    from fused_dals.fused import FusedPass

    group: dict[str, Any] = {
        "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 1.0, "trust_clip": (0.5, 0.5),
        "ema_decay": (0.3, 0.6, 0.7), "phase_thresholds": (0.01, 0.002), "total_steps": None, "warmup_fraction": 0.0,
        "restart_steps": None, "restart_mult": 2, "maximize": False, "max_grad_norm": None,
    }  # fmt: skip
    inputs = StepInputs(RunState().values, StepLoss(torch.ones((), dtype=torch.float64), 1))
    fused = FusedPass(CPU, LaunchPlan(stage_a_writes=stage_a_writes))
    fused.prepare([TensorBatch(0, [0], [p], [g])], {p: {"grad_ema": h, "momentum_buffer": m}}, [[0.4]])
    (launch,) = fused.launches
    bucket = launch.bucket
    items = [layout.pack_item(0, chunk, stage) for stage in (STAGE_A, STAGE_B) for chunk in chunks]
    bucket.lists = [WorkList(torch.tensor(items), len(items))]
    fused._launch_prologue(inputs, [group], GroupsVersion(0, 0))
    bucket.arrivals[0] = -(-p.numel() // CHUNK) - len(chunks)
    bucket.partials.zero_()
    fused._launch_pass(launch, 0)
    flag = (bucket.ready[0] & 0x7FFFFFFF).view(torch.float32)
    assert int(bucket.ready[0]) < 0 and flag == bucket.ratios[0] and int(bucket.arrivals[0]) == -(-p.numel() // CHUNK)
    found = [t.reshape(-1)[chunk * CHUNK :][:CHUNK].clone() for t in (p, h, m) for chunk in chunks]
    sums = bucket.partials.view(-1, 2)
    assert sums.nonzero()[:, 0].unique().tolist() == chunks, "sums of these chunks, and of no other"
    return Touched(found, sums[chunks].clone(), bucket.ratios.item())


def virtual(numel: int, offset: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory before they are written: fresh pages of the operating system."""
    try:
        return torch.empty(numel + offset, dtype=dtype)[offset:]
    except RuntimeError as error:
        pytest.skip(f"no address space for {numel:.1e} elements: {str(error)[:80]}")


@pytest.mark.parametrize("access", ["wide", "narrow", "strided"])
@pytest.mark.parametrize(("boundary", "stage_a_writes"), [(2**31, True), (2**32, False)])
def test_the_kernel_beyond_32_bits(
    boundary: int, access: str, stage_a_writes: bool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The chunks on both sides of the boundary and the last ones: the bits of a small tensor made of those chunks.

    Around them, and where a wrapped offset would lead, no bit changes.
    """
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter's work: a GPU has memory for the real thing")
    import triton.language as tl

    # A million sums in turns of 256 take the interpreter ten seconds.
    monkeypatch.setattr("fused_dals.kernels.fused_pass.PARTIALS_PER_TURN", tl.constexpr(1 << 17))
    numel = boundary + 3 * CHUNK + 77
    before, last = boundary // CHUNK - 1, numel // CHUNK
    chunks = [before, before + 1, last]
    # State in float16, which the kernel could serve: in bfloat16 it would be rounded by the index of the element.
    large = [virtual(numel, 1 if access == "narrow" else 0, dtype) for dtype in (BF16, BF16, F16, F16)]
    if access == "strided":
        large[1] = torch.tensor(0.3, dtype=BF16).expand(numel)
    windows = [slice(0, 2 * CHUNK), slice((before - 2) * CHUNK, numel)]
    windows += [slice(2**31 - CHUNK, 2**31 + 2 * CHUNK)] * (boundary > 2**31)
    for tensor in large:
        for window in windows:
            if tensor.stride() == (1,):
                tensor[window] = torch.randn(tensor[window].numel()).to(tensor.dtype)
    kept = [[tensor[window].clone() for window in windows] for tensor in large]

    size = 2 * CHUNK + numel - last * CHUNK
    small = [torch.cat([t[chunk * CHUNK :][:CHUNK] for chunk in chunks]) for t in large]
    assert all(t.numel() == size for t in small)
    if access == "narrow":
        small = [torch.cat([t[:1], t])[1:] for t in small]
    if access == "strided":
        small[1] = large[1][:size]

    ours, expected = run_chunks(*large, chunks, stage_a_writes), run_chunks(*small, [0, 1, 2], stage_a_writes)
    assert ours.ratio == expected.ratio == 0.5
    assert torch.equal(ours.partials, expected.partials)
    for a, b in zip(ours.tensors, expected.tensors, strict=True):
        assert torch.equal(a, b)

    inside = torch.tensor(chunks)
    for which, (tensor, before_the_run) in enumerate(zip(large, kept, strict=True)):
        for window, was in zip(windows, before_the_run, strict=True):
            changed = (tensor[window] != was).nonzero().flatten() + window.start
            assert bool(torch.isin(changed // CHUNK, inside).all())
            assert which == 1 or window.stop < numel or len(changed) > CHUNK


@pytest.mark.parametrize("stage_a_writes", [True, False])
def test_random_bits_beyond_32_bits(stage_a_writes: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """State in bfloat16 is rounded by all bits of an element's index, as rounding.py does it."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter's work: a GPU has memory for the real thing")
    import triton.language as tl

    monkeypatch.setattr("fused_dals.kernels.fused_pass.PARTIALS_PER_TURN", tl.constexpr(1 << 17))
    numel = 2**32 + 2 * CHUNK + 77
    chunks = [2**32 // CHUNK - 1, 2**32 // CHUNK, 2**32 // CHUNK + 1, numel // CHUNK]
    p, g, h, m = (virtual(numel, 0, dtype) for dtype in (BF16, F32, BF16, BF16))
    window = slice(chunks[0] * CHUNK, numel)
    g[window], h[window] = torch.randn(numel - window.start), torch.randn(numel - window.start).to(BF16)
    exact = 0.3 * h[window].float() + torch.tensor(1 - 0.3) * g[window]
    run_chunks(p, g, h, m, chunks, stage_a_writes)
    rounding = Rounding(place_key(0, 0), step_seed(torch.zeros(())))
    bits = [random_bits(*ends, rounding) for ends in ((window.start, 2**32), (2**32, numel))]
    assert torch.equal(h[window], stochastic_bfloat16(exact, torch.cat(bits) & 0xFFFF))
