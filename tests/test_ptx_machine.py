"""The machine of tests/ptx on PTX written by hand: what the compiled kernels of test_ptx.py do not do today."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.ptx.arithmetic import TYPES, operation
from tests.ptx.machine import Code, Launch
from tests.ptx.memory import CELL, WRITTEN, Memory, Wrong
from tests.ptx.parse import parse
from tests.ptx.races import Clocks

THREADS = 32
KERNEL = f"""
.visible .entry kernel(.param .u64 kernel_param_0)
.reqntid {THREADS}
{{
    .reg .pred %p<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.u32 %r3, %r2, {THREADS}, %r1;
    mad.wide.u32 %rd2, %r3, 4, %rd1; // a word for each thread
    BODY
    ret;
}}
"""


def run(body: str, words: np.ndarray, programs: int = 1, seed: int = 0) -> Launch:
    launch = Launch(Code(parse(KERNEL.replace("BODY", body)), 0), Memory(), [words.ctypes.data], programs)
    launch.memory.allow([(words.ctypes.data, np.full(words.nbytes // CELL, WRITTEN, np.uint8))])
    launch.run(seed, None, 10_000)
    return launch


LANES = np.arange(THREADS, dtype=np.uint32)
PREDICATED = {
    "bra $end": np.full(THREADS, 77),
    "ret": np.full(THREADS, 77),
    "shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1": LANES ^ 1,
    "redux.sync.add.s32 %r4, %r1, -1": np.full(THREADS, LANES.sum()),
}


@pytest.mark.parametrize("instruction", PREDICATED)
def test_what_all_threads_leave_out_does_not_happen(instruction: str) -> None:
    """``bound``: how many threads the predicate holds in."""
    for bound, expected in ((0, np.full(THREADS, 5)), (THREADS, PREDICATED[instruction])):
        words = np.full(THREADS, 77, np.uint32)
        run(guarded(instruction, bound), words)
        assert np.array_equal(words, expected)
    with pytest.raises(Wrong, match="not for all threads"):
        run(guarded(instruction, 1), words)


def guarded(instruction: str, bound: int) -> str:
    return f"""
    mov.b32 %r4, 5;
    setp.lt.s32 %p1, %r1, {bound};
    @%p1 {instruction};
    st.global.b32 [%rd2], %r4;
$end:
    """


@pytest.mark.parametrize("bound", [0, THREADS])
def test_a_barrier_that_all_threads_leave_out_orders_nothing(bound: int) -> None:
    exchange = f"""
    setp.lt.s32 %p1, %r1, {bound};
    xor.b32 %r4, %r1, 1;
    mad.wide.u32 %rd3, %r4, 4, %rd1;
    st.global.b32 [%rd2], %r1;
    @%p1 bar.sync 0;
    ld.global.b32 %r5, [%rd3];
    """
    assert bool(run(exchange, np.zeros(THREADS, np.uint32)).races()) == (bound == 0)


def test_atomics_of_one_instruction_come_in_any_order_with_other_programs_between(seed: int) -> None:
    """Two threads of two programs draw numbers: all 24 orders are seen."""
    body = """
    setp.lt.s32 %p1, %r1, 2;
    mov.b32 %r4, 1;
    @%p1 atom.global.gpu.relaxed.add.u32 %r5, [%rd1 + 256], %r4;
    @%p1 st.global.b32 [%rd2], %r5;
    """
    draw, seen = random.Random(seed), set()
    for _ in range(20_000):
        words = np.zeros(2 * THREADS + 1, np.uint32)
        run(body, words, programs=2, seed=draw.randrange(1 << 30))
        seen.add(tuple(words[[0, 1, THREADS, THREADS + 1]].tolist()))
        if len(seen) == 24:
            break
    assert len(seen) == 24
    assert all(sorted(numbers) == [0, 1, 2, 3] for numbers in seen)


@pytest.mark.parametrize("readers", [[3], [3, 9], [THREADS - 2, THREADS - 1]], ids=str)
def test_a_write_after_reads_races_whichever_thread_writes(readers: list[int]) -> None:
    """In programs before and after that of the readers, and in theirs, but for the one that read alone."""
    for program in range(3):
        for thread in range(THREADS):
            clocks = Clocks(3, THREADS)
            for lanes, by, write in ((readers, 1, False), ([thread], program, True)):
                clocks.access("region", 1, by, np.array(lanes), np.zeros((len(lanes), 1), int), 0, write)
            assert bool(clocks.races) != (program == 1 and readers == [thread])


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind: str, seed: int) -> None:
    """As the specification of PTX has them."""
    draw, bits = random.Random(seed), int(kind[1:])
    extract, (a_type, *_), result_type = operation(("bfe", kind))
    assert result_type == TYPES[kind]
    cases = [(0xF0, 4, 4), *((draw.getrandbits(bits), draw.randrange(80), draw.randrange(80)) for _ in range(2000))]
    a, start, length = (np.array(column, np.uint64) for column in zip(*cases, strict=True))
    found = extract(a.astype(f"u{bits // 8}").view(a_type), start.astype(np.uint32), length.astype(np.uint32))
    for (number, at, size), ours in zip(cases, found.view(f"u{bits // 8}").tolist(), strict=True):
        digits = [number >> i & 1 for i in range(bits)]
        sign = digits[min(at + size, bits) - 1] if kind[0] == "s" and size > 0 else 0
        field = [digits[at + i] if i < size and at + i < bits else sign for i in range(bits)]
        assert ours == sum(digit << i for i, digit in enumerate(field))


def test_bytes_are_permuted_as_each_thread_selects(seed: int) -> None:
    draw = random.Random(seed)
    permute, _, _ = operation(("prmt", "b32"))
    cases = [(draw.getrandbits(32), draw.getrandbits(32), draw.getrandbits(16)) for _ in range(2000)]
    found = permute(*(np.array(column, np.uint32) for column in zip(*cases, strict=True)))
    for (a, b, select), ours in zip(cases, found.tolist(), strict=True):
        both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        nibbles = [select >> 4 * i & 15 for i in range(4)]
        taken = [both[n] if n < 8 else 255 * (both[n - 8] >> 7) for n in nibbles]
        assert ours == int.from_bytes(taken, "little")
