"""The optimizers whose step is timed on a GPU, and what each must move and hold."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench.contenders import CONTENDERS, LR, Factory, NamedParameter, Step
from bench.gpu.driver import Dtypes, PassDriver, Plan, TensorSet, even_blends, hyperparameters
from fused_dals import DALS
from fused_dals.gather import flat_zeros
from fused_dals.reference import compute_dtype, dals_reference_

FUSED, FOREACH, COMPILED = "DALS fused", "DALS foreach", "DALS reference compiled"
CLIPPED = "DALS fused, max_grad_norm"
BF16_STATE, COMPENSATED = "DALS fused, bf16 state", "DALS fused, compensated"
PASS_ALONE = "DALS fused pass alone"
ADAMW, ADAMW_FOREACH, SGD = "AdamW fused", "AdamW foreach", "SGD momentum fused"

#: Longer lists take torch.compile minutes: the whole list is one graph.
COMPILED_TENSORS = 200


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


@dataclass(frozen=True)
class Contender:
    """An optimizer: how to build it, and its bytes per parameter.

    ``moves``: what a step must read and write at least. ``state``: what it keeps. ``scratch``: what a step needs for
    the moment, a guess, only to decide whether contenders fit into memory side by side.
    """

    build: Factory
    moves: float
    state: float
    scratch: float = 0.0


def least_bytes(p: int, g: int, state: int) -> int:
    """Bytes per parameter of any step with two states: read p, g, h, m and write p, h, m."""
    return 2 * p + g + 4 * state


def contenders_for(dtypes: Dtypes, tensors: int, budget: CompileBudget) -> dict[str, Contender]:
    """Who competes on parameters of these dtypes; AdamW and SGD keep their state in the parameters' dtype."""
    p, g, state = (dtype.itemsize for dtype in dtypes)
    moves = least_bytes(p, g, state)
    torch_optimizers = {
        ADAMW: Contender(CONTENDERS["AdamW fused"], least_bytes(p, g, p), 2 * p),
        SGD: Contender(_sgd_fused, 4 * p + g, p),
    }
    if dtypes[2] != compute_dtype(dtypes[0]):
        # The pass driven directly, beside what the optimizer makes of it, without and with a compensation.
        return {
            PASS_ALONE: Contender(_pass_alone(dtypes[2]), moves, 2 * state),
            BF16_STATE: Contender(_dals_fused(state_dtype=dtypes[2]), moves, 2 * state),
            COMPENSATED: Contender(_dals_fused(state_dtype=dtypes[2], compensated=True), moves + 4, 2 * state + 2),
            **torch_optimizers,
        }
    found = {
        FUSED: Contender(_dals_fused(), moves, 2 * state),
        CLIPPED: Contender(_dals_fused(max_grad_norm=1.0), moves + g, 2 * state),
        FOREACH: Contender(CONTENDERS["DALS foreach"], moves, 2 * state, 4 * state),
        **torch_optimizers,
        ADAMW_FOREACH: Contender(CONTENDERS["AdamW foreach"], least_bytes(p, g, p), 2 * p, 2 * p),
    }
    if dtypes[0] == torch.float32:
        found[COMPILED] = Contender(lambda named: compiled_reference(named, tensors, budget), moves, 2 * state, state)
    return found


def _dals_fused(**arguments: Any) -> Factory:
    def build(named: Sequence[NamedParameter]) -> Step:
        optimizer = DALS(list(named), lr=LR, fused=True, **arguments)
        loss = torch.ones((), device=named[0][1].device)
        return lambda: optimizer.step(loss=loss)

    return build


def _sgd_fused(named: Sequence[NamedParameter]) -> Step:
    parameters = [parameter for _, parameter in named]
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=5e-4, fused=True).step


def _pass_alone(state_dtype: torch.dtype) -> Factory:
    def build(named: Sequence[NamedParameter]) -> Step:
        return PassDriver(tensor_set(named, state_dtype), Plan(), hyperparameters(lr=LR)).step

    return build


def tensor_set(named: Sequence[NamedParameter], state_dtype: torch.dtype) -> TensorSet:
    """The parameters with their gradients, and state of zeros in flat buffers as the optimizer makes it."""
    params = [parameter.detach() for _, parameter in named]
    grads = [parameter.grad for _, parameter in named]
    assert all(grad is not None for grad in grads)
    state = [flat_zeros(params, state_dtype) for _ in range(2)]
    return TensorSet(params, [g for g in grads if g is not None], state[0], state[1], even_blends(len(params)))


def compiled_reference(named: Sequence[NamedParameter], tensors: int, budget: CompileBudget, **options: Any) -> Step:
    """The reference's lines over all tensors as one compiled graph; compiles at once, within the budget."""
    if tensors > COMPILED_TENSORS:
        raise RuntimeError(f"left out: {tensors} tensors, and only lists of up to {COMPILED_TENSORS} are compiled")
    if budget.left_s <= 0:
        raise RuntimeError("left out: the time for torch.compile in this run is spent")
    own = tensor_set(named, torch.float32)
    hyper = hyperparameters()
    names = ("weight_decay", "trust_coefficient", "trust_clip", "momentum")
    scalars = {name: hyper[name] for name in names}
    lists = (own.params, own.grads, own.grad_emas, own.momentum_buffers)

    def update(lists: tuple[list[torch.Tensor], ...], lr: torch.Tensor, alpha: torch.Tensor) -> None:
        for p, g, h, m, blend in zip(*lists, own.blends, strict=True):
            dals_reference_(p, g, h, m, blend, ema_decay=alpha, bypass=False, lr=lr, **scalars)

    device = own.params[0].device
    lr, alpha = torch.tensor(LR, device=device), torch.tensor(0.3, device=device)
    compiled: Callable[..., None] = torch.compile(update, fullgraph=True, dynamic=False, **options)

    @torch.no_grad()
    def step() -> None:
        compiled(lists, lr, alpha)

    limit = min(budget.left_s, budget.per_model_s)
    start = time.monotonic()
    try:
        with time_limit(limit):
            step()
    except OutOfTime:
        torch.compiler.reset()
        raise RuntimeError(f"left out: torch.compile was not done with it after {limit:.0f} s") from None
    finally:
        budget.left_s -= time.monotonic() - start
    return step
