"""``python -m bench micro``: time one optimizer step, all contenders side by side."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench import environment, extras
from bench.contenders import BASELINE, CONTENDERS
from bench.shapes import SHAPES
from bench.table import format_table
from bench.timing import WARMUP_ROUNDS, Summary, measure, summarize


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench micro",
        description="Time one optimizer step on the CPU (fp32): all contenders in one process, one "
        f"step each in turn. Times are in milliseconds, after {WARMUP_ROUNDS} warm-up rounds. "
        "Memory: about 20 times the parameters (gpt2: 10 GB).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["resnet50"], help="parameter lists")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps per contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    extras.require("tqdm")
    from tqdm import tqdm

    torch.set_num_threads(args.threads)
    results = []
    total = len(args.shapes) * len(CONTENDERS) * (WARMUP_ROUNDS + args.repeats)
    with tqdm(total=total, unit="step") as bar:
        for model in args.shapes:
            bar.set_description(model)
            shapes = list(SHAPES[model]())
            parameters = sum(math.prod(shape) for _, shape in shapes)
            rows = summarize(measure(shapes, CONTENDERS, args.repeats, bar.update), BASELINE)
            bar.write(f"\n{model}: {len(shapes)} tensors, {parameters:,} parameters, fp32\n")
            bar.write(timing_table(rows))
            results.append(
                {
                    "shapes": model,
                    "tensors": len(shapes),
                    "parameters": parameters,
                    "dtype": "float32",
                    "contenders": [asdict(row) for row in rows],
                }
            )
    if args.json is not None:
        record = {
            "environment": environment.describe(args.threads),
            "baseline": BASELINE,
            "repeats": args.repeats,
            "results": results,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nresults: {args.json}")
    return 0


def timing_table(rows: Sequence[Summary]) -> str:
    """Times in milliseconds and the median ratio to the baseline; failures below the table."""
    cells, failures = [], []
    for row in rows:
        if row.time_s is None:
            failures.append(f"{row.contender} failed: {row.error}")
            continue
        spread = row.time_s
        times = [f"{1e3 * value:.1f}" for value in (spread.median, spread.p10, spread.p90)]
        ratio = "-" if row.ratio is None else f"{row.ratio.median:.2f}"
        cells.append([row.contender, *times, ratio])
    header = ["contender", "median ms", "p10 ms", "p90 ms", f"x {BASELINE}"]
    return "\n".join([format_table(header, cells), *failures])
