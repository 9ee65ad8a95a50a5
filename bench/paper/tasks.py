"""The tasks of the paper's benchmark: data, net, batches, settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import nn

from bench.paper.files import need_folder
from bench.paper.images import CifarNet, MnistNet, load_cifar10, load_mnist
from bench.paper.problem import SCRATCH, Options, Problem, layers_by_child
from bench.paper.settings import Settings, fine_tuning, from_scratch
from bench.paper.slug import slug
from bench.paper.synthetic import DraftMLP, load_synthetic_b, load_synthetic_t
from bench.paper.text import prepare_text
from bench.tasks import Data, SyntheticMLP, load_synthetic_a

TEXT_PACKAGES = ("transformers", "tokenizers")


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


def _synthetic(seed: int, options: Options, load: Callable[[int], Data], build: Callable[[], nn.Module]) -> Problem:
    data = load(seed)
    model = build()
    return Problem(data, model, layers_by_child(model))


@lru_cache(maxsize=1)
def _loaded(load: Callable[[Path], Data], folder: Path) -> Data:
    """The data set last used, so that the runs of one command read it once."""
    return load(folder)


def _images(
    seed: int, options: Options, load: Callable[[Path], Data], build: Callable[[], nn.Module], files: str
) -> Problem:
    data = _loaded(load, need_folder(options.data_dir, files))
    torch.manual_seed(seed)
    model = build()
    return Problem(data, model, layers_by_child(model))


TASKS: Mapping[str, PaperTask] = {
    "synthetic-a": PaperTask(
        title="Synthetic task A",
        batch_size=128,
        epochs=80,
        settings=from_scratch(weight_decay=5e-4),
        prepare=partial(_synthetic, load=load_synthetic_a, build=SyntheticMLP),
        published="synthetic",
    ),
    "synthetic-b": PaperTask(
        title="Synthetic task B",
        batch_size=64,
        epochs=80,
        settings=from_scratch(weight_decay=1e-4),
        prepare=partial(_synthetic, load=load_synthetic_b, build=DraftMLP),
        whole_permutation=True,
        published="drafts",
    ),
    "synthetic-t": PaperTask(
        title="Synthetic task T",
        batch_size=64,
        epochs=80,
        settings=from_scratch(weight_decay=1e-4),
        prepare=partial(_synthetic, load=load_synthetic_t, build=DraftMLP),
        whole_permutation=True,
    ),
    "mnist": PaperTask(
        title="MNIST",
        batch_size=128,
        epochs=5,
        settings=from_scratch(weight_decay=5e-4),
        prepare=partial(_images, load=load_mnist, build=MnistNet, files="MNIST's four idx files"),
    ),
    "cifar10": PaperTask(
        title="CIFAR-10",
        batch_size=128,
        epochs=50,
        settings=from_scratch(weight_decay=5e-4),
        prepare=partial(_images, load=load_cifar10, build=CifarNet, files="CIFAR-10's binary version"),
        published="cifar10",
    ),
    "trec6": PaperTask(
        title="TREC-6",
        batch_size=32,
        epochs=10,
        settings=fine_tuning(lr_adam=3e-5, lr_sgd=3e-4),
        prepare=partial(prepare_text, "trec6"),
        published="trec6",
        packages=TEXT_PACKAGES,
    ),
    "rte": PaperTask(
        title="RTE",
        batch_size=32,
        epochs=10,
        settings=fine_tuning(),
        prepare=partial(prepare_text, "rte"),
        published="rte",
        packages=TEXT_PACKAGES,
    ),
    "imdb": PaperTask(
        title="IMDb",
        batch_size=32,
        epochs=5,
        settings=fine_tuning(),
        prepare=partial(prepare_text, "imdb"),
        published="imdb",
        packages=TEXT_PACKAGES,
    ),
}

#: The learning rates of either set: what a text model that is not pretrained takes, and what one that is takes.
RATES = ("scratch", "fine-tuning")


def with_model(task: PaperTask, options: Options, rates: str | None) -> PaperTask:
    """The text task with this model and these learning rates, by default those that fit the model.

    Nothing is published for other models than DistilBERT, nor for the other set of rates.
    """
    if not task.packages:
        return task
    fitting = _fitting_rates(options)
    title, settings = task.title, task.settings
    if options.model == SCRATCH:
        title += " from scratch"
    if rates not in (None, fitting):
        title += f", learning rates for {rates}"
    if (rates or fitting) == "scratch":
        settings = from_scratch(weight_decay=5e-4)
    as_published = title == task.title and Path(options.model).name == Options.model  # by name or in a folder
    return replace(task, title=title, settings=settings, published=task.published if as_published else None)


def _fitting_rates(options: Options) -> str:
    return "scratch" if options.model == SCRATCH else "fine-tuning"


def experiment_name(task_name: str, task: PaperTask, options: Options, rates: str | None, epochs: int) -> str:
    """The folder of the results: the task, and what differs from the paper's way to train it."""
    parts = [task_name]
    if task.packages and options.model != Options.model:
        parts.append(slug(options.model))
    if task.packages and rates not in (None, _fitting_rates(options)):
        parts.append(f"{rates}-rates")
    if options.nudge:
        parts.append(f"nudge-{options.nudge}")
    if epochs != task.epochs:
        parts.append(f"{epochs}-epochs")
    return "-".join(parts)
