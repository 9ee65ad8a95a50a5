"""The machine in the place of Triton's launches: ``FusedPass`` with its own tables, and PTX instead of Python.

Kernels are compiled in a process of its own (``python -m tests.ptx.launcher``), because the tests' interprets Triton.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_dals.fused import FusedPass
from fused_dals.launcher import ALIGNMENT
from tests.processes import ROOT, without_interpreter
from tests.ptx.machine import Code, Launch
from tests.ptx.memory import CELL, UNWRITTEN, WRITTEN, Memory
from tests.ptx.parse import parse

LOSS_TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

#: Kernel, type of the prologue's loss, constants with types by their names: what a launch is compiled for.
Request = tuple[str, str, tuple[tuple[str, Any], ...]]


class Compiler:
    """PTX as launches with aligned tensors get it. A context: the process ends with it."""

    def __init__(self, capability: int = 90) -> None:
        command = [sys.executable, "-m", "tests.ptx.launcher", str(capability)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=without_interpreter(), stdin=pipe, stdout=pipe, text=True
        )
        self._made: dict[Request, tuple[str, int]] = {}

    def __call__(self, request: Request) -> tuple[str, int]:
        """The text, and bytes of shared memory."""
        if request not in self._made:
            assert self._process.stdin is not None and self._process.stdout is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            ptx, shared = json.loads(self._process.stdout.readline())
            self._made[request] = ptx, shared
        return self._made[request]

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()


class Emulator:
    """Kernels ready to run, and what is seen when they do."""

    def __init__(self, compiler: Compiler, rewrite: Callable[[str, str], str] = lambda kernel, ptx: ptx) -> None:
        """``rewrite``: for tests that break a kernel, by its name."""
        self.compiler, self.rewrite = compiler, rewrite
        self.executed: Counter[str] = Counter()  # instructions of programs, by opcode
        self.races: dict[tuple[str, str], str] = {}
        self.limit = 100_000  # global accesses of a launch
        self._codes: dict[Request, Code] = {}

    def code(self, request: Request) -> Code:
        if request not in self._codes:
            ptx, shared = self.compiler(request)
            self._codes[request] = Code(parse(self.rewrite(request[0], ptx)), shared)
        return self._codes[request]

    def count(self, launch: Launch) -> None:
        for step, count in zip(launch.code.steps, launch.executed.tolist(), strict=True):
            self.executed[".".join(step.instruction.parts)] += count
        self.races |= launch.races()


class EmulatedLauncher:
    """Stands in for the launcher of a FusedPass."""

    def __init__(
        self,
        emulator: Emulator,
        fused: FusedPass,
        reached: Callable[[], Sequence[Tensor]],
        seed: int = 0,
        programs: int = 2,
        resident: int | None = None,
    ) -> None:
        """``reached``: tensors that kernels find through tables of addresses."""
        self.emulator, self.fused, self.reached, self.resident = emulator, fused, reached, resident
        self._draw = random.Random(seed)
        self._memory = Memory()
        self._known: dict[tuple[int, int], Tensor] = {}  # keeps them alive, so that no address is used twice
        fused.launcher = self  # type: ignore[assignment]
        fused.programs = programs

    def launch(
        self,
        kernel: Any,
        programs: int,
        arguments: tuple[Any, ...],
        *,
        num_warps: int,
        max_registers: None = None,
        **constants: Any,
    ) -> None:
        """As ``Launcher.launch``; nothing is launched again."""
        name = kernel.fn.__name__
        loss = LOSS_TYPES[arguments[kernel.arg_names.index("loss_sum")].dtype] if name == "prologue" else ""
        by_name = tuple((key, str(v) if key.endswith("_TYPE") else v) for key, v in constants.items())
        code = self.emulator.code((name, loss, by_name))
        own = [argument for argument in arguments if isinstance(argument, Tensor)]
        assert code.threads == 32 * num_warps and all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in own)
        self._memory.allow(self._spans(own) + code.arrays())
        # Triton adds two pointers to memory of its own.
        launch = Launch(code, self._memory, [*map(_encoded, arguments), 0, 0], programs)
        launch.run(self._draw.randrange(1 << 30), self.resident, self.emulator.limit)
        self.emulator.count(launch)

    def _spans(self, arguments: Sequence[Tensor]) -> list[tuple[int, Any]]:
        """Tensors that are new, as ``Memory.allow`` takes them; those from ``torch.empty`` have yet to be written."""
        fused = self.fused
        scratch = [fused.sync, getattr(fused.group_table, "scalars", fused.sync), *fused._scan_rows.values()]
        scratch += [launch.bucket.partials for launch in fused.launches]
        unwritten = {tensor.untyped_storage().data_ptr() for tensor in scratch}
        spans = []
        for tensor in [*arguments, *self.reached()]:
            key = tensor.data_ptr(), tensor.numel()
            if tensor.numel() and key not in self._known:
                self._known[key] = tensor
                status = UNWRITTEN if tensor.untyped_storage().data_ptr() in unwritten else WRITTEN
                spans.append((tensor.data_ptr(), _status(tensor, status)))
        return spans


def _status(tensor: Tensor, status: int) -> Any:
    """For each cell from the tensor's first byte on, whether the tensor has it: strides may leave some out."""
    cells = tensor.element_size() // CELL
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    found = torch.zeros(length * cells, dtype=torch.uint8)
    found.as_strided((*tensor.shape, cells), (*(cells * stride for stride in tensor.stride()), 1)).fill_(status)
    return found.numpy()


def _encoded(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return int(np.float32(argument).view(np.uint32)) if isinstance(argument, float) else int(argument)


# -- the process that compiles ----------------------------------------------------------------------------------------


def _compile(name: str, loss: str, constants: Sequence[tuple[str, Any]]) -> tuple[str, int]:
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from bench.machine_code import compile_ahead
    from fused_dals.kernels import variants

    signature, warps = {
        "fused_pass": (variants.PASS_SIGNATURE, variants.NUM_WARPS),
        "prologue": ({**variants.PROLOGUE_SIGNATURE, "loss_sum": loss}, 4),
        "grad_scan": (variants.SCAN_SIGNATURE, variants.NUM_WARPS),
        "ratios_of_norms": (variants.RATIOS_SIGNATURE, 4),
    }[name]
    chosen = {key: tl.dtype(value) if key.endswith("_TYPE") else value for key, value in constants}
    made = compile_ahead(getattr(variants, name), signature, chosen, GPUTarget("cuda", int(sys.argv[1]), 32), warps)
    return made.asm["ptx"], made.metadata.shared


def _serve() -> None:
    for line in sys.stdin:
        print(json.dumps(_compile(*json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
