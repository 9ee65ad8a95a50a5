"""All runs of one command, one after the other under one progress bar, each kept as soon as it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from bench import environment
from bench.paper.problem import Options
from bench.paper.results import Experiment
from bench.paper.tasks import PaperTask
from bench.paper.training import train_run


@dataclass(frozen=True)
class Plan:
    """What to run: every strategy with every seed, all strategies of one seed before the next."""

    task_name: str
    task: PaperTask
    strategies: Sequence[str]
    seeds: Sequence[int]
    epochs: int
    options: Options
    device: torch.device
    threads: int

    def about(self, strategy: str) -> dict[str, Any]:
        """What the runs of a results file have in common."""
        return {
            "strategy": strategy,
            "task": self.task_name,
            "model": self.options.model if self.task.packages else None,
            "epochs": self.epochs,
            "batch_size": self.task.batch_size,
            "settings": asdict(self.task.settings),
        }

    def environment(self) -> dict[str, Any]:
        described: dict[str, Any] = environment.describe(self.threads)
        for package in ("pytorch_optimizer", *self.task.packages):
            described[package] = metadata.version(package)
        if self.device.type == "cuda":
            described["device"] = torch.cuda.get_device_name(self.device)
        return described


def run_all(plan: Plan, experiment: Experiment) -> None:
    """Do what is missing in the experiment's folder."""
    experiment.folder.mkdir(parents=True, exist_ok=True)
    for strategy in plan.strategies:
        experiment.check(strategy, plan.about(strategy))
    done = {strategy: experiment.seeds(strategy) for strategy in plan.strategies}
    missing = [
        (seed, strategy) for seed, strategy in product(plan.seeds, plan.strategies) if seed not in done[strategy]
    ]
    with tqdm(total=len(missing) * plan.epochs, unit="epoch") as bar:
        for index, (seed, strategy) in enumerate(missing):
            bar.set_description(f"{plan.task_name}: {strategy}, seed {seed}")

            def on_epoch(epochs: int, accuracy: float, before: int = index * plan.epochs) -> None:
                bar.update(before + epochs - bar.n)
                bar.set_postfix_str(f"{accuracy:.2f} %")

            if seed in experiment.seeds(strategy):
                continue  # finished by another process meanwhile
            described, about = plan.environment(), plan.about(strategy)
            result = train_run(
                plan.task,
                strategy,
                seed,
                plan.epochs,
                options=plan.options,
                device=plan.device,
                checkpoint=experiment.checkpoint(strategy, seed),
                about={**about, "threads": plan.threads, "device": plan.device.type},
                on_epoch=on_epoch,
            )
            experiment.add(strategy, about, result, described)
