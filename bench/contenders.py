"""The optimizers whose step is timed: one table, name -> factory."""

from collections.abc import Callable, Sequence

import torch

from fused_dals import DALS

NamedParameter = tuple[str, torch.nn.Parameter]
Step = Callable[[], object]
Factory = Callable[[Sequence[NamedParameter]], Step]

# Small enough that many steps along one and the same gradient keep every number ordinary.
LR = 1e-5
BASELINE = "AdamW foreach"


def _adamw(named: Sequence[NamedParameter], fused: bool) -> Step:
    parameters = [parameter for _, parameter in named]
    if fused:
        return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01, fused=True).step
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01, foreach=True).step


def _sgd(named: Sequence[NamedParameter]) -> Step:
    parameters = [parameter for _, parameter in named]
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=5e-4, foreach=True).step


def _dals(named: Sequence[NamedParameter], foreach: bool) -> Step:
    optimizer = DALS(list(named), lr=LR, weight_decay=5e-4, foreach=foreach)
    loss = torch.ones((), device=named[0][1].device)
    return lambda: optimizer.step(loss=loss)


CONTENDERS: dict[str, Factory] = {
    BASELINE: lambda named: _adamw(named, fused=False),
    "AdamW fused": lambda named: _adamw(named, fused=True),
    "SGD momentum foreach": _sgd,
    "DALS foreach": lambda named: _dals(named, foreach=True),
    "DALS reference": lambda named: _dals(named, foreach=False),
}
