"""A model of the fused pass's protocol, and an explorer that runs every interleaving of it. Pure Python, no device.

Programs draw tickets from a counter, each one ahead of the item that they work on. Stage A leaves a partial sum per
chunk and arrives; the last to arrive adds the partials up and publishes the ratio that follows, which is the tensor's
flag itself. Who has a tensor's only chunk does so without arriving. Stage B waits for the flag and writes its chunk of
p.
Each step named in `Protocol` is one atomic action; the actions of different programs interleave in any order.

Memory is weak, along happens-before. A plain store belongs at first to the view of its program alone. A release adds
the whole view of the program to what the sync variable carries, an acquire adds what the variable carries to the
program's view. A read-modify-write adds to what is carried (it continues the release sequence), a store replaces it.
The ticket counter carries nothing, so the proof does not lean on its memory order. A plain read of what is not in the
view is a fault. The end of a launch makes everything visible.

A view is a set of bits: the partial of (tensor, chunk), which stands for all that stage A of the chunk did before it
arrived (its reads of p, its writes of h and m, too). Whoever publishes a ratio has to see all of its tensor's, and so
has whoever writes p, which must come after every A's read of p.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fused_dals.worklist import STAGE_A, STAGE_B, Item


def arrives_last(order: int, chunk: int, count: int) -> bool:
    return order == count - 1


@dataclass(frozen=True)
class Protocol:
    """The kernel's steps and memory orders. The defaults are the protocol; anything else is a broken one."""

    counter_is_atomic: bool = True
    # Only the last to arrive goes on. A stage that does not draw ahead draws when it is done.
    stage_a: tuple[str, ...] = ("store partial", "draw next", "arrive", "publish ratio")
    stage_b: tuple[str, ...] = ("draw next", "wait", "write p")
    arrives_last: Callable[[int, int, int], bool] = arrives_last
    lone_chunks_arrive: bool = False
    arrival_releases: bool = True
    arrival_acquires: bool = True
    ready_releases: bool = True
    wait_acquires: bool = True


DRAWING, STOPPED = -1, -2


class Program(NamedTuple):
    ticket: int  # or DRAWING or STOPPED
    step: int  # next step of the ticket's stage; -1 - step in the second half of a draw that is not atomic
    view: int  # bits of the stores that are visible to it
    following: int = DRAWING  # the ticket drawn ahead, if any; STOPPED if it lies beyond the list


class Tensor(NamedTuple):
    arrivals: int
    arrivals_carry: int
    ready: bool
    ready_carries: int


class State(NamedTuple):
    launch: int
    counter: int
    programs: tuple[Program, ...]  # sorted, for programs are interchangeable
    tensors: tuple[Tensor, ...]
    stored: int  # what is stored, visible or not
    drawn: int  # bits of the items drawn so far


#: The actions whose order among the programs can change what happens. Any other, once enabled, stays enabled and does
#: the same whatever the others do, and the others can at most be waiting for it. So it may as well come at once, alone:
#: a persistent set of one, which keeps every fault and deadlock. None is put off for ever: each moves its program on.
ORDERED = {"draw", "draw next", "bump counter", "arrive"}


class Fault(Exception):
    """What a schedule did wrong."""


class Report(NamedTuple):
    states: Collection[State]
    fault: str | None
    trace: list[str]  # a shortest of the explored schedules to the fault


class Explorer:
    """All that ``programs`` programs can do with ``launches``, each a list of items in ticket order."""

    def __init__(
        self,
        chunks: Sequence[int],
        launches: Sequence[Sequence[Item]],
        programs: int,
        protocol: Protocol,
        reduced: bool = True,
    ) -> None:
        self.chunks = chunks
        self.launches = launches
        self.protocol = protocol
        self.reduced = reduced
        self.steps = {STAGE_A: protocol.stage_a, STAGE_B: protocol.stage_b}
        self.first = [sum(chunks[:tensor]) for tensor in range(len(chunks))]
        self.total = sum(chunks)
        idle = (Program(DRAWING, 0, 0),) * programs
        self.start = State(0, 0, idle, (Tensor(0, 0, False, 0),) * len(chunks), stored=0, drawn=0)

    def explore(self) -> Report:
        """Visit every reachable state once, breadth first, up to the first fault."""
        came_from: dict[State, tuple[State, Program, str] | None] = {self.start: None}
        queue = deque([self.start])
        while queue:
            state = queue.popleft()
            action = ""
            try:
                for program, action in self.enabled(state):
                    successor = self.after(state, program, action)
                    if successor not in came_from:
                        came_from[successor] = state, program, action
                        queue.append(successor)
            except Fault as fault:
                trace = [self.name(state, program, action)] if action else []
                while origin := came_from[state]:
                    trace.append(self.name(*origin))
                    state = origin[0]
                return Report(came_from.keys(), str(fault), trace[::-1])
        return Report(came_from.keys(), None, [])

    def name(self, state: State, program: Program, action: str) -> str:
        items = self.launches[state.launch]
        ticket = state.counter if action == "draw" else program.ticket
        if ticket < 0:
            return action
        tensor, chunk, stage = items[ticket]
        return f"{'AB'[stage]}({tensor}, {chunk}): {action}"

    def enabled(self, state: State) -> list[tuple[Program, str]]:
        """The actions to explore from a state. Raises Fault if there are none and the work is not done."""
        actions = []
        for program in dict.fromkeys(state.programs):  # of programs in the same state one will do
            action = self.next(state, program)
            if action and self.reduced and action not in ORDERED:
                return [(program, action)]
            if action:
                actions.append((program, action))
        if not actions:
            if any(program.ticket != STOPPED for program in state.programs):
                raise Fault("deadlock")
            if state.launch + 1 < len(self.launches):
                return [(state.programs[0], "launch")]
            if state.drawn != (1 << 2 * self.total) - 1:
                raise Fault("item never done")
        return actions

    def next(self, state: State, program: Program) -> str | None:
        """The program's next action, None if it must wait or has stopped."""
        items = self.launches[state.launch]
        if program.ticket == STOPPED:
            return None
        if program.ticket == DRAWING:
            return "draw" if state.counter < len(items) else "stop"
        if program.step < 0:
            return "bump counter"
        tensor, _, stage = items[program.ticket]
        action = self.steps[stage][program.step]
        return None if action == "wait" and not state.tensors[tensor].ready else action

    def after(self, state: State, program: Program, action: str) -> State:
        """The state after an enabled action of a program. Raises Fault if the action is wrong."""
        launch, counter, _, tensors, stored, drawn = state
        ticket, step, view, following = program
        others = list(state.programs)
        others.remove(program)
        if action == "launch":
            programs = (Program(DRAWING, 0, stored),) * len(state.programs)
            return State(launch + 1, 0, programs, tensors, stored, drawn)
        if action == "stop":
            return State(launch, counter, ranked(Program(STOPPED, 0, 0), others), tensors, stored, drawn)
        if action == "bump counter":
            taken = ticket if following == DRAWING else following
            moved = Program(ticket, -1 - step, view, following)
            return State(launch, taken + 1, ranked(moved, others), tensors, stored, drawn)

        items = self.launches[launch]
        if action == "draw next" and counter >= len(items):
            moved = Program(ticket, step + 1, view, STOPPED)
            return State(launch, counter, ranked(moved, others), tensors, stored, drawn)
        if action in ("draw", "draw next"):
            t, chunk, stage = items[counter]
            item_bit = 1 << self.first[t] + chunk + stage * self.total
            if drawn & item_bit:
                raise Fault("item done twice")
            atomic = self.protocol.counter_is_atomic
            moved = Program(counter, 0, view) if action == "draw" else Program(ticket, step + 1, view, counter)
            if not atomic:
                moved = moved._replace(step=-1 - moved.step)
            return State(launch, counter + atomic, ranked(moved, others), tensors, stored, drawn | item_bit)

        t, chunk, stage = items[ticket]
        partials = (1 << self.chunks[t]) - 1 << self.first[t]
        readable = -1  # mask of what someone may still read; the rest is forgotten, so that fewer states differ
        arrivals, arrivals_carry, ready, ready_carries = tensors[t]
        step += 1
        if action == "store partial":
            view |= 1 << self.first[t] + chunk
        elif action == "arrive" and (self.chunks[t] > 1 or self.protocol.lone_chunks_arrive):
            if not self.protocol.arrives_last(arrivals, chunk, self.chunks[t]):
                step = len(self.protocol.stage_a)
            carried = arrivals_carry
            arrivals += 1
            if self.protocol.arrival_releases:
                arrivals_carry |= view
            if self.protocol.arrival_acquires:
                view |= carried
        elif action == "arrive":
            pass  # nobody to agree with: no access to memory, and so nothing that it orders
        elif action == "publish ratio":
            need("partial", partials, stored, view)
            if ready:
                raise Fault("ratio published twice")
            ready = True
            ready_carries = view if self.protocol.ready_releases else 0
        elif action == "wait":
            if self.protocol.wait_acquires:
                view |= ready_carries
        elif action == "write p":
            need("partial", partials, stored, view)
            all_b_drawn = not partials & ~(drawn >> self.total)
            held = [of for other in (*others, program) for of in (other.ticket, other.following) if of >= 0]
            held.remove(ticket)
            if all_b_drawn and not any(items[of][0] == t for of in held):
                readable = ~partials
        else:
            raise ValueError(action)
        stored |= view
        moved = Program(ticket, step, view, following)
        if step == len(self.steps[stage]):
            moved = Program(following, 0, 0 if following == STOPPED else view)
        tensors = (*tensors[:t], Tensor(arrivals, arrivals_carry, ready, ready_carries), *tensors[t + 1 :])
        if self.reduced and readable != -1:
            moved, *others = (some._replace(view=some.view & readable) for some in (moved, *others))
            tensors = tuple(Tensor(n, a & readable, is_set, r & readable) for n, a, is_set, r in tensors)
        return State(launch, counter, ranked(moved, others), tensors, stored, drawn)


def need(what: str, bits: int, stored: int, view: int) -> None:
    if bits & ~stored:
        raise Fault(f"{what} not stored")
    if bits & ~view:
        raise Fault(f"{what} not visible")


def ranked(program: Program, others: list[Program]) -> tuple[Program, ...]:
    return tuple(sorted([program, *others]))
