"""Checks for optional dependencies, so that a missing one is one clear line."""

from collections.abc import Sequence
from importlib.util import find_spec

#: The extra that installs what a command may need when it is imported.
EXTRA_OF = {"numpy": "demo", "tqdm": "demo", "matplotlib": "demo", "triton": "fused"}


def explain(error: ModuleNotFoundError) -> None:
    """Exit with the command that installs what could not be imported, where it is an optional dependency."""
    name = (error.name or "").split(".")[0]
    if name in EXTRA_OF:
        raise SystemExit(_missing([name], EXTRA_OF[name])) from error


def require(*modules: str, extra: str = "demo") -> None:
    """Exit with the command that installs `extra` when any of `modules` cannot be imported."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise SystemExit(_missing(missing, extra))


def _missing(names: Sequence[str], extra: str) -> str:
    return f"error: {', '.join(names)} missing: pip install '.[{extra}]'"
