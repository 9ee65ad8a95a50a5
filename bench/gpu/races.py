"""The race hunt: thousands of tiny tensors beside huge ones, another stream at work, the same bits at every rerun."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.byte_table import Dtypes
from bench.compiled import even_blends
from bench.gpu.correctness import (
    F64,
    HYPERPARAMETERS,
    LAST,
    Check,
    Outcome,
    describe_shares,
    dtypes_label,
    judge,
    reference_step,
    writer_label,
)
from bench.gpu.driver import PassDriver, TensorSet
from bench.machine import Machine
from fused_dals.launch_plan import LaunchPlan


@dataclass(frozen=True)
class Crowd:
    """Sizes of the race hunt: tiny tensors beside huge ones."""

    tiny: int
    tiny_elements: int
    huge: int
    huge_elements: int


class FlatSet:
    """A crowd in one flat buffer per kind, so that restoring and comparing are one operation each."""

    def __init__(self, crowd: Crowd, dtypes: Dtypes, device: torch.device, seed: int) -> None:
        draw = random.Random(seed)
        sizes = [draw.randint(1, crowd.tiny_elements) for _ in range(crowd.tiny)]
        sizes += [crowd.huge_elements + i for i in range(crowd.huge)]
        draw.shuffle(sizes)
        # Most segments start where 16-byte accesses are possible, every seventh does not.
        starts, total = [], 0
        for i, size in enumerate(sizes):
            starts.append(total + (i % 7 == 6))
            total += -(-(size + 1) // 64) * 64
        generator = torch.Generator(device).manual_seed(seed)
        sign = torch.randint(2, (total,), generator=generator, device=device, dtype=torch.int8) * 2.0 - 1
        self.flats = []
        for dtype in (dtypes[0], dtypes[1], dtypes[2], dtypes[2]):
            values = torch.rand(total, generator=generator, device=device)
            self.flats.append((sign * (0.5 + values)).to(dtype))
        self.start = [flat.clone() for flat in self.flats]
        p, g, h, m = ([flat[a : a + n] for a, n in zip(starts, sizes, strict=True)] for flat in self.flats)
        self.tensors = TensorSet(p, g, h, m, even_blends(len(sizes)))

    def restore(self) -> None:
        for flat, start in zip(self.flats, self.start, strict=True):
            flat.copy_(start)


def hunt_races(
    machine: Machine,
    dtypes: Dtypes,
    crowd: Crowd,
    plan: LaunchPlan,
    reruns: int,
    seed: int,
    time_is_up: Callable[[], bool] = lambda: False,
) -> Check:
    """Steps from one start, in turn under several windows, while another stream works: all must leave the same bits.

    With fewer reruns where time is up before.
    """
    flat_set = FlatSet(crowd, dtypes, machine.device, seed)
    windows = (None, 0, 1, 64, LAST)
    drivers = [PassDriver(flat_set.tensors, replace(plan, window=w), HYPERPARAMETERS) for w in windows]
    first: list[Tensor] = []
    differing: list[int] = []
    shares: dict[str, float] = {}
    done = 0
    for rerun in range(reruns + 1):
        if rerun > len(drivers) and time_is_up():
            break
        done = rerun
        flat_set.restore()
        machine.wait()
        machine.keep_busy()
        ratios = drivers[rerun % len(drivers)].step()
        machine.wait()
        found = [*flat_set.flats, ratios]
        if rerun == 0:
            first = [t.clone() for t in found]
            own = flat_set.tensors
            outcome = Outcome(own.params, own.grad_emas, own.momentum_buffers, first[-1])
            start = _views_of(flat_set)
            plain, truth = reference_step(start, None), reference_step(start, F64)
            _, shares = judge(outcome, plain, truth, rounds=machine.device.type != "cpu")
        elif not all(torch.equal(a, b) for a, b in zip(found, first, strict=True)):
            differing.append(rerun)
    right = all(share <= 1 for share in shares.values())
    problems = [] if right else ["an error is above its bound"]
    if differing:
        problems.append(f"{len(differing)} of {done} reruns differ: {differing[:10]}")
    detail = "; ".join([*problems, f"{done} reruns of {len(flat_set.tensors.params)} tensors", describe_shares(shares)])
    return Check(f"{dtypes_label(dtypes)}, {writer_label(plan)}", not problems, detail, shares)


def _views_of(flat_set: FlatSet) -> TensorSet:
    """The tensors as they were at the start."""

    def views(tensors: list[Tensor], start: Tensor) -> list[Tensor]:
        return [start[t.storage_offset() :][: t.numel()] for t in tensors]

    own = flat_set.tensors
    lists = (own.params, own.grads, own.grad_emas, own.momentum_buffers)
    p, g, h, m = (views(tensors, start) for tensors, start in zip(lists, flat_set.start, strict=True))
    return TensorSet(p, g, h, m, own.blends)
