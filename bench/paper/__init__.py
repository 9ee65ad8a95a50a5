"""``python -m bench paper``: the benchmark of arXiv:2604.27295, 18 strategies on its tasks; tables, figures, JSON."""

from __future__ import annotations

from collections.abc import Sequence

from bench import extras


def main(argv: Sequence[str] | None = None) -> int:
    extras.require("numpy", "scipy", "tqdm", "pytorch_optimizer", extra="paper")
    from bench.paper import cli  # the strategies alone, which the demonstration takes, need none of what it imports

    return cli.main(argv)
