"""Lists of tensors, contenders, the compiled reference, and how they take turns."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from bench import timing
from bench.compiled import CompileBudget, CompiledReference, OutOfTime, time_limit
from bench.contenders import (
    FOREACH,
    Contender,
    Step,
)
from bench.gpu import jobs as gpu_jobs
from bench.gpu.contenders import contenders_for
from bench.shapes import SHAPES
from bench.step_table import steps_text, waits_for_host
from bench.timing import Spread, make_parameters, time_contenders
from tests.gpu_stand_ins import BF16, CPU, FP32, TINY, CpuMachine


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        ("vit_b_16", 152, 86_567_656),
        ("vit_l_16", 296, 304_326_632),
        ("bert_large", 391, 335_141_888),
        ("gpt2_xl", 580, 1_557_611_200),
        ("llama_1b", 201, 1_100_048_384),
        ("llama_7b", 291, 6_738_415_616),
    ],
)
def test_shapes_have_the_published_size(model: str, tensors: int, parameters: int) -> None:
    shapes = list(SHAPES[model]())
    assert len(shapes) == len(dict(shapes)) == tensors
    assert sum(math.prod(shape) for _, shape in shapes) == parameters


def test_a_smaller_model_where_memory_is_short() -> None:
    assert gpu_jobs.fitting_model(CpuMachine(80 << 30), "llama_7b", FP32) == "llama_1b"
    assert gpu_jobs.fitting_model(CpuMachine(80 << 30), "llama_7b", BF16) == "llama_7b"
    assert gpu_jobs.fitting_model(CpuMachine(139 << 30), "llama_7b", FP32) == "llama_7b"
    assert gpu_jobs.fitting_model(CpuMachine(1), "gpt2", FP32) == "gpt2"


def test_the_compiled_reference_is_the_reference() -> None:
    named = make_parameters(TINY, FP32, CPU, 0)
    twin = make_parameters(TINY, FP32, CPU, 0)
    budget = CompileBudget(60.0, 60.0)
    compiled = CompiledReference(FP32, budget, backend="eager")
    step = compiled.build(named)
    step()
    assert budget.left_s < 60
    foreach = CONTENDERS_BY_NAME[FOREACH](twin)
    for _ in range(2):
        foreach()
    for (_, a), (_, b) in zip(named, twin, strict=True):
        assert not torch.equal(a, torch.zeros_like(a))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


CONTENDERS_BY_NAME = {name: c.build for name, c in contenders_for(FP32).items()}


def test_what_torch_dropped_is_not_compiled_again_to_be_counted() -> None:
    """Once torch has been reset for one list, the others' would each take minutes to be there again."""
    named = make_parameters(TINY, FP32, CPU, 0)
    reference = CompiledReference(FP32, CompileBudget(60.0, 60.0), backend="eager")
    reference.build(named)
    reference.build(named)
    with pytest.raises(RuntimeError, match=r"left out: torch\.compile was not done"):
        CompileBudget(0.05, 0.05).first_call(lambda: time.sleep(9))
    with pytest.raises(RuntimeError, match=r"left out: torch\.compile dropped it, out of time for others"):
        reference.build(named)


def test_compiling_has_its_limits() -> None:
    named = make_parameters(TINY, FP32, CPU, 0)
    with pytest.raises(RuntimeError, match=r"left out: torch\.compile takes 156 s or more, and has 60 s"):
        CompiledReference(FP32, CompileBudget(60.0, 60.0)).build(named * 130)
    with pytest.raises(RuntimeError, match="is spent"):
        CompiledReference(FP32, CompileBudget(0.0, 60.0)).build(named)

    def slow(module: Any, inputs: Any) -> Any:
        time.sleep(5)

    with pytest.raises(RuntimeError, match="was not done with it after"):
        CompiledReference(FP32, CompileBudget(60.0, 0.5), backend=slow).build(named[:1])
    start = time.monotonic()
    with pytest.raises(OutOfTime), time_limit(0.05):
        while time.monotonic() < start + 5:
            pass
    with time_limit(5):
        pass


def _counting(calls: list[str], name: str, fails: bool = False) -> Contender:
    def step() -> None:
        calls.append(name)
        if fails and calls.count(name) > 6:
            raise RuntimeError("out of memory")

    return Contender(lambda named: step, 28, 8)


def test_when_time_is_up_rounds_end_and_nobody_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST_STEPS", 1)

    def timed(asked_before: int) -> list[timing.StepRow]:
        asked = itertools.count()
        contenders = {name: _counting([], name) for name in "xy"}
        return time_contenders(
            CpuMachine(), "m", FP32, "fp32", TINY, contenders, 9, 0, time_is_up=lambda: next(asked) >= asked_before
        )

    assert [len(row.device_samples_s) for row in timed(4)] == [3, 3]
    built, late = timed(1)
    assert len(built.device_samples_s) == 1 and built.device_s is not None
    assert late.error == "TimeoutError: left out: time is up" and late.device_s is None


class Queue(CpuMachine):
    """A device with a queue and a clock of their own: a step is so many launches, which take the host and the device a
    while each; ``length`` launches fit into the queue."""

    def __init__(self, host_s: float, device_s: float, launches: int, length: int = 1000) -> None:
        super().__init__()
        self.host_s, self.device_s, self.count, self.length = host_s, device_s, launches, length
        self.now = self.free_at = 0.0
        self.ends: list[float] = []  # of what has been queued
        self.leads: list[float] = []

    def perf_counter(self) -> float:
        return self.now

    def wait(self) -> None:
        self.now = max(self.now, self.free_at)

    def step(self) -> None:
        for _ in range(self.count):
            self.now += self.host_s
            if len(self.ends) >= self.length:
                self.now = max(self.now, self.ends[-self.length])
            self.free_at = max(self.free_at, self.now) + self.device_s
            self.ends.append(self.free_at)

    def seconds(self, work: Callable[[], object], lead_s: float = 0.0) -> float:
        self.wait()
        self.leads.append(lead_s)
        start = self.free_at = self.now + lead_s
        work()
        self.wait()
        return self.free_at - start


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Queue, timing.Sampler]]:
    def make(*arguments: Any) -> tuple[Queue, timing.Sampler]:
        machine = Queue(*arguments)
        monkeypatch.setattr(time, "perf_counter", machine.perf_counter)
        return machine, timing.Sampler(machine, machine.step)

    return make


def test_a_host_that_becomes_slower_is_hidden_all_the_same(queue: Callable[..., tuple[Queue, timing.Sampler]]) -> None:
    machine, sampler = queue(10e-6, 2e-6, 200)
    machine.host_s = 40e-6  # as on a machine that others use, too
    for _ in range(3):
        assert sampler.sample() == pytest.approx(200 * 2e-6, rel=1e-3)
    assert not sampler.host_bound
    assert machine.leads[-1] == machine.leads[-2] > 200 * 40e-6, "what it has learned it keeps"


def test_a_hiccup_while_it_is_built_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Queue(10e-6, 50e-6, 1)
    monkeypatch.setattr(time, "perf_counter", machine.perf_counter)
    calls = itertools.count()

    def step() -> None:
        if next(calls) == timing.WARMUP_STEPS + 3:
            machine.now += 5e-3
        machine.step()

    sampler = timing.Sampler(machine, step)
    assert sampler.steps == timing.MOST_STEPS and sampler.retakes == timing.RETAKES
    assert sampler.sample() == pytest.approx(50e-6) and machine.leads[-1] < 1e-3


def test_a_time_that_is_the_hosts_says_so(queue: Callable[..., tuple[Queue, timing.Sampler]]) -> None:
    """Where more is launched than the queue holds; not where the device is slower than the host nevertheless."""
    machine, sampler = queue(10e-6, 2e-6, 5000)
    assert sampler.sample() > 2 * 5000 * 2e-6 and sampler.host_bound
    taken = len(machine.leads)
    assert sampler.sample() > 0 and len(machine.leads) == taken + 1, "no lead helps, and none is tried again"
    machine, sampler = queue(10e-6, 20e-6, 5000)
    assert sampler.sample() == pytest.approx(5000 * 20e-6, rel=1e-3) and not sampler.host_bound


def test_replays_tell_whose_time_it_was() -> None:
    slow, quick, alike = (Spread(seconds, seconds, seconds) for seconds in (3e-3, 1e-3, 1.1e-3))
    rows = [
        timing.StepRow("m", "fp32", name, 1, 1, 28, True, device_s=time)
        for name, time in {"x": slow, "x, graph": quick, "y": alike, "y, graph": quick, "z": slow}.items()
    ]
    assert [waits_for_host(row, rows) for row in rows] == [True, False, False, False, False]
    assert "3.000*" in steps_text(rows, 1e9) and "1.100 " in steps_text(rows, 1e9)
    rows[4].host_bound = True
    assert waits_for_host(rows[4], rows)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_contenders_take_turns_where_memory_allows(side_by_side: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(timing, "MOST_STEPS", 1)
    monkeypatch.setattr(timing, "RETAKES", 0)
    contenders = {"x": _counting(calls, "x"), "y": _counting(calls, "y")}
    machine = CpuMachine(10_000 if side_by_side else 1200)
    rows = time_contenders(machine, "m", FP32, "fp32", TINY, contenders, 4, 0)
    assert [row.side_by_side for row in rows] == [side_by_side] * 2
    assert all(row.error is None and len(row.device_samples_s) == 4 for row in rows)
    warm = timing.WARMUP_STEPS + 3 + 1
    expected = ["x", "y", "y", "x"] * 2 if side_by_side else ["x"] * 4  # nobody is always first
    assert calls[warm * (2 if side_by_side else 1) :][: len(expected)] == expected
    rows = time_contenders(CpuMachine(100), "m", FP32, "fp32", TINY, contenders, 4, 0)
    assert all(row.error is not None and row.error.startswith("left out: needs") for row in rows)


def test_a_contender_that_breaks_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def refuses(named: Any) -> Step:
        raise RuntimeError("not\n built")

    contenders = {
        "refuses": Contender(refuses, 28, 8),
        "breaks": _counting(calls, "breaks", fails=True),
        "works": _counting(calls, "works"),
    }
    rows = time_contenders(CpuMachine(), "m", FP32, "fp32", TINY, contenders, 3, 0)
    assert [row.error for row in rows] == ["RuntimeError: not built", "RuntimeError: out of memory", None]
    text = steps_text(rows, 1e9)
    assert "refuses failed: RuntimeError: not built" in text and "\nworks " in text
