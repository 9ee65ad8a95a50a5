"""The cases of ``python -m bench micro`` through pytest-benchmark: ``pytest bench --benchmark-only``.

One contender after the other, where the command takes turns: for comparisons take the command.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.byte_table import STEP_DTYPES
from bench.compiled import CompileBudget, CompiledReference
from bench.machine import Machine
from bench.micro import SEED, contenders_of
from bench.shapes import SHAPES
from bench.timing import MEMORY_SHARE, WARMUP_STEPS, make_parameters, needed_bytes, one_line

ROUNDS, COMPILE_SECONDS = 10, 120.0


def test_step(benchmark: BenchmarkFixture, machine: Machine, model: str, dtypes_name: str, contender: str) -> None:
    shapes, dtypes = list(SHAPES[model]()), STEP_DTYPES[dtypes_name]
    compiled = CompiledReference(dtypes, CompileBudget(COMPILE_SECONDS, COMPILE_SECONDS))
    found = contenders_of(dtypes, machine, compiled)[contender]
    needed, free = needed_bytes(shapes, dtypes, found), MEMORY_SHARE * machine.free_bytes()
    if needed > free:
        pytest.skip(f"needs {needed / 1e9:.3g} GB of {free / 1e9:.3g} GB")
    named = make_parameters(shapes, dtypes, machine.device, SEED)
    try:
        step = found.build(named)
        step()
    except Exception as error:  # missing, or not for this machine
        pytest.skip(one_line(error))

    def step_and_wait() -> None:
        step()
        machine.wait()

    benchmark.group = f"{model} {dtypes_name}"
    benchmark.extra_info["bytes_per_parameter"] = found.moves
    benchmark.pedantic(step_and_wait, rounds=ROUNDS, warmup_rounds=WARMUP_STEPS)  # type: ignore[no-untyped-call]
