"""The synthetic tasks: A, behind the published column; B, of the paper's drafts; T, as the paper's text has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.tasks import Data

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


class DraftMLP(nn.Module):
    """The net of B and T: four Linear children."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(COORDINATES, 128)
        self.fc2 = nn.Linear(128, 128)
        self.fc3 = nn.Linear(128, 128)
        self.fc4 = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = F.relu(self.fc3(x))
        out: Tensor = self.fc4(x)
        return out
