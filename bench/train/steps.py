"""Whole training steps: built for an optimizer and a mode, timed round by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.compiled import CompileBudget
from bench.contenders import (
    ADAMW,
    ADAMW_FOREACH,
    FOREACH,
    FUSED,
    LR,
    PATHS,
    SGD,
    STEPS_BEFORE_CAPTURE,
)
from bench.machine import Machine
from bench.timing import Sampler, Spread, one_line
from bench.train.models import TASKS, Task
from fused_dals import DALS

#: As it is; the model under torch.compile; the whole step as the replay of a CUDA graph.
MODES = ("eager", "compile", "graph")
SEED = 0
#: Steps over which the peak of the memory is taken: in the first one the state comes when the activations have gone.
PEAK_OF_STEPS = 2

#: One step of the optimizer after a backward pass whose loss it is given.
OptimizerStep = Callable[[Tensor], object]


@dataclass
class TrainRow:
    """Training steps of one model with one optimizer; `error` says why there are none, or no times of it alone."""

    model: str
    size: str
    contender: str
    mode: str
    tensors: int = 0
    parameters: int = 0
    step_samples_s: list[float] = field(default_factory=list)
    step_s: Spread | None = None
    optimizer_s: Spread | None = None
    peak_bytes: int | None = None
    error: str | None = None


def _torch(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module, bool], OptimizerStep]:
    def build(model: nn.Module, capturable: bool) -> OptimizerStep:
        more = {"capturable": True} if capturable and make is torch.optim.AdamW else {}
        optimizer = make(model.parameters(), lr=LR, **options, **more)
        return lambda loss: optimizer.step()

    return build


def _dals(**options: Any) -> Callable[[nn.Module, bool], OptimizerStep]:
    def build(model: nn.Module, capturable: bool) -> OptimizerStep:
        # Replays of torch operations would keep a number as it was.
        lr = torch.tensor(LR, device=next(model.parameters()).device) if capturable else LR
        optimizer = DALS(model, lr=lr, **options, capturable=capturable)
        return lambda loss: optimizer.step(loss=loss)

    return build


OPTIMIZERS: dict[str, Callable[[nn.Module, bool], OptimizerStep]] = {
    ADAMW: _torch(torch.optim.AdamW, fused=True),
    ADAMW_FOREACH: _torch(torch.optim.AdamW, foreach=True),
    SGD: _torch(torch.optim.SGD, momentum=0.9, fused=True),
    FUSED: _dals(**PATHS[FUSED]),
    FOREACH: _dals(**PATHS[FOREACH]),
}


class TrainingStep:
    """A model with inputs that stay, and an optimizer; a call is one whole step."""

    def __init__(
        self, task: Task, size: str, machine: Machine, optimizer: str, mode: str, budget: CompileBudget
    ) -> None:
        torch.manual_seed(SEED)
        self.mode = mode
        chosen = task.sizes[size]
        self.device = machine.device
        self.model = task.build(chosen).to(self.device)
        self.inputs = task.inputs(chosen, self.device)
        self.optimizer_step = OPTIMIZERS[optimizer](self.model, mode == "graph")
        self.loss_of: Callable[..., Tensor] = self.model
        self.loss = torch.zeros((), device=self.device)
        self.whole: Callable[[], object] = self.eager
        if mode == "compile":
            budget.check()
            self.loss_of = torch.compile(self.model)
            budget.first_call(self.eager)
        elif mode == "graph":
            self.whole = machine.capture(self._before_capture, self.eager)

    def eager(self) -> None:
        self.model.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.loss_of(*self.inputs)
        loss.backward()
        self.loss = loss.detach()
        self.optimizer_step(self.loss)

    def _before_capture(self) -> None:
        for _ in range(STEPS_BEFORE_CAPTURE):
            self.eager()
        self.model.zero_grad(set_to_none=True)  # so that the graph's gradients lie in its own memory

    def optimizer_alone(self) -> None:
        """Along the gradients that the last whole step left."""
        self.optimizer_step(self.loss)

    def share(self, machine: Machine) -> Callable[[], object]:
        """The optimizer's step alone, in a graph of its own where the whole step is one."""
        if self.mode == "graph":
            return machine.capture(self.optimizer_alone, self.optimizer_alone)
        return self.optimizer_alone

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.device.type == "cpu":
            return nullcontext()
        # A graph must not hold casts that were cached outside of it.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)


def time_training(
    machine: Machine,
    model: str,
    size: str,
    mode: str,
    optimizers: Sequence[str],
    samples: int,
    budget: CompileBudget,
    after_each: Callable[[], object] = lambda: None,
) -> list[TrainRow]:
    """A row per optimizer, each with a model of its own, timed once per round."""
    rows = {name: TrainRow(model, size, name, mode) for name in optimizers}
    steps: dict[str, TrainingStep] = {}
    samplers: dict[str, Sampler] = {}

    def attempt(name: str, work: Callable[[str], object]) -> None:
        if rows[name].error is None:
            try:
                work(name)
            except Exception as error:  # whatever an optimizer, the compiler or the device raises is a row
                rows[name].error = one_line(error)
                samplers.pop(name, None)
                steps.pop(name, None)
                machine.release()
        after_each()

    def build(name: str) -> None:
        def build_and_step() -> None:
            steps[name] = TrainingStep(TASKS[model], size, machine, name, mode, budget)
            for _ in range(PEAK_OF_STEPS):
                steps[name].whole()

        rows[name].peak_bytes = machine.peak_bytes(build_and_step)
        parameters = [p.numel() for p in steps[name].model.parameters()]
        rows[name].tensors, rows[name].parameters = len(parameters), sum(parameters)
        samplers[name] = Sampler(machine, steps[name].whole)

    with suppress(Exception):  # what the device's libraries allocate once is nobody's; what is wrong will be a row
        tiny = "graph" if mode == "graph" else "eager"  # libraries have memory for each stream
        TrainingStep(TASKS[model], "tiny", machine, optimizers[0], tiny, budget).whole()
    machine.release()
    for name in optimizers:
        attempt(name, build)
    for _ in range(samples):
        for name in optimizers:
            attempt(name, lambda name: rows[name].step_samples_s.append(samplers[name].sample()))

    def finish(name: str) -> None:
        rows[name].step_s = Spread.of(rows[name].step_samples_s)
        alone = Sampler(machine, steps[name].share(machine))
        rows[name].optimizer_s = Spread.of([alone.sample() for _ in range(samples)])

    for name in optimizers:
        attempt(name, finish)
    steps.clear()
    samplers.clear()
    machine.release()
    return list(rows.values())
