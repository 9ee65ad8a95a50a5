"""For tests that start a process: where, and how one compiles kernels that this one interprets."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def without_interpreter() -> dict[str, str]:
    """The environment of a process in which Triton compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
