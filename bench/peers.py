"""Optimizers of other packages, where they are installed; one that is not says how to get it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from bench.byte_table import Dtypes, item_sizes, least_bytes
from bench.contenders import LR, Contender, Factory, NamedParameter, Step

OPTIMI, FLASH, LAMB, BNB_LARS = "torch-optimi AdamW", "flashoptim AdamW", "pytorch_optimizer Lamb", "bitsandbytes LARS"


def peer_contenders(dtypes: Dtypes, device: torch.device) -> dict[str, Contender]:
    """Peers on parameters of these dtypes; all but bitsandbytes keep state in the parameters' dtype or narrower.

    Each has gradients of its own, because some write to them.
    """
    p, g, _ = item_sizes(dtypes)
    adam = least_bytes(p, g, p)
    # An int8 for each of two states, and a float16 scale for every 32 of them; 8 more bits for a 16-bit parameter.
    quantized, correction = 2 * (1 + 2 / 32), 1 if p == 2 else 0
    triton = device.type == "cuda"
    optimi = _of("optimi", "torch-optimi", "AdamW", weight_decay=0.01, triton=triton, kahan_sum=False)
    flash = _of("flashoptim", "flashoptim", "FlashAdamW", weight_decay=0.01)
    lamb = _of("pytorch_optimizer", "pytorch_optimizer", "Lamb", weight_decay=0.01)
    lars = _of("bitsandbytes.optim", "bitsandbytes", "LARS", momentum=0.9, weight_decay=5e-4)
    return {
        OPTIMI: Contender(optimi, adam, 2 * p + g),
        # Its kernel is compiled anew at the 16th step, a number that Triton takes for a multiple of 16.
        FLASH: Contender(_after(16, flash), 2 * p + g + 2 * (quantized + correction), quantized + correction + g),
        LAMB: Contender(lamb, adam, 2 * p + g, 2 * p),
        # It waits for the device after every tensor.
        BNB_LARS: Contender(lars, 2 * p + g + 8, 4 + g, waits_for_device=True),
    }


def _of(module: str, package: str, name: str, **options: Any) -> Factory:
    def build(named: Sequence[NamedParameter]) -> Step:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}: pip install {package}") from None
        optimizer = getattr(found, name)([_with_own_gradient(p) for _, p in named], lr=LR, **options)
        step: Step = optimizer.step
        return step

    return build


def _after(steps: int, build: Factory) -> Factory:
    """The same with so many steps behind it."""

    def build_and_step(named: Sequence[NamedParameter]) -> Step:
        step = build(named)
        for _ in range(steps):
            step()
        return step

    return build_and_step


def _with_own_gradient(shared: torch.nn.Parameter) -> torch.nn.Parameter:
    """The same memory as a parameter of its own, with a copy of the gradient."""
    own = torch.nn.Parameter(shared.detach())
    own.grad = None if shared.grad is None else shared.grad.clone()
    return own
