"""One training run: the loop, its measurements, and the record it leaves."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from bench.strategies import STRATEGIES
from bench.tasks import TASKS, Data
from fused_dals import DALS

TRUST_SAMPLES_PER_EPOCH = 16


@dataclass
class Run:
    """What one optimizer did; the last three fields stay empty outside the DALS family.

    Lists have one entry per epoch. `accuracy` is the test accuracy in percent after the epoch,
    `loss` the mean training loss, `seconds` the time of all training steps without the evaluations,
    `phase_share` the shares of phases 0, 1 and 2, `trust` by parameter name the median trust ratio.
    """

    strategy: str
    accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    phase_share: list[list[float]] = field(default_factory=list)
    depths: dict[str, float] = field(default_factory=dict)
    trust: dict[str, list[float]] = field(default_factory=dict)


def first_epochs(accuracy: Sequence[float], thresholds: Sequence[float]) -> list[int | None]:
    """For each threshold the first epoch, counted from 1, that reaches it; None if none does."""
    return [
        next((epoch for epoch, value in enumerate(accuracy, start=1) if value >= threshold), None)
        for threshold in thresholds
    ]


def shuffled_batches(data: Data, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Batches in a new order each epoch, the last one smaller where the rows do not divide.

    The orders are those of ``DataLoader(dataset, batch_size, shuffle=True)``, on which the
    published first epochs depend; a batch is gathered in one piece, which is four times faster.
    """
    dataset = TensorDataset(data.x_train, data.y_train)
    order = BatchSampler(RandomSampler(dataset), batch_size, drop_last=False)
    return DataLoader(dataset, batch_size=None, sampler=order)


@torch.no_grad()
def accuracy_percent(model: nn.Module, data: Data) -> float:
    """Percent of the test rows classified correctly."""
    hits: int = int((model(data.x_test).argmax(dim=1) == data.y_test).sum())
    return 100 * hits / len(data.y_test)


def train(strategy: str, task_name: str, seed: int, epochs: int, on_epoch: Callable[[], object]) -> Run:
    """Train one task with one strategy on one thread, calling `on_epoch` after each epoch."""
    torch.set_num_threads(1)
    task = TASKS[task_name]
    data = task.load(seed)
    model = task.build()
    batches = shuffled_batches(data, task.batch_size)
    optimizer = STRATEGIES[strategy](model, len(batches), task.horizon * len(batches))
    sample_every = -(-len(batches) // TRUST_SAMPLES_PER_EPOCH)
    run = Run(strategy)
    if isinstance(optimizer, DALS):
        run.depths = optimizer.depths()
        run.trust = {name: [] for name in run.depths}

    for _ in range(epochs):
        start = time.perf_counter()
        losses: list[Tensor] = []
        phases: list[int] = []
        ratios: list[dict[str, float]] = []
        for step, (x, y) in enumerate(batches):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.detach())
            if isinstance(optimizer, DALS):
                optimizer.step(loss=loss)
                phases.append(optimizer.phases()[0])
                if step % sample_every == 0:
                    ratios.append(optimizer.trust_ratios())
            else:
                optimizer.step()
        run.seconds += time.perf_counter() - start
        run.loss.append(torch.stack(losses).mean().item())
        run.accuracy.append(accuracy_percent(model, data))
        if isinstance(optimizer, DALS):
            run.phase_share.append([phases.count(phase) / len(phases) for phase in range(3)])
            for name, medians in run.trust.items():
                medians.append(statistics.median(sample[name] for sample in ratios))
        on_epoch()
    return run
