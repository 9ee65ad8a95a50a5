"""What the fused pass moves to and from memory and how long it takes, PREDICTED: its work list replayed.

Time: programs draw items in ticket order, each one ahead. Memory serves them in the order in which they begin, at a
share of the bandwidth of a copy. An item of stage A takes that long and no less than its latencies. One of stage B,
whose stores nobody waits for, takes its latencies alone where stage A has left it all it loads, and as long as A's
where A only reads, so that B fetches m itself (and, an upper bound, its stores). The last item of a tensor's stage A
makes the trust ratio besides; stage B waits for it, and begins then.

Latencies, the cache's pace and the share of the bandwidth are those with which the model comes closest to the times
that were measured on an H200, 4 % off in the mean (docs/design.md has both); where a number is assumed or follows from
others, it says so. Another GPU has others.

Bytes: the cache is fully associative, replaces what was used least recently, and holds all of a chunk's tensors or
none: p, g, h and m of 8192 float32 elements are 128 KiB of some 50 MB. An item uses its chunk when half of its time is
over. The cache is empty when the step begins, as a backward pass leaves it. What is written is written back once: no
tensor is written twice in a step. What stage B finds no more is added to the time as if memory were busy anyway.

Not in the model: that tails, and tensors of odd addresses or strides, are not marked; sets and hashes of addresses,
halves of an L2 that may hold a line twice, sectors, the work list and the partial sums (4 bytes per 1000
parameters), and the latency of what stage B misses. Hashes and halves are why a smaller cache should be tried too: 55 %
of an H200's explain the bytes that its counters tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.byte_table import Dtypes, item_sizes, least_bytes, uncached_bytes
from fused_dals.kernels import layout
from fused_dals.launch_plan import IN_USE, WINDOW_PER_PROGRAM
from fused_dals.worklist import packed_work_list

Integers = NDArray[np.int64]

#: Of an item of stage A and of stage B, beside its tiles: reading the tensor's row, then drawing the next ticket while
#: stores are on their way, two sums over all threads and arriving, or looking at a flag.
ITEM_SECONDS = (2.7e-6, 1.5e-6)
#: Of a tile, whose loads are under way together: from memory, and of stage B the way to the L2 cache and back. Tiles
#: come one after the other: in the machine code the next one's loads stand behind the stores.
TILE_SECONDS = (2.0e-6, 0.4e-6)
#: Of two tiles of stage A that are loaded together. PREDICTED: one tile's wait of 1.7 us, and the work on two.
PAIR_SECONDS = 2.3e-6
#: What one multiprocessor gets from its L2 cache. What stage B loads comes at that pace.
L2_BYTES_PER_S = 69e9
#: Of a copy's bandwidth, what memory gives to seven streams of reads and writes: 3.61 of 4.23 TB/s.
MIXED_SHARE = 0.855

#: Of a trust ratio: fetching what the chunks have left, two sums over all threads, two roots and a division, and a
#: flag behind a fence. ASSUMED: what comes besides for every 1024 chunks.
RATIO_SECONDS = (2.1e-6, 0.4e-6)
#: What a tensor of one chunk is spared of all that: to arrive, to fetch and to add. ASSUMED.
LONE_CHUNK_SECONDS = 1.2e-6

#: What happens to an item: it is taken up, its tensor's trust ratio is there for it, it is done, and, of a tensor's
#: last item of stage A, so is the ratio.
BEGINS, GOES_ON, ENDS, HAS_RATIO = range(4)


@dataclass(frozen=True)
class PassPlan:
    """A launch of the pass; ``window`` in chunks. ``programs`` run at a time; ``evict_first``: data that the pass does
    not need again is marked so and leaves the cache at once. ``bandwidth`` of the memory, in bytes a second; 0 leaves
    latencies out."""

    sizes: tuple[int, ...]
    dtypes: Dtypes
    window: int
    chunk: int = layout.chunk_elements(4, 4, 4)
    stage_a_writes: bool = True
    evict_first: bool = True
    programs: int = 1
    tile: int = IN_USE.tile
    most_in_b: int = IN_USE.most_in_b  # elements of a tile of stage B, where A writes
    in_pairs: bool = IN_USE.in_pairs  # whether stage A loads two tiles together where all is 16-bit
    bandwidth: float = 0.0
    merged: int = 1  # chunks of the pass in one of these

    @property
    def tile_of_b(self) -> int:
        """Elements that stage B loads before it stores."""
        return max(self.tile, min(self.chunk // self.merged, self.most_in_b)) if self.stage_a_writes else self.tile

    @property
    def loads_pairs(self) -> bool:
        return self.in_pairs and 8 * sum(item_sizes(self.dtypes)) <= layout.BITS_IN_PAIRS

    def coarser(self, most_chunks: int) -> PassPlan:
        """The same in fewer, larger chunks: quicker to replay, the blur of a few of them.

        A program then stands for several that work on a chunk each at the same time.
        """
        factor = -(-sum(self.sizes) // (self.chunk * most_chunks))
        if factor <= 1:
            return self
        return replace(
            self,
            chunk=factor * self.chunk,
            window=self.window // factor,
            programs=max(1, round(self.programs / factor)),
            merged=factor * self.merged,
        )


@dataclass(frozen=True)
class Traffic:
    """What one step moves. ``waiting``: share of the programs' time that they spend waiting for a trust ratio;
    ``slowness``: its time over that of the least bytes at full bandwidth."""

    parameters: int
    memory_bytes: int
    waiting: float
    slowness: float

    @property
    def per_parameter(self) -> float:
        return self.memory_bytes / max(1, self.parameters)


@dataclass(frozen=True)
class _Items:
    """The work list in columns; ``place`` counts chunks over all tensors."""

    tensor: list[int]
    stage: list[int]
    place: list[int]
    elements: list[int]
    chunks: list[int]  # of each tensor
    places: int


def plan_in_use() -> dict[str, Any]:
    """What the fused pass is launched with where nothing else is asked for, for the record of a measurement."""
    return {
        "chunk_bytes": layout.CHUNK_BYTES,
        "tile": IN_USE.tile,
        "most_in_b": IN_USE.most_in_b,
        "in_pairs": IN_USE.in_pairs,
        "window_per_program": WINDOW_PER_PROGRAM,
        "programs_per_sm": IN_USE.programs_per_sm,
        "stage_a_writes": IN_USE.a_writes(),
        "evict_first": IN_USE.evict_first,
        "same_runs": IN_USE.same_runs,
    }


def bounds(plan: PassPlan) -> tuple[int, int]:
    """Bytes per parameter with a cache that holds everything, and with none."""
    sizes = item_sizes(plan.dtypes)
    return least_bytes(*sizes), uncached_bytes(*sizes, plan.stage_a_writes)


def window_chunks(multiple: float, programs: int) -> int:
    """A window of so many chunks for each program; an infinite one puts all A before all B."""
    return int(layout.CHUNK_MASK) if math.isinf(multiple) else round(multiple * programs)


def chunk_of(dtypes: Dtypes, chunk_bytes: int = layout.CHUNK_BYTES) -> int:
    """Elements of a chunk, as the optimizer chooses them."""
    return int(layout.chunk_elements(*(dtype.itemsize for dtype in dtypes), chunk_bytes))


def predict(plan: PassPlan, *cache_bytes: int) -> list[Traffic]:
    """Replay a plan's work list through caches of these sizes."""
    items = _items(plan)
    order, waiting, length = _in_order_of_use(plan, items)
    least, uncached = bounds(plan)
    parameters = sum(plan.sizes)
    found = []
    for size in cache_bytes:
        missed = (uncached - least) * _missed_elements(plan, items, order, size)
        slowness = (length + missed / MIXED_SHARE) / max(1, least * parameters)
        found.append(Traffic(parameters, least * parameters + missed, waiting, slowness))
    return found


def _items(plan: PassPlan) -> _Items:
    chunks = np.array([-(-size // plan.chunk) for size in plan.sizes], dtype=np.int64)
    packed: Integers = packed_work_list(chunks.tolist(), plan.window).numpy()
    tensor = packed >> layout.TENSOR_SHIFT
    chunk = (packed >> 1) & layout.CHUNK_MASK
    first = np.concatenate([[0], np.cumsum(chunks)])
    elements = np.minimum(plan.chunk, np.array(plan.sizes, dtype=np.int64)[tensor] - chunk * plan.chunk)
    columns: tuple[Integers, ...] = (tensor, packed & 1, first[tensor] + chunk, elements)
    tensors, stages, places, counts = (column.tolist() for column in columns)
    return _Items(tensors, stages, places, counts, chunks.tolist(), int(first[-1]))


def _memory_bytes(plan: PassPlan) -> tuple[int, int]:
    """Bytes per element between memory and an item of stage A, and one of stage B that finds A's in the cache."""
    p, g, state = item_sizes(plan.dtypes)
    if plan.stage_a_writes:
        return p + g + 4 * state, p
    return p + g + state, p + 3 * state


def _durations(plan: PassPlan, items: _Items) -> tuple[list[float], list[float]]:
    """Of every item, in bytes that a copy moves: the time that memory needs for it, and its latencies."""
    stage, elements = np.array(items.stage, dtype=np.int64), np.array(items.elements, dtype=np.int64)
    tile_of_a = PAIR_SECONDS / 2 if plan.loads_pairs else TILE_SECONDS[0]
    tiles = -(-elements // (plan.merged * np.array([plan.tile, plan.tile_of_b])[stage]))
    p, g, state = item_sizes(plan.dtypes)
    loaded = np.array([0, p + state if plan.stage_a_writes else p + g + 2 * state])[stage] * elements / plan.merged
    seconds = (
        np.array(ITEM_SECONDS)[stage] + tiles * np.array([tile_of_a, TILE_SECONDS[1]])[stage] + loaded / L2_BYTES_PER_S
    )
    moved = np.array(_memory_bytes(plan))[stage] * elements / MIXED_SHARE
    return moved.tolist(), (plan.bandwidth * seconds).tolist()


def _in_order_of_use(plan: PassPlan, items: _Items) -> tuple[Sequence[int], float, float]:
    """Tickets in the order in which they use the cache, the share of time spent waiting, and the whole time.

    Time is counted in bytes that memory could move.
    """
    moved, at_least = _durations(plan, items)
    count, drawn = len(items.tensor), min(plan.programs, len(items.tensor))
    chunks_left, ratio_left = list(items.chunks), [True] * len(items.chunks)
    ratio_times = [
        plan.bandwidth * (RATIO_SECONDS[0] + RATIO_SECONDS[1] * plan.merged * chunks / 1024) for chunks in items.chunks
    ]
    for tensor, size in enumerate(plan.sizes):
        if size * plan.merged <= plan.chunk:
            ratio_times[tensor] -= plan.bandwidth * LONE_CHUNK_SECONDS
    following = [count] * plan.programs  # tickets drawn ahead
    waiting: dict[int, list[tuple[float, int, int]]] = {}
    events = [(0.0, program, program, BEGINS) for program in range(drawn)]
    uses: list[tuple[float, int]] = []
    waited = worked = memory = time = 0.0
    while events:
        time, program, ticket, event = heappop(events)
        tensor, stage = items.tensor[ticket], items.stage[ticket]
        # Stage A draws when it is done, stage B when it looks at the flag.
        if event == (BEGINS if stage else ENDS):
            following[program] = drawn
            drawn += 1
        if event == ENDS and not stage:
            chunks_left[tensor] -= 1
            if not chunks_left[tensor]:
                worked += ratio_times[tensor]
                heappush(events, (time + ratio_times[tensor], program, ticket, HAS_RATIO))
                continue
        if event == HAS_RATIO:
            ratio_left[tensor] = False
            for since, other, held in waiting.pop(tensor, ()):
                waited += time - since
                heappush(events, (time, other, held, GOES_ON))
        if event in (ENDS, HAS_RATIO):
            if following[program] < count:
                heappush(events, (time, program, following[program], BEGINS))
        elif stage and ratio_left[tensor]:
            waiting.setdefault(tensor, []).append((time, program, ticket))
        else:
            memory = max(memory, time) + moved[ticket]
            end = time + at_least[ticket]
            if not stage or not plan.stage_a_writes:
                end = max(end, memory)
            uses.append(((time + end) / 2, ticket))
            worked += end - time
            heappush(events, (end, program, ticket, ENDS))
    return [ticket for _, ticket in sorted(uses)], waited / max(1.0, waited + worked), max(time, memory)


def _missed_elements(plan: PassPlan, items: _Items, order: Sequence[int], cache_bytes: int) -> int:
    """Elements whose tensors stage B has to fetch again.

    The cache is a queue of records in the order of their last use; what is used again, or evicted, leaves a record of
    less or no bytes behind.
    """
    p, g, state = item_sizes(plan.dtypes)
    # What stage B reads again, what only A touches, what only B touches.
    again, only_a, only_b = (p + state, g + state, 0) if plan.stage_a_writes else (p + g + state, 0, state)
    left_by_a = again if plan.evict_first else again + only_a
    left_by_b = 0 if plan.evict_first else again + only_b
    held: list[int] = []
    record_of = [0] * items.places
    oldest = used = missed = 0
    stages, places, elements_of = items.stage, items.place, items.elements
    for ticket in order:
        place, elements = places[ticket], elements_of[ticket]
        if stages[ticket]:
            record = record_of[place]
            if record >= oldest:
                held[record] -= again * elements
                used -= again * elements
            else:
                missed += elements
            size = left_by_b * elements
        else:
            record_of[place] = len(held)
            size = left_by_a * elements
        held.append(size)
        used += size
        while used > cache_bytes:
            used -= held[oldest]
            oldest += 1
    return missed
