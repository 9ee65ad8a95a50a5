"""Jobs one after the other, and what they have found; one that fails is a row, and the others still run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.machine import Machine
from bench.timing import one_line
from fused_dals.host_walk import HOST_WALK

#: In the order in which they are shown. The profiler counts launches, and once it was there the host may stay slower
#: (pytorch issue 146604: 10 to 20 %), so that times of the host come before.
SECTIONS = (
    "compile", "correctness", "races", "waiting", "host", "steps", "launches", "features", "compiled", "sweep",
)  # fmt: skip

#: Longer than any job of checks takes, and than one with torch.compile or all of a model's contenders.
CHECKS_SECONDS, LONG_SECONDS = 60.0, 150.0
#: Jobs that may cost a process, in a section; a hang and a new start take half a minute, and tell the same again.
MOST_LOST = 2
#: Between two saves of what a job has found so far.
SAVE_SECONDS = 2.0


class DeviceLost(BaseException):
    """The device does nothing more in this process. No Exception: nothing but ending the process helps."""


@dataclass(frozen=True)
class Job:
    """A part of a section; ``limit_s`` is the time after which whoever watches may take it for dead."""

    section: str
    label: str
    run: Callable[[], Iterable[Any]]
    limit_s: float = CHECKS_SECONDS


@dataclass
class Failure:
    """A job that has no rows to show, or not all, and why."""

    label: str
    error: str


def _of_sections(empty: Callable[[], Any]) -> dict[str, Any]:
    return {section: empty() for section in SECTIONS}


@dataclass
class Results:
    """Rows by section, what failed in each, what was left out, how many jobs have not ended, and how many have taken
    their process with them; the copy bandwidth in bytes per second, measured before each list of tensors; clocks and
    temperature of the device at work, when a process began, before each model, and at the end."""

    copy_samples: list[float] = field(default_factory=list)
    conditions: list[dict[str, str]] = field(default_factory=list)
    rows: dict[str, list[Any]] = field(default_factory=lambda: _of_sections(list))
    failures: dict[str, list[Failure]] = field(default_factory=lambda: _of_sections(list))
    left_out: dict[str, list[str]] = field(default_factory=lambda: _of_sections(list))
    to_come: dict[str, int] = field(default_factory=lambda: _of_sections(int))
    lost: dict[str, int] = field(default_factory=lambda: _of_sections(int))
    seconds: dict[str, float] = field(default_factory=lambda: _of_sections(float))

    @property
    def copy_bandwidth(self) -> float:
        """The best sample: no step is let off because the machine was slow for a moment."""
        return max(self.copy_samples)

    def note_conditions(self, machine: Machine, when: str) -> None:
        walk = "yes" if HOST_WALK.compiled is not None else HOST_WALK.why_not or "not yet"
        self.conditions.append({"when": when, **machine.conditions(), "compiled_walk": walk})


class Deadline:
    """When the run has to be at its end, by time.monotonic(), which all processes of a machine share."""

    def __init__(self, end: float) -> None:
        self.end = end

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def left_s(self) -> float:
        return self.end - time.monotonic()

    def passed(self) -> bool:
        return self.left_s() < 0


def run_jobs(
    jobs: Sequence[Job],
    results: Results,
    deadline: Deadline,
    machine: Machine,
    before: Callable[[Job], None] = lambda job: None,
    after: Callable[[Job], None] = lambda job: None,
    during: Callable[[], None] = lambda: None,
) -> None:
    """Run them one after the other; an error is a failure of its section, and what there is no time for is left out, as
    is what follows in a section that has cost processes before. ``during`` is called now and then between two rows.

    Raises DeviceLost, with the failure noted, where a job leaves a device that does nothing more.
    """
    for job in jobs:
        before(job)
        many_lost = results.lost[job.section] >= MOST_LOST
        if deadline.passed() or many_lost:
            results.left_out[job.section].append(job.label + " (others before it lost the device)" * many_lost)
            results.to_come[job.section] -= 1
            after(job)
            continue
        start = saved = time.monotonic()
        failures = results.failures[job.section]
        try:
            for row in job.run():
                results.rows[job.section].append(row)
                if time.monotonic() - saved > SAVE_SECONDS:
                    during()
                    saved = time.monotonic()
        except DeviceLost as lost:
            failures.append(Failure(job.label, str(lost)))
            results.lost[job.section] += 1
            raise
        except Exception as error:  # whatever it is, the next job may work
            failures.append(Failure(job.label, one_line(error)))
        finally:
            results.seconds[job.section] += time.monotonic() - start
            results.to_come[job.section] -= 1
        try:
            machine.wait()
        except (DeviceLost, Exception) as refusal:
            # What has been queued does not end, or an error of an address has left a context that serves no more.
            failures.append(Failure(f"{job.label}, afterwards", one_line(refusal)))
            results.lost[job.section] += 1
            raise DeviceLost(f"after {job.section}, {job.label}: {one_line(refusal)}") from refusal
        try:
            machine.release()
        except Exception as error:
            failures.append(Failure(f"{job.label}, releasing memory", one_line(error)))
        after(job)
