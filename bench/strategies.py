"""The five optimizers of the demonstration, with the published settings for small tasks."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from fused_dals import DALS, DALSAcc, DALSFast, infer_depths

WEIGHT_DECAY = 5e-4
TRUST_COEFFICIENT = 0.02
RESTART_EPOCHS = 10

# (model, steps per epoch, steps of the whole schedule) -> optimizer
Builder = Callable[[nn.Module, int, int], Optimizer]


def _dals(model: nn.Module, steps_per_epoch: int, total_steps: int) -> Optimizer:
    return DALS(
        model,
        lr=0.03,
        momentum=0.9,
        weight_decay=WEIGHT_DECAY,
        trust_coefficient=TRUST_COEFFICIENT,
        total_steps=total_steps,
        depth=infer_depths(model, granularity="children"),
    )


def _dals_fast(model: nn.Module, steps_per_epoch: int, total_steps: int) -> Optimizer:
    return DALSFast(
        model,
        lr=0.05,
        momentum=0.85,
        weight_decay=WEIGHT_DECAY,
        trust_coefficient=TRUST_COEFFICIENT,
        total_steps=total_steps,
        depth=infer_depths(model, granularity="children"),
    )


def _dals_acc(model: nn.Module, steps_per_epoch: int, total_steps: int) -> Optimizer:
    return DALSAcc(
        model,
        lr=0.03,
        momentum=0.9,
        weight_decay=WEIGHT_DECAY,
        trust_coefficient=TRUST_COEFFICIENT,
        restart_steps=RESTART_EPOCHS * steps_per_epoch,
        restart_mult=2,
        depth=infer_depths(model, granularity="children"),
    )


def _sgd(model: nn.Module, steps_per_epoch: int, total_steps: int) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=WEIGHT_DECAY)


def _adamw(model: nn.Module, steps_per_epoch: int, total_steps: int) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)


STRATEGIES: dict[str, Builder] = {
    "DALS": _dals,
    "DALS-Fast": _dals_fast,
    "DALS-Acc": _dals_acc,
    "Fixed SGD": _sgd,
    "AdamW": _adamw,
}
