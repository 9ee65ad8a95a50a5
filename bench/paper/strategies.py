"""The paper's 18 strategies as they were run, three of them corrected besides, and DALS with parts taken away."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from bench.paper.settings import (
    ADAM_WEIGHT_DECAY,
    DISCRIMINATIVE_FACTOR,
    FINAL_LR_OF_COSINES,
    MOMENTUM,
    RESTART_MULT,
    TRUST_COEFFICIENT,
    Settings,
    in_steps,
)
from bench.paper.stepping import Grokfast, LossAware, RandomPhases, SharpnessAware, Stepper
from fused_dals import DALS, DALSAcc, DALSFast
from fused_dals.schedule import cosine_restarts

#: The lower end of DALS's clamp.
LOWEST_TRUST_RATIO = 0.2


@dataclass(frozen=True)
class Setup:
    """What a strategy is made for. `layers`: names of parameters, layer by layer from the input to the output."""

    model: nn.Module
    layers: list[list[str]]
    steps_per_epoch: int
    epochs: int
    settings: Settings
    seed: int

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def first_of_three_cycles(self, steps: int) -> int:
        """The first cycle's length, so that those of 1, 2 and 4 times as many steps last for at least so many."""
        return math.ceil(steps / (1 + RESTART_MULT + RESTART_MULT**2))

    def depths(self) -> dict[str, float]:
        """The paper's depths: evenly from 0 for the first layer to 1 for the last, 0.5 for a single one."""
        last = len(self.layers) - 1
        return {name: i / last if last else 0.5 for i, names in enumerate(self.layers) for name in names}

    def discriminative_groups(self, base: float) -> list[dict[str, Any]]:
        """One parameter group per layer, each with a learning rate 2.6 times that of the layer below it."""
        parameters = dict(self.model.named_parameters())
        rates = [base / factor for factor in self.discriminative_factors()]
        return [
            {"params": [parameters[name] for name in names], "lr": lr}
            for names, lr in zip(self.layers, rates, strict=True)
        ]

    def discriminative_factors(self) -> list[float]:
        """By layer, how many times its learning rate is below the top layer's."""
        last = len(self.layers) - 1
        return [DISCRIMINATIVE_FACTOR ** (last - i) for i in range(len(self.layers))]


Strategy = Callable[[Setup], Stepper]


def _sgd(params: Any, lr: float, setup: Setup) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=lr, momentum=MOMENTUM, weight_decay=setup.settings.weight_decay)


def fixed_sgd(setup: Setup) -> Stepper:
    return Stepper(_sgd(setup.model.parameters(), setup.settings.fixed_sgd, setup))


def cosine_sgd(setup: Setup) -> Stepper:
    optimizer = _sgd(setup.model.parameters(), setup.settings.cosine_sgd, setup)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, setup.total_steps, eta_min=FINAL_LR_OF_COSINES)
    return Stepper(optimizer, per_batch=cosine)


def sgdr(setup: Setup) -> Stepper:
    """As run: the first cycle is 10 steps on nets from scratch, where the method's authors mean epochs, and the counter
    goes up before a step, as DALS-Acc's does, so that it is 9."""
    base = setup.settings.sgdr
    optimizer = _sgd(setup.model.parameters(), base, setup)
    cycle = in_steps(setup.settings.restart_steps, setup.steps_per_epoch)

    def factor(step: int) -> float:
        floor = FINAL_LR_OF_COSINES / base
        return floor + (1 - floor) * cosine_restarts(step, cycle, RESTART_MULT)

    return Stepper(optimizer, per_batch=lr_scheduler.LambdaLR(optimizer, factor))


def sgdr_corrected(setup: Setup) -> Stepper:
    """Three cycles that fill the run, as its authors have them."""
    optimizer = _sgd(setup.model.parameters(), setup.settings.sgdr, setup)
    restarts = lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, setup.first_of_three_cycles(setup.total_steps), T_mult=RESTART_MULT, eta_min=FINAL_LR_OF_COSINES
    )
    return Stepper(optimizer, per_batch=restarts)


def adam(setup: Setup) -> Stepper:
    return Stepper(torch.optim.Adam(setup.model.parameters(), lr=setup.settings.adam))


def adamw(setup: Setup) -> Stepper:
    return Stepper(_adamw(setup))


def _adamw(setup: Setup) -> torch.optim.AdamW:
    return torch.optim.AdamW(setup.model.parameters(), lr=setup.settings.adam, weight_decay=ADAM_WEIGHT_DECAY)


def radam(setup: Setup) -> Stepper:
    return Stepper(torch.optim.RAdam(setup.model.parameters(), lr=setup.settings.adam))


def adabound(setup: Setup) -> Stepper:
    from pytorch_optimizer import AdaBound

    settings = setup.settings
    return Stepper(AdaBound(setup.model.parameters(), lr=settings.adam, final_lr=settings.adabound_final, gamma=1e-3))


def lion(setup: Setup) -> Stepper:
    from pytorch_optimizer import Lion

    lr = setup.settings.lion
    return Stepper(Lion(setup.model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=ADAM_WEIGHT_DECAY))


def lookahead_adamw(setup: Setup) -> Stepper:
    from pytorch_optimizer import Lookahead

    return Stepper(Lookahead(_adamw(setup), k=5, alpha=0.5))


def lars(setup: Setup) -> Stepper:
    """The paper's LARS scales the momentum buffer as a whole, vectors too, without bounds.

    That is DALS without filter and bounds; pytorch_optimizer's LARS scales what enters the buffer, and no vectors.
    """
    optimizer = DALS(
        setup.model,
        lr=setup.settings.lars,
        momentum=MOMENTUM,
        weight_decay=setup.settings.weight_decay,
        trust_coefficient=TRUST_COEFFICIENT,
        trust_clip=(0.0, math.inf),
        ema_decay=(1.0, 1.0, 1.0),
    )
    return LossAware(optimizer)


def grokfast(setup: Setup) -> Stepper:
    from pytorch_optimizer import SGDW

    optimizer = SGDW(
        setup.model.parameters(),
        lr=setup.settings.grokfast,
        momentum=MOMENTUM,
        dampening=MOMENTUM,
        weight_decay=setup.settings.weight_decay,
        weight_decouple=True,
    )
    return Grokfast(optimizer, setup.model, decay=0.98, amplify=1.0)


def _sam(params: Any, lr: float, setup: Setup) -> Stepper:
    from pytorch_optimizer import SAM

    optimizer = SAM(
        params,
        torch.optim.SGD,
        rho=0.05,
        adaptive=True,
        lr=lr,
        momentum=MOMENTUM,
        weight_decay=setup.settings.weight_decay,
    )
    return SharpnessAware(optimizer)


def sam(setup: Setup) -> Stepper:
    return _sam(setup.model.parameters(), setup.settings.sam, setup)


def sam_discriminative(setup: Setup) -> Stepper:
    base = setup.settings.discriminative
    return _sam(setup.discriminative_groups(base), base, setup)


def discriminative(setup: Setup) -> Stepper:
    base = setup.settings.discriminative
    return Stepper(_sgd(setup.discriminative_groups(base), base, setup))


def slanted_triangle(t: float, total: float, cut_fraction: float = 0.1, ratio: float = 32) -> float:
    """The factor in [1 / ratio, 1] that rises until `cut_fraction` of `total` and then falls (arXiv:1801.06146)."""
    cut = max(1, math.floor(total * cut_fraction))
    share = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_fraction - 1))
    return (1 + max(0.0, share) * (ratio - 1)) / ratio


def stlr_discriminative(setup: Setup) -> Stepper:
    """As run: from the second epoch on every layer's rate is divided by its factor a second time, and the triangle
    moves once per epoch."""
    base = setup.settings.discriminative
    optimizer = _sgd(setup.discriminative_groups(base), base, setup)

    def factor(epoch: int, again: float) -> float:
        return slanted_triangle(epoch, setup.epochs) / again if epoch else 1.0

    factors: list[Callable[[int], float]] = [partial(factor, again=again) for again in setup.discriminative_factors()]
    return Stepper(optimizer, per_epoch=lr_scheduler.LambdaLR(optimizer, factors))


def stlr_discriminative_corrected(setup: Setup) -> Stepper:
    base = setup.settings.discriminative
    optimizer = _sgd(setup.discriminative_groups(base), base, setup)
    triangle = lr_scheduler.LambdaLR(optimizer, lambda step: slanted_triangle(step, setup.total_steps))
    return Stepper(optimizer, per_batch=triangle)


def dals_options(setup: Setup) -> dict[str, Any]:
    """The arguments of DALS."""
    settings = setup.settings
    return {
        "lr": settings.dals,
        "momentum": MOMENTUM,
        "weight_decay": settings.weight_decay,
        "trust_coefficient": TRUST_COEFFICIENT,
        "total_steps": setup.total_steps,
        "warmup_fraction": settings.warmup,
        "depth": setup.depths(),
    }


def dals(setup: Setup, **changed: Any) -> Stepper:
    return LossAware(DALS(setup.model, **{**dals_options(setup), **changed}))


def dals_fast(setup: Setup) -> Stepper:
    settings = setup.settings
    changed = {"lr": settings.dals_fast, "momentum": 0.85, "warmup_fraction": settings.fast_warmup}
    return LossAware(DALSFast(setup.model, **{**dals_options(setup), **changed}))


def dals_acc(setup: Setup) -> Stepper:
    return _dals_acc(setup, in_steps(setup.settings.acc_restart_steps, setup.steps_per_epoch))


def dals_acc_corrected(setup: Setup) -> Stepper:
    """Three cycles that fill the run, so that it ends with a low rate; the first has a step less than its length."""
    return _dals_acc(setup, setup.first_of_three_cycles(setup.total_steps + 1))


def _dals_acc(setup: Setup, cycle: int) -> Stepper:
    settings = setup.settings
    optimizer = DALSAcc(
        setup.model,
        lr=settings.dals_acc,
        momentum=MOMENTUM,
        weight_decay=settings.dals_acc_weight_decay,
        trust_coefficient=TRUST_COEFFICIENT,
        restart_steps=cycle,
        restart_mult=RESTART_MULT,
        depth=setup.depths(),
    )
    return LossAware(optimizer)


EMA_DECAY = (0.3, 0.6, 0.7)


def _fixed_phase(phase: int) -> Strategy:
    return partial(dals, ema_decay=(EMA_DECAY[phase],) * 3)


def _random_phases(setup: Setup) -> Stepper:
    return RandomPhases(DALS(setup.model, **dals_options(setup)), EMA_DECAY, setup.steps_per_epoch, setup.seed)


def _depth_reversed(setup: Setup) -> Stepper:
    return dals(setup, depth={name: 1 - depth for name, depth in setup.depths().items()})


#: The paper's strategies in the paper's order, configured as in the runs behind its tables.
PUBLISHED: Mapping[str, Strategy] = {
    "Fixed SGD": fixed_sgd,
    "Cosine Decay SGD": cosine_sgd,
    "SGDR": sgdr,
    "Adam": adam,
    "AdamW": adamw,
    "AdaBound": adabound,
    "LARS": lars,
    "Discriminative LR": discriminative,
    "RAdam": radam,
    "Lion": lion,
    "Lookahead+AdamW": lookahead_adamw,
    "SAM": sam,
    "Grokfast": grokfast,
    "STLR+Discriminative": stlr_discriminative,
    "SAM+Discriminative": sam_discriminative,
    "DALS": dals,
    "DALS-Fast": dals_fast,
    "DALS-Acc": dals_acc,
}

#: What the strategies should have been that have a defect in the paper's run, or end it in the midst of a cycle.
CORRECTED: Mapping[str, Strategy] = {
    "SGDR (corrected)": sgdr_corrected,
    "STLR+Discriminative (corrected)": stlr_discriminative_corrected,
    "DALS-Acc (corrected)": dals_acc_corrected,
}

#: DALS with one part changed or taken away.
ABLATIONS: Mapping[str, Strategy] = {
    "DALS, phase 0 only": _fixed_phase(0),
    "DALS, phase 1 only": _fixed_phase(1),
    "DALS, phase 2 only": _fixed_phase(2),
    "DALS, random phases": _random_phases,
    "DALS, no filter": partial(dals, ema_decay=(1.0, 1.0, 1.0)),
    "DALS, no trust ratio": partial(dals, trust_clip=(1.0, 1.0)),
    "DALS, trust ratio 0.2": partial(dals, trust_clip=(LOWEST_TRUST_RATIO, LOWEST_TRUST_RATIO)),
    "DALS, no clamp": partial(dals, trust_clip=(0.0, math.inf)),
    "DALS, depth reversed": _depth_reversed,
    "DALS, depth constant": partial(dals, depth=0.5),
}

STRATEGIES: Mapping[str, Strategy] = {**PUBLISHED, **CORRECTED, **ABLATIONS}
