"""The reference under torch.compile, all tensors in one graph, and limits to the time that compiling may take."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from bench.byte_table import Dtypes, item_sizes, least_bytes
from bench.contenders import LR, Contender, NamedParameter, Step
from fused_dals import DALS
from fused_dals.gather import flat_zeros
from fused_dals.reference import dals_reference_

#: What torch.compile takes at least, as the whole list is one graph: on one core tracing alone takes 3 s for 20
#: tensors, 6.5 for 40 and 15 for 80, and generating code comes on top.
SECONDS_PER_TENSOR = 0.4
#: What building a step may take that was compiled before: where torch dropped it, it is not compiled once more.
SECONDS_OF_A_HIT = 10.0


class Resets:
    """How often everything that torch.compile had compiled was dropped in this process."""

    count = 0


class OutOfTime(BaseException):
    """A time limit ran out. No Exception, so that nothing on the way takes it for its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread when the block takes longer."""

    running = True

    def stop(*_: object) -> None:
        if running:
            raise OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@dataclass
class CompileBudget:
    """Time that torch.compile may still take in this run, and at most for one model."""

    left_s: float
    per_model_s: float

    @property
    def limit_s(self) -> float:
        return min(self.left_s, self.per_model_s)

    def check(self, needed_s: float = 0.0) -> None:
        """Raise RuntimeError where no time is left, or clearly too little."""
        if self.left_s <= 0:
            raise RuntimeError("left out: the time for torch.compile in this run is spent")
        if needed_s > self.limit_s:
            raise RuntimeError(f"left out: torch.compile takes {needed_s:.0f} s or more, and has {self.limit_s:.0f} s")

    def first_call(self, step: Callable[[], object]) -> None:
        """The call that compiles. Raises RuntimeError where it takes too long."""
        self.check()
        limit = self.limit_s
        start = time.monotonic()
        try:
            with time_limit(limit):
                step()
        except OutOfTime:
            torch.compiler.reset()
            Resets.count += 1
            raise RuntimeError(f"left out: torch.compile was not done with it after {limit:.0f} s") from None
        finally:
            self.left_s -= time.monotonic() - start


def hyperparameters(**overrides: Any) -> dict[str, Any]:
    """A param group's hyperparameters; the filter is the same in every phase, so that any step repeats another."""
    group = DALS([("w", torch.nn.Parameter(torch.zeros(1)))]).defaults
    return {**group, "ema_decay": (0.3, 0.3, 0.3), **overrides}


def even_blends(count: int) -> list[float]:
    """b of tensors at evenly spaced depths."""
    return [0.3 + 0.4 * i / max(1, count - 1) for i in range(count)]


class CompiledReference:
    """The reference's lines over a list of tensors as one graph, which is compiled once, within the budget.

    Whoever builds a step again, to capture it or to count what it launches, gets the same graph, with state of its own
    in the table's dtype, whatever the parameters'.
    """

    def __init__(self, dtypes: Dtypes, budget: CompileBudget, **options: Any) -> None:
        self.dtypes, self.budget, self.options = dtypes, budget, options
        self.compiled: Callable[..., None] | None = None
        self.resets = 0

    def contender(self) -> Contender:
        p, g, state = item_sizes(self.dtypes)
        return Contender(self.build, least_bytes(p, g, state), 2 * state, state)

    def build(self, named: Sequence[NamedParameter]) -> Step:
        """Raises RuntimeError where no time is left, or compiling takes too long, or is to be done once more."""
        budget = self.budget
        if self.compiled is None:
            budget.check(SECONDS_PER_TENSOR * len(named))
        elif self.resets != Resets.count:
            raise RuntimeError("left out: torch.compile dropped it, out of time for others")
        else:
            budget = CompileBudget(SECONDS_OF_A_HIT, SECONDS_OF_A_HIT)
        params = [parameter.detach() for _, parameter in named]
        grads = [parameter.grad for _, parameter in named]
        lists = (params, grads, *(flat_zeros(params, self.dtypes[2]) for _ in range(2)))
        lr, alpha = (torch.tensor(value, device=params[0].device) for value in (LR, 0.3))
        compiled = self.compiled or torch.compile(_update_of(len(named)), fullgraph=True, dynamic=False, **self.options)

        @torch.no_grad()
        def step() -> None:
            compiled(lists, lr, alpha)

        budget.first_call(step)
        self.compiled, self.resets = compiled, Resets.count
        return step


def _update_of(tensors: int) -> Callable[..., None]:
    blends = even_blends(tensors)
    hyper = hyperparameters()
    scalars = {name: hyper[name] for name in ("weight_decay", "trust_coefficient", "trust_clip", "momentum")}

    def update(lists: tuple[list[Any], ...], lr: torch.Tensor, alpha: torch.Tensor) -> None:
        for p, g, h, m, blend in zip(*lists, blends, strict=True):
            dals_reference_(p, g, h, m, blend, ema_decay=alpha, bypass=False, lr=lr, **scalars)

    # Code of its own: else every list is a recompilation of the same lines, and torch gives up after eight.
    return FunctionType(update.__code__.replace(), update.__globals__, closure=update.__closure__)
