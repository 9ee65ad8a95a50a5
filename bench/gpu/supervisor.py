"""The jobs in a process of their own, which a device that hangs or breaks takes with it, but not what was found so far.

A process that waits for a kernel which never ends cannot be talked to, and after an illegal access every call to the
device fails. So another process watches: it ends the one that works when a job is over its time, and starts a new one
for the jobs that are left.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bench.gpu.runner import Deadline, Failure, Job, Results
from bench.record import write_atomically

#: For starting a process, up to its first job: torch, the device, the first copies; and how often in a row.
START_SECONDS, STARTS = 60.0, 2
#: Over the deadline, what a start or a job may still take; and what it may take in any case. With the 430 s of a whole
#: run and END_SECONDS this stays within eight minutes.
GRACE_SECONDS, LEAST_SECONDS = 25.0, 10.0
#: For the end of a process that has left its status, or is being ended.
END_SECONDS = 10.0
POLL_SECONDS = 0.1
NO_WORD = "the process was ended: no word from it"
OUT_OF_TIME = "the time was up before the end"
#: From linux/prctl.h: the signal that a process gets when the one that started it ends, in whatever way.
PR_SET_PDEATHSIG = 1


@dataclass
class Progress:
    """What has been found, and on what; how many jobs have begun, which one is at work, and the sections whose tables
    somebody has seen; ``status`` once all is done.
    """

    results: Results = field(default_factory=Results)
    described: dict[str, Any] = field(default_factory=dict)
    begun: int = 0
    running: tuple[str, str, float] | None = None  # section, label, the seconds that it has
    is_cut: bool = False  # by the deadline, to fewer seconds than jobs of its kind have
    shown: list[str] = field(default_factory=list)
    status: int | None = None


def _bounded(deadline: Deadline, limit_s: float) -> float:
    """No more than what is left up to the deadline, and the grace."""
    return min(limit_s, max(LEAST_SECONDS, deadline.left_s() + GRACE_SECONDS))


class Ended(BaseException):
    """Somebody asks this process to end."""


class Store:
    """A file with the progress of a run; who is killed while writing leaves the one before."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> Progress:
        if not self.path.exists():
            return Progress()
        progress: Progress = pickle.loads(self.path.read_bytes())
        return progress

    def save(self, progress: Progress) -> None:
        write_atomically(self.path, pickle.dumps(progress))

    def begin(self, progress: Progress, job: Job, deadline: Deadline) -> None:
        """A traceback comes shortly before the process is taken for dead."""
        limit_s = _bounded(deadline, job.limit_s)
        progress.begun += 1
        progress.running, progress.is_cut = (job.section, job.label, limit_s), limit_s < job.limit_s
        self.save(progress)
        if sys.__stderr__ is not None:  # the real one, which a traceback can be written to from anywhere
            faulthandler.dump_traceback_later(0.9 * limit_s, file=sys.__stderr__)

    def end(self, progress: Progress) -> None:
        faulthandler.cancel_dump_traceback_later()
        progress.running = None
        self.save(progress)


def supervise(
    store: Store,
    deadline: Deadline,
    work: Callable[[Store, Deadline], int],
    give_up: Callable[[Progress, str], None] = lambda progress, why: None,
) -> int:
    """Call ``work`` in processes, one after the other, until it is done; returns the last one's status.

    ``work``, which pickle must find by its name, goes on with what the store has, and leaves its status there at the
    end. A job that outlasts its limit, or whose process ends, is a failure of its section. Where two processes in a row
    do not even come to a job, where time is up, or where somebody asks this process to end, nothing more is tried, and
    ``give_up`` is called with what there is.
    """
    failed_starts = 0
    held: list[BaseProcess] = []
    asked: Any = signal.signal(signal.SIGTERM, _end) if threading.current_thread() is threading.main_thread() else None
    try:
        while True:
            before = store.load()
            why = _watch(store, deadline, work, held)
            progress = store.load()
            if progress.status is not None:
                return _leave(progress.status, held)
            why = _note_end(progress, why)
            store.save(progress)
            print(f"error: {why}", file=sys.stderr, flush=True)
            failed_starts = 0 if progress.begun > before.begun else failed_starts + 1
            if failed_starts == STARTS or deadline.passed():
                give_up(progress, why if failed_starts == STARTS else f"{OUT_OF_TIME}; {why}")
                return _leave(1, held)
    except (Ended, KeyboardInterrupt) as end:
        progress = store.load()
        give_up(progress, f"{type(end).__name__}, {_note_end(progress, 'somebody ended the run')}")
        return _leave(1, held)
    finally:
        if asked is not None:
            signal.signal(signal.SIGTERM, asked)


def _end(*_: object) -> None:
    raise Ended


def _note_end(progress: Progress, why: str) -> str:
    """Note that a process ended with a job at work, if there was one; says what ended."""
    if progress.running is None:
        return why
    section, label, _ = progress.running
    if progress.is_cut and why.startswith(NO_WORD):
        progress.results.left_out[section].append(f"{label} (in the midst of it: {why})")
    else:
        progress.results.failures[section].append(Failure(label, why))
        progress.results.lost[section] += 1
    progress.results.to_come[section] -= 1
    progress.running = None
    return f"{section}, {label}: {why}"


def _leave(status: int, held: Sequence[BaseProcess]) -> int:
    """The status; where a process outlives its end, this one ends here, for Python would wait for it at its own."""
    if any(process.is_alive() for process in held):
        print("error: a process cannot be ended; its device may be at work still", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _watch(store: Store, deadline: Deadline, work: Callable[[Store, Deadline], int], held: list[BaseProcess]) -> str:
    """Start a process, which ``held`` gets, and see it to its end; says why it ended."""
    process = multiprocessing.get_context("spawn").Process(target=_enter, args=(work, store, deadline))
    process.start()
    held.append(process)
    try:
        limit_s, since = _bounded(deadline, START_SECONDS), time.monotonic()
        seen, at = _version(store), store.load()
        while process.is_alive():
            process.join(POLL_SECONDS)
            if _version(store) != seen:
                seen, progress = _version(store), store.load()
                if (progress.begun, progress.running) == (at.begun, at.running) and progress.status is None:
                    continue  # rows of the job at work, which is given no more time for them
                at, since = progress, time.monotonic()
                limit_s = _bounded(deadline, START_SECONDS) if progress.running is None else progress.running[2]
                limit_s = limit_s if progress.status is None else END_SECONDS
            elif time.monotonic() - since > limit_s:
                return f"{NO_WORD} for {limit_s:.0f} s"
        return f"the process ended with status {process.exitcode}"
    finally:
        # With all that it has started but a compiler, which ends by itself, in case of an interrupt too.
        process.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]  # it has been started
        process.join(END_SECONDS)  # a driver may hold it for ever


def _version(store: Store) -> tuple[int, int]:
    """Every write is another file; the clock of a file system may be slow."""
    status = store.path.stat() if store.path.exists() else None
    return (status.st_ino, status.st_mtime_ns) if status is not None else (0, 0)


def _enter(work: Callable[[Store, Deadline], int], store: Store, deadline: Deadline) -> None:
    os.setpgid(0, 0)
    # Whoever ends the supervisor must not leave a device at work.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    supervisor = multiprocessing.parent_process()
    if supervisor is not None and os.getppid() != supervisor.pid:  # it has ended before
        os._exit(1)
    sys.exit(work(store, deadline))
