"""How a launch of the fused pass is cut up and run: what is free to choose, because no result depends on it.

But for the chunk: what it adds up is rounded to float32 (SPEC leaves the order of sums open).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fused_dals.kernels import layout

#: Resident programs per multiprocessor that the registers of the kernel allow with 8 warps (128 x 256 x 2 = 65536).
PROGRAMS_PER_SM = 2
#: Chunks of stage A between a tensor's own and its stage B, for each program. When the first item of stage B is drawn,
#: all programs are at the tensor's last chunks or have just begun theirs; with as many other chunks before it they are
#: done by the time. With whole tensors in between, as many as a part of the L2 cache holds, an H200's programs waited
#: for ratios during 13 to 25 % of their time (bench/cache_model.py, from what was measured).
WINDOW_PER_PROGRAM = 1


def programs_on(device: torch.device, per_sm: int = PROGRAMS_PER_SM) -> int:
    """How many programs a launch has; by default all of them are resident."""
    return 2 if device.type != "cuda" else per_sm * torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class LaunchPlan:
    """Of one device. The defaults are what the optimizer takes; docs/design.md has the reasons.

    Stage A writing h and m moves fewer bytes (36 against 40 per float32 parameter, where B finds nothing in the cache),
    and does so everywhere except on AMD, where Triton's barrier before the arrival does not wait for the other waves'
    stores to memory.
    """

    #: Elements of a chunk; where None, ``layout.chunk_elements`` of the dtypes.
    chunk: int | None = None
    #: Elements that a program has in its registers at a time; no more than the chunk.
    tile: int = layout.TILE
    #: Most elements of a tile of stage B, a whole chunk up to there, where stage A writes.
    most_in_b: int = layout.MOST_IN_B
    #: Whether stage A loads two tiles together where there are registers for it.
    in_pairs: bool = True
    #: Chunks between a tensor's stage A and its stage B; where None, WINDOW_PER_PROGRAM for each program.
    window: int | None = None
    #: Whether h and m are written in stage A; where None, but on AMD.
    stage_a_writes: bool | None = None
    #: Whether what a step does not touch again is marked so, for the sake of the L2 cache.
    evict_first: bool = True
    #: Of 16-bit parameters with float32 state, or the other way round: 16-bit numbers go 8 bytes at a time instead of
    #: 16, which needs no barriers.
    same_runs: bool = False
    num_warps: int = layout.NUM_WARPS
    programs_per_sm: int = PROGRAMS_PER_SM
    #: Of a thread of the pass; left to the compiler where None.
    max_registers: int | None = None

    def programs(self, device: torch.device) -> int:
        """Of a launch on the device."""
        return programs_on(device, self.programs_per_sm)

    def window_on(self, device: torch.device) -> int:
        """In chunks."""
        return WINDOW_PER_PROGRAM * self.programs(device) if self.window is None else self.window

    def a_writes(self) -> bool:
        """Whether h and m are written in stage A."""
        return torch.version.hip is None if self.stage_a_writes is None else self.stage_a_writes

    def chunk_of(self, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> int:
        """Elements of a chunk of tensors of these dtypes."""
        return self.chunk or layout.chunk_elements(param.itemsize, grad.itemsize, state.itemsize)

    def decided(self, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> LaunchPlan:
        """The same with chunk and stage A's writes as they are for these dtypes where it leaves them open."""
        return replace(self, chunk=self.chunk_of(param, grad, state), stage_a_writes=self.a_writes())


#: What the optimizer takes.
IN_USE = LaunchPlan()
