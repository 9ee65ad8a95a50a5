"""However parameters and gradients lie in memory, a step does what it does on plain copies, on all three paths.

With the trust ratio clipped to 1 nothing depends on the order of a sum, and the bits are the same; without, a few
roundings are left. Memory beside the views is NaN, which shows whether it is read, and must stay NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS
from fused_dals.kernels import layout
from tests.helpers import EVERY_PATH, identical

F32, BF16 = torch.float32, torch.bfloat16
CHUNK = layout.chunk_elements(4, 4, 4)
Shapes: TypeAlias = list[tuple[int, ...]]
Layout: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]


def each(change: Callable[[Tensor], Tensor]) -> Layout:
    return lambda tensors: [change(t) for t in tensors]


def in_memory_as(*order: int) -> Layout:
    """The same tensors, with the dimensions in this order in memory, outermost first."""
    back = [order.index(d) for d in range(len(order))]
    return each(lambda t: t.permute(order).contiguous().permute(back))


def expanded(dim: int) -> Layout:
    """Not the same values: the first slice, repeated without memory."""
    return each(lambda t: t.narrow(dim, 0, 1).clone().expand(t.shape))


def views_of_one(first: int, gap: int) -> Layout:
    """One after the other in a flat tensor, with gaps of NaN before and between them."""

    def views(tensors: Sequence[Tensor]) -> list[Tensor]:
        starts = list(accumulate((t.numel() + gap for t in tensors), initial=first))
        flat = torch.full((starts[-1],), math.nan, dtype=tensors[0].dtype, device=tensors[0].device)
        found = [flat[start : start + t.numel()].view(t.shape) for start, t in zip(starts, tensors, strict=False)]
        return [view.copy_(t) for view, t in zip(found, tensors, strict=True)]

    return views


def columns_of_one(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Interleaved: element i of every tensor, then a NaN, then element i + 1."""
    matrix = tensors[0].new_full((max(t.numel() for t in tensors), len(tensors) + 1), math.nan)
    views = [matrix[: t.numel(), i].view(t.shape) for i, t in enumerate(tensors)]
    return [view.copy_(t) for view, t in zip(views, tensors, strict=True)]


contiguous = each(torch.clone)
channels_last = each(lambda t: t.contiguous(memory_format=torch.channels_last))
slices = each(lambda t: nn.functional.pad(t, (1, 2) * t.dim(), value=math.nan)[(slice(1, -2),) * t.dim()])

IMAGES: Shapes = [(4, 3, 2, 5), (2, 1, 3, 3), (1, 6, 1, 1)]
FLAT: Shapes = [(3, 5), (1,), (4, 2, 3), (), (7,), (1, 530)]
COLUMNS: Shapes = [(6,), (40,), (2, 3), (60,)]
MATRICES: Shapes = [(5, 7), (1, 6), (40, 3), (3, 1)]
#: shapes, layout of the parameters, layout of the gradients
CASES: dict[str, tuple[Shapes, Layout, Layout]] = {
    "channels_last": (IMAGES, channels_last, channels_last),
    "channels_last, plain gradients": (IMAGES, channels_last, contiguous),
    "plain, channels_last gradients": (IMAGES, contiguous, channels_last),
    "channels_last_3d": ([(2, 3, 4, 2, 3), (1, 2, 1, 3, 1)], in_memory_as(0, 2, 3, 4, 1), in_memory_as(0, 2, 3, 4, 1)),
    "transposed": (MATRICES, in_memory_as(1, 0), in_memory_as(1, 0)),
    "transposed, plain gradients": (MATRICES, in_memory_as(1, 0), contiguous),
    "permuted": (IMAGES, in_memory_as(3, 1, 0, 2), in_memory_as(3, 1, 0, 2)),
    "permuted, gradients otherwise": (IMAGES, in_memory_as(3, 1, 0, 2), in_memory_as(1, 2, 3, 0)),
    "six dimensions reversed": ([(2, 3, 1, 2, 2, 3)], contiguous, in_memory_as(5, 4, 3, 2, 1, 0)),
    "gradients of equal rows": (MATRICES, contiguous, expanded(0)),
    "transposed, gradients of equal columns": (MATRICES, in_memory_as(1, 0), expanded(1)),
    "channels_last, gradients of equal channels": (IMAGES, channels_last, expanded(1)),
    "views of one flat tensor": (FLAT, views_of_one(1, 2), contiguous),
    "gradients in one flat bucket": (FLAT, contiguous, views_of_one(3, 0)),
    "both flat, at other offsets": ([(3, 5), (1,), (CHUNK + 5,), (0,), (7,)], views_of_one(1, 2), views_of_one(2, 1)),
    "columns of one matrix": (COLUMNS, columns_of_one, columns_of_one),
    "columns, plain gradients": (COLUMNS, columns_of_one, contiguous),
    "slices of larger tensors": (IMAGES, slices, contiguous),
}
#: Where two bytes an element make a difference to addresses.
NARROW_TOO = ("channels_last", "transposed, plain gradients", "both flat, at other offsets", "columns of one matrix")


def contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def memory_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """All that lies in the tensors' storages, beside them too."""
    return [t.new_empty(0).set_(t.untyped_storage()) for t in tensors]


@dataclass
class Result:
    """Parameters, gradient EMAs and momentum of all tensors, and the ratios of the last step."""

    tensors: list[Tensor]
    ratios: dict[str, float]


def train(case: str, path: str, dtype: torch.dtype, **options: Any) -> tuple[Result, Result]:
    """Two steps in the layouts of the case, and the same two on plain copies."""
    if path == "fused":
        pytest.importorskip("triton")
    device = torch.device("cuda" if path == "fused" and torch.cuda.is_available() else "cpu")
    shapes, of_params, of_grads = CASES[case]
    start = of_params([torch.randn(shape, dtype=dtype, device=device) for shape in shapes])
    params = [[nn.Parameter(t) for t in start], [nn.Parameter(contiguous_copy(t)) for t in start]]
    optimizers = [
        DALS([(f"p{i}", p) for i, p in enumerate(ps)], lr=0.1, **EVERY_PATH[path], **options) for ps in params
    ]
    beside = [memory.isnan() for memory in memory_of(start)]
    for loss in (1.0, 0.99):
        grads = of_grads([torch.randn(shape, dtype=dtype, device=device) for shape in shapes])
        before = [memory.clone() for memory in memory_of(grads)]
        for ps, gs, optimizer in zip(params, (grads, map(contiguous_copy, grads)), optimizers, strict=True):
            for p, g in zip(ps, gs, strict=True):
                p.grad = g
            optimizer.step(loss=loss)
        for memory, was in zip(memory_of(grads), before, strict=True):
            torch.testing.assert_close(memory, was, rtol=0, atol=0, equal_nan=True)
    for memory, nans in zip(memory_of(start), beside, strict=True):
        assert torch.equal(memory.isnan(), nans)
    for p, given in zip(params[0], start, strict=True):
        assert p.data_ptr() == given.data_ptr() and p.stride() == given.stride()
    first, second = (
        Result([t for p in ps for t in (p.detach(), *optimizer.state[p].values())], optimizer.trust_ratios())
        for ps, optimizer in zip(params, optimizers, strict=True)
    )
    return first, second


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize(("case", "dtype"), [*((case, F32) for case in CASES), *((case, BF16) for case in NARROW_TOO)])
def test_the_same_bits_as_plain_copies(case: str, dtype: torch.dtype, path: str, seed: int) -> None:
    odd, plain = train(case, path, dtype, trust_clip=(1.0, 1.0))
    if path == "fused" and torch.cuda.is_available():  # one branch per kind of access, each compiled in its own way
        for a, b in zip(odd.tensors, plain.tensors, strict=True):
            torch.testing.assert_close(a, b)
    else:
        assert identical(odd.tensors, plain.tensors)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("case", CASES)
def test_ratios_differ_by_the_order_of_their_sums(case: str, path: str, seed: int) -> None:
    odd, plain = train(case, path, F32, trust_coefficient=1.0, trust_clip=(0.0, 5.0))
    assert odd.ratios == pytest.approx(plain.ratios, rel=2e-6)
    assert len(set(odd.ratios.values())) >= len(CASES[case][0]) - 1, "no constant that says nothing"
    for a, b in zip(odd.tensors, plain.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=4e-6)
