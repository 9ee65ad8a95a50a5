"""A run that is killed at random moments goes on from its last whole checkpoint to the same bits."""

from __future__ import annotations

import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.crash_run import train
from tests.exact import same

KILLS = 12
STEPS = 100

#: A step takes 16 ms at least, most of them while its checkpoint is being written.
PAUSE = 0.002

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and os.replace over open files")


@pytest.fixture(scope="module")
def processes() -> Any:
    """Fresh processes that have torch imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.crash_run"])
    return context


def run_and_kill(processes: Any, draw: random.Random, started: Callable[[], bool], *args: Any, **options: Any) -> bool:
    """Start a run and kill it up to 0.1 seconds after it started to write; False if it was done before that."""
    process = processes.Process(target=train, args=args, kwargs={"pause": PAUSE, **options})
    process.start()
    deadline = time.monotonic() + 60
    while process.is_alive() and not started() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.join(draw.uniform(0, 0.1))
    killed = process.exitcode is None
    process.kill()
    process.join()
    assert process.exitcode in (0, -9), "an error of the run itself"
    return killed and process.exitcode == -9


def readable(file: Path) -> bool:
    try:
        torch.load(file, weights_only=True)
    except Exception:  # whatever torch says of a torn file
        return False
    return True


def final(file: Path) -> Any:
    return torch.load(file, weights_only=True)


def test_killed_runs_end_in_the_same_bits(processes: Any, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    unbroken = processes.Process(target=train, args=(tmp_path / "unbroken", seed, STEPS))
    unbroken.start()

    file = tmp_path / "broken"
    kills, positions = 0, [0]
    for _ in range(KILLS):
        left = set(tmp_path.glob("broken.*.tmp"))

        def started(left: set[Path] = left) -> bool:
            return bool(set(tmp_path.glob("broken.*.tmp")) - left)

        kills += run_and_kill(processes, draw, started, file, seed, STEPS)
        if file.exists():  # and then it is whole, and no older than before
            positions.append(final(file)["position"])
            assert positions[-1] >= positions[-2]
    last = processes.Process(target=train, args=(file, seed, STEPS))
    last.start()
    last.join()
    unbroken.join()
    assert last.exitcode == unbroken.exitcode == 0

    torn = [part for part in tmp_path.glob("broken.*.tmp") if not readable(part)]
    assert kills > KILLS // 2 and torn, "kills must fall into the writing"
    assert 0 < positions[-1] < STEPS, "and between the first and the last step"
    assert final(file)["position"] == STEPS
    assert same(final(tmp_path / "unbroken"), final(file))


def test_writing_in_place_would_tear_a_checkpoint(processes: Any, tmp_path: Path, seed: int) -> None:
    """Negative control: without the temporary file one of the same kills leaves a file that nobody can read."""
    draw = random.Random(seed)
    file = tmp_path / "in_place"
    for _ in range(40):
        before = file.stat().st_mtime_ns if file.exists() else None
        run_and_kill(
            processes,
            draw,
            lambda before=before: file.exists() and file.stat().st_mtime_ns != before,
            *(file, seed, 10**6),
            in_place=True,
        )
        if not readable(file):
            return
    raise AssertionError("40 kills, and every file is whole")


@pytest.mark.filterwarnings("ignore:.*the built-in schedule is over")  # of a run that forgot its position
@pytest.mark.parametrize("forget", ["optimizer", "position", "random", None])
def test_every_part_of_the_checkpoint_is_needed(forget: str | None, tmp_path: Path, seed: int) -> None:
    """Negative control: a resumption that leaves out one part ends in other weights."""
    for name, stop in (("unbroken", 20), ("resumed", 9)):
        train(tmp_path / name, seed, 20, stop=stop)
    train(tmp_path / "resumed", seed, 20, forget=forget)
    weights = [final(tmp_path / name)["model"] for name in ("unbroken", "resumed")]
    assert same(*weights) == (forget is None)
