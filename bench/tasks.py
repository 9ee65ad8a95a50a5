"""The two small tasks of the demonstration: data, model, batch size, schedule horizon."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Data:
    """A labelled training set and test set."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class Task:
    """What to train on and for how long.

    `load(seed)` seeds torch's global generator, and `build` goes on drawing from it: together they
    fix every random number before the first batch. `horizon` is the length in epochs that learning
    rate schedules are laid out for; a shorter run, such as of `default_epochs`, sees the beginning of
    the same schedule.
    """

    title: str
    batch_size: int
    horizon: int
    default_epochs: int
    test_rows: int
    load: Callable[[int], Data]
    build: Callable[[], nn.Module]
    published: bool
    modules: tuple[str, ...] = ()


def load_synthetic_a(seed: int) -> Data:
    """Protocol A: 20 Gaussian coordinates, two labelling rules to learn, the first one tested."""
    torch.manual_seed(seed)
    x_first, x_test = torch.randn(10_000, 20), torch.randn(2_000, 20)
    torch.manual_seed(seed + 1)
    x_second = 0.5 * torch.randn(10_000, 20)
    y_second = x_second[:, 0] * x_second[:, 1] + x_second[:, 2] * x_second[:, 3] > 0
    return Data(
        x_train=torch.cat([x_first, x_second]),
        y_train=torch.cat([_first_rule(x_first), y_second.long()]),
        x_test=x_test,
        y_test=_first_rule(x_test),
    )


def _first_rule(x: Tensor) -> Tensor:
    return (x[:, :5].sum(dim=1) > 0).long()


class SyntheticMLP(nn.Module):
    """Four Linear children; by default protocol A's net, with ten outputs although the labels are binary."""

    def __init__(self, inputs: int = 20, width: int = 256, outputs: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, width)
        self.fc4 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = F.relu(self.fc3(x))
        out: Tensor = self.fc4(x)
        return out


def load_digits(seed: int) -> Data:
    """scikit-learn's 1797 handwritten 8 x 8 digits, a fifth of each class held out for the test."""
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    x_train, x_test, y_train, y_test = model_selection.train_test_split(
        digits.images / 16, digits.target, test_size=0.2, stratify=digits.target, random_state=seed
    )
    torch.manual_seed(seed)
    return Data(
        x_train=torch.tensor(x_train, dtype=torch.float32).unsqueeze(1),
        y_train=torch.tensor(y_train),
        x_test=torch.tensor(x_test, dtype=torch.float32).unsqueeze(1),
        y_test=torch.tensor(y_test),
    )


class DigitsConvNet(nn.Module):
    """Two convolutions and two Linear layers for 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        out: Tensor = self.fc2(x)
        return out


TASKS = {
    "synthetic-a": Task(
        title="Synthetic task A",
        batch_size=128,
        horizon=80,
        default_epochs=30,
        test_rows=2_000,
        load=load_synthetic_a,
        build=SyntheticMLP,
        published=True,
    ),
    "digits": Task(
        title="Handwritten digits (8 x 8)",
        batch_size=64,
        horizon=50,
        default_epochs=50,
        test_rows=360,
        load=load_digits,
        build=DigitsConvNet,
        published=False,
        modules=("sklearn",),
    ),
}
