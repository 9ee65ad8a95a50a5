"""Results on disk: one JSON file per strategy in a folder per experiment, one line per run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.paper.slug import slug
from bench.paper.training import RunResult
from bench.record import write_atomically
from bench.training import first_epochs

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Where results go unless the command line says otherwise.
RESULTS = Path("out/paper")


@dataclass(frozen=True)
class Record:
    """One run as read back. Accuracies in percent, one per epoch; `seconds` of training steps, one per epoch."""

    strategy: str
    seed: int
    test_rows: int
    hits_even: list[int]
    hits_odd: list[int]
    seconds: list[float]
    loss: list[float | None]
    extra: dict[str, Any]
    environment: dict[str, Any]

    @property
    def accuracy(self) -> list[float]:
        hits = zip(self.hits_even, self.hits_odd, strict=True)
        return [100 * (even + odd) / self.test_rows for even, odd in hits]

    @property
    def best(self) -> float:
        """The best epoch's accuracy: picked on the test set, as in the paper, and so too high."""
        return max(self.accuracy)

    @property
    def last(self) -> float:
        return self.accuracy[-1]

    @property
    def cross_picked(self) -> float:
        """Accuracy on one half of the test rows at the epoch that the other half picks, mean of both ways round.

        The best epoch without the optimism of picking and judging on the same rows.
        """
        odd_rows = self.test_rows // 2
        even_rows = self.test_rows - odd_rows
        by_even = self.hits_even.index(max(self.hits_even))
        by_odd = self.hits_odd.index(max(self.hits_odd))
        return 50 * (self.hits_odd[by_even] / odd_rows + self.hits_even[by_odd] / even_rows)

    def first_epochs(self, thresholds: Sequence[float]) -> list[int | None]:
        return first_epochs(self.accuracy, thresholds)


class Experiment:
    """A folder of results: one task trained in one way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, strategy: str) -> Path:
        return self.folder / f"{slug(strategy)}.json"

    def checkpoint(self, strategy: str, seed: int) -> Path:
        """Of an unfinished run."""
        return self.folder / f"{slug(strategy)}.{seed}.checkpoint"

    def seeds(self, strategy: str) -> list[int]:
        """Of the finished runs."""
        return [record.seed for record in self.records(strategy)]

    def records(self, strategy: str) -> list[Record]:
        """The finished runs, in the order of their seeds."""
        return self._read(strategy)[1]

    def _read(self, strategy: str) -> tuple[dict[str, Any], list[Record]]:
        """The file's content, if it is one of this benchmark, and its runs; both empty where there is none."""
        file = self.file(strategy)
        if not file.exists():
            return {}, []
        try:
            content = json.loads(file.read_text())
            return content, [Record(strategy=content["strategy"], **run) for run in content["runs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"error: {file} is not a results file of this benchmark ({error}); move it away") from None

    def check(self, strategy: str, about: dict[str, Any]) -> None:
        """Refuse to put runs of other settings into one file."""
        head, _ = self._read(strategy)
        for key, value in json.loads(json.dumps(about)).items():
            if key in head and head[key] != value:
                raise self._others(strategy, f"{key} {head[key]!r}, not {value!r}")

    def _others(self, strategy: str, difference: str) -> SystemExit:
        return SystemExit(
            f"error: {self.file(strategy)} holds runs with {difference}; give another folder with --results, or move "
            "the file away"
        )

    def add(self, strategy: str, about: dict[str, Any], result: RunResult, environment: dict[str, Any]) -> None:
        """Write a finished run beside the earlier ones; its checkpoint is of no more use then.

        Where another process has finished the same run meanwhile, that one is kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            self.check(strategy, about)
            if result.seed not in self.seeds(strategy):
                self._write(strategy, about, result, environment)
        self.checkpoint(strategy, result.seed).unlink(missing_ok=True)

    def _write(self, strategy: str, about: dict[str, Any], result: RunResult, environment: dict[str, Any]) -> None:
        file = self.file(strategy)
        content, records = self._read(strategy)
        runs = content.get("runs", [])
        if records and records[0].test_rows != result.test_rows:
            raise self._others(strategy, f"{records[0].test_rows} test rows, not {result.test_rows}")
        run = {
            "seed": result.seed,
            "test_rows": result.test_rows,
            "hits_even": result.curves.hits_even,
            "hits_odd": result.curves.hits_odd,
            "seconds": result.curves.seconds,
            "loss": [round(loss, 6) if loss - loss == 0 else None for loss in result.curves.loss],
            "extra": result.extra,
            "environment": environment,
        }
        runs = sorted([*runs, run], key=lambda run: run["seed"])
        head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
        lines = ",\n".join(f"  {json.dumps(run)}" for run in runs)
        write_atomically(file, f'{{\n{head} "runs": [\n{lines}\n ]\n}}\n'.encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, but on Windows; the lock goes with the process that held it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
