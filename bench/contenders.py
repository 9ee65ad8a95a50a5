"""The optimizers whose step is timed, on any machine: how to build each, what it must move and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.byte_table import Dtypes, item_sizes, least_bytes
from bench.machine import Machine
from fused_dals import DALS
from fused_dals.reference import compute_dtype

NamedParameter = tuple[str, torch.nn.Parameter]
Step = Callable[[], object]
Factory = Callable[[Sequence[NamedParameter]], Step]

# Small enough that many steps along one and the same gradient keep every number ordinary.
LR = 1e-5

FUSED, FOREACH, REFERENCE = "DALS fused", "DALS foreach", "DALS reference"
CLIPPED = "DALS fused, max_grad_norm"
BF16_STATE, COMPENSATED = "DALS fused, bf16 state", "DALS fused, compensated"
COMPILED, LOOP = "DALS reference compiled", "Grokfast + LARS loop"
ADAMW, ADAMW_FOREACH = "AdamW fused", "AdamW foreach"
SGD, SGD_FOREACH = "SGD momentum fused", "SGD momentum foreach"
BASELINE = ADAMW_FOREACH

#: Steps before a capture: torch asks for some on a side stream, and state must exist.
STEPS_BEFORE_CAPTURE = 3
#: Ends the name of a contender whose steps are replays.
GRAPH = ", graph"


@dataclass(frozen=True)
class Contender:
    """An optimizer: how to build it, and its bytes per parameter.

    ``moves``: what a step must read and write at least. ``state``: what it keeps. ``scratch``: what a step needs for
    the moment, ``tensor_scratch``: the same per element of the largest tensor; guesses, only to decide whether
    contenders fit into memory. ``capturable`` builds one whose step can be captured, where that takes more;
    ``waits_for_device``: none can, because the step waits for the device in its midst.
    """

    build: Factory
    moves: float
    state: float
    scratch: float = 0.0
    tensor_scratch: float = 0.0
    capturable: Factory | None = None
    waits_for_device: bool = False


def torch_contenders(dtypes: Dtypes) -> dict[str, Contender]:
    """AdamW and SGD of torch.optim, which keep their state in the parameters' dtype."""
    p, g, _ = item_sizes(dtypes)
    adamw, sgd = least_bytes(p, g, p), 4 * p + g
    return {
        ADAMW_FOREACH: Contender(
            _adamw(foreach=True), adamw, 2 * p, 2 * p, capturable=_adamw(foreach=True, capturable=True)
        ),
        ADAMW: Contender(_adamw(fused=True), adamw, 2 * p, capturable=_adamw(fused=True, capturable=True)),
        SGD_FOREACH: Contender(_sgd(foreach=True), sgd, p, p),
        SGD: Contender(_sgd(fused=True), sgd, p),
    }


def dals_contenders(dtypes: Dtypes) -> dict[str, Contender]:
    """The three paths of DALS with state of this dtype."""
    p, g, state = item_sizes(dtypes)
    moves, held = least_bytes(p, g, state), 2 * state
    options: dict[str, Any] = {} if dtypes[2] == compute_dtype(dtypes[0]) else {"state_dtype": dtypes[2]}
    # Narrower parameters take float32 copies of parameter and gradient while the step runs.
    wide = compute_dtype(dtypes[0]).itemsize
    copies = 0 if p == wide else 2 * wide
    contenders = {
        FUSED: Contender(dals(fused=True, **options), moves, held),
        FOREACH: Contender(dals(foreach=True, **options), moves, held, 2 * wide + copies),
        # Counted: six tensors of float32 at a time, nine where others are rounded to narrower ones.
        REFERENCE: Contender(
            dals(foreach=False, **options), moves, held, tensor_scratch=(6 if copies == 0 else 9) * wide
        ),
    }
    return {
        name: replace(contender, capturable=dals(**PATHS[name], **options, capturable=True))
        for name, contender in contenders.items()
    }


PATHS: dict[str, dict[str, bool]] = {FUSED: {"fused": True}, FOREACH: {"foreach": True}, REFERENCE: {"foreach": False}}


def loop_contender(dtypes: Dtypes) -> Contender:
    """What people run who want a gradient filter and trust ratios today; state in the parameters' dtype."""
    p, g, _ = item_sizes(dtypes)
    return Contender(grokfast_lars, least_bytes(p, g, p), 2 * p, tensor_scratch=4 * p)


def _adamw(**options: Any) -> Factory:
    return lambda named: torch.optim.AdamW(_parameters(named), lr=LR, weight_decay=0.01, **options).step


def _sgd(**options: Any) -> Factory:
    return lambda named: torch.optim.SGD(_parameters(named), lr=LR, momentum=0.9, weight_decay=5e-4, **options).step


def _parameters(named: Sequence[NamedParameter]) -> list[torch.nn.Parameter]:
    return [parameter for _, parameter in named]


def dals(**options: Any) -> Factory:
    """DALS with a loss at every step, which stays where it is."""

    def build(named: Sequence[NamedParameter]) -> Step:
        device = named[0][1].device
        # Replays of torch operations would keep a number as it was.
        lr = torch.tensor(LR, device=device) if options.get("capturable") else LR
        optimizer = DALS(list(named), lr=lr, weight_decay=5e-4, **options)
        loss = torch.ones((), device=device)
        return lambda: optimizer.step(loss=loss)

    return build


def grokfast_lars(named: Sequence[NamedParameter]) -> Step:
    """A loop over tensors: an EMA of the gradient added to it, then LARS as it is written for torch.

    Gradients are read, not written, because all contenders share them.
    """
    decay, factor, momentum, weight_decay, trust = 0.9, 2.0, 0.9, 5e-4, 1e-3
    emas = {name: torch.zeros_like(p) for name, p in named}
    buffers = {name: torch.zeros_like(p) for name, p in named}

    @torch.no_grad()
    def step() -> None:
        for name, p in named:
            gradient = p.grad
            assert gradient is not None
            emas[name].mul_(decay).add_(gradient * (1 - decay))
            update = gradient + emas[name] * factor
            update = update.add(p, alpha=weight_decay)
            buffers[name].mul_(momentum).add_(update.mul(_trust_ratio(p, update, trust)))
            p.add_(buffers[name], alpha=-LR)

    return step


def _trust_ratio(p: Tensor, update: Tensor, trust: float) -> Tensor:
    p_norm, update_norm = torch.norm(p), torch.norm(update)
    one = torch.ones_like(p_norm)
    return torch.where(p_norm > 0, torch.where(update_norm > 0, trust * p_norm / update_norm, one), one)


# -- in a graph ------------------------------------------------------------------------------------------------------


def is_graph(contender: str) -> bool:
    """Whether steps of a contender of this name are replays."""
    return contender.endswith(GRAPH)


def in_graphs(contenders: Mapping[str, Contender], machine: Machine) -> dict[str, Contender]:
    """The same contenders, each of whose steps is the replay of a CUDA graph."""
    return {
        name + GRAPH: replace(
            contender,
            build=_cannot_be_captured
            if contender.waits_for_device
            else _captured(contender.capturable or contender.build, machine),
        )
        for name, contender in contenders.items()
    }


def _cannot_be_captured(named: Sequence[NamedParameter]) -> Step:
    raise RuntimeError("left out: its step waits for the device, which a graph cannot hold")


def _captured(build: Factory, machine: Machine) -> Factory:
    def build_and_capture(named: Sequence[NamedParameter]) -> Step:
        step = build(named)

        def warm_up() -> None:
            for _ in range(STEPS_BEFORE_CAPTURE):
                step()

        replay = machine.capture(warm_up, step)
        return _Replay(replay, step)

    return build_and_capture


@dataclass(frozen=True)
class _Replay:
    """A graph reads memory that only the captured optimizer keeps alive."""

    replay: Callable[[], object]
    captured: Step

    def __call__(self) -> object:
        return self.replay()
