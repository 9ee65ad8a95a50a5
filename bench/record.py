"""Results as JSON files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def save(path: Path, record: dict[str, Any]) -> None:
    """Write beside it and rename, so that a run that is killed leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")
    scratch.replace(path)


def _finite(value: Any) -> Any:
    """The same, with numbers that JSON does not have as text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
