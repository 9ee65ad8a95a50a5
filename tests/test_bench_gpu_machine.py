"""What `bench gpu` asks of torch.cuda, against stand-ins of its events, streams, graphs and profiler."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from bench.gpu import machine as gpu_machine
from bench.gpu.machine import CudaMachine, DeviceHung, launches_of
from tests.gpu_stand_ins import CPU


def test_an_event_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        def query(self) -> bool:
            return False

    monkeypatch.setattr(gpu_machine, "HANG_SECONDS", 0.01)
    with pytest.raises(DeviceHung):
        gpu_machine._wait_for(Never())


def test_torch_cuda_has_what_the_machine_uses() -> None:
    used = set(re.findall(r"torch\.(cuda\.\w+|profiler\.\w+)", inspect.getsource(gpu_machine.CudaMachine)))
    assert len(used) > 10
    for name in used:
        module, _, attribute = name.partition(".")
        assert hasattr(getattr(torch, module), attribute), name


class FakeEvent:
    """A CUDA event by the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.asked = 0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3 * (other.at - self.at)


class FakeStream:
    order: ClassVar[list[str]] = []

    def wait_stream(self, other: Any) -> None:
        self.order.append("waits")


class FakeGraph:
    """Notes when it is captured and replayed."""

    @contextlib.contextmanager
    def captures(self) -> Iterator[None]:
        FakeStream.order.append("capture")
        yield
        FakeStream.order.append("end")
        type(self).ends()

    @staticmethod
    def ends() -> None:
        pass

    def replay(self) -> None:
        FakeStream.order.append("replay")


class FakeProfile:
    """A profiler that has seen one kernel."""

    def __init__(self, activities: Any) -> None:
        pass

    def start(self) -> None:
        FakeStream.order.append("profiled")

    def stop(self) -> None:
        FakeStream.order.append("stopped")

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text(json.dumps({"traceEvents": [{"cat": "kernel", "name": "k"}]}))


def fail() -> None:
    raise KeyError("none")


def hang() -> None:
    raise DeviceHung("at work for ever")


def test_the_machine_against_a_stand_in_of_torch_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    properties = SimpleNamespace(L2_cache_size=5, major=9, minor=0, multi_processor_count=132, total_memory=7)
    stand_ins = {
        "Event": FakeEvent,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "CUDAGraph": FakeGraph,
        "graph": FakeGraph.captures,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": lambda stream: FakeStream.order.append("back"),
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda device: "H",
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 10,
        "max_memory_allocated": lambda: 13,
        "mem_get_info": lambda: (11, 12),
        "empty_cache": lambda: None,
        "set_sync_debug_mode": modes.append,
    }
    asked: list[str] = []

    def driver(command: list[str], **options: Any) -> Any:
        asked.append(command[1])
        if len(asked) == 3:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return SimpleNamespace(stdout="1, 2, 3, 4, 5\n" if "clocks" in command[1] else "570\n")

    monkeypatch.setattr(subprocess, "run", driver)
    monkeypatch.setattr(gpu_machine, "BUSY_SECONDS", 1e-5)
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.profiler, "profile", FakeProfile)
    monkeypatch.setattr(gpu_machine, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(gpu_machine, "MATMUL_WIDTH", 8)
    machine = CudaMachine(CPU)
    described = machine.describe()
    assert described["device"] == "H" and described["capability"] == "9.0" and described["driver"] == "570"
    assert list(machine.conditions().values()) == ["1", "2", "3", "4", "5"]
    assert machine.conditions() == machine.conditions() == {} and len(asked) == 3, "who does not answer is left alone"
    assert machine.copy_bandwidth() > 0 and machine.l2_bytes == 5 and machine.free_bytes() == 11
    assert machine.seconds(lambda: time.sleep(0.01), lead_s=1e-5) >= 0.01
    machine.keep_busy()
    assert torch.equal(machine.product, machine.factors[0] @ machine.factors[1])
    assert machine.peak_bytes(lambda: None) == 3
    with pytest.raises(KeyError), machine.no_waiting():
        raise KeyError
    assert modes == ["error", "default"]
    FakeStream.order = []
    assert machine.launches(lambda: FakeStream.order.append("work")) == [("kernel", "k")]
    assert FakeStream.order == ["profiled", "work", "stopped"]
    FakeStream.order = []
    with pytest.raises(KeyError):
        machine.launches(fail)
    with pytest.raises(DeviceHung):
        machine.launches(hang)
    assert FakeStream.order == ["profiled", "stopped", "profiled"], "stop() waits, for ever where the device hangs"
    with pytest.raises(KeyError):
        machine.capture(lambda: None, fail)
    assert FakeStream.order[-1] == "back"
    FakeStream.order = []
    machine.capture(lambda: FakeStream.order.append("warm up"), lambda: FakeStream.order.append("work"))()
    assert FakeStream.order == ["waits", "warm up", "waits", "capture", "work", "end", "back", "replay"]

    def breaks() -> None:
        monkeypatch.setattr(FakeGraph, "ends", fail)

    for _ in range(2):
        with pytest.raises(KeyError if not machine.broken_capture else RuntimeError, match="none"):
            machine.capture(lambda: None, breaks)
    assert machine.broken_capture == "KeyError: 'none'", "and no other is begun"


def test_launches_are_what_the_device_executes() -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": "fused_pass"}
    others = [{"cat": "cuda_runtime", "name": "cudaLaunchKernel"}, {"cat": "gpu_user_annotation", "name": "step"}, {}]
    memset = {"cat": "gpu_memset", "name": "Memset (Device)"}
    assert launches_of([kernel, *others, memset]) == [("kernel", "fused_pass"), ("gpu_memset", "Memset (Device)")]
