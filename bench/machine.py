"""What a benchmark asks of the machine that it runs on, and the answers of a machine without a GPU."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from bench import environment

#: Category and name of a kernel, memset or copy.
Launch = tuple[str, str]

#: Larger than the caches of all but the largest servers, of which one core reaches a part.
HOST_COPY_BYTES = 1 << 28


class Machine(Protocol):
    """A device with its clocks and counters."""

    device: torch.device
    l2_bytes: int
    #: Whether work is queued, so that the host's time is not the device's.
    queues_work: bool

    def describe(self) -> dict[str, Any]:
        """Device, driver and versions, ready for JSON."""
        ...

    def conditions(self) -> dict[str, str]:
        """Clocks, temperature and what holds them back at the moment, where the machine tells."""
        ...

    def wait(self) -> None:
        """Until everything queued is done; DeviceHung where that never happens."""
        ...

    def seconds(self, work: Callable[[], object], lead_s: float = 0.0) -> float:
        """Device time of what ``work`` queues, behind other work of ``lead_s``, so that the queue does not run dry."""
        ...

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of one sample of large copies."""
        ...

    def occupy(self, seconds: float) -> None:
        """Queue work for about so long."""
        ...

    def keep_busy(self) -> None:
        """Queue matrix products on a second stream."""
        ...

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Memory that ``work`` allocates at most beyond what was allocated before it."""
        ...

    def free_bytes(self) -> int:
        """Memory that can be allocated."""
        ...

    def release(self) -> None:
        """Give back memory that nothing refers to."""
        ...

    def no_waiting(self) -> AbstractContextManager[None]:
        """Within it an operation that waits for the device is an error."""
        ...

    def capture(self, warm_up: Callable[[], object], work: Callable[[], object]) -> Callable[[], object]:
        """Run ``warm_up`` on a stream beside, then put ``work`` into a graph without running it; returns the replay."""
        ...

    def launches(self, work: Callable[[], object]) -> list[Launch]:
        """Category and name of each kernel, memset and copy that ``work`` launches."""
        ...


class HostMachine:
    """The processor itself: nothing is queued, nothing launched."""

    device = torch.device("cpu")
    l2_bytes = 0
    queues_work = False

    def describe(self) -> dict[str, Any]:
        return dict(environment.describe(torch.get_num_threads()))

    def conditions(self) -> dict[str, str]:
        return {}

    def wait(self) -> None:
        pass

    def seconds(self, work: Callable[[], object], lead_s: float = 0.0) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def copy_bandwidth(self) -> float:
        source, target = self._copied
        return 2 * HOST_COPY_BYTES / self.seconds(lambda: target.copy_(source))

    @cached_property
    def _copied(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(HOST_COPY_BYTES // 4), torch.ones(HOST_COPY_BYTES // 4)

    def occupy(self, seconds: float) -> None:
        pass

    def keep_busy(self) -> None:
        pass

    def peak_bytes(self, work: Callable[[], object]) -> int:
        return allocated_by(work)[0]

    def free_bytes(self) -> int:
        self.release()
        return available_bytes()

    def release(self) -> None:
        gc.collect()
        if sys.platform == "linux":  # glibc keeps what is given up in pieces below 32 MiB
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        yield

    def capture(self, warm_up: Callable[[], object], work: Callable[[], object]) -> Callable[[], object]:
        raise RuntimeError("a CPU has no CUDA graphs")

    def launches(self, work: Callable[[], object]) -> list[Launch]:
        work()
        return []


def allocated_by(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that ``work`` holds at most, and at its end, of what it has allocated on the CPU; by torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or every profile prints when it begins and ends
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most, held


def available_bytes() -> int:
    """Memory of the machine that can be taken without swapping; all of it where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
