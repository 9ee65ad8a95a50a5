"""One run: a task, a strategy and a seed; it goes on from its checkpoint if it was killed."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.paper.problem import Options, Problem, nudge
from bench.paper.strategies import STRATEGIES, Setup
from bench.paper.tasks import PaperTask
from bench.record import write_atomically
from bench.tasks import Data
from bench.training import shuffled_batches

EVALUATION_ROWS = 500


@dataclass
class Curves:
    """What is measured after each epoch.

    `hits_even`, `hits_odd`: correct answers among the test rows of even and of odd index; apart, so that one half can
    pick the epoch and the other judge it. `loss`: mean training loss. `seconds`: wall clock of the training steps of
    that epoch.
    """

    hits_even: list[int] = field(default_factory=list)
    hits_odd: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RunResult:
    """A finished run. `extra`: what the strategy itself recorded."""

    seed: int
    test_rows: int
    curves: Curves
    extra: dict[str, Any]


def train_run(
    task: PaperTask,
    strategy: str,
    seed: int,
    epochs: int,
    *,
    options: Options,
    device: torch.device,
    checkpoint: Path,
    about: dict[str, Any],
    on_epoch: Callable[[int, float], object],
) -> RunResult:
    """Train, with a checkpoint after every epoch; a checkpoint that is there already is gone on from.

    `about` is what a run must have in common with the one whose checkpoint it goes on from.

    `on_epoch(epochs done, test accuracy in percent)` is called at the beginning and after each epoch. The checkpoint is
    deleted by whoever keeps the result.
    """
    settings = json.dumps(about, sort_keys=True)  # as text: from files tuples come back as lists
    problem = task.prepare(seed, options)
    if options.nudge:
        nudge(problem.model, options.nudge)
    model = problem.model.to(device)
    steps = math.ceil(len(problem.data.y_train) / task.batch_size)
    setup = Setup(model, problem.layers, steps, epochs, task.settings, seed)
    stepper = STRATEGIES[strategy](setup)
    curves = Curves()
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["about"] != settings:
            raise SystemExit(
                f"error: {checkpoint} is of a run with other settings; delete it to begin anew, or go on with its own: "
                f"{saved['about']}"
            )
        model.load_state_dict(saved["model"])
        stepper.load_state_dict(saved["stepper"])
        curves = Curves(**saved["curves"])
        _set_random_state(saved["random"])

    test_rows = len(problem.data.y_test)
    on_epoch(len(curves.loss), math.nan)
    while len(curves.loss) < epochs:
        model.train()
        start = time.perf_counter()
        losses = []
        for x, y in batches(task, problem.data, device):
            losses.append(stepper.step(lambda x=x, y=y: F.cross_entropy(problem.logits(model, x), y)))  # type: ignore[misc]
        stepper.end_epoch()
        loss = torch.stack(losses).mean().item()  # waits for the device
        curves.seconds.append(round(time.perf_counter() - start, 3))
        curves.loss.append(loss)
        even, odd = count_hits(problem, device)
        curves.hits_even.append(even)
        curves.hits_odd.append(odd)
        state = {
            "model": model.state_dict(),
            "stepper": stepper.state_dict(),
            "curves": vars(curves),
            "random": _random_state(device),
            "about": settings,
        }
        write_atomically(checkpoint, packed(state))
        on_epoch(len(curves.loss), 100 * (even + odd) / test_rows)
    return RunResult(seed, test_rows, curves, stepper.record())


def batches(task: PaperTask, data: Data, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch's batches, in the order that the published run drew."""
    if task.whole_permutation:
        orders = torch.randperm(len(data.y_train)).split(task.batch_size)
        pairs: Any = ((data.x_train[order], data.y_train[order]) for order in orders)
    else:
        pairs = shuffled_batches(data, task.batch_size)
    for x, y in pairs:
        yield x.to(device), y.to(device)


@torch.no_grad()
def count_hits(problem: Problem, device: torch.device) -> tuple[int, int]:
    """Correct answers among the test rows of even and of odd index."""
    problem.model.eval()
    chunks = zip(problem.data.x_test.split(EVALUATION_ROWS), problem.data.y_test.split(EVALUATION_ROWS), strict=True)
    hits = torch.cat([problem.logits(problem.model, x.to(device)).argmax(dim=1).cpu() == y for x, y in chunks])
    return int(hits[::2].sum()), int(hits[1::2].sum())


def packed(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())
