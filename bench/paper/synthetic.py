"""The synthetic tasks: A, behind the published column; B, of the paper's drafts; T, as the paper's text has it."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.tasks import Data, SyntheticMLP

ROWS = 8_000
TRAIN_ROWS = 6_400
COORDINATES = 64
CLASSES = 10


def load_synthetic_b(seed: int) -> Data:
    """Ten of 64 Gaussian coordinates, the largest is the class; noise is added after the class is known."""
    torch.manual_seed(seed)
    x = torch.randn(ROWS, COORDINATES)
    y = x[:, :CLASSES].argmax(dim=1)
    return _split(x + 0.1 * torch.randn(ROWS, COORDINATES), y)


def load_synthetic_t(seed: int) -> Data:
    """The same rule without that noise; the ten coordinates stand out, the other 54 are small."""
    torch.manual_seed(seed)
    told = 3 * torch.randn(ROWS, CLASSES)
    others = 0.1 * torch.randn(ROWS, COORDINATES - CLASSES)
    return _split(torch.cat([told, others], dim=1), told.argmax(dim=1))


def _split(x: Tensor, y: Tensor) -> Data:
    return Data(x[:TRAIN_ROWS], y[:TRAIN_ROWS], x[TRAIN_ROWS:], y[TRAIN_ROWS:])


class DraftMLP(SyntheticMLP):
    """The net of B and T."""

    def __init__(self) -> None:
        super().__init__(COORDINATES, 128, CLASSES)
