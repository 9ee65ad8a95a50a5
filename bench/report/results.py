"""The files in bench/results/, read back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.host import HostCost
from bench.step_table import row_from
from bench.timing import Spread, StepRow
from bench.training import Run

DEMO = "demo-synthetic-a.json"


@dataclass(frozen=True)
class StepFile:
    """Step times of one run: of ``bench micro`` or ``bench gpu``. ``plan``: what the fused pass was launched with, as
    ``bench.cache_model.plan_in_use`` gave it then."""

    name: str
    environment: dict[str, Any]
    copies: list[float]
    rows: list[StepRow]
    plan: dict[str, Any] | None
    beside_compiled: list[StepRow] = field(default_factory=list)  # the fused path beside the compiled reference
    targets: list[dict[str, Any]] = field(default_factory=list)  # what `bench gpu` was held against

    @property
    def copy_bandwidth(self) -> float | None:
        """The best, in bytes per second, read plus written."""
        return max(self.copies, default=None)

    @property
    def on_gpu(self) -> bool:
        return "multiprocessors" in self.environment


@dataclass(frozen=True)
class HostFile:
    """Host times of one run of ``bench host``."""

    name: str
    environment: dict[str, Any]
    costs: list[HostCost]


@dataclass(frozen=True)
class CounterFile:
    """What the device's counters said of the bytes of the fused pass: rows of model, dtypes, bytes_per_parameter.

    ``plan`` as of a StepFile.
    """

    name: str
    environment: dict[str, Any]
    what: str
    rows: list[dict[str, Any]]
    plan: dict[str, Any] | None = None


@dataclass(frozen=True)
class Results:
    """Everything there is, by file name; ``traffic`` is what ``bench traffic`` predicted, ``demo`` what ``bench demo``
    found on the synthetic task.
    """

    steps: list[StepFile] = field(default_factory=list)
    hosts: list[HostFile] = field(default_factory=list)
    counters: list[CounterFile] = field(default_factory=list)
    training: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    traffic: dict[str, Any] | None = None
    demo: list[Run] = field(default_factory=list)


def load(folder: Path) -> Results:
    """All files of the folder whose kind is known; GPUs first."""
    results = Results()
    traffic = None
    demo: list[Run] = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if record.get("steps"):
            copies, plan = record["copy_bytes_per_s"]["samples"], record["settings"].get("plan")
            rows, beside = ([row_from(row) for row in record.get(key, ())] for key in ("steps", "compiled"))
            targets = record.get("targets", [])
            results.steps.append(StepFile(path.name, record["environment"], copies, rows, plan, beside, targets))
        elif record.get("counters"):
            rows_counted = [row for row in record["counters"] if row.get("bytes_per_parameter") is not None]
            plan = record.get("settings", {}).get("plan")
            results.counters.append(CounterFile(path.name, record["environment"], record["what"], rows_counted, plan))
        elif "training_steps" in record:
            results.training.append((path.name, record))
        elif record.get("predicted"):
            traffic = record
        elif path.name == DEMO:
            demo = [Run(**{name: run[name] for name in Run.__dataclass_fields__}) for run in record["runs"]]
        elif path.name.startswith("host"):
            results.hosts.append(HostFile(path.name, record["environment"], [_cost(row) for row in record["results"]]))
    results.steps.sort(key=lambda found: not found.on_gpu)
    return replace(results, traffic=traffic, demo=demo)


def _cost(row: dict[str, Any]) -> HostCost:
    spreads = (Spread(**row[name]) for name in ("step_s", "scheduled_s", "addresses_s"))
    return HostCost(row["walk"], row["tensors"], row["groups"], row["kind"], *spreads)
