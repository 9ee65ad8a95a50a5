"""The machine that a benchmark runs on."""

from __future__ import annotations

import torch

from bench.machine import HostMachine, Machine
from fused_dals.host_walk import HOST_WALK


def find_machine() -> Machine:
    """The current GPU, with the walk over tensors compiled, or the processor where there is none."""
    if not torch.cuda.is_available():
        return HostMachine()
    from bench.gpu.machine import CudaMachine

    HOST_WALK.want(wait=True)  # no step is timed while a compiler runs beside it
    return CudaMachine(torch.device("cuda", torch.cuda.current_device()))
