"""Runs PTX on the memory of this process: programs of threads, each a coroutine that stops before global accesses.

The threads of a program go in step, as vectors: the kernels branch for whole programs only, and where one does not,
the machine stops. So programs take turns in any order that a seed draws, between the atomics of one instruction's
threads too, which come in any order. All else has one order of the threads in each program; that no other order of
threads or weaker memory could tell is for the detector of races to say.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.arithmetic import TYPES, operation
from tests.ptx.memory import CELL, UNWRITTEN, WRITTEN, Memory, Region, Wrong
from tests.ptx.parse import Address, Instruction, Kernel, Operand
from tests.ptx.races import Clocks

Array = NDArray[Any]
Registers = list[Any]
Source = Callable[[Registers], Array]
Action = Callable[["Program", Array | None], None]  # with the threads that take part, None for all

WARP = 32
LOCAL = 64  # bytes of local memory of each thread
LEFT_OUT = 0xDEADBEEFDEADBEEF  # in registers of threads that an instruction left out
ACQUIRES, RELEASES = ("acquire", "acq_rel"), ("release", "acq_rel")
ORDERS = {"relaxed", *ACQUIRES, *RELEASES}  # what makes an access atomic
ACCESS_PARTS = {"ld", "st", "atom", "global", "shared", "local", "gpu", "nc", "v2", "v4", "add", "exch"}
ACCESS_PARTS |= {"L1::evict_first", "L2::cache_hint", *ORDERS}
SPECIAL = ("%tid.x", "%ctaid.x", "%nctaid.x")


@dataclass
class Step:
    instruction: Instruction
    guard: tuple[int, bool] | None
    run: Action
    control: str = ""  # "access" to global memory, or "atomic"; "together" for all threads only, "bra", "ret"
    target: int = 0


class Code:
    """A kernel, translated: a Step per instruction."""

    def __init__(self, kernel: Kernel, shared: int) -> None:
        self.kernel, self.shared, self.threads = kernel, shared, kernel.threads
        self.registers: dict[str, int] = {}
        self._arrays = {name: np.frombuffer(data + bytes(32), np.uint8).copy() for name, data in kernel.arrays.items()}
        self._symbols = {name: array.ctypes.data for name, array in self._arrays.items()}
        self._symbols |= {"global_smem": 0, "__local_depot0": 0}
        self.steps = [self._step(at, instruction) for at, instruction in enumerate(kernel.code)]

    def arrays(self) -> list[tuple[int, Array]]:
        """The kernel's constants, for ``Memory.allow``."""
        data = self.kernel.arrays.items()
        return [(self._symbols[name], np.full(-(-len(some) // CELL), WRITTEN, np.uint8)) for name, some in data]

    def _step(self, at: int, instruction: Instruction) -> Step:
        guard = None
        if instruction.guard is not None:
            guard = self._register(instruction.guard[0]), instruction.guard[1]
        step = Step(instruction, guard, lambda program, mask: None)
        name, operands = instruction.parts[0], instruction.operands
        try:
            if name in ("bra", "ret"):
                step.control = name
                step.target = self.kernel.labels[str(operands[0])] if name == "bra" else 0
            elif name in ("bar", "shfl", "redux"):
                step.control, step.run = "together", self._exchange(instruction)
            elif name in ("ld", "st", "atom"):
                control = "access" if ORDERS.isdisjoint(instruction.parts) else "atomic"
                step.control, step.run = control * ("global" in instruction.parts), self._access(at, instruction)
            elif name == "mov":
                step.run = self._move(instruction)
            elif name == "createpolicy":
                step.run = self._assign(operands[0], lambda registers: np.zeros(self.threads, np.uint64), np.uint64)
            else:
                function, kinds, result = operation(instruction.parts)
                kinds += kinds[-1:] * (len(operands) - 1 - len(kinds))
                sources = [self._source(one, kind) for one, kind in zip(operands[1:], kinds, strict=True)]
                step.run = self._assign(operands[0], lambda r: function(*[source(r) for source in sources]), result)
        except (KeyError, NotImplementedError) as error:
            step.run = _unknown(error)  # wrong if a program comes here
        return step

    # -- operands -------------------------------------------------------------------------------------------------

    def _register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def _stored(self, name: str) -> Any:
        """The unsigned type of a register."""
        declared = self.kernel.registers
        kind = "b32" if name in SPECIAL else declared.get(name) or declared[name.rstrip("0123456789")]
        return np.dtype(TYPES[kind])

    def _source(self, operand: Operand, kind: Any) -> Source:
        """Of a register that is wider the lower bits."""
        kind = np.dtype(kind)
        if not isinstance(operand, str):
            raise NotImplementedError(f"{operand} as a source")
        if operand.startswith("%") or operand in self.kernel.registers:
            index, width = self._register(operand), self._stored(operand).itemsize
            if width < kind.itemsize:
                raise NotImplementedError(f"{operand} as {kind}")
            if width == kind.itemsize:
                return lambda registers: registers[index].view(kind)
            return lambda registers: registers[index].astype(f"u{kind.itemsize}").view(kind)
        if operand in self._symbols:
            value = self._symbols[operand]
        elif operand[:2] in ("0f", "0d"):
            value = int(operand[2:], 16)
        else:
            value = int(operand.rstrip("U"), 0) % (1 << 8 * kind.itemsize)
        constant = np.full(self.threads, value, f"u{kind.itemsize}").view(kind)
        return lambda registers: constant

    def _address(self, operand: Operand) -> Source:
        if not isinstance(operand, Address):
            raise NotImplementedError(f"{operand} is no address")
        width = self._stored(operand.base).itemsize if operand.base.startswith("%") else 8
        base, offset = self._source(operand.base, f"u{width}"), np.uint64(operand.offset % (1 << 64))
        return lambda registers: base(registers).astype(np.uint64) + offset

    # -- instructions ---------------------------------------------------------------------------------------------

    def _assign(self, target: Operand, value: Source, kind: Any) -> Action:
        if target == "_":
            return lambda program, mask: None
        if not isinstance(target, str) or self._stored(target).itemsize != np.dtype(kind).itemsize:
            raise NotImplementedError(f"{kind} in {target}")
        index, stored = self._register(target), self._stored(target)
        return lambda program, mask: program.put(index, value(program.registers).view(stored).reshape(-1), mask)

    def _move(self, instruction: Instruction) -> Action:
        """To and from several registers, too, the lowest first."""
        target, source = instruction.operands
        kind = np.dtype(TYPES[instruction.parts[-1]])
        if isinstance(target, tuple):
            read, part = self._source(source, kind), f"u{kind.itemsize // len(target)}"

            def piece(i: int) -> Source:
                return lambda registers: np.ascontiguousarray(read(registers).view(part)[i :: len(target)])

            return _in_turn([self._assign(one, piece(i), part) for i, one in enumerate(target)])
        if isinstance(source, tuple):
            part = f"u{kind.itemsize // len(source)}"
            undefined = np.full(self.threads, LEFT_OUT % (1 << 8 * np.dtype(part).itemsize), part)
            parts = [(self._register(one), self._source(one, part)) for one in source]

            def whole(registers: Registers) -> Array:
                # The compiler leaves halves undefined that nobody needs.
                columns = [undefined if registers[index] is None else read(registers) for index, read in parts]
                return np.stack(columns, 1).reshape(-1).view(kind)

            return self._assign(target, whole, kind)
        return self._assign(target, self._source(source, kind), kind)

    def _exchange(self, instruction: Instruction) -> Action:
        """Barriers, and what lanes of a warp tell each other."""
        name, operands = ".".join(instruction.parts), instruction.operands
        if name == "bar.sync" and operands == ("0",):
            return lambda program, mask: program.launch.clocks.barrier(program.index)
        if name == "shfl.sync.bfly.b32" and operands[3:] == ("31", "-1"):
            source, lane = self._source(operands[1], np.uint32), np.arange(self.threads) ^ int(str(operands[2]))
            return self._assign(operands[0], lambda registers: source(registers)[lane], np.uint32)
        if name in ("redux.sync.max.s32", "redux.sync.add.s32"):
            source, members = self._source(operands[1], np.int32), self._source(operands[2], np.int32)
            combine = np.max if "max" in instruction.parts else np.sum

            def combined(registers: Registers) -> Array:
                if (members(registers) != -1).any():
                    raise Wrong("a reduction over a part of a warp")
                return np.repeat(combine(source(registers).reshape(-1, WARP), 1).astype(np.int32), WARP)

            return self._assign(operands[0], combined, np.int32)
        raise NotImplementedError(instruction.text)

    def _access(self, at: int, instruction: Instruction) -> Action:
        """Loads, stores and atomic operations; cache policies change nothing."""
        parts, operands = instruction.parts, instruction.operands
        kind = np.dtype(TYPES[parts[-1]])
        if "param" in parts:
            return self._argument(instruction, kind)
        space = next((space for space in ("global", "shared", "local") if space in parts), None)
        order = ORDERS & set(parts)
        if space is None or not ACCESS_PARTS.issuperset(parts[:-1]) or (order and "gpu" not in parts):
            raise NotImplementedError(instruction.text)
        address = self._address(operands[0] if parts[0] == "st" else operands[1])
        some = operands[1] if parts[0] == "st" else operands[0]
        names = some if isinstance(some, tuple) else (str(some),)
        access = Access(at, space, kind, len(names), not order.isdisjoint(ACQUIRES), not order.isdisjoint(RELEASES))
        if parts[0] == "st" and not order:
            values = [self._source(one, f"u{kind.itemsize}") for one in names]
            return lambda program, mask: program.store(access, address, values, mask)
        targets = [(self._register(one), self._stored(one)) for one in names]
        if not order:
            return lambda program, mask: program.load(access, address, targets, mask)
        if parts[0] == "st" or ("add" in parts) + ("exch" in parts) != (parts[0] == "atom"):
            raise NotImplementedError(instruction.text)
        value = self._source(operands[2], f"u{kind.itemsize}") if parts[0] == "atom" else None
        return lambda program, mask: program.atomic(access, address, value, "add" in parts, targets[0], mask)

    def _argument(self, instruction: Instruction, kind: np.dtype[Any]) -> Action:
        target, source = instruction.operands
        if instruction.parts[0] != "ld" or not isinstance(source, Address) or "_param_" not in source.base:
            raise NotImplementedError(instruction.text)
        number, index, limit = int(source.base.rpartition("_")[2]), self._register(str(target)), 1 << 8 * kind.itemsize
        return lambda program, mask: program.put(
            index, np.full(self.threads, program.launch.arguments[number] % limit, kind), mask
        )


def _unknown(error: Exception) -> Action:
    def run(program: Program, mask: Array | None) -> None:
        raise Wrong(f"unknown to this machine: {error!r}")

    return run


def _in_turn(actions: Sequence[Action]) -> Action:
    def run(program: Program, mask: Array | None) -> None:
        for action in actions:
            action(program, mask)

    return run


@dataclass(frozen=True)
class Access:
    at: int  # which instruction
    space: str
    kind: np.dtype[Any]
    count: int  # elements of each thread
    acquires: bool
    releases: bool


class Program:
    """Some warps with registers and memory of their own."""

    def __init__(self, launch: Launch, index: int) -> None:
        self.launch, self.code, self.index = launch, launch.code, index
        threads = self.code.threads
        self.lanes = np.arange(threads)
        self.registers: Registers = [None] * len(self.code.registers)
        for name, values in zip(SPECIAL, (self.lanes, index, launch.programs), strict=True):
            if name in self.code.registers:
                self.registers[self.code.registers[name]] = np.zeros(threads, np.uint32) + np.uint32(values)
        self.own = {"shared": Memory.own(self.code.shared), "local": Memory.own(LOCAL * threads)}

    def run(self, draw: random.Random) -> Iterator[None]:
        """Stops before whatever other programs can see; ``draw`` orders the threads of an atomic instruction."""
        steps, executed, pc = self.code.steps, self.launch.executed, 0
        while True:
            step, mask = steps[pc], None
            executed[pc] += 1
            if step.control in ("access", "atomic"):
                yield
            if step.guard is not None:
                register, wanted = step.guard
                mask = self.registers[register] == wanted
            try:
                if step.control in ("bra", "together", "ret") and mask is not None:
                    if mask.min() != mask.max():
                        raise Wrong("not for all threads")
                    if not mask[0]:
                        pc += 1
                        continue
                if step.control == "ret":
                    return
                if step.control == "bra":
                    pc = step.target
                    continue
                if step.control == "atomic":
                    lanes = (self.lanes if mask is None else np.flatnonzero(mask)).tolist()
                    for turn, lane in enumerate(draw.sample(lanes, len(lanes))):
                        if turn > 0:
                            yield  # other programs come between a warp's atomics
                        step.run(self, self.lanes == lane)
                else:
                    step.run(self, mask)
                pc += 1
            except Exception as error:
                where = f"{self.code.kernel.name}, program {self.index}, line {step.instruction}"
                raise Wrong(f"{where}: {error}") from error

    def put(self, index: int, values: Array, mask: Array | None) -> None:
        """Set a register, in some threads."""
        if mask is not None:
            old = self.registers[index]
            old = np.full(len(mask), LEFT_OUT, np.uint64).astype(values.dtype) if old is None else old
            values = np.where(mask, values, old)
        self.registers[index] = values

    def load(self, access: Access, address: Source, targets: Sequence[tuple[int, Any]], mask: Array | None) -> None:
        """Into wider registers with the sign of a signed type."""
        lanes = self.lanes if mask is None else np.flatnonzero(mask)
        found = np.zeros((len(self.lanes), access.count), f"u{access.kind.itemsize}")
        for chosen, view, elements in self._touch(access, address(self.registers)[lanes], lanes, write=False):
            found[lanes[chosen]] = view[elements]
        for i, (index, stored) in enumerate(targets):
            self.put(index, np.ascontiguousarray(found[:, i]).view(access.kind).astype(stored), mask)

    def store(self, access: Access, address: Source, values: Sequence[Source], mask: Array | None) -> None:
        lanes = self.lanes if mask is None else np.flatnonzero(mask)
        data = np.stack([value(self.registers)[lanes] for value in values], 1)
        for chosen, view, elements in self._touch(access, address(self.registers)[lanes], lanes, write=True):
            view[elements] = data[chosen]

    def atomic(
        self, access: Access, address: Source, value: Source | None, adds: bool, target: tuple[int, Any],
        mask: Array | None,
    ) -> None:  # fmt: skip
        """A load where there is no value; one thread after the other."""
        clocks, index = self.launch.clocks, target[0]
        for lane in self.lanes if mask is None else np.flatnonzero(mask):
            one = np.array([lane])
            place = address(self.registers)[one]
            ((_, view, elements),) = self._touch(access, place, one, write=value is not None, atomic=True)
            clocks.atomic(self.index, int(lane), int(place[0]), access.acquires, access.releases)
            old = view[elements[0, 0]]
            if value is not None:
                new = value(self.registers)[lane]
                view[elements[0, 0]] = old + new if adds else new
            self.put(index, np.full(len(self.lanes), old).astype(target[1]), self.lanes == lane)

    def _touch(
        self, access: Access, addresses: Array, lanes: Array, write: bool, atomic: bool = False
    ) -> Iterator[tuple[Array | slice, Array, Array]]:
        """By region: which of the lanes, its memory, and their elements there; checked, and told to the detector."""
        memory = self.launch.memory if access.space == "global" else self.own[access.space]
        if access.space == "local":
            addresses = addresses + np.uint64(LOCAL) * lanes.astype(np.uint64)
        width = access.kind.itemsize
        for chosen, region in memory.at(addresses, width * access.count):
            least = UNWRITTEN if write and not atomic else WRITTEN
            cells, elements = region.cells(addresses[chosen], width, access.count, least)
            self._tell(access, region, lanes[chosen], cells, write, atomic)
            if write:
                region.status[cells] = WRITTEN
            yield chosen, region.views[width], elements

    def _tell(self, access: Access, region: Region, lanes: Array, cells: Array, write: bool, atomic: bool) -> None:
        key = region.base if access.space == "global" else (access.space, self.index)
        self.launch.clocks.access(key, len(region.status), self.index, lanes, cells, access.at, write, atomic)


@dataclass
class Launch:
    code: Code
    memory: Memory
    arguments: Sequence[int]
    programs: int
    executed: Array = field(init=False)  # how often each instruction

    def __post_init__(self) -> None:
        self.clocks = Clocks(self.programs, self.code.threads)
        self.executed = np.zeros(len(self.code.steps), np.int64)

    def run(self, seed: int, resident: int | None, limit: int) -> None:
        """In an order drawn from ``seed``; ``resident`` programs at a time, a further one where one has ended.

        Raises Wrong where ``limit`` global accesses are no end.
        """
        draw, accesses = random.Random(seed), 0
        waiting = [Program(self, index).run(draw) for index in range(self.programs)]
        draw.shuffle(waiting)
        running = [waiting.pop() for _ in range(min(resident or self.programs, self.programs))]
        longest = draw.choice([1, 3, 10, 100])  # accesses of a program before another has its turn
        with np.errstate(all="ignore"):
            while running:
                which = draw.randrange(len(running))
                for _ in range(draw.randint(1, longest)):
                    accesses += 1
                    if next(running[which], "ended") == "ended":
                        running[which : which + 1] = [waiting.pop()] if waiting else []
                        break
                if accesses > limit:
                    raise Wrong(f"{self.code.kernel.name} does not end: {accesses} accesses")

    def races(self) -> dict[tuple[str, str], str]:
        """What nothing orders, by the source lines of the two accesses."""
        found = {}
        for pair, text in self.clocks.races.items():
            one, other = (self.code.steps[at].instruction for at in pair)
            found[one.source, other.source] = f"{self.code.kernel.name}: {text}\n  line {one}\n  line {other}"
        return found
