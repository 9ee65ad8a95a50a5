"""Step times: contenders side by side on one set of tensors, on any machine; device time and host time apart."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from bench.byte_table import Dtypes
from bench.contenders import Contender, NamedParameter, Step, is_graph
from bench.machine import Machine
from bench.shapes import NamedShape

WARMUP_STEPS = 3
#: A sample is several steps back to back: about so much device time, and at most so much host time.
SAMPLE_DEVICE_S, SAMPLE_HOST_S, MOST_STEPS = 5e-3, 10e-3, 20
#: Work that a sample hides the host's time behind, in units of that time.
LEAD = 1.5
#: How often a sample is taken anew where the host was slower than the lead is long, each time behind a longer one.
RETAKES = 2
#: So late the host may be: 1 % of a sample.
LATE_S = 5e-5
#: What a device has left to do at most when the host has queued all of it, where it has been waiting for the host.
#: A queue that is full, some thousand launches, has more.
IDLE_S = 1e-3
#: Share of the free memory that contenders may fill.
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Spread:
    """Median with the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        p10, median, p90 = np.percentile(values, (10, 50, 90)).tolist()
        return cls(median, p10, p90)


@dataclass
class StepRow:
    """One contender's step on one list of tensors; `error` says why it has no figures.

    Where nothing is queued, device time is the host's own, and there is no host time beside it. ``host_bound``: the
    device waited for the host in most samples, whatever was queued before; its time is the host's.
    """

    model: str
    dtypes: str
    contender: str
    tensors: int
    parameters: int
    bytes_per_parameter: float
    side_by_side: bool
    steps_per_sample: int = 0
    device_samples_s: list[float] = field(default_factory=list)
    host_samples_s: list[float] = field(default_factory=list)
    device_s: Spread | None = None
    host_s: Spread | None = None
    bytes_per_s: float | None = None
    peak_extra_bytes: int | None = None
    launches: int | None = None
    launches_error: str | None = None
    host_bound: bool = False
    error: str | None = None


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def is_left_out(error: str) -> bool:
    """Whether a row has no figures for want of time or memory, which is nobody's fault."""
    return "left out" in error or "OutOfMemoryError" in error


def make_parameters(
    shapes: Sequence[NamedShape], dtypes: Dtypes, device: torch.device, seed: int
) -> list[NamedParameter]:
    """Random parameters with random gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    named = []
    for name, shape in shapes:
        values = torch.empty(shape, dtype=dtypes[0], device=device).normal_(0, 0.02, generator=generator)
        parameter = torch.nn.Parameter(values)
        gradient = torch.empty(shape, dtype=dtypes[1], device=device).normal_(0, 0.02, generator=generator)
        parameter.grad = gradient
        named.append((name, parameter))
    return named


def host_seconds(machine: Machine, step: Step) -> float:
    """Host time of one step into an empty queue."""
    machine.wait()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def host_sample(machine: Machine, step: Step, samples: int) -> list[float]:
    found = [host_seconds(machine, step) for _ in range(samples)]
    machine.wait()
    return found


class Sampler:
    """Takes samples of one step, the device's queue kept filled: the lead is work that the host's time hides behind."""

    def __init__(self, machine: Machine, step: Step) -> None:
        self.machine, self.step = machine, step
        for _ in range(WARMUP_STEPS):
            step()
        self.host_s = min(host_sample(machine, step, 3))
        self.steps = 1
        self._begin()
        device_s = self.sample() if machine.queues_work else self.host_s
        self._begin()  # what a first sample finds may be a hiccup
        wanted = min(SAMPLE_DEVICE_S / max(device_s, 1e-9), SAMPLE_HOST_S / max(self.host_s, 1e-9), MOST_STEPS)
        self.steps = max(1, math.floor(wanted))

    def _begin(self) -> None:
        self.lead_s = LEAD * self.host_s  # for each step
        self.retakes = RETAKES
        self.taken = self.waited = 0  # samples, and those in which the device waited for the host

    def sample(self) -> float:
        """Device seconds per step."""
        if not self.machine.queues_work:
            return self._take(0.0)[0] / self.steps
        lead_s = self.steps * self.lead_s
        device_s, late_s = self._take(lead_s)
        for _ in range(self.retakes):
            if late_s <= LATE_S:
                break
            longer_s = lead_s + LEAD * late_s
            device_s, still_late_s = self._take(longer_s)
            if still_late_s > 0.5 * late_s:  # the queue is full, and no lead makes it longer
                self.retakes = 0
            else:
                lead_s, self.lead_s = longer_s, longer_s / self.steps
            late_s = still_late_s
        self.taken += 1
        self.waited += late_s > 0.5 * device_s and device_s - late_s < IDLE_S
        return device_s / self.steps

    def _take(self, lead_s: float) -> tuple[float, float]:
        """Device seconds of all steps, and by how much the host was still at them when the lead was over."""
        start = end = 0.0

        def steps() -> None:
            nonlocal start, end
            start = time.perf_counter()
            for _ in range(self.steps):
                self.step()
            end = time.perf_counter()

        device_s = self.machine.seconds(steps, lead_s=lead_s)
        return device_s, end - start - lead_s

    @property
    def host_bound(self) -> bool:
        """Whether the device waited for the host in most samples."""
        return 2 * self.waited > self.taken


def needed_bytes(shapes: Sequence[NamedShape], dtypes: Dtypes, contender: Contender) -> float:
    """Memory that parameters, gradients and one contender take at most, by its own estimate."""
    sizes = [math.prod(shape) for _, shape in shapes]
    everywhere = dtypes[0].itemsize + dtypes[1].itemsize + contender.state + contender.scratch
    return sum(sizes) * everywhere + max(sizes, default=0) * contender.tensor_scratch


def time_contenders(
    machine: Machine,
    model: str,
    dtypes: Dtypes,
    dtypes_name: str,
    shapes: Sequence[NamedShape],
    contenders: Mapping[str, Contender],
    samples: int,
    seed: int,
    after_each: Callable[[], object] = lambda: None,
    time_is_up: Callable[[], bool] = lambda: False,
    rows: list[StepRow] | None = None,
) -> list[StepRow]:
    """Time every contender once per round where all fit into memory, else one contender after the other.

    All step the same parameters along the same gradients, each with state of its own. A contender that does not fit
    into memory is a row that says so. ``after_each`` is called when a contender has been built, and after each sample.
    When ``time_is_up``, no further round begins; all have as many samples. ``rows`` is filled in, also where what is
    raised is no Exception: ``finished`` then makes the best of it.
    """
    parameters = sum(math.prod(shape) for _, shape in shapes)
    free = MEMORY_SHARE * machine.free_bytes()
    alone = {name: needed_bytes(shapes, dtypes, contender) for name, contender in contenders.items()}
    fitting = [name for name in contenders if alone[name] <= free]
    state = {name: parameters * contenders[name].state for name in fitting}
    most = max((alone[name] - state[name] for name in fitting), default=0.0)
    side_by_side = most + sum(state.values()) <= free
    by_name = {
        name: StepRow(model, dtypes_name, name, len(shapes), parameters, c.moves, side_by_side)
        for name, c in contenders.items()
    }
    rows = [] if rows is None else rows
    rows += by_name.values()
    for name in contenders:
        if name not in fitting:
            by_name[name].error = f"left out: needs {alone[name] / 1e9:.3g} GB of {free / 1e9:.3g} GB"
            for _ in range(samples + 1):
                after_each()
    if not fitting:
        return rows
    named = make_parameters(shapes, dtypes, machine.device, seed)
    for names in [fitting] if side_by_side else [[name] for name in fitting]:
        group = {name: (by_name[name], contenders[name]) for name in names}
        _time_group(machine, named, group, samples, after_each, time_is_up)
        machine.release()
    return rows


def finished(rows: Sequence[StepRow]) -> list[StepRow]:
    """Those of a list that came to no end which have figures, as they are, or a reason to have none."""
    for row in rows:
        if row.error is None and row.device_s is None and row.device_samples_s:
            _note_device_time(row)
    return [row for row in rows if row.error is not None or row.device_s is not None]


def _time_group(
    machine: Machine,
    named: Sequence[NamedParameter],
    group: Mapping[str, tuple[StepRow, Contender]],
    samples: int,
    after_each: Callable[[], object],
    time_is_up: Callable[[], bool],
) -> None:
    samplers: dict[str, Sampler] = {}

    def attempt(name: str, work: Callable[[], object]) -> None:
        row, _ = group[name]
        if row.error is not None:
            return
        try:
            work()
        except Exception as error:  # whatever an optimizer, the compiler or the device raises is a row
            row.error = one_line(error)
            samplers.pop(name, None)
        if row.error is not None:  # once: who allocates after it pays for it, and that may be somebody's sample
            machine.release()

    def build(name: str) -> None:
        if time_is_up():
            raise TimeoutError("left out: time is up")
        samplers[name] = Sampler(machine, group[name][1].build(named))

    for name in group:
        attempt(name, lambda name=name: build(name))  # type: ignore[misc]
        after_each()
    for taken in range(samples):
        if taken and time_is_up():
            break
        for name in [*list(group)[taken % len(group) :], *list(group)[: taken % len(group)]]:  # nobody is always first
            attempt(name, lambda name=name: group[name][0].device_samples_s.append(samplers[name].sample()))  # type: ignore[misc]
            after_each()
    for name in list(samplers):
        attempt(name, lambda name=name: _finish(machine, samplers[name], group[name][0], samples))  # type: ignore[misc]


def _finish(machine: Machine, sampler: Sampler, row: StepRow, samples: int) -> None:
    """Host time, memory, and what follows from the samples."""
    row.steps_per_sample, row.host_bound = sampler.steps, sampler.host_bound
    if machine.queues_work:
        row.host_samples_s = host_sample(machine, sampler.step, samples)
        row.host_s = Spread.of(row.host_samples_s)
    if not is_graph(row.contender):  # a replay allocates nothing: its memory was taken at capture
        row.peak_extra_bytes = machine.peak_bytes(sampler.step)
    _note_device_time(row)


def _note_device_time(row: StepRow) -> None:
    row.device_s = Spread.of(row.device_samples_s)
    row.bytes_per_s = row.bytes_per_parameter * row.parameters / row.device_s.median


def count_launches(
    machine: Machine,
    rows: Sequence[StepRow],
    shapes: Sequence[NamedShape],
    dtypes: Dtypes,
    contenders: Mapping[str, Contender],
    seed: int,
) -> None:
    """Write into the rows without an error what a step launches, or why that could not be counted.

    For the end of a run: once torch's profiler was there, the host may stay slower (pytorch issue 146604).
    """
    named = make_parameters(shapes, dtypes, machine.device, seed)
    for row in rows:
        if row.error is None and row.contender in contenders:
            try:
                step = contenders[row.contender].build(named)
                for _ in range(WARMUP_STEPS):
                    step()
                row.launches = len(machine.launches(step))
            except Exception as error:
                row.launches_error = one_line(error)
        machine.release()


def ratios(rows: Sequence[StepRow], baseline: str) -> dict[str, Spread]:
    """Times in units of the baseline's, taken round by round; nothing where they were not measured side by side."""
    reference = next((row for row in rows if row.contender == baseline and row.error is None), None)
    if reference is None or not reference.side_by_side:
        return {}
    found = {}
    for row in rows:
        if row.error is None and len(row.device_samples_s) == len(reference.device_samples_s) > 0:
            pairs = zip(row.device_samples_s, reference.device_samples_s, strict=True)
            found[row.contender] = Spread.of([own / other for own, other in pairs])
    return found
