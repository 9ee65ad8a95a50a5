"""What a result depends on besides the code: machine, versions, threads, date."""

import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

import fused_dals


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
