"""Happens-before between the threads of a launch, and the accesses that it leaves unordered.

Every thread has a clock, and knows of every other thread up to which clock its accesses come before what it does next.
A barrier hands each thread of a program the knowledge of all; an atomic operation with release semantics adds the
thread's knowledge to what its variable carries, one with acquire semantics takes it from there. Operations without
either leave what the variable carries as it is (they continue a release sequence). Two accesses of which one writes,
neither of them atomic, must be ordered.

A clock is (barriers passed, releases since). Between barriers the threads of a program know the same, but for those
that have acquired something: so one row of knowledge per program says it, and another for each of those threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PHASE = 12  # bits of the clock that count releases between two barriers
NOBODY, MANY = -1, -2


@dataclass
class Marks:
    """Per cell (two bytes): thread, its clock, and the instruction."""

    thread: Array
    clock: Array
    at: Array

    @staticmethod
    def of(cells: int) -> Marks:
        return Marks(np.full(cells, NOBODY, np.int32), np.zeros(cells, np.int32), np.zeros(cells, np.int32))

    def put(self, cells: Array, thread: Array, clock: Array, at: int) -> None:
        self.thread[cells], self.clock[cells], self.at[cells] = thread, clock, at


class Shadow:
    """What has happened to one region of memory in this launch."""

    def __init__(self, cells: int) -> None:
        self.written = Marks.of(cells)
        self.read: dict[int, Marks] = {}  # by program; several threads between the same barriers are MANY
        self.atomic = np.zeros(cells, bool)


class Clocks:
    """The knowledge of all threads of one launch, and the history of the memory that they touch."""

    def __init__(self, programs: int, threads: int) -> None:
        self.threads = threads
        self.own = np.zeros((programs, threads), np.int32)
        self.known = np.full((programs, programs * threads), -1, np.int32)
        self.ahead: list[dict[int, Array]] = [{} for _ in range(programs)]  # rows of threads that know more
        self.carried: dict[int, Array] = {}  # by the address of an atomic variable
        self.shadows: dict[Any, Shadow] = {}
        self.races: dict[tuple[int, int], str] = {}  # by the two instructions

    def barrier(self, program: int) -> None:
        row = self.known[program]
        for other in self.ahead[program].values():
            np.maximum(row, other, out=row)
        self.ahead[program].clear()
        row[self._slots(program)] = self.own[program]
        self.own[program] = ((self.own[program, 0] >> PHASE) + 1) << PHASE

    def atomic(self, program: int, thread: int, address: int, acquire: bool, release: bool) -> None:
        row = self.ahead[program].get(thread, self.known[program])
        carried = self.carried.get(address)
        if acquire and carried is not None:
            row = self.ahead[program][thread] = np.maximum(row, carried)
        if release:
            told = row.copy() if carried is None else np.maximum(row, carried)
            told[program * self.threads + thread] = self.own[program, thread]
            self.carried[address] = told
            self.own[program, thread] += 1

    def access(
        self,
        region: Any,
        size: int,
        program: int,
        lanes: Array,
        cells: Array,
        at: int,
        write: bool,
        atomic: bool = False,
    ) -> None:
        """Threads ``lanes`` touch the rows of ``cells`` [lanes, cells each]; leaves what it finds in ``races``."""
        shadow = self.shadows.get(region)
        if shadow is None:
            shadow = self.shadows[region] = Shadow(size)
        thread, cell = np.repeat(lanes, cells.shape[1]), cells.ravel()
        if atomic:
            shadow.atomic[cell] = True
        elif shadow.atomic[cell].any():
            self.races[at, at] = f"program {program}: a plain access to an atomic variable"
        self._check(program, thread, shadow.written, cell, "write", at, write)
        if write:
            for other, marks in shadow.read.items():
                self._check(program, thread, marks, cell, "read", at, write, other)
        if atomic:
            return
        if write:
            shadow.written.put(cell, program * self.threads + thread, self.own[program, thread], at)
            twice = shadow.written.thread[cell] != program * self.threads + thread
            if twice.any():
                self.races[at, at] = f"program {program}: two threads write the same memory at once"
            return
        if program not in shadow.read:
            shadow.read[program] = Marks.of(size)
        marks = shadow.read[program]
        before, now = marks.thread[cell], self.own[program, thread]
        together = (before != NOBODY) & (before != thread) & (marks.clock[cell] >> PHASE == now >> PHASE)
        marks.put(cell, thread, now, at)
        marks.thread[cell[together | (marks.thread[cell] != thread)]] = MANY

    def _slots(self, program: int) -> slice:
        return slice(program * self.threads, (program + 1) * self.threads)

    def _check(
        self, program: int, thread: Array, marks: Marks, cell: Array, kind: str, at: int, write: bool, reader: int = 0
    ) -> None:
        """That what is marked comes before what ``thread`` does now."""
        before, clock = marks.thread[cell], marks.clock[cell]
        if (before == NOBODY).all():
            return
        first = reader * self.threads if kind == "read" else 0
        unordered = self._unknown(self.known[program], before, clock, first, reader)
        for one, row in self.ahead[program].items():
            mine = thread == one
            if mine.any():
                unordered[mine] = self._unknown(row, before[mine], clock[mine], first, reader)
        # Whoever reads or writes twice is ordered with itself; MANY is no thread's number.
        unordered &= (before == MANY) | (before + first != program * self.threads + thread)
        if unordered.any():
            i = int(unordered.argmax())
            who = divmod(int(before[i]) + first, self.threads) if before[i] >= 0 else (reader, "several threads")
            self.races.setdefault(
                (int(marks.at[cell[i]]), at),
                f"{kind} by (program, thread) {who}, then {'write' if write else 'read'} by ({program}, {thread[i]})",
            )

    def _unknown(self, row: Array, before: Array, clock: Array, first: int, reader: int) -> Array:
        unknown = row[np.maximum(before, 0) + first] < clock
        many = before == MANY
        if many.any():
            unknown[many] = (row[self._slots(reader)] >> PHASE).min() < clock[many] >> PHASE
        unknown[before == NOBODY] = False
        result: Array = unknown
        return result
