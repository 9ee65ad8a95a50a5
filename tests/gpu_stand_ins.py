"""A machine without a GPU in the GPU's place, and a list of tiny tensors, for the tests of `bench gpu`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.byte_table import STEP_DTYPES
from bench.machine import HostMachine, Launch

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU kernels are compiled, not interpreted")

CPU = torch.device("cpu")
FP32, MIXED, BF16 = STEP_DTYPES.values()
TINY = [("a.weight", (40,)), ("b.weight", (3, 5)), ("b.bias", (5,))]


class CpuMachine(HostMachine):
    """Stands in for the GPU: host clocks, and counters that say what a test wants to hear."""

    queues_work = True

    def __init__(self, free: int = 1 << 40) -> None:
        self.device = CPU
        self.l2_bytes = 1 << 14
        self.free = free
        self.uses = 0

    def describe(self) -> dict[str, Any]:
        return {"device": "none", "driver": None}

    def copy_bandwidth(self) -> float:
        return 1e9

    def peak_bytes(self, work: Callable[[], object]) -> int:
        work()
        return 0

    def free_bytes(self) -> int:
        return self.free

    def release(self) -> None:
        pass

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Notices the control, which comes first, and nothing after it."""
        yield
        self.uses += 1
        if self.uses == 1:
            raise RuntimeError("called a synchronizing operation")

    def capture(self, warm_up: Callable[[], object], work: Callable[[], object]) -> Callable[[], object]:
        warm_up()
        return work

    def launches(self, work: Callable[[], object]) -> list[Launch]:
        work()
        return [("kernel", "fused_pass"), ("kernel", "prologue"), ("gpu_memcpy", "Memcpy DtoD")]
