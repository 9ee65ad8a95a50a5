"""The work list, and the protocol between the stages of the fused pass, without a device.

Proved, by visiting every reachable state of the model in tests/protocol.py: up to 3 tensors of 0 to 3 chunks, worked on
by 1 to 3 programs in any interleaving, with every window from 0 to all chunks (for 3 programs on 3 tensors one of them,
and all of smaller ones) and with one launch for each stage, do every item exactly once and never deadlock; the last
arrival sees all partials, and stage B writes after its tensor's ratio is known and all that stage A did is visible to
it. That it ends follows, since each action moves a program on. Programs need not be resident together: one that is not
has drawn no ticket, so the pass could only be stuck if the others alone were.

Not proved: larger sizes; that the kernel does what the model does and that a barrier stands between all threads of a
program and its release (the tests of the machine code look at that); that counters start at 0; that the device lets
every resident program run on while others spin.
"""

from __future__ import annotations

import gc
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, product

import pytest

from fused_dals.kernels import layout
from fused_dals.worklist import STAGE_A, STAGE_B, Item, packed_work_list, work_list
from tests.protocol import Explorer, Protocol, State

Launches = tuple[tuple[Item, ...], ...]


@pytest.fixture(scope="module", autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """The states are many tuples without a cycle; to search them for garbage costs a third of the time."""
    gc.disable()
    yield
    gc.enable()


# --- the work list ---


def all_items(chunks: Sequence[int], stage: int) -> list[Item]:
    return [(tensor, chunk, stage) for tensor, count in enumerate(chunks) for chunk in range(count)]


def newest_first(chunks: Sequence[int]) -> list[Item]:
    return [(tensor, chunk, STAGE_B) for tensor, count in enumerate(chunks) for chunk in reversed(range(count))]


def of_stage(items: Sequence[Item], stage: int) -> list[Item]:
    return [item for item in items if item[2] == stage]


def check_work_list(chunks: Sequence[int], window: int) -> None:
    items = list(work_list(chunks, window))
    # Every item once, tensors in order, stage B newest first.
    assert of_stage(items, STAGE_A) == all_items(chunks, STAGE_A)
    assert of_stage(items, STAGE_B) == newest_first(chunks)
    assert len(items) == 2 * sum(chunks)

    ends = list(accumulate(chunks))
    for tensor, count in enumerate(chunks):
        if count:
            before = items[: items.index((tensor, count - 1, STAGE_B))]
            behind = len(of_stage(before, STAGE_A)) - ends[tensor]
            assert behind == min(window, ends[-1] - ends[tensor]), "stage B too soon, or later than it has to be"


def test_work_list_of_every_small_shape() -> None:
    for tensors in range(5):
        for chunks in product(range(4), repeat=tensors):
            for window in range(sum(chunks) + 2):
                check_work_list(chunks, window)


def test_work_list_of_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        chunks = [rng.choice([0, 1, 1, 2, rng.randrange(60)]) for _ in range(rng.randrange(1, 40))]
        check_work_list(chunks, rng.choice([0, 1, rng.randrange(200), sum(chunks), 10**9]))


@pytest.mark.parametrize("chunks", [(), (0,), (3,), (2, 0, 3), (0, 1, 0, 0, 4, 0)])
def test_windows_at_both_ends(chunks: tuple[int, ...]) -> None:
    tensor_by_tensor = [
        (tensor, chunk, stage)
        for tensor, count in enumerate(chunks)
        for stage, order in ((STAGE_A, range(count)), (STAGE_B, reversed(range(count))))
        for chunk in order
    ]
    assert list(work_list(chunks, 0)) == tensor_by_tensor
    for window in (sum(chunks), 10**9):
        assert list(work_list(chunks, window)) == all_items(chunks, STAGE_A) + newest_first(chunks)


def test_packed_work_list_is_the_same_list() -> None:
    for chunks in product(range(4), repeat=3):
        for window in range(sum(chunks) + 2):
            packed = packed_work_list(chunks, window).tolist()
            items = [(item >> layout.TENSOR_SHIFT, item >> 1 & layout.CHUNK_MASK, item & 1) for item in packed]
            assert items == list(work_list(chunks, window))


def test_empty_tensors_change_nothing() -> None:
    for chunks in product(range(4), repeat=4):
        for window in range(6):
            assert renumbered(list(work_list(chunks, window))) == tuple(work_list([c for c in chunks if c], window))


def renumbered(items: Sequence[Item]) -> tuple[Item, ...]:
    """The items as if the tensors without any were not there."""
    number = {tensor: n for n, tensor in enumerate(sorted({tensor for tensor, _, _ in items}))}
    return tuple((number[tensor], chunk, stage) for tensor, chunk, stage in items)


# --- every interleaving ---


def one_launch(chunks: Sequence[int], window: int) -> Launches:
    return (tuple(work_list(chunks, window)),)


def two_launches(chunks: Sequence[int]) -> Launches:
    items = list(work_list(chunks, sum(chunks)))
    return tuple(of_stage(items, STAGE_A)), tuple(of_stage(items, STAGE_B))


def plans(chunks: Sequence[int], windows: Sequence[int] | None = None) -> Iterator[Launches]:
    """With these windows, by default all that there are, and in two launches."""
    for window in range(sum(chunks) + 1) if windows is None else windows:
        yield one_launch(chunks, window)
    yield two_launches(chunks)


@cache
def states_without_fault(chunks: tuple[int, ...], launches: Launches, programs: int) -> int:
    report = Explorer(chunks, launches, programs, Protocol()).explore()
    assert report.fault is None, (report.fault, report.trace)
    return len(report.states)


@pytest.mark.parametrize("programs", [1, 2, 3])
@pytest.mark.parametrize("tensors", [1, 2, 3])
def test_every_interleaving_is_right(tensors: int, programs: int) -> None:
    states = {}
    for chunks in product(range(4), repeat=tensors):
        filled = tuple(count for count in chunks if count)
        # All windows of the largest case take a minute and a half.
        windows = (2,) if (tensors, programs) == (3, 3) else None
        for launches in plans(chunks, windows):
            launches = tuple(renumbered(items) for items in launches)
            states[filled, launches] = states_without_fault(filled, launches, programs)
    print(f"{len(states)} plans, {sum(states.values())} states, at most {max(states.values())}")


@pytest.mark.parametrize("stage_b", [("wait", "draw next", "write p"), ("wait", "write p")], ids=str)
def test_stage_b_may_draw_at_any_time(stage_b: tuple[str, ...]) -> None:
    """The kernel looks at the flag and draws at the same time; one launch or two, before or after the other."""
    for chunks in product(range(3), repeat=2):
        for launches in plans(chunks):
            report = Explorer(chunks, launches, 3, Protocol(stage_b=stage_b)).explore()
            assert report.fault is None, (report.fault, report.trace)


@pytest.mark.parametrize("chunks", [(1,), (1, 1), (1, 2), (2, 1, 0, 1)], ids=str)
def test_a_tensor_of_one_chunk_may_arrive_or_not(chunks: tuple[int, ...]) -> None:
    for launches, arrive in product(plans(chunks), (False, True)):
        report = Explorer(chunks, launches, 3, Protocol(lone_chunks_arrive=arrive)).explore()
        assert report.fault is None, (report.fault, report.trace)


@pytest.mark.parametrize(
    ("protocol", "fault"),
    [
        (Protocol(arrival_releases=False, arrival_acquires=False), None),
        (Protocol(arrives_last=lambda order, _, count: order == count), None),
        (Protocol(ready_releases=False), "partial not visible"),
        (Protocol(wait_acquires=False), "partial not visible"),
        (Protocol(stage_a=("draw next", "arrive", "publish ratio", "store partial")), "partial not stored"),
    ],
)
def test_of_one_chunk_the_flag_alone_is_what_orders(protocol: Protocol, fault: str | None) -> None:
    found = {Explorer((1, 1), launches, 2, protocol).explore().fault for launches in plans((1, 1), [0, 1, 2])}
    # In two launches the end of the first makes everything visible.
    assert found - {None} == {fault} - {None}


def test_two_launches_need_no_wait() -> None:
    report = Explorer((2, 1), two_launches((2, 1)), 3, Protocol(stage_b=("write p",))).explore()
    assert report.fault is None


# --- negative controls: the explorer finds what is broken ---

BROKEN = {
    "no wait": (Protocol(stage_b=("write p",)), "partial not"),
    "ratio before the arrival": (
        Protocol(stage_a=("store partial", "draw next", "publish ratio", "arrive")),
        "partial not (stored|visible)",
    ),
    "partial after the arrival": (
        Protocol(stage_a=("draw next", "arrive", "store partial", "publish ratio")),
        "partial not (stored|visible)",
    ),
    "arrival without release": (Protocol(arrival_releases=False), "partial not visible"),
    "arrival without acquire": (Protocol(arrival_acquires=False), "partial not visible"),
    "ready without release": (Protocol(ready_releases=False), "partial not visible"),
    "wait without acquire": (Protocol(wait_acquires=False), "partial not visible"),
    "one before the last adds up": (Protocol(arrives_last=lambda order, _, count: order == count - 2), "partial not"),
    "one after the last adds up": (Protocol(arrives_last=lambda order, _, count: order == count), "deadlock"),
    "the last chunk adds up": (Protocol(arrives_last=lambda _, chunk, count: chunk == count - 1), "partial not"),
    "every arrival adds up": (Protocol(arrives_last=lambda *_: True), "partial not"),
    "counter not atomic": (Protocol(counter_is_atomic=False), "item done twice"),
}


@pytest.mark.parametrize("programs", [2, 3])
@pytest.mark.parametrize("window", [0, 1, 2, 4])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_protocol_is_found(name: str, window: int, programs: int) -> None:
    protocol, fault = BROKEN[name]
    report = Explorer((2, 0, 2), one_launch((2, 0, 2), window), programs, protocol).explore()
    assert report.fault and re.match(fault, report.fault), report


A0, A1, B0, B1 = (0, 0, STAGE_A), (0, 1, STAGE_A), (0, 0, STAGE_B), (0, 1, STAGE_B)


@pytest.mark.parametrize(
    ("items", "programs", "fault"),
    [
        ((A0, A1, B1, B0), 1, None),
        ((A0, B0, A1, B1), 1, "deadlock"),
        ((A0, B0, A1, B1), 3, "deadlock"),  # however many there are: one may wait for what it has drawn ahead
        ((B1, B0, A0, A1), 1, "deadlock"),
        ((B1, B0, A0, A1), 3, "deadlock"),
        ((A0, B1, B0), 3, "deadlock"),
        ((A0, A1, B1), 3, "item never done"),
        ((A0, A1, A1, B1, B0), 3, "item done twice"),
        ((A0, A1, B1, B0, B0), 3, "item done twice"),
    ],
)
def test_broken_list_is_found(items: tuple[Item, ...], programs: int, fault: str | None) -> None:
    assert Explorer((2,), (items,), programs, Protocol()).explore().fault == fault


def test_a_fault_comes_with_a_shortest_schedule() -> None:
    report = Explorer((1,), one_launch((1,), 0), 2, Protocol(stage_b=("write p",)), reduced=False).explore()
    assert report.trace == ["A(0, 0): draw", "B(0, 0): draw", "B(0, 0): write p"]


# --- the explorer against itself: taking only the orders that can matter loses nothing, on small shapes ---

SMALL = [(1,), (3,), (0, 2), (2, 1), (1, 2)]


@pytest.mark.parametrize("name", BROKEN)
def test_reduction_loses_no_fault(name: str) -> None:
    for chunks, programs in product(SMALL, (1, 2, 3)):
        for launches in plans(chunks):
            reduced, full = (
                Explorer(chunks, launches, programs, BROKEN[name][0], way).explore() for way in (True, False)
            )
            assert (reduced.fault is None) == (full.fault is None), (chunks, launches, programs)


def test_reduction_loses_no_situation() -> None:
    """Where every program is to draw or arrive, or waits, both know the same tickets, steps, arrivals and flags."""
    for chunks, programs in product(SMALL, (1, 2, 3)):
        for launches in plans(chunks):
            explorers = [Explorer(chunks, launches, programs, Protocol(), way) for way in (True, False)]
            reduced, full = ({outline(state) for state in settled(explorer)} for explorer in explorers)
            assert reduced == full, (chunks, launches, programs)


def settled(explorer: Explorer) -> Iterator[State]:
    for state in explorer.explore().states:
        if {explorer.next(state, program) for program in state.programs} <= {"draw", "draw next", "arrive", None}:
            yield state


def outline(state: State) -> tuple[object, ...]:
    """The state without what is visible to whom."""
    programs = sorted((program.ticket, program.step, program.following) for program in state.programs)
    tensors = tuple((tensor.arrivals, tensor.ready) for tensor in state.tensors)
    return state.launch, state.counter, tuple(programs), tensors, state.stored, state.drawn
