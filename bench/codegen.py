"""``python -m bench codegen``: what the kernels compile to for each kind of GPU; needs Triton, but no GPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import environment, extras, record
from bench.table import format_table

if TYPE_CHECKING:
    from bench.machine_code import MachineCode

Variant = tuple[str, Any, Mapping[str, str], Mapping[str, Any], int]
HEADER = ["target", "dtypes", "registers", "shared", "spills", "wide ld/st", "narrow ld/st", "in full tiles"]
NOTES = """\
registers: per thread (AMD: vector registers). shared: bytes per program. spills: bytes stored and loaded per thread.
wide: global accesses of 128 bits; narrow: of less, as in the masked path for tails and in loads from tables.
in full tiles: narrow accesses among those of unmasked blocks; anything but 0/0 costs bandwidth.
Accesses are counted as they stand in the machine code: once each, in a loop or not."""


def variants() -> Iterator[Variant]:
    """Label, kernel, signature, constants and number of warps of each kernel to compile."""
    from fused_dals.kernels.variants import codegen_variants

    yield from codegen_variants()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench codegen",
        description="Compile the kernels ahead of time and print registers, shared memory, spills and the "
        "widths of global accesses, read from the machine code. Needs no GPU.",
    )
    parser.add_argument("--targets", nargs="+", metavar="TARGET", help="sm_90, gfx942, ... (default: all known)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results, line by line of source")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if find_spec("triton") is None:
        raise SystemExit("error: triton missing: pip install triton (Linux)")
    import triton

    if triton.knobs.runtime.interpret:
        raise SystemExit("error: TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    extras.require("tqdm")
    from tqdm import tqdm

    from bench.machine_code import TARGETS, compile_kernel

    targets = args.targets or list(TARGETS)
    for target in targets:
        if target not in TARGETS:
            parser.error(f"argument --targets: {target!r} is not one of {', '.join(TARGETS)}")

    compiled: list[tuple[str, MachineCode]] = []
    failures: list[str] = []
    jobs = [(target, variant) for target in targets for variant in variants()]
    for target, (label, kernel, signature, constants, num_warps) in tqdm(jobs, unit="kernel"):
        try:
            compiled.append((label, compile_kernel(kernel, signature, constants, target, num_warps)))
        except Exception as error:  # whatever the compiler raises; the other kernels are still worth a row
            failures.append(f"{target} {label} failed: {type(error).__name__}: {' '.join(str(error).split())}")
    print("\n".join([codegen_table(compiled), *failures, "", NOTES]))
    if args.json is not None:
        found = {
            "environment": {**environment.describe(torch.get_num_threads()), "triton": triton.__version__},
            "results": [{"variant": label, **asdict(code)} for label, code in compiled],
            "failures": failures,
        }
        record.save(args.json, found)
        print(f"\nresults: {args.json}")
    return 1 if failures else 0


def codegen_table(compiled: Sequence[tuple[str, MachineCode]]) -> str:
    """One line per target and variant; pairs are stores and loads for spills, loads and stores elsewhere."""
    return format_table(HEADER, [_cells(label, code) for label, code in compiled])


def _cells(label: str, code: MachineCode) -> list[str]:
    def pair(wide: bool, *forms: str) -> str:
        return "/".join(str(code.count(operation, wide, *forms)) for operation in ("load", "store"))

    spills = f"{code.spill_store_bytes}/{code.spill_load_bytes}"
    return [
        code.target,
        label,
        str(code.registers),
        str(code.shared_bytes),
        spills,
        pair(True),
        pair(False),
        pair(False, "full", "mixed", "unknown"),
    ]
