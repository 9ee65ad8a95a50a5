"""PTX as data: the instructions of one kernel, in the subset that Triton emits for the kernels here."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; the base is a register, a parameter or a symbol."""

    base: str
    offset: int


#: A register, number or symbol; several in braces; an address.
Operand = str | tuple[str, ...] | Address


@dataclass(frozen=True)
class Instruction:
    parts: tuple[str, ...]  # the opcode between its dots
    guard: tuple[str, bool] | None  # predicate, and the value that lets a thread take part
    operands: tuple[Operand, ...]
    text: str
    line: int  # of the PTX
    source: str  # "file.py:line:column" that it comes from

    def __str__(self) -> str:
        return f"{self.line} ({self.source}): {self.text}"


@dataclass
class Kernel:
    name: str
    threads: int
    registers: dict[str, str]  # type by prefix ("%r": "b32"), or by name
    code: list[Instruction]
    labels: dict[str, int]
    arrays: dict[str, bytes]  # constants in global memory


def parse(ptx: str) -> Kernel:
    """The only ``.entry`` of a module."""
    entry = re.search(r"\.entry (\w+)\(.*?\)\s*\.reqntid (\d+)[^{]*\n\{\n(.*?)\n\}", ptx, re.DOTALL)
    if entry is None:
        raise ValueError("no kernel in this PTX")
    body_line = ptx.count("\n", 0, entry.start(3)) + 1
    found = Kernel(entry[1], int(entry[2]), {}, [], {}, {})
    for name, values in re.findall(r"^\.global \.align \d+ \.b8 (\S+)\[\d+\] = \{(.*?)\};", ptx, re.MULTILINE):
        found.arrays[name] = bytes(int(value) for value in values.split(","))
    source = ""
    for number, line in enumerate(entry[3].splitlines(), body_line):
        code, _, comment = line.partition("//")
        if code.strip().startswith(".loc"):
            source = comment.split("@")[0].strip()
            continue
        if label := re.match(r"(\$\w+):", code):
            found.labels[label[1]] = len(found.code)
            code = code[label.end() :]
        for statement in code.split(";"):
            _statement(found, re.sub(r"^\s*\{(?!\s*%)|^\s*\}$", "", statement).strip(), number, source)
    return found


def _statement(kernel: Kernel, text: str, line: int, source: str) -> None:
    if declared := re.match(r"\.reg \.(\w+)\s+(.*)", text):
        for name in declared[2].split(","):
            kernel.registers[name.strip().partition("<")[0]] = declared[1]
    elif text and not text.startswith((".", "{", "}")):
        match = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
        if match is None:
            raise ValueError(f"line {line}: {text!r} is no instruction")
        guard = (match[2], not match[1]) if match[2] else None
        operands = tuple(_operand(one) for one in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[4]))
        parts = tuple(re.split(r"(?<!:)\.", match[3]))
        kernel.code.append(Instruction(parts, guard, operands, text, line, source))


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(one.strip() for one in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or 0))
    return text
