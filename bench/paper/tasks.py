"""The tasks of the paper's benchmark: data, net, layers, batches, settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from bench.paper.settings import Settings, from_scratch
from bench.paper.synthetic import DraftMLP, load_synthetic_b, load_synthetic_t
from bench.tasks import Data, SyntheticMLP, load_synthetic_a


@dataclass(frozen=True)
class Options:
    """What a user says of a task. `data_dir`: the folder with the data set's files."""

    data_dir: Path | None = None


def layers_by_child(model: nn.Module) -> list[list[str]]:
    """Names of parameters by direct child of the model, in registration order."""
    return [[f"{child}.{name}" for name, _ in module.named_parameters()] for child, module in model.named_children()]


def apply_model(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits


@dataclass(frozen=True)
class Problem:
    """One seed's data and freshly initialised net. `logits` applies the net to a batch, shape [rows, classes]."""

    data: Data
    model: nn.Module
    layers: list[list[str]]
    logits: Callable[[nn.Module, Tensor], Tensor] = apply_model


@dataclass(frozen=True)
class PaperTask:
    """How one of the paper's tasks is trained.

    `prepare(seed, options)` seeds torch's global generator; together with what draws from it afterwards, the batches,
    it fixes every random number. `whole_permutation`: an epoch's order is one torch.randperm, where a DataLoader draws
    the seed of a generator of its own. `published` names the column of the paper's table, or is None. `packages`: what
    it needs besides torch and pytorch_optimizer.
    """

    title: str
    batch_size: int
    epochs: int
    settings: Settings
    prepare: Callable[[int, Options], Problem]
    whole_permutation: bool = False
    published: str | None = None
    packages: tuple[str, ...] = ()


def _synthetic(load: Callable[[int], Data], build: Callable[[], nn.Module]) -> Callable[[int, Options], Problem]:
    def prepare(seed: int, options: Options) -> Problem:
        data = load(seed)
        model = build()
        return Problem(data, model, layers_by_child(model))

    return prepare


TASKS: Mapping[str, PaperTask] = {
    "synthetic-a": PaperTask(
        title="Synthetic task A",
        batch_size=128,
        epochs=80,
        settings=from_scratch(weight_decay=5e-4),
        prepare=_synthetic(load_synthetic_a, SyntheticMLP),
        published="synthetic",
    ),
    "synthetic-b": PaperTask(
        title="Synthetic task B",
        batch_size=64,
        epochs=80,
        settings=from_scratch(weight_decay=1e-4),
        prepare=_synthetic(load_synthetic_b, DraftMLP),
        whole_permutation=True,
        published="drafts",
    ),
    "synthetic-t": PaperTask(
        title="Synthetic task T",
        batch_size=64,
        epochs=80,
        settings=from_scratch(weight_decay=1e-4),
        prepare=_synthetic(load_synthetic_t, DraftMLP),
        whole_permutation=True,
    ),
}
