"""``python -m bench host``: what a fused step costs the host, on any machine; kernel launches are no-ops."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch

from bench import environment, extras, record
from bench.find import find_machine
from bench.options import HelpFormatter
from bench.table import format_table
from bench.timing import Spread
from fused_dals import DALS
from fused_dals.host_walk import HOST_WALK
from fused_dals.sharding import local

#: What is stepped: plain tensors; DTensors, as FSDP2 has them; plain tensors whose gradients the step unscales; plain
#: tensors of which every tenth has no gradient, others at every step.
PLAIN, DTENSORS, UNSCALED, MISSING = "plain", "DTensors", "unscaled", "some missing"

#: Tensors, groups and kind of the cases: the first beside the second and the fourth give the cost of one more tensor,
#: the second and the third that of one more group.
CASES = (
    (10, 1, PLAIN), (300, 1, PLAIN), (300, 300, PLAIN), (10_000, 1, PLAIN),
    (300, 1, DTENSORS), (300, 1, UNSCALED), (300, 1, MISSING),
)  # fmt: skip
ELEMENTS = 64

#: How the optimizer looks for what changed: by host_walk.cpp, or without it.
COMPILED_WALK, IN_PYTHON = "compiled", "in Python"

WARMUP_STEPS = 5

#: What one more plain tensor may cost with the compiled walk, in seconds.
MOST_PER_TENSOR = 0.2e-6


@dataclass(frozen=True)
class HostCost:
    """Seconds of host time per step by either walk: with gradients elsewhere than before, and with a new learning rate
    in every group besides, as under a scheduler; and of reading every gradient and its address in Python.
    """

    walk: str
    tensors: int
    groups: int
    kind: str
    step_s: Spread
    scheduled_s: Spread
    addresses_s: Spread


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench host",
        description="Host time of one fused step, in microseconds: checks, comparison of all tensors with the last "
        "step, tables, preparation of the launches, which are no-ops here. With new gradients at every step, as in "
        "training; with the compiled walk over the tensors and without it. 'new lr': every group's learning rate "
        "changed, too. 'addresses': reading every gradient and its address in Python. Then the same for DTensors, as "
        "FSDP2 has them, for gradients that the step unscales (amp_fused), and where every tenth gradient is missing, "
        "others at every step.",
        formatter_class=HelpFormatter,
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

    walks = [COMPILED_WALK, IN_PYTHON]
    if HOST_WALK.want(wait=True) is None:
        print(f"no compiled walk: {HOST_WALK.why_not}")
        walks.remove(COMPILED_WALK)
    costs = []
    with without_launches():
        for tensors, groups, kind in tqdm(CASES, unit="case"):
            costs += measure(tensors, groups, kind, walks, args.repeats)
    print(cost_table(costs))
    if args.json is not None:
        found = {"repeats": args.repeats, "results": [asdict(cost) for cost in costs]}
        record.save(args.json, {"environment": environment.of_machine(find_machine().describe()), **found})
        print(f"\nresults: {args.json}")
    return 0


def using(walk: str) -> AbstractContextManager[None]:
    """The compiled walk, where there is one, or none."""
    return HOST_WALK.left_out() if walk == IN_PYTHON else nullcontext()


class _NoLaunch:
    """A kernel that does nothing, also as what Triton has compiled."""

    def __init__(self, arg_names: Sequence[str]) -> None:
        self.arg_names = arg_names

    def __getitem__(self, grid: Any) -> Callable[..., _NoLaunch]:
        return lambda *args, **kwargs: self


@contextmanager
def without_launches() -> Iterator[None]:
    """Kernels that do nothing, wherever a step of whole tensors launches one."""
    from fused_dals.kernels import fused_pass, grad_scan, prologue

    modules: dict[str, Any] = {"fused_pass": fused_pass, "grad_scan": grad_scan, "prologue": prologue}
    real = {name: getattr(module, name) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            setattr(module, name, _NoLaunch(real[name].arg_names))
        yield
    finally:
        for name, module in modules.items():
            setattr(module, name, real[name])


def measure(tensors: int, groups: int, kind: str, walks: Sequence[str], repeats: int) -> list[HostCost]:
    """Steps of ``tensors`` small parameters in ``groups`` groups, the same ones for each walk."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss = torch.ones((), device=device)
    costs = []
    with _one_rank() if kind == DTENSORS else nullcontext():
        named, gradients = _dtensors(tensors, device) if kind == DTENSORS else _plain(tensors, device)
        if kind == MISSING:
            gradients = [
                [None if j % 10 == i else grad for j, grad in enumerate(some)] for i, some in enumerate(gradients)
            ]
        for walk in walks:
            with using(walk):
                params = [{"params": list(named[i::groups])} for i in range(groups)]
                optimizer = DALS(params, depth=0.5, fused=True, amp_fused=kind == UNSCALED)
                if kind == UNSCALED:  # as GradScaler hands them over
                    vars(optimizer).update(grad_scale=loss, found_inf=torch.zeros_like(loss))
                if kind == MISSING:
                    _step_with_all(optimizer, named, loss)
                steps, addresses = _timed_steps(optimizer, named, gradients, loss, repeats, new_lr=False)
                scheduled, _ = _timed_steps(optimizer, named, gradients, loss, repeats, new_lr=True)
            costs.append(HostCost(walk, tensors, groups, kind, *map(Spread.of, (steps, scheduled, addresses))))
    return costs


Named: TypeAlias = list[tuple[str, torch.nn.Parameter]]
#: The gradients of two steps that take turns.
Gradients: TypeAlias = Sequence[Sequence[torch.Tensor | None]]


def _plain(count: int, device: str) -> tuple[Named, Gradients]:
    tensors = [[torch.ones(ELEMENTS, device=device) for _ in range(count)] for _ in range(3)]
    return [(f"{i}.weight", torch.nn.Parameter(tensor)) for i, tensor in enumerate(tensors[0])], tensors[1:]


@contextmanager
def _one_rank() -> Iterator[None]:
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _dtensors(count: int, device: str) -> tuple[Named, Gradients]:
    """Of a mesh of one rank, so that nothing is added up; gradients have the spec of their parameters, as FSDP2's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh(device, (1,))
    named, shards = _plain(count, device)
    params: list[Any] = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for _, p in named]
    gradients: Gradients = [
        [DTensor(shard, p._spec, requires_grad=False) for p, shard in zip(params, some, strict=True)] for some in shards
    ]
    return [(name, p) for (name, _), p in zip(named, params, strict=True)], gradients


def _step_with_all(optimizer: DALS, named: Named, loss: torch.Tensor) -> None:
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step(loss=loss)


def _timed_steps(
    optimizer: DALS,
    named: Named,
    gradients: Gradients,
    loss: torch.Tensor,
    repeats: int,
    *,
    new_lr: bool,
) -> tuple[list[float], list[float]]:
    """Seconds of steps with other gradients than the step before, and of reading all gradients' addresses in Python."""
    steps, addresses = [], []
    for step in range(WARMUP_STEPS + repeats):
        for (_, p), gradient in zip(named, gradients[step % 2], strict=True):
            p.grad = gradient
        for group in optimizer.param_groups if new_lr else ():
            group["lr"] = 0.03 / (1 + step)
        start = time.perf_counter()
        optimizer.step(loss=loss)
        middle = time.perf_counter()
        [local(p.grad).data_ptr() for _, p in named if p.grad is not None]
        end = time.perf_counter()
        steps.append(middle - start)
        addresses.append(end - middle)
    return steps[WARMUP_STEPS:], addresses[WARMUP_STEPS:]


def cost_table(costs: Sequence[HostCost]) -> str:
    """Microseconds per step, then what one more tensor and one more group cost, by either walk.

    Of the compiled walk also whether a plain tensor keeps to its bound; shards and scales cost more.
    """
    cells = []
    walks = list(dict.fromkeys(cost.walk for cost in costs))
    for cost in sorted(costs, key=lambda cost: walks.index(cost.walk)):
        times = [cost.step_s.median, cost.step_s.p10, cost.step_s.p90, cost.scheduled_s.median, cost.addresses_s.median]
        what = [cost.walk, f"{cost.tensors:,}", cost.kind, str(cost.groups)]
        cells.append([*what, *(f"{1e6 * value:.0f}" for value in times)])
    header = ["walk", "tensors", "kind", "groups", "median us", "p10 us", "p90 us", "new lr us", "addresses us"]
    lines = [format_table(header, cells), ""]
    for walk in walks:
        few, some, grouped, many = (cost for cost in costs if cost.walk == walk and cost.kind == PLAIN)
        up_to_some, up_to_many = (
            (more.step_s.median - few.step_s.median) / (more.tensors - few.tensors) for more in (some, many)
        )
        group = (grouped.step_s.median - some.step_s.median) / (grouped.groups - some.groups)
        tensor = f"{1e9 * up_to_some:.0f} ns up to {some.tensors:,}, {1e9 * up_to_many:.0f} ns up to {many.tensors:,}"
        if walk == COMPILED_WALK:
            kept = max(up_to_some, up_to_many) <= MOST_PER_TENSOR
            tensor += f" (at most {1e9 * MOST_PER_TENSOR:.0f}: {'kept' if kept else 'NOT kept'})"
        lines.append(f"{walk}: per tensor {tensor}; per group {1e6 * group:.2f} us")
    return "\n".join(lines)
