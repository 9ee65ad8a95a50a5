"""Command line of the benchmarks: one subcommand per module, imported only when it is chosen."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from bench import extras

COMMANDS = {
    "demo": "train a small task with the DALS family, SGD and AdamW; table, figure, JSON",
    "micro": "time one optimizer step on real parameter lists; table, JSON",
    "train": "time whole training steps of a GPT-2 and a ViT, and the optimizer's share; tables, JSON",
    "traffic": "predict the bytes that a fused step moves on any GPU, and what window to take; tables, JSON",
    "counters": "on a GPU, under ncu: the bytes that a fused step moves, by the device's counters; table, JSON",
    "report": "write the tables of README.md and docs/, and the plots, from the files in bench/results",
    "host": "time what a fused step costs the host, launches left out; table, JSON",
    "codegen": "compile the kernels for several GPUs, without one: registers, spills, access widths; table, JSON",
    "sharding": "what sharding adds to a step: collectives, bytes, time, by arithmetic from links that you assume",
    "paper": "the benchmark of the paper: 18 strategies on its tasks, with seeds; tables, figures, JSON",
    "gpu": "on a GPU: correctness of the kernels, races, launches, step time beside other optimizers; tables, JSON",
}


def main(argv: Sequence[str] | None = None) -> int:
    listing = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Demonstration and benchmarks of fused_dals.",
        epilog=f"commands:\n{listing}\n\n'python -m bench COMMAND --help' lists its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", nargs="?")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the command")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        module = importlib.import_module(f"bench.{args.command}")
    except ModuleNotFoundError as error:
        extras.explain(error)
        raise
    status: int = module.main(args.options)
    return status


if __name__ == "__main__":
    sys.exit(main())
