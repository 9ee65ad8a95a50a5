"""Names of files and folders."""

import re


def slug(name: str) -> str:
    """The name of a strategy or model in lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
