"""Small models, and runs that feed an optimizer and the oracle the same gradients and losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS, DALSAcc, DALSFast
from fused_dals.host_walk import HOST_WALK
from tests.oracle import Oracle, oracle_depths, oracle_group

needs_walk = pytest.mark.skipif(HOST_WALK.compiled is None, reason=f"no compiled walk: {HOST_WALK.why_not}")

PRESETS: dict[str, type[DALS]] = {"dals": DALS, "dals_fast": DALSFast, "dals_acc": DALSAcc}
PATHS = {"reference": False, "foreach": True}

#: The same with the kernels, as arguments.
EVERY_PATH: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


class ConvNet(nn.Module):
    """A small real network: convolution, normalisation, a parameter of the root, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)) * self.scale)
        out: Tensor = self.head(x.flatten(1))
        return out


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 1, 4, 4, dtype=dtype)
    return x, (x.mean(dim=(1, 2, 3)) * 6).round().clamp(-1, 1).long() + 1


def train_step(model: nn.Module, optimizer: DALS, data: tuple[Tensor, Tensor]) -> float:
    """One ordinary step of a training loop; returns the loss."""
    x, y = data
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(loss=loss)
    return loss.item()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of weights and state, to show that nothing or something changed."""
    tensors = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        for value in optimizer.state.get(p, {}).values():
            tensors.append(value.clone())
    return tensors


def identical(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def oracle_of(model: nn.Module, preset: Any, **overrides: Any) -> Oracle:
    """The oracle in the model's present weights, with depths by the SPEC's rule."""
    named = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    depths = oracle_depths([name.rpartition(".")[0] for name in named])
    group = oracle_group(preset, list(named), **overrides)
    return Oracle(named, [group], dict(zip(named, depths, strict=True)))


def loss_sequence(steps: int) -> list[float | None]:
    """Losses that lead through all three phases, with a step without a loss and one whose loss is not finite.

    D = 0.05 (1 - L / E), so L = E (1 - 20 D) gives the D that is wanted; each D stays clear of the thresholds.
    """
    wanted = [0.02, 0.005, 0.0, 0.0015, -0.01]
    losses: list[float | None] = [1.0]
    ema = 1.0
    for step in range(1, steps):
        if step % 41 == 40:
            losses.append(None)
        elif step % 37 == 36:
            losses.append(math.nan)
        else:
            loss = ema * (1 - 20 * wanted[step % len(wanted)])
            ema = 0.95 * ema + 0.05 * loss
            losses.append(loss)
    return losses


@dataclass
class Errors:
    """Largest relative error of any tensor at any step: the norm of the difference over the largest norm so far.

    (Not over the present norm: a momentum buffer that passes through zero has the rounding of its summands.)
    """

    param: float = 0.0
    grad_ema: float = 0.0
    momentum_buffer: float = 0.0
    trust_ratio: float = 0.0

    def worst(self) -> float:
        """Of the three tensors. The ratio is judged apart: where b g + (1 - b) h cancels, ||u|| has few good digits."""
        return max(self.param, self.grad_ema, self.momentum_buffer)


def follow_oracle(
    model: nn.Module,
    optimizer: DALS,
    oracle: Oracle,
    steps: int,
    *,
    resync: bool = False,
    each_step: Callable[[int], None] = lambda step: None,
) -> Errors:
    """Step both with the same gradients and losses; returns the errors.

    Gradients are those of a real network at the optimizer's weights, rounded to the parameters' dtype. Every seventh
    step one parameter has no gradient. With ``resync`` the oracle restarts each step from the optimizer's weights
    and state, so that the errors are those of a single step: the way to judge dtypes whose weights round coarsely.
    """
    dtype = next(model.parameters()).dtype
    names = [name for name, _ in model.named_parameters()]
    errors = Errors()
    scale: dict[tuple[str, str], float] = {}

    def compare(what: str, name: str, value: Tensor, truth: np.ndarray[Any, Any]) -> None:
        norm = scale[what, name] = max(scale.get((what, name), 0.0), float(np.linalg.norm(truth)))
        error = float(np.linalg.norm(value.detach().double().numpy() - truth))
        setattr(errors, what, max(getattr(errors, what), error / norm if norm > 0 else error))

    for step, loss in enumerate(loss_sequence(steps)):
        each_step(step)
        optimizer.zero_grad()
        x, y = batch(torch.float64)
        nn.functional.cross_entropy(model(x.to(dtype)).double(), y).backward()
        params = dict(model.named_parameters())
        if step % 7 == 3:
            params[names[step % len(names)]].grad = None
        grads = {name: None if p.grad is None else p.grad.double().numpy().copy() for name, p in params.items()}
        if resync and step > 0:
            for name, p in params.items():
                oracle.params[name][...] = p.detach().double().numpy()
                oracle.grad_ema[name][...] = optimizer.state[p]["grad_ema"].double().numpy()
                oracle.momentum_buffer[name][...] = optimizer.state[p]["momentum_buffer"].double().numpy()
        if loss is None:
            optimizer.step()
            oracle.step(grads)
        else:
            optimizer.step(loss=loss)
            oracle.step(grads, [loss])
        assert optimizer.phases() == oracle.phases
        ratios = optimizer.trust_ratios()
        assert ratios.keys() == oracle.trust_ratio.keys()
        for name, p in params.items():
            compare("param", name, p, oracle.params[name])
            compare("grad_ema", name, optimizer.state[p]["grad_ema"], oracle.grad_ema[name])
            compare("momentum_buffer", name, optimizer.state[p]["momentum_buffer"], oracle.momentum_buffer[name])
            if name in ratios:
                errors.trust_ratio = max(errors.trust_ratio, abs(ratios[name] / oracle.trust_ratio[name] - 1))
    return errors
