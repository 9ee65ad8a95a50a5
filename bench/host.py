"""``python -m bench host``: what a fused step costs the host, on any machine; kernel launches are no-ops."""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from bench import environment, extras, record
from bench.machine import find_machine
from bench.table import format_table
from bench.timing import Spread
from fused_dals import DALS

#: Tensors and groups of the cases; the first and the largest give the cost per tensor, the second and third per group.
CASES = ((10, 1), (300, 1), (300, 300), (10_000, 1))
ELEMENTS = 64
WARMUP_STEPS = 5


@dataclass(frozen=True)
class HostCost:
    """Seconds of host time per step, and of the least that any step must do: read every gradient and its address."""

    tensors: int
    groups: int
    step_s: Spread
    addresses_s: Spread


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench host",
        description="Host time of one fused step: checks, comparison of all tensors with the last step, tables, "
        "preparation of the launches, which are no-ops here. With new gradients at every step, as in training. Times "
        "in microseconds. 'addresses': reading every gradient and its address, the least that a step must do.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=200, help="timed steps per case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {args.repeats}")
    if find_spec("triton") is None:
        raise SystemExit("error: triton missing: pip install triton (Linux)")
    if not torch.cuda.is_available():
        # The kernels are defined for CPU tensors and never run.
        os.environ["TRITON_INTERPRET"] = "1"
    extras.require("tqdm")
    from tqdm import tqdm

    costs = []
    with without_launches():
        for tensors, groups in tqdm(CASES, unit="case"):
            costs.append(measure(tensors, groups, args.repeats))
    print(cost_table(costs))
    if args.json is not None:
        found = {"repeats": args.repeats, "results": [asdict(cost) for cost in costs]}
        record.save(args.json, {"environment": environment.of_machine(find_machine()), **found})
        print(f"\nresults: {args.json}")
    return 0


class _NoLaunch:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def without_launches() -> Iterator[None]:
    """Kernels that do nothing, wherever a step of whole tensors launches one."""
    from fused_dals.kernels import fused_pass, grad_scan, prologue

    modules: dict[str, Any] = {"fused_pass": fused_pass, "grad_scan": grad_scan, "prologue": prologue}
    real = {name: getattr(module, name) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            setattr(module, name, _NoLaunch())
        yield
    finally:
        for name, module in modules.items():
            setattr(module, name, real[name])


def measure(tensors: int, groups: int, repeats: int) -> HostCost:
    """Steps of ``tensors`` small parameters in ``groups`` groups, with other gradients than the step before."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = [(f"{i}.weight", torch.nn.Parameter(torch.ones(ELEMENTS, device=device))) for i in range(tensors)]
    optimizer = DALS([{"params": named[i::groups]} for i in range(groups)], depth=0.5, fused=True)
    loss = torch.ones((), device=device)
    gradients = [[torch.ones_like(p) for _, p in named] for _ in range(2)]
    steps, addresses = [], []
    for step in range(WARMUP_STEPS + repeats):
        for (_, p), gradient in zip(named, gradients[step % 2], strict=True):
            p.grad = gradient
        start = time.perf_counter()
        optimizer.step(loss=loss)
        middle = time.perf_counter()
        list(map(torch.Tensor.data_ptr, map(attrgetter("grad"), [p for _, p in named])))
        end = time.perf_counter()
        if step >= WARMUP_STEPS:
            steps.append(middle - start)
            addresses.append(end - middle)
    return HostCost(tensors, groups, Spread.of(steps), Spread.of(addresses))


def cost_table(costs: Sequence[HostCost]) -> str:
    """Microseconds per step, then what one more tensor and one more group cost."""
    cells = []
    for cost in costs:
        times = [cost.step_s.median, cost.step_s.p10, cost.step_s.p90, cost.addresses_s.median]
        cells.append([f"{cost.tensors:,}", str(cost.groups), *(f"{1e6 * value:.0f}" for value in times)])
    table = format_table(["tensors", "groups", "median us", "p10 us", "p90 us", "addresses us"], cells)
    few, some, grouped, many = costs
    tensor = (many.step_s.median - few.step_s.median) / (many.tensors - few.tensors)
    address = (many.addresses_s.median - few.addresses_s.median) / (many.tensors - few.tensors)
    group = (grouped.step_s.median - some.step_s.median) / (grouped.groups - some.groups)
    per_tensor = f"per tensor {1e9 * tensor:.0f} ns, of which reading its address {1e9 * address:.0f}"
    return f"{table}\n\n{per_tensor}; per group {1e6 * group:.1f} us"
