"""Results as files that are whole or not there."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def save(path: Path, record: dict[str, Any]) -> None:
    """A run that is killed leaves the last whole file. What JSON does not know is there as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(_finite(record), indent=1, allow_nan=False, default=str) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Whoever is killed here leaves the old file or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _finite(value: Any) -> Any:
    """The same, with numbers that JSON does not have as text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
