"""Parameters that share memory: stepping both would write some elements twice, in an order that nobody chose.

Where nothing intersects, which is the rule, this is one sort of address ranges. Only ranges that do intersect are
looked at closer: views may interleave without sharing an element, as the columns of a matrix do. That is arithmetic on
sizes and strides; no memory is touched and none is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fused_dals.memory_order import has_memory

#: Steps of the search that one call may take, half a second of them. Two views of one tensor usually take a few.
MAX_STEPS = 1 << 18

#: (stride, size) in bytes and elements, smallest stride first.
Dims: TypeAlias = tuple[tuple[int, int], ...]

#: start, stop, index and dims of one tensor: a run of bytes at ``start``, and again at each combination of ``dims``.
#: A plain tuple, which is made and sorted in a third of the time of a named one.
Extent: TypeAlias = tuple[int, int, int, Dims]


def find_overlap(params: Sequence[Tensor]) -> tuple[int, int] | None:
    """Indices i <= j of two parameters that share memory, i == j for one whose own elements do; None if there are none.

    Bytes are compared, whatever the dtypes, and devices share none. Tensors without memory (empty, lazy, sparse, meta,
    wrappers around others) overlap nothing; one that is listed twice overlaps. There is no false alarm. An overlap may
    be missed only among views so tangled that MAX_STEPS steps of search do not decide.
    """
    by_device: dict[torch.device, list[Extent]] = {}
    for index, param in enumerate(params):
        if is_lazy(param) or param.layout != torch.strided or not has_memory(param):
            continue
        start, size = param.data_ptr(), param.nbytes
        extent = (start, start + size, index, ()) if param.is_contiguous() else _strided(param, index)
        by_device.setdefault(param.device, []).append(extent)
    steps = iter(range(MAX_STEPS))
    for device, extents in by_device.items():
        found = _among(extents, steps) if device.type != "meta" else None
        if found is not None:
            return found
    return None


def _strided(param: Tensor, index: int) -> Extent:
    start, width = param.data_ptr(), param.element_size()
    run = width
    dims: Dims = ()
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1 and stride * width == run and not dims:
            run *= size
        elif size > 1:
            dims += ((stride * width, size),)
    return start, start + run + _reach(dims), index, dims


def _run(extent: Extent) -> int:
    start, stop, _, dims = extent
    return stop - start - _reach(dims)


def _reach(dims: Dims) -> int:
    return sum(stride * (size - 1) for stride, size in dims)


def _among(extents: list[Extent], steps: Iterator[int]) -> tuple[int, int] | None:
    for cluster in _clusters(extents):
        rows = _first_rows(cluster)
        found = _by_search(cluster, steps) if rows is None else _among(rows, steps)
        if found is not None:
            return found
    return None


def _clusters(extents: list[Extent]) -> Iterator[list[Extent]]:
    """Extents that intersect, directly or through others, and each lone one that may overlap itself."""
    extents = sorted(extents)
    first, reach = 0, extents[0][1]
    for i, (start, stop, _, _) in enumerate(extents):
        if start >= reach:
            if i - first > 1 or extents[first][3]:
                yield extents[first:i]
            first, reach = i, stop
        elif stop > reach:
            reach = stop
    if len(extents) - first > 1 or extents[first][3]:
        yield extents[first:]


def _first_rows(cluster: list[Extent]) -> list[Extent] | None:
    """What is left to compare where all are rows at multiples of one stride that is as wide as a row of all of them.

    Different rows then share nothing, and the first rows overlap if any do: slices of a matrix become plain ranges.
    """
    row_stride = max((dims[-1][0] for *_, dims in cluster if dims), default=0)
    rows: list[Extent] = []
    for start, stop, index, dims in cluster:
        if dims and dims[-1][0] == row_stride:
            stop, dims = stop - _reach(dims[-1:]), dims[:-1]
        rows.append((start, stop, index, dims))
    fits = max(stop for _, stop, _, _ in rows) - cluster[0][0] <= row_stride
    return rows if fits else None


def _by_search(cluster: list[Extent], steps: Iterator[int]) -> tuple[int, int] | None:
    for extent in cluster:
        if _meets_itself(extent, steps):
            return extent[2], extent[2]
    for a, b in combinations(cluster, 2):
        if b[0] < a[1] and _meet(a, b, steps):  # a starts first
            return min(a[2], b[2]), max(a[2], b[2])
    return None


def _meet(a: Extent, b: Extent, steps: Iterator[int]) -> bool:
    """Whether a.start + sum(stride x) + i == b.start + sum(stride y) + j for some elements x, y and bytes i, j of runs.

    y and j are counted from the end here, which makes all terms positive.
    """
    return _reachable(b[1] - 1 - a[0], (*a[3], *b[3], (1, _run(a)), (1, _run(b))), steps)


def _meets_itself(extent: Extent, steps: Iterator[int]) -> bool:
    """Whether two different runs share a byte: sum(stride d) == 0 with |d| < size, and d > 0 in one dimension."""
    dims, run = extent[3], _run(extent)
    for k, (stride, size) in enumerate(dims):
        if stride < run:
            return True
        others = (*dims[:k], *dims[k + 1 :], (1, run))
        either_sign = ((other, 2 * n - 1) for other, n in others)
        if _reachable(_reach(others) - stride, (*either_sign, (stride, size - 1)), steps):
            return True
    return False


def _reachable(target: int, dims: Dims, steps: Iterator[int]) -> bool:
    """Whether sum(stride x) == target for some 0 <= x < size: a search from the largest stride, cut by range and gcd.

    False where the steps run out.
    """
    if next(steps, None) is None:
        return False
    bounds: dict[int, int] = {}
    for stride, size in dims:
        bounds[stride] = bounds.get(stride, 0) + size - 1
    bytes_of_runs = bounds.pop(1, 0)
    terms = sorted(bounds.items(), reverse=True)
    reach = [bytes_of_runs + sum(stride * bound for stride, bound in terms[k:]) for k in range(len(terms) + 1)]
    divisor = [math.gcd(*(stride for stride, _ in terms[k:])) for k in range(len(terms))]

    def search(k: int, rest: int) -> bool:
        if k == len(terms):
            return 0 <= rest <= bytes_of_runs
        if next(steps, None) is None or rest % divisor[k] > bytes_of_runs:
            return False
        stride, bound = terms[k]
        least, most = -((reach[k + 1] - rest) // stride), rest // stride
        return any(search(k + 1, rest - stride * x) for x in range(max(0, least), min(bound, most) + 1))

    return search(0, target)
