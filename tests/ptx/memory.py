"""Memory that kernels may touch: the process's own, with a status for each of its cells."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CELL = 2  # bytes that share a status: the smallest element
FORBIDDEN, UNWRITTEN, WRITTEN = range(3)
WIDEST = 16  # bytes of an access; so many, aligned, lie in one page


class Wrong(Exception):
    """Something that a GPU would not forgive, or that this machine does not know."""


class Region:
    """A run of memory."""

    def __init__(self, base: int, size: int, data: Array | None = None) -> None:
        self.base, self.size = base, size
        if data is None:
            data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
        self.views = {width: data.view(f"u{width}") for width in (2, 4, 8)}
        self.status = np.zeros(size // CELL, np.uint8)

    def cells(self, addresses: Array, width: int, count: int, at_least: int) -> tuple[Array, Array]:
        """For each address a row of cells, and of elements; raises Wrong unless all have a status of ``at_least``."""
        offsets = (addresses - np.uint64(self.base)).astype(np.int64)[:, None]
        cells = offsets // CELL + np.arange(width * count // CELL)
        bad = self.status[cells] < at_least
        if bad.any():
            row, column = np.unravel_index(bad.argmax(), bad.shape)
            forbidden = self.status[cells[row, column]] == FORBIDDEN
            what = "outside of all tensors" if forbidden else "of memory that nobody wrote"
            raise Wrong(f"an access {what}, at {int(addresses[row]):#x}")
        return cells, offsets // width + np.arange(count)


class Memory:
    """Regions; what was written stays known."""

    def __init__(self, regions: Sequence[Region] = ()) -> None:
        self._take(regions)

    @staticmethod
    def own(size: int) -> Memory:
        """From address 0 on, apart from the process's memory."""
        whole = -(-size // WIDEST) * WIDEST
        region = Region(0, whole, np.zeros(whole, np.uint8))
        region.status[: size // CELL] = UNWRITTEN
        return Memory([region])

    def allow(self, spans: Sequence[tuple[int, Array]]) -> None:
        """Each an address, and the status of each cell from there on."""
        spans = [*spans, *((region.base, region.status) for region in self.regions)]
        runs: list[list[int]] = []
        for address, status in sorted(spans, key=lambda span: span[0]):
            start, stop = address // WIDEST * WIDEST, -(-(address + CELL * len(status)) // WIDEST) * WIDEST
            if runs and start <= runs[-1][1]:
                runs[-1][1] = max(runs[-1][1], stop)
            else:
                runs.append([start, stop])
        self._take([Region(start, stop - start) for start, stop in runs])
        for address, status in spans:
            region = self.regions[bisect_right(self._bases, address) - 1]
            cells = region.status[(address - region.base) // CELL :][: len(status)]
            np.maximum(cells, status, out=cells)

    def at(self, addresses: Array, size: int) -> Iterator[tuple[Array | slice, Region]]:
        """Which of the addresses lie in which region: usually all in one. Raises Wrong for what is not aligned."""
        odd = addresses % np.uint64(size) != 0
        if odd.any():
            raise Wrong(f"an access of {size} bytes at {int(addresses[odd][0]):#x} is not aligned")
        which = np.searchsorted(self._bases, addresses, "right") - 1
        for index in np.unique(which):
            chosen = slice(None) if (which == index).all() else np.flatnonzero(which == index)
            region, last = self.regions[index], int(addresses[chosen].max())
            if index < 0 or last + size > region.base + region.size:
                raise Wrong(f"an access outside of all tensors, at {last:#x}")
            yield chosen, region

    def _take(self, regions: Sequence[Region]) -> None:
        self.regions = list(regions)
        self._bases = [region.base for region in self.regions]
