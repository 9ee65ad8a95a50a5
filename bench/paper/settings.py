"""The numbers behind the published tables: one set for nets trained from scratch, one for fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

MOMENTUM = 0.9
ADAM_WEIGHT_DECAY = 0.01
FINAL_LR_OF_COSINES = 1e-5
TRUST_COEFFICIENT = 0.02
DISCRIMINATIVE_FACTOR = 2.6
RESTART_MULT = 2


@dataclass(frozen=True)
class Settings:
    """Learning rates by strategy, and what else differs between the two sets.

    `restart_steps` is the first cycle of SGDR, `acc_restart_steps` that of DALS-Acc, both in steps and given as
    (steps, epochs, least): steps + epochs * steps per epoch, at least `least`.
    """

    fixed_sgd: float
    cosine_sgd: float
    sgdr: float
    adam: float
    adabound_final: float
    lion: float
    lars: float
    discriminative: float
    sam: float
    grokfast: float
    dals: float
    dals_fast: float
    dals_acc: float
    weight_decay: float
    dals_acc_weight_decay: float
    warmup: float
    fast_warmup: float
    restart_steps: tuple[int, int, int]
    acc_restart_steps: tuple[int, int, int]


def from_scratch(weight_decay: float) -> Settings:
    """Synthetic tasks and CIFAR-10; `weight_decay` is that of everything based on SGD, DALS-Acc excepted."""
    return Settings(
        fixed_sgd=0.01,
        cosine_sgd=0.03,
        sgdr=0.05,
        adam=3e-4,
        adabound_final=0.01,
        lion=1e-4,
        lars=0.03,
        discriminative=0.05,
        sam=0.03,
        grokfast=0.03,
        dals=0.03,
        dals_fast=0.05,
        dals_acc=0.03,
        weight_decay=weight_decay,
        dals_acc_weight_decay=5e-4,
        warmup=0.05,
        fast_warmup=0.02,
        restart_steps=(10, 0, 1),
        acc_restart_steps=(0, 10, 1),
    )


def fine_tuning(lr_adam: float = 5e-5, lr_sgd: float = 5e-4) -> Settings:
    """A pretrained text encoder."""
    return Settings(
        fixed_sgd=lr_sgd,
        cosine_sgd=lr_sgd,
        sgdr=2 * lr_sgd,
        adam=lr_adam,
        adabound_final=lr_sgd,
        lion=lr_adam / 2,
        lars=lr_sgd,
        discriminative=lr_sgd,
        sam=lr_sgd,
        grokfast=lr_sgd,
        dals=lr_sgd,
        dals_fast=2 * lr_sgd,
        dals_acc=lr_sgd,
        weight_decay=0.01,
        dals_acc_weight_decay=0.01,
        warmup=0.1,
        fast_warmup=0.05,
        restart_steps=(0, 1, 50),
        acc_restart_steps=(0, 3, 50),
    )


def in_steps(cycle: tuple[int, int, int], steps_per_epoch: int) -> int:
    """A cycle of `Settings` in steps."""
    steps, epochs, least = cycle
    return max(steps + epochs * steps_per_epoch, least)
