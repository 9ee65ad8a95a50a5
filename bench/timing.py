"""Side-by-side timing of optimizer steps, and the statistics drawn from it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from bench.contenders import Factory, NamedParameter, Step
from bench.shapes import NamedShape

WARMUP_ROUNDS = 3
SEED = 0


@dataclass
class Timing:
    """One contender's samples in seconds; `error` says why it has none or was left out."""

    contender: str
    seconds: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Spread:
    """Median with the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        p10, median, p90 = np.percentile(values, (10, 50, 90)).tolist()
        return cls(median, p10, p90)


@dataclass(frozen=True)
class Summary:
    """One contender's times, and their ratios to the baseline taken round by round."""

    contender: str
    time_s: Spread | None
    ratio: Spread | None
    samples_s: list[float]
    error: str | None


def make_parameters(shapes: Sequence[NamedShape], seed: int) -> list[NamedParameter]:
    """Random fp32 parameters without gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [(name, torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator))) for name, shape in shapes]


def measure(
    shapes: Sequence[NamedShape],
    contenders: Mapping[str, Factory],
    repeats: int,
    on_step: Callable[[], object],
) -> list[Timing]:
    """Time every contender once per round, so that drift of the machine hits all alike.

    Each contender has parameters and state of its own. The gradients are shared, because no
    optimizer here writes to them. A contender that fails is left out from then on.
    """
    gradients = [parameter.detach() for _, parameter in make_parameters(shapes, SEED + 1)]
    timings = [Timing(name) for name in contenders]
    steps: dict[str, Step] = {}
    for timing in timings:
        named = make_parameters(shapes, SEED)
        for (_, parameter), gradient in zip(named, gradients, strict=True):
            parameter.grad = gradient
        try:
            steps[timing.contender] = contenders[timing.contender](named)
        except Exception as error:
            timing.error = _one_line(error)
    for round_index in range(WARMUP_ROUNDS + repeats):
        for timing in timings:
            if timing.error is None:
                try:
                    seconds = time_step(steps[timing.contender])
                except Exception as error:
                    timing.error = _one_line(error)
                    del steps[timing.contender]
                else:
                    if round_index >= WARMUP_ROUNDS:
                        timing.seconds.append(seconds)
            on_step()
    return timings


def time_step(step: Step) -> float:
    """Wall-clock seconds of one step on the CPU."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def summarize(timings: Sequence[Timing], baseline: str) -> list[Summary]:
    """Medians and percentiles; no ratios where the contender or the baseline failed."""
    reference = next((t.seconds for t in timings if t.contender == baseline and not t.error), None)
    summaries = []
    for timing in timings:
        time_s = ratio = None
        if timing.error is None:
            time_s = Spread.of(timing.seconds)
            if reference is not None:
                pairs = zip(timing.seconds, reference, strict=True)
                ratio = Spread.of([own / other for own, other in pairs])
        summaries.append(Summary(timing.contender, time_s, ratio, timing.seconds, timing.error))
    return summaries
