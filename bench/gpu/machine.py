"""CUDA's answers to what a benchmark asks of a machine: all of torch.cuda that the benchmarks use stands here."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gpu.runner import DeviceLost
from bench.machine import Launch
from bench.timing import one_line

#: Far above what one launch, or what is queued before it, can take: a second.
HANG_SECONDS = 10.0
COPY_BYTES = 1 << 30
COPIES_PER_SAMPLE = 10
MATMUL_WIDTH = 4096
MATMULS = 16
#: Work while the driver is asked for clocks: those of an idle device say nothing.
BUSY_SECONDS = 1.0
#: The driver's tool answers in well under a second, or hangs as the device does.
DRIVER_SECONDS = 5.0
CONDITIONS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active")
LAUNCH_CATEGORIES = ("kernel", "gpu_memset", "gpu_memcpy")


class DeviceHung(DeviceLost):
    """Queued work does not end."""


class CudaMachine:
    """A CUDA device, the current one."""

    queues_work = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.driver_answers = True
        self.broken_capture = ""  # what a capture that could not be ended in order said
        properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes: int = properties.L2_cache_size
        self.source = torch.randn(COPY_BYTES // 4, device=self.device)
        self.target = torch.empty_like(self.source)
        self.factors = torch.randn(2, MATMUL_WIDTH, MATMUL_WIDTH, device=self.device).bfloat16()
        self.product = torch.empty_like(self.factors[0])
        self.side_stream = torch.cuda.Stream()
        self.copy_seconds = 2 * COPY_BYTES / max(self.copy_bandwidth() for _ in range(3))

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": torch.cuda.get_device_name(self.device),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": self.l2_bytes,
            "memory_bytes": properties.total_memory,
            "driver": self._ask_driver("driver_version").get("driver_version"),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }

    def conditions(self) -> dict[str, str]:
        self.occupy(BUSY_SECONDS)
        answers = self._ask_driver(*CONDITIONS)
        self.wait()
        return answers

    def _ask_driver(self, *questions: str) -> dict[str, str]:
        """Answers of nvidia-smi, of the first device; none where it does not answer, and no more questions then."""
        command = ["nvidia-smi", f"--query-gpu={','.join(questions)}", "--format=csv,noheader"]
        if not self.driver_answers:
            return {}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            self.driver_answers = isinstance(error, subprocess.CalledProcessError)
            return {}
        answers = [answer.strip() for answer in done.stdout.partition("\n")[0].split(",")]
        return dict(zip(questions, answers, strict=True)) if len(answers) == len(questions) else {}

    def wait(self) -> None:
        for stream in (torch.cuda.current_stream(), self.side_stream):
            event = torch.cuda.Event()
            event.record(stream)
            _wait_for(event)

    def seconds(self, work: Callable[[], object], lead_s: float = 0.0) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if lead_s > 0:
            self.occupy(lead_s)
        start.record()
        work()
        end.record()
        _wait_for(end)
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3

    def copy_bandwidth(self) -> float:
        def copies() -> None:
            for _ in range(COPIES_PER_SAMPLE):
                self.target.copy_(self.source)

        return COPIES_PER_SAMPLE * 2 * COPY_BYTES / self.seconds(copies)

    def occupy(self, seconds: float) -> None:
        for _ in range(math.ceil(seconds / self.copy_seconds)):
            self.target.copy_(self.source)

    def keep_busy(self) -> None:
        with torch.cuda.stream(self.side_stream):
            for _ in range(MATMULS):
                torch.mm(self.factors[0], self.factors[1], out=self.product)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def free_bytes(self) -> int:
        self.release()
        free: int = torch.cuda.mem_get_info()[0]
        return free

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def capture(self, warm_up: Callable[[], object], work: Callable[[], object]) -> Callable[[], object]:
        if self.broken_capture:
            raise RuntimeError(f"left out: torch may not give memory back since a capture broke: {self.broken_capture}")
        self.wait()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        self.wait()  # here, where it can be given up; capture begins with a wait of its own
        gc.collect()  # no graph of before may be destroyed in the midst of it
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        own: list[Exception] = []
        try:
            with torch.cuda.graph(graph):
                try:
                    work()
                except Exception as error:
                    own.append(error)
                    raise
        except Exception as error:
            if error not in own:  # the end of the capture itself; torch before 2.12 then goes on as if in a capture
                self.broken_capture = one_line(error)
            raise
        finally:
            torch.cuda.set_stream(before)  # where the capture fails, torch stays on the stream of the capture
        replay: Callable[[], object] = graph.replay
        return replay

    def launches(self, work: Callable[[], object]) -> list[Launch]:
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        profile.start()
        try:
            work()
            self.wait()
        except Exception:  # not DeviceHung: stop() would wait for the device
            profile.stop()
            raise
        profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            profile.export_chrome_trace(str(trace))
            return launches_of(json.loads(trace.read_text())["traceEvents"])


def launches_of(events: Iterable[Mapping[str, Any]]) -> list[Launch]:
    """Those among the events of a profiler's trace that the device executed."""
    return [(event["cat"], event["name"]) for event in events if event.get("cat") in LAUNCH_CATEGORIES]


def _wait_for(event: torch.cuda.Event) -> None:
    """Poll, because a wait for a kernel that never ends could not be given up."""
    deadline = time.monotonic() + HANG_SECONDS
    while not event.query():
        if time.monotonic() > deadline:
            raise DeviceHung(f"the device was still at work after {HANG_SECONDS:.0f} seconds")
        time.sleep(2e-5)
