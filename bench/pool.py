"""Runs of several strategies in worker processes, under one progress bar."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from queue import Empty, Queue

from tqdm import tqdm

from bench.training import Run, train


def _work(strategy: str, task_name: str, seed: int, epochs: int, ticks: "Queue[None]") -> Run:
    return train(strategy, task_name, seed, epochs, on_epoch=lambda: ticks.put(None))


def train_all(strategies: Sequence[str], task_name: str, seed: int, epochs: int, jobs: int) -> list[Run]:
    """Train with every strategy, at most `jobs` at a time; results in the order of `strategies`.

    Workers are spawned, not forked: torch's thread pools do not survive a fork.
    """
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(max_workers=jobs, mp_context=context) as executor,
        tqdm(total=len(strategies) * epochs, unit="epoch", desc=task_name) as bar,
    ):
        ticks: Queue[None] = manager.Queue()
        futures = [executor.submit(_work, name, task_name, seed, epochs, ticks) for name in strategies]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            if count := _drain(ticks):
                bar.update(count)
            for future in done:
                if future.exception():
                    executor.shutdown(cancel_futures=True)
                future.result()
        return [future.result() for future in futures]


def _drain(ticks: "Queue[None]") -> int:
    count = 0
    while True:
        try:
            ticks.get_nowait()
        except Empty:
            return count
        count += 1
