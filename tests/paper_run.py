"""A small task in the form of the paper's, and a run of it that may be killed; tests/test_paper_runs.py starts it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from bench.paper.problem import Options, Problem, layers_by_child
from bench.paper.settings import from_scratch
from bench.paper.tasks import PaperTask
from bench.paper.training import RunResult, train_run
from bench.tasks import Data

EPOCHS = 12


def prepare(seed: int, options: Options) -> Problem:
    """Classes of Gaussian points; the net draws random numbers while it trains."""
    torch.manual_seed(seed)
    x = torch.randn(301, 6)
    y = x[:, :3].argmax(dim=1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))
    layers = [names for names in layers_by_child(model) if names]
    return Problem(Data(x[:200], y[:200], x[200:], y[200:]), model, layers)


TASK = PaperTask(
    title="Small task",
    batch_size=32,
    epochs=EPOCHS,
    settings=from_scratch(5e-4),
    prepare=prepare,
    published="synthetic",
)


class Killed(Exception):
    """Raised after an epoch, in place of a kill."""


def run(strategy: str, seed: int, checkpoint: Path, epochs: int = EPOCHS, kill_after: int | None = None) -> RunResult:
    def on_epoch(done: int, accuracy: float) -> None:
        if done == kill_after:
            raise Killed

    torch.set_num_threads(1)
    return train_run(
        TASK,
        strategy,
        seed,
        epochs,
        options=Options(),
        device=torch.device("cpu"),
        checkpoint=checkpoint,
        about={"epochs": epochs},
        on_epoch=on_epoch,
    )


# What torch imports at a first step takes seconds; the process that forks the runs has done it by now.
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    run("DALS", 0, Path(folder) / "first", epochs=1)
