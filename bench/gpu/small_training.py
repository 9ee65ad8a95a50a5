"""A small deterministic training run, to be done twice in different ways and compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.correctness import Check
from bench.timing import one_line
from fused_dals import DALS

#: The widest matrix has more elements than a chunk, and a tail.
INPUTS, WIDTH, OUTPUTS, ROWS = 40, 120, 9, 32
LR = 0.05


@dataclass
class Verdict:
    """What a check found: it holds if there are no problems."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def demand(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.problems.append(otherwise)


def attempt(label: str, check: Callable[[], Verdict]) -> Check:
    """The check as a row; an exception is a check that fails, and the next one still runs."""
    try:
        verdict = check()
    except Exception as error:  # whatever a kernel, a graph or the compiler raises
        return Check(label, False, one_line(error))
    return Check(label, not verdict.problems, "; ".join([*verdict.problems, *verdict.notes]), verdict.figures)


def small_model(generator: torch.Generator) -> nn.Sequential:
    """No operation in it whose result may change from run to run on a GPU."""
    model = nn.Sequential(
        nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, OUTPUTS)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / WIDTH**0.5)
    return model


class Training:
    """A model with static inputs and an optimizer; two of the same seed start alike."""

    def __init__(self, device: torch.device, seed: int, dtype: torch.dtype = torch.float32, **arguments: Any) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.model = small_model(self.generator).to(device, dtype)
        self.x = torch.zeros(ROWS, INPUTS, device=device, dtype=dtype)
        self.y = torch.zeros(ROWS, OUTPUTS, device=device, dtype=dtype)
        self.new_inputs()
        self.optimizer = DALS(self.model, **{"lr": LR, **arguments})

    def new_inputs(self) -> None:
        """Other data in the same memory; the same for two trainings that draw equally often."""
        for static in (self.x, self.y):
            static.copy_(torch.randn(static.shape, generator=self.generator))

    def loss(self) -> Tensor:
        loss: Tensor = (self.model(self.x) - self.y).float().square().mean()
        return loss

    def backward(self) -> Tensor:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        return loss

    def step(self) -> None:
        """A whole step of training."""
        self.optimizer.step(loss=self.backward())

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def numbers(self) -> dict[str, Tensor]:
        """Copies of the weights, the optimizer's state and the run state, by name."""
        found = {"run state": self.optimizer._runtime.state.values.clone()}
        for name, p in self.model.named_parameters():
            found[name] = p.detach().clone()
            for key, value in self.optimizer.state.get(p, {}).items():
                found[f"{key} of {name}"] = value.clone()
        return found


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of what is not the same to the last bit."""
    return [name for name in dict.fromkeys([*a, *b]) if name not in a or name not in b or not _same(a[name], b[name])]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def listed(names: list[str]) -> str:
    """The first of them, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
