"""What a step asks of the host: no waiting for the device, few launches, little time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bench.byte_table import Dtypes
from bench.contenders import ADAMW, FUSED, LR, NamedParameter, Step, torch_contenders
from bench.gpu.contenders import contenders_for
from bench.gpu.correctness import Check
from bench.machine import Machine
from bench.timing import Spread, host_sample, make_parameters, one_line
from fused_dals import DALS

FP32: Dtypes = (torch.float32, torch.float32, torch.float32)
WITHOUT_LOSS, CONTROL = f"{FUSED}, no loss", "control: two kernels"
#: The device is kept at work for so long; a step that does not wait returns in a small part of it.
QUEUE_S = 0.1


def many_parameters(machine: Machine, count: int, elements: int = 1000) -> list[NamedParameter]:
    shapes = [(f"layer{i}.weight", (elements,)) for i in range(count)]
    return make_parameters(shapes, FP32, machine.device, seed=count)


# -- waiting ---------------------------------------------------------------------------------------------------------


def check_waiting(machine: Machine, count: int) -> list[Check]:
    """Whether a step, after the first one, ever waits for the device."""
    named = many_parameters(machine, count)
    optimizer = DALS(list(named), lr=LR, fused=True)
    loss = torch.ones((), device=machine.device)
    optimizer.step(loss=loss)
    machine.wait()
    kept = [parameter.grad for _, parameter in named]

    def fresh_gradients() -> None:
        for _, parameter in named:
            assert parameter.grad is not None
            parameter.grad = parameter.grad.clone()
            kept.append(parameter.grad)  # so that no address comes back

    def new_lr() -> None:
        optimizer.param_groups[0]["lr"] *= 0.5

    def control() -> bool:
        """Whether the debug mode notices anything at all."""
        value = torch.ones((), device=machine.device)
        try:
            with machine.no_waiting():
                value.item()
        except RuntimeError:
            return True
        return False

    noticed = control()
    checks = [Check("control: item() is noticed", noticed, "" if noticed else "the debug mode notices nothing")]
    for label, change in (
        ("same gradients", lambda: None),
        ("gradients at new addresses", fresh_gradients),
        ("another lr", new_lr),
    ):
        checks.append(_without_waiting(machine, label, change, lambda: optimizer.step(loss=loss)))
    checks.append(_without_waiting(machine, "no loss", lambda: None, optimizer.step))
    checks.append(_without_waiting(machine, "loss a Python number", lambda: None, lambda: optimizer.step(loss=1.0)))
    return checks


def _without_waiting(machine: Machine, label: str, change: Callable[[], None], step: Step) -> Check:
    """Under the debug mode, and behind a long queue."""
    change()
    try:
        with machine.no_waiting():
            step()
    except RuntimeError as error:
        return Check(label, False, one_line(error))
    change()
    machine.wait()
    machine.occupy(QUEUE_S)
    start = time.perf_counter()
    step()
    taken = time.perf_counter() - start
    machine.wait()
    detail = f"returned after {1e3 * taken:.2f} ms behind a queue of {1e3 * QUEUE_S:.0f} ms"
    return Check(label, taken < QUEUE_S / 2, detail, {"host_s": taken, "queue_s": QUEUE_S})


# -- launches --------------------------------------------------------------------------------------------------------


@dataclass
class LaunchRow:
    """What one step of some tensors launches; `names` counts each kernel."""

    contender: str
    tensors: int
    kernels: int = 0
    memsets: int = 0
    copies: int = 0
    names: dict[str, int] | None = None
    error: str | None = None

    @property
    def launches(self) -> int:
        """Kernels and memsets; copies are listed beside them."""
        return self.kernels + self.memsets


def count_launches(machine: Machine, count: int) -> list[LaunchRow]:
    """One row per contender, after a control whose two launches are known."""
    value = torch.ones(64, device=machine.device)
    machine.launches(lambda: value.add_(1))  # the profiler's own start
    control = LaunchRow(CONTROL, count)
    _count(machine, control, lambda: value.add_(1).mul_(0.5))
    if control.error is None and control.launches != 2:
        control.error = f"counted {control.launches} launches: the counts of this table mean nothing"
    rows = [control]
    named = many_parameters(machine, count)
    builders: dict[str, Callable[[Sequence[NamedParameter]], Step]] = {
        name: contender.build for name, contender in contenders_for(FP32).items()
    }
    builders[WITHOUT_LOSS] = _dals_without_loss
    for name, build in builders.items():
        row = LaunchRow(name, count)
        try:
            step = build(named)
            for _ in range(2):
                step()
            machine.wait()
            _count(machine, row, step)
        except Exception as error:
            row.error = one_line(error)
        rows.append(row)
        machine.release()
    return rows


def _count(machine: Machine, row: LaunchRow, work: Callable[[], object]) -> None:
    launches = machine.launches(work)
    kinds = Counter(category for category, _ in launches)
    row.kernels, row.memsets, row.copies = kinds["kernel"], kinds["gpu_memset"], kinds["gpu_memcpy"]
    row.names = dict(Counter(name[:80] for _, name in launches).most_common(12))
    if not launches:
        row.error = "the profiler recorded no launch"


def _dals_without_loss(named: Sequence[NamedParameter]) -> Step:
    optimizer = DALS(list(named), lr=LR, fused=True)
    optimizer.observe_loss(torch.ones((), device=named[0][1].device))
    return optimizer.step


# -- host time -------------------------------------------------------------------------------------------------------


@dataclass
class HostRow:
    """Host time of one step into an empty queue."""

    contender: str
    tensors: int
    groups: int
    host_s: Spread | None
    samples_s: list[float]
    error: str | None = None


def time_host(
    machine: Machine,
    count: int,
    groups: Sequence[int],
    samples: int,
    time_is_up: Callable[[], bool] = lambda: False,
) -> Iterator[HostRow]:
    """Steps of the fused path with its parameters in so many groups, with gradients that move, and of AdamW."""
    named = many_parameters(machine, count)
    loss = torch.ones((), device=machine.device)
    grads = [parameter.grad for _, parameter in named if parameter.grad is not None]
    sets = [grads, [grad.clone() for grad in grads]]

    def dals(number: int) -> Step:
        split = [{"params": list(named[i::number])} for i in range(number)]
        optimizer = DALS(split, lr=LR, fused=True)
        return lambda: optimizer.step(loss=loss)

    def moving_gradients() -> Step:
        step, calls = dals(1), 0

        def move_and_step() -> None:
            nonlocal calls
            calls += 1
            for (_, parameter), gradient in zip(named, sets[calls % 2], strict=True):
                parameter.grad = gradient
            step()

        return move_and_step

    jobs: dict[tuple[str, int], Callable[[], Step]] = {
        (FUSED, number): (lambda number=number: dals(number))  # type: ignore[misc]
        for number in groups
    }
    jobs[ADAMW, 1] = lambda: torch_contenders(FP32)[ADAMW].build(named)
    jobs[f"{FUSED}, gradients at new addresses each step (their assignment included)", 1] = moving_gradients
    for (name, number), build in jobs.items():
        row = HostRow(name, count, number, None, [])
        try:
            if time_is_up():
                raise TimeoutError("left out: time is up")
            step = build()
            for _ in range(3):
                step()
            row.samples_s = host_sample(machine, step, samples)
            row.host_s = Spread.of(row.samples_s)
        except Exception as error:
            row.error = one_line(error)
        yield row
