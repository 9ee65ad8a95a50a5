"""The options that all timing commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults, but for None, which says nothing: the help itself has to say what it stands for."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def add_timing_options(
    parser: argparse.ArgumentParser, *, of_each: str, compile_seconds: float, compile_of: str, after_each: str
) -> None:
    """``of_each``: what a sample is taken of; ``compile_of``: what the seconds for torch.compile are for;
    ``after_each``: when results are written anew.
    """
    parser.add_argument("--repeats", type=int, default=20, help=f"samples per {of_each}")
    parser.add_argument(
        "--compile-seconds", type=float, default=compile_seconds, help=f"for torch.compile, in {compile_of}"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"where to write the results, after each {after_each} anew (default: nowhere)",
    )


def check_timing_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a line that says what is wrong."""
    for name in ("repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
