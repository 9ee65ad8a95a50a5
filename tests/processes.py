"""For tests that start a process: where, how one compiles kernels that this one interprets, whether one still runs."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def without_interpreter() -> dict[str, str]:
    """The environment of a process in which Triton compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended and only waits to be asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
