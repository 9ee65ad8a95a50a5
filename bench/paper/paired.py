"""Strategies compared seed by seed: the same data, the same initial weights, so that what seeds share drops out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from bench.paper.results import Experiment, Record

Measure = Callable[[Record], float]

CONFIDENCE = 0.95


def last(record: Record) -> float:
    return record.last


def best(record: Record) -> float:
    return record.best


def differences(experiment: Experiment, strategy: str, reference: str, measure: Measure) -> list[float]:
    """Strategy minus reference for every seed that both were run with."""
    of_reference = {record.seed: measure(record) for record in experiment.records(reference)}
    return [measure(r) - of_reference[r.seed] for r in experiment.records(strategy) if r.seed in of_reference]


def half_width(values: Sequence[float]) -> float:
    """Of Student's 95 % confidence interval of the mean of two or more values."""
    from scipy import stats

    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float]) -> str:
    """Mean, half width of its interval, and in brackets of how many seeds."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):+.2f}"
    width = f" ± {half_width(values):.2f}" if len(values) > 1 else ""
    return f"{mean}{width} ({len(values)})"
