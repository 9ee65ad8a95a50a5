"""A training run that checkpoints every step and may be killed at any moment; tests/test_crash.py starts it.

A checkpoint is everything the run needs: weights, optimizer, position in the data, random numbers (dropout draws them).
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_dals import DALS

PIECES = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def build(steps: int) -> tuple[Net, DALS]:
    """Groups with values of their own, a schedule over the whole run."""
    model = Net()
    named = list(model.named_parameters())
    weights = {"params": [(name, p) for name, p in named if p.dim() > 1]}
    biases = {"params": [(name, p) for name, p in named if p.dim() == 1], "weight_decay": 0.0, "lr": 0.02}
    return model, DALS([weights, biases], total_steps=steps, warmup_fraction=0.2)


def train(
    file: Path,
    seed: int,
    steps: int,
    *,
    stop: int | None = None,
    forget: str | None = None,
    in_place: bool = False,
    pause: float = 0.0,
) -> None:
    """Go on from ``file``, or begin, until ``steps`` (or ``stop``) steps are done, with a checkpoint after each.

    ``forget`` leaves an entry of the checkpoint unread. ``pause`` seconds lie between the pieces of a checkpoint, so
    that writing takes most of the time. ``in_place`` writes without a temporary file.
    """
    torch.manual_seed(seed)
    inputs, order = torch.randn(64, 6), torch.randperm(16)
    targets = inputs.sin().sum(1, keepdim=True)
    model, optimizer = build(steps)
    position = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        if forget != "optimizer":
            optimizer.load_state_dict(saved["optimizer"])
        if forget != "position":
            position = saved["position"]
        if forget != "random":
            torch.set_rng_state(saved["random"])
    while position < (steps if stop is None else stop):
        rows = slice(4 * int(order[position % 16]), None)
        loss = nn.functional.mse_loss(model(inputs[rows][:4]), targets[rows][:4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        position += 1
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "position": position,
            "random": torch.get_rng_state(),
        }
        write(state, file, in_place=in_place, pause=pause)


def write(state: dict[str, Any], file: Path, *, in_place: bool, pause: float) -> None:
    packed = io.BytesIO()
    torch.save(state, packed)
    data = packed.getvalue()
    # One temporary file per process: what a killed one leaves behind can be counted.
    target = file if in_place else file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with target.open("wb") as out:
        size = -(-len(data) // PIECES)
        for start in range(0, len(data), size):
            out.write(data[start : start + size])
            out.flush()
            time.sleep(pause)
        os.fsync(out.fileno())
    if not in_place:
        os.replace(target, file)


# What torch imports at a first step takes seconds; the process that forks the runs has done it by now.
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    train(Path(folder) / "first", 0, 2)
