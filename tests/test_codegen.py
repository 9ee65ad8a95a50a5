"""What the kernels compile to, read from the machine code of four kinds of GPU; needs Triton, but no GPU.

One process compiles all variants (`python -m bench codegen`), because this one may interpret Triton.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product

import pytest

pytest.importorskip("triton")

from bench.machine_code import TARGETS, Access, MachineCode, Synchronization, compile_ahead
from tests.processes import ROOT, without_interpreter

NVIDIA = [target for target in TARGETS if target.startswith("sm_")]

#: Two programs of 256 threads fit on an SM's 65536 registers; on AMD 128 leave four waves a SIMD.
MOST_REGISTERS = 128


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, MachineCode]]:
    """(label, facts) of every variant and target."""
    file = tmp_path_factory.mktemp("codegen") / "codegen.json"
    command = [sys.executable, "-m", "bench", "codegen", "--json", str(file)]
    subprocess.run(command, cwd=ROOT, env=without_interpreter(), check=True, capture_output=True)
    record = json.loads(file.read_text())
    assert record["failures"] == []
    found = []
    for row in record["results"]:
        label = row.pop("variant")
        accesses = tuple(Access(**access) for access in row.pop("accesses"))
        synchronization = tuple(Synchronization(**one) for one in row.pop("synchronization"))
        found.append((label, MachineCode(**row, accesses=accesses, synchronization=synchronization)))
    return found


def passes(compiled: list[tuple[str, MachineCode]], *targets: str) -> Iterator[MachineCode]:
    chosen = [code for _, code in compiled if code.kernel == "fused_pass" and code.target in targets]
    assert len(chosen) == 14 * len(targets), (
        "six kinds of tensors, with stage A writing and only reading; two of shards"
    )
    yield from chosen


def test_all_variants_compile_for_all_targets(compiled: list[tuple[str, MachineCode]]) -> None:
    assert {code.target for _, code in compiled} == set(TARGETS)
    assert {code.kernel for _, code in compiled} == {"fused_pass", "grad_scan", "prologue", "ratios_of_norms"}


def test_nothing_spills_and_registers_stay_in_bounds(compiled: list[tuple[str, MachineCode]]) -> None:
    for code in passes(compiled, *TARGETS):
        # Scalar registers of gfx942 spill into lanes of vector registers, not to memory: 5 where state is rounded.
        assert code.spill_bytes == 0 and code.scalar_spills <= 5, code
        assert code.registers <= MOST_REGISTERS, (code.target, code.registers)


def test_full_tiles_move_in_accesses_of_128_bits(compiled: list[tuple[str, MachineCode]]) -> None:
    """Every access of the unmasked path, and there are some: a mask from a loaded length would make them all narrow."""
    for code in passes(compiled, *NVIDIA):
        for operation in ("load", "store"):
            assert code.count(operation, True, "full") > 0
            assert code.count(operation, False, "full", "mixed", "unknown") == 0


def test_what_is_not_needed_again_is_marked(compiled: list[tuple[str, MachineCode]]) -> None:
    """Of float32 in full tiles, two accesses per tensor: stage B comes back for what is not marked, only.

    The compiler may unroll the loop over a stage's tiles, and so has each stage's accesses several times over.
    """
    # Loads not marked and marked, stores not marked and marked, in a tile of A and of B.
    # A writes: A loads p g h m and stores h m, B loads p m and stores p; all but p and m in A are marked.
    expected = {"A writes h m": ((4, 4, 2, 2), (0, 4, 0, 2)), "A reads": ((6, 0, 0, 0), (0, 8, 0, 6))}
    found = [(label.removeprefix("fp32,fp32,fp32 "), code) for label, code in compiled if code.target in NVIDIA]
    codes = [(*expected[label], code) for label, code in found if label in expected]
    assert len(codes) == 2 * len(NVIDIA)
    for of_a, of_b, code in codes:
        full = [access for access in code.accesses if access.form == "full"]
        kinds = [(operation, marked) for operation in ("load", "store") for marked in (False, True)]
        counts = [sum(a.count for a in full if (a.operation, a.evict_first) == kind) for kind in kinds]
        times = product(range(1, sum(counts)), repeat=2)
        assert any(counts == [i * a + j * b for a, b in zip(of_a, of_b, strict=True)] for i, j in times), counts
        assert not any(access.evict_first for access in code.accesses if access.form != "full")


def test_the_scan_of_the_gradients_reads_wide_and_writes_a_row(compiled: list[tuple[str, MachineCode]]) -> None:
    codes = [code for _, code in compiled if code.kernel == "grad_scan" and code.target in NVIDIA]
    assert len(codes) == 2 * len(NVIDIA)
    for code in codes:
        assert code.count("load", True, "full") > 0 and code.count("load", False, "full", "mixed", "unknown") == 0
        assert code.count("store", True) == 0 and code.spill_bytes == 0 and code.registers <= MOST_REGISTERS
        assert code.synchronization == ()


def test_arrivals_release_behind_a_barrier_and_waits_acquire(compiled: list[tuple[str, MachineCode]]) -> None:
    """From the PTX, at GPU scope: what the explorer in test_protocol.py takes for granted of a program's inside."""
    shards = {id(code) for label, code in compiled if "shards" in label}
    for code in passes(compiled, *NVIDIA):
        assert all(one.scope == "gpu" for one in code.synchronization)
        arrival = [one for one in code.synchronization if one.semantics == "acq_rel"]
        publication = [one for one in code.synchronization if one.semantics == "release"]
        waits = [one for one in code.synchronization if one.semantics == "acquire"]
        tickets = [one for one in code.synchronization if one.semantics == "relaxed"]
        # Ratios of shards are published by another kernel, between the stages.
        published = [] if id(code) in shards else ["atom.exch"]
        assert [one.operation for one in arrival] == ["atom.add"]
        assert [one.operation for one in publication] == published
        # On every way: who has a tensor's only chunk comes to the publication without an arrival.
        assert all(one.after_barrier for one in arrival + publication), (
            "all threads have written before one announces it"
        )
        # The wait is looked at once before the loop and once in it; all threads go on behind the one that waited.
        assert len(waits) == 2 and all(one.before_barrier for one in waits + arrival)
        assert len(tickets) == 2
        assert len(code.synchronization) == 5 + len(published)


@pytest.fixture(scope="module")
def ptx() -> dict[str, str]:
    """Of the pass over tensors that are all float32, all bfloat16, or bfloat16 with state in float32, for sm_90."""
    command = [sys.executable, "-m", "tests.test_codegen"]
    ran = subprocess.run(command, cwd=ROOT, env=without_interpreter(), check=True, capture_output=True)
    texts: dict[str, str] = json.loads(ran.stdout)
    return texts


def test_warps_of_a_program_do_not_wait_for_each_other_between_tiles(ptx: dict[str, str]) -> None:
    """Where no types have to change layouts: sums stay with their threads until the chunk is done."""
    for name, loads in {"fp32": 8, "bf16": 4, "mixed, same runs": 4, "mixed": 6}.items():
        blocks = re.split(r"^\$L__BB", ptx[name], flags=re.MULTILINE)
        loops = (block.partition(" bra ")[0] for block in blocks)
        (loop,) = (block for block in loops if len(re.findall(r"ld\.global\S*\.v4", block)) == loads)
        assert ("bar.sync" in loop) == (name == "mixed") and "shfl" not in loop
        assert len(re.findall(r"ld\.global\S*\.v2", loop)) == (4 if name == "mixed, same runs" else 0)


def test_stage_b_asks_for_all_of_a_chunk_before_it_stores(ptx: dict[str, str]) -> None:
    """p and m of 8192 elements, 32 a thread, in accesses of 16 bytes; and p is stored."""
    for name, (loads, stores) in {"fp32": (16, 8), "bf16": (8, 4), "mixed": (12, 4)}.items():
        blocks = re.split(r"^\$L__BB", ptx[name], flags=re.MULTILINE)
        kinds = [re.findall(r"\b(ld|st)\.global\S*\.v4", block.partition(" bra ")[0]) for block in blocks]
        assert ["ld"] * loads + ["st"] * stores in kinds


def test_stage_a_loads_two_tiles_together_where_all_is_16_bit(ptx: dict[str, str]) -> None:
    """p, g, h and m of each, of which g and h are marked, stand in one block, for one wait."""
    for name, tiles in {"fp32": 1, "bf16": 2, "mixed": 1}.items():
        wide_loads = {"fp32": (8, 4), "bf16": (4, 2), "mixed": (6, 3)}[name]  # of a tile, and the marked ones
        found = []
        for block in re.split(r"^\$L__BB", ptx[name], flags=re.MULTILINE):
            body = block.partition(" bra ")[0]
            loads = re.findall(r"ld\.global\S*\.v4", body)
            found.append((len(loads), sum("evict_first" in load for load in loads)))
        counts = [found.count((n * wide_loads[0], n * wide_loads[1])) for n in (1, 2)]
        assert counts == [1, tiles - 1], "each tile by itself, and where there are pairs, two"


def test_marks_are_for_the_l2_cache(ptx: dict[str, str]) -> None:
    """Machine code shows the mark alone, which could be one for the L1 cache."""
    marked = [line for line in ptx["fp32"].splitlines() if "L1::evict_first" in line]
    assert marked and all("L2::cache_hint" in line for line in marked)
    assert "createpolicy.fractional.L2::evict_first" in ptx["fp32"]


def test_bfloat16_is_rounded_to_nearest(ptx: dict[str, str]) -> None:
    """The interpreter truncates; a GPU must round."""
    conversions = [line.split()[0] for line in ptx["bf16"].splitlines() if "cvt" in line and "bf16" in line.split()[0]]
    narrowing = {name for name in conversions if ".bf16.f32" in name or ".bf16x2.f32" in name}
    assert narrowing and all(name.startswith("cvt.rn.") for name in narrowing), narrowing


def print_ptx() -> None:
    """The PTX of some variants of the pass for sm_90, as JSON."""
    from fused_dals.kernels.variants import codegen_variants

    names = {"fp32,fp32,fp32": "fp32", "bf16,bf16,bf16": "bf16", "bf16,bf16,fp32": "mixed"}
    labels = {f"{dtypes} A writes h m": name for dtypes, name in names.items()}
    chosen = {labels[label]: rest for label, *rest in codegen_variants() if label in labels}
    kernel, signature, constants, num_warps = chosen["mixed"]
    chosen["mixed, same runs"] = [kernel, signature, {**constants, "SAME_RUNS": True}, num_warps]
    texts = {}
    for name, (kernel, signature, constants, num_warps) in chosen.items():
        texts[name] = compile_ahead(kernel, signature, constants, TARGETS["sm_90"], num_warps).asm["ptx"]
    print(json.dumps(texts))


if __name__ == "__main__":
    print_ptx()
