"""What a result depends on besides the code: machine, versions, threads, date."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fused_dals

SOURCES = (".py", ".cpp", ".h")

#: Packages whose version a result depends on, besides torch; None where one is not installed.
PACKAGES = ("triton", "numpy", "torch-optimi", "flashoptim", "pytorch_optimizer", "bitsandbytes")


def cpu_model() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe(threads: int) -> dict[str, str | int]:
    """A JSON-ready description of this run's environment."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": cpu_model(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_dals": fused_dals.__version__,
    }


def source_hash() -> str:
    """Of the package's sources, which tells what was measured also where there is no repository."""
    from fused_dals import kernels

    digest = hashlib.sha256()
    for module in (fused_dals, kernels):  # one lies in the other, or beside it
        folder = Path(str(module.__file__)).parent
        for path in sorted(path for path in folder.iterdir() if path.suffix in SOURCES):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def of_machine(described: Mapping[str, Any]) -> dict[str, Any]:
    """What a machine says of itself, and the versions of everything that matters."""
    host = describe(torch.get_num_threads())
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        **host,
        "source": source_hash(),
        "cpu": host["device"],
        **versions,
        **described,
        "kernel": platform.release(),
    }
