"""Compile Triton kernels ahead of time, without a GPU, and read facts off their machine code.

Registers, spills and global accesses come from the final code (SASS, AMD assembly). Every access carries
the source line that the debug information gives it, and what Triton's own code (TTIR) does on that line:
that tells the unmasked path of full tiles from the masked path of tails and from scalar table loads.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_dals.kernels.layout import COMPILER_OPTIONS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WIDE = 128  # bits
SEMANTICS = {"relaxed", "acquire", "release", "acq_rel"}
SCOPES = {"cta", "cluster", "gpu", "sys"}

Line = tuple[str, int]  # file name without folders, line number; ("", 0) where the compiler names none


@dataclass(frozen=True)
class Access:
    """Global accesses of one width that one source line became; `count` is static, loops count once."""

    operation: str  # "load", "store"
    bits: int  # per thread
    file: str
    line: int
    # What the line is in TTIR: "full" (an unmasked block), "masked" (a block), "scalar", "atomic", "mixed" (several
    # of these), "unknown". A scalar store is one thread's.
    form: str
    count: int
    evict_first: bool = False  # marked so; NVIDIA only


@dataclass(frozen=True)
class Synchronization:
    """A PTX instruction with memory semantics."""

    operation: str  # "atom.add", "atom.exch", "red.add", "ld", "st", "fence"
    semantics: str  # "relaxed", "acquire", "release", "acq_rel", "sc"; "" where none is written
    scope: str  # "cta", "cluster", "gpu", "sys"; "" where none is written
    after_barrier: bool  # bar.sync comes before it on every way that leads there, with no global write in between
    before_barrier: bool  # bar.sync comes after it in its basic block, with no global access in between


@dataclass(frozen=True)
class Resources:
    """What a thread and a block need. Spills are bytes per thread, counted once for each instruction."""

    registers: int  # of a vector lane on AMD
    scalar_registers: int  # AMD only
    scalar_spills: int  # AMD only: scalar registers kept in vector registers for want of room
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class MachineCode(Resources):
    """The facts about one kernel, compiled for one target."""

    kernel: str
    target: str
    num_warps: int
    shared_bytes: int
    accesses: tuple[Access, ...]
    synchronization: tuple[Synchronization, ...]  # NVIDIA only

    def count(self, operation: str, wide: bool, *forms: str) -> int:
        """Wide (128 bits and more) or narrow "load"s or "store"s, of the given forms only where some are given."""
        return sum(
            access.count
            for access in self.accesses
            if access.operation == operation and (access.bits >= WIDE) == wide and (not forms or access.form in forms)
        )

    def widths(self, operation: str) -> dict[int, int]:
        """How many accesses of each width in bits."""
        widths: Counter[int] = Counter()
        for access in self.accesses:
            if access.operation == operation:
                widths[access.bits] += access.count
        return dict(sorted(widths.items()))

    @property
    def spill_bytes(self) -> int:
        return self.spill_store_bytes + self.spill_load_bytes


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: GPUTarget,
    num_warps: int,
    attrs: Mapping[str, int] | None = None,
) -> Any:
    """Compile a `triton.jit` function as its launches do; returns what Triton makes of it.

    `signature` has a type ("*fp32", "i64") for each argument that is not in `constants`; `attrs` says by which power
    of two an argument is divisible, by default 16 for each pointer whose alignment the kernel specializes on: what a
    launch with tensors of 16-byte aligned addresses gives.
    """
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    if attrs is None:
        attrs = {
            parameter.name: 16
            for parameter in kernel.params
            if types[parameter.name].startswith("*")
            and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        }
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", value]] for name, value in attrs.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=divisible)
    return triton.compile(source, target=target, options={"num_warps": num_warps, **COMPILER_OPTIONS})


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    num_warps: int,
    attrs: Mapping[str, int] | None = None,
) -> MachineCode:
    """Compile a `triton.jit` function for one of `TARGETS`, as `compile_ahead` does, and read its machine code."""
    compiled = compile_ahead(kernel, signature, constants, TARGETS[target], num_warps, attrs)
    forms = access_forms(compiled.asm["ttir"])
    if TARGETS[target].backend == "cuda":
        usage, sass = disassemble(compiled.asm["cubin"])
        resources, accesses = sass_resources(usage, sass), sass_accesses(sass, forms)
        synchronization = ptx_synchronization(compiled.asm["ptx"])
    else:
        assembly = compiled.asm["amdgcn"]
        resources, accesses = amd_resources(assembly), amd_accesses(assembly, forms)
        synchronization = ()
    return MachineCode(
        **asdict(resources),
        kernel=compiled.metadata.name,
        target=target,
        num_warps=num_warps,
        shared_bytes=compiled.metadata.shared,  # allocated at launch: the machine code does not tell
        accesses=accesses,
        synchronization=synchronization,
    )


def access_forms(ttir: str) -> dict[Line, str]:
    """For each source line that accesses global memory, what kind of access it is in Triton's first code."""
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))
    forms: dict[Line, str] = {}
    pattern = r"\btt\.(load|store|atomic_\w+) (.*) : (.*) loc\((#loc\d*)\)$"
    for operation, operands, kind, location in re.findall(pattern, ttir, re.MULTILINE):
        if operation.startswith("atomic"):
            form = "atomic"
        elif not kind.startswith("tensor<"):
            form = "scalar"
        else:
            masked = len(re.findall(r"%[\w.$#-]+", operands)) > (1 if operation == "load" else 2)
            form = "masked" if masked else "full"
        line = _innermost(location, locations)
        forms[line] = form if forms.get(line, form) == form else "mixed"
    return forms


def _innermost(location: str, locations: Mapping[str, str]) -> Line:
    """Follow named and call-site locations down to the file and line that hold the operation itself."""
    text = locations.get(location, "")
    if place := re.match(r'"([^"]*)":(\d+):', text):
        return Path(place[1]).name, int(place[2])
    inner = re.search(r"#loc\d*", text)
    return _innermost(inner[0], locations) if inner else ("", 0)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The resource usage and the SASS with source lines of an NVIDIA binary, by the tools in Triton's wheel."""
    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        commands = (
            [tools.cuobjdump.path, "-res-usage", str(file)],
            [tools.nvdisasm.path, "-g", "-c", "-ndf", str(file)],
        )
        usage, sass = (subprocess.run(command, check=True, capture_output=True, text=True) for command in commands)
    return usage.stdout, sass.stdout


def sass_instructions(sass: str) -> Iterator[tuple[list[str], Line]]:
    """Each instruction's dotted parts without its guard, with its source line."""
    line: Line = ("", 0)
    for text in sass.splitlines():
        if place := re.match(r'\s*//## File "([^"]*)", line (\d+)', text):
            line = Path(place[1]).name, int(place[2])
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text):
            yield instruction[1].split("."), line


def sass_bits(parts: list[str]) -> int:
    """Width of a memory instruction: 32 bits unless a part says otherwise."""
    return next((int(part[-3:].lstrip("US")) for part in parts if re.fullmatch(r"[US]?(8|16|64|128|256)", part)), 32)


def sass_accesses(sass: str, forms: Mapping[Line, str]) -> tuple[Access, ...]:
    """Global accesses; a generic one (LD, ST) counts as global, since Triton has no other generic pointers."""
    operations = {"LDG": "load", "LD": "load", "LDGSTS": "load", "STG": "store", "ST": "store"}
    found = (
        (operations[parts[0]], sass_bits(parts), line, "EF" in parts)
        for parts, line in sass_instructions(sass)
        if parts[0] in operations
    )
    return _collect(found, forms)


def sass_resources(usage: str, sass: str) -> Resources:
    """Spills are the accesses to local memory: Triton puts nothing else there."""
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise ValueError(f"no resource usage in {usage!r}")
    local = Counter[str]()
    for parts, _ in sass_instructions(sass):
        if parts[0] in ("LDL", "STL"):
            local[parts[0]] += sass_bits(parts) // 8
    return Resources(
        registers=int(match[1]),
        scalar_registers=0,
        scalar_spills=0,
        stack_bytes=int(match[2]),
        spill_store_bytes=local["STL"],
        spill_load_bytes=local["LDL"],
    )


def amd_accesses(assembly: str, forms: Mapping[Line, str]) -> tuple[Access, ...]:
    """Vector accesses to global memory. Uniform loads on the scalar unit (s_load: arguments, tables) are left out."""
    return _collect(
        (
            (operation, bits, line, False)
            for space, operation, bits, line in _amd_memory(assembly)
            if space != "scratch"
        ),
        forms,
    )


def amd_resources(assembly: str) -> Resources:
    """From the metadata at the end of the assembly, and the scratch accesses for the spills."""

    def metadata(name: str) -> int:
        match = re.search(rf"^\s+(?:- )?\.{name}:\s+(\d+)$", assembly, re.MULTILINE)
        if match is None:
            raise ValueError(f"no .{name} in the metadata of the assembly")
        return int(match[1])

    spilled = Counter[str]()
    for space, operation, bits, _ in _amd_memory(assembly):
        if space == "scratch":
            spilled[operation] += bits // 8
    return Resources(
        registers=metadata("vgpr_count"),
        scalar_registers=metadata("sgpr_count"),
        scalar_spills=metadata("sgpr_spill_count"),
        stack_bytes=metadata("private_segment_fixed_size"),
        spill_store_bytes=spilled["store"],
        spill_load_bytes=spilled["load"],
    )


def _amd_memory(assembly: str) -> Iterator[tuple[str, str, int, Line]]:
    """Address space, operation, width and source line of each vector memory access."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+) .*?"([^"]*)"(?: md5 \S+)?$', assembly, re.MULTILINE))
    sizes = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "sshort": 16, "dword": 32}
    line: Line = ("", 0)
    for text in assembly.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            line = Path(files.get(place[1], "")).name, int(place[2])
        elif access := re.match(
            r"\s*(global|flat|buffer|scratch)_(load|store)_(?:lds_)?([a-z]+)(?:_d16(?:_hi)?)?(?:x(\d))?\b", text
        ):
            yield access[1], access[2], sizes[access[3]] * int(access[4] or 1), line


def _collect(found: Iterator[tuple[str, int, Line, bool]], forms: Mapping[Line, str]) -> tuple[Access, ...]:
    """Count equal accesses and give each the form of its line."""
    return tuple(
        Access(operation, bits, line[0], line[1], forms.get(line, "unknown"), count, evict_first)
        for (operation, bits, line, evict_first), count in sorted(Counter(found).items())
    )


def ptx_synchronization(ptx: str) -> tuple[Synchronization, ...]:
    """Atomics, fences, and loads and stores with memory semantics, in the order of the text."""
    code, origins = _ptx_code(ptx)
    return tuple(
        Synchronization(
            operation=_ptx_operation(parts),
            semantics=next((part for part in parts if part in SEMANTICS | {"sc"}), ""),
            scope=_ptx_scope(parts),
            after_barrier=_comes_behind_barriers(code, origins, index),
            before_barrier=_meets_barrier(code[index + 1 :]),
        )
        for index, parts in enumerate(code)
        if parts[0] in ("atom", "red", "fence", "membar")
        or (parts[0] in ("ld", "st") and SEMANTICS.intersection(parts))
    )


def _ptx_code(ptx: str) -> tuple[list[list[str]], list[list[int]]]:
    """Each instruction's dotted parts without its guard, ["label"] where a basic block begins; and what may come
    directly before each of them, -1 for the beginning."""
    code: list[list[str]] = []
    goes_on: list[bool] = []  # whether the next instruction may follow
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in ptx.splitlines():
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = len(code)
            code.append(["label"])
            goes_on.append(True)
        for statement in line.partition("//")[0].split(";"):
            if opcode := re.match(r"[\s{]*(@!?%\w+\s+)?([a-z][\w.:]*)\s*[\s\[]", statement + " "):
                parts = re.split(r"[.:]+", opcode[2])
                if parts[0] == "bra":
                    branches.append((len(code), statement.split()[-1]))
                code.append(parts)
                goes_on.append(opcode[1] is not None or parts[0] not in ("bra", "ret", "exit"))
    origins = [[index - 1] if index == 0 or goes_on[index - 1] else [] for index in range(len(code))]
    for index, label_name in branches:
        origins[labels[label_name]].append(index)
    return code, origins


def _ptx_operation(parts: list[str]) -> str:
    if parts[0] not in ("atom", "red"):
        return "fence" if parts[0] == "membar" else parts[0]
    names = {"add", "exch", "cas", "min", "max", "inc", "dec", "and", "or", "xor"}
    return ".".join([parts[0], *(part for part in parts if part in names)])


def _ptx_scope(parts: list[str]) -> str:
    if parts[0] == "membar":  # of old: membar.cta, membar.gl, membar.sys
        return "gpu" if "gl" in parts else parts[-1]
    return next((part for part in parts if part in SCOPES), "")


def _is_barrier(parts: list[str]) -> bool:
    return parts[0] in ("bar", "barrier") and "warp" not in parts


def _is_global(parts: list[str], operations: tuple[str, ...]) -> bool:
    return parts[0] in operations and not {"shared", "param", "local", "const"}.intersection(parts)


def _comes_behind_barriers(code: list[list[str]], origins: list[list[int]], index: int) -> bool:
    """Whether all that leads to an instruction meets a barrier, with no write to global memory in between."""
    seen, ahead = {index}, list(origins[index])
    while ahead:
        at = ahead.pop()
        if at < 0 or _is_global(code[at], ("st", "atom", "red")):
            return False
        if at not in seen and not _is_barrier(code[at]):
            seen.add(at)
            ahead += origins[at]
    return True


def _meets_barrier(code: list[list[str]]) -> bool:
    """Whether a barrier comes before the end of the basic block and before any access to global memory."""
    for parts in code:
        if _is_barrier(parts):
            return True
        if parts[0] in ("label", "bra", "ret") or _is_global(parts, ("ld", "st", "atom", "red")):
            return False
    return False
