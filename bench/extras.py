"""Checks for optional dependencies, so that a missing one is one clear line."""

from importlib.util import find_spec


def require(*modules: str, extra: str = "demo") -> None:
    """Exit with the command that installs `extra` when any of `modules` cannot be imported."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise SystemExit(f"error: {', '.join(missing)} missing: pip install '.[{extra}]'")
