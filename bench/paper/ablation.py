"""What each part of DALS is worth: every variant against DALS itself, seed by seed, with an interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from bench.paper.results import Experiment, Record
from bench.paper.strategies import ABLATIONS
from bench.table import format_table

REFERENCE = "DALS"
CONFIDENCE = 0.95


def ablation_table(experiments: Sequence[tuple[str, Experiment]]) -> str:
    """One line per variant; for each (title, experiment) with any, the difference in the last and the best epoch."""
    shown = [(title, experiment) for title, experiment in experiments if any(map(experiment.records, ABLATIONS))]
    if not shown:
        return "no results"
    header = ["variant", *(f"{title}: {measure}" for title, _ in shown for measure in ("last", "best"))]
    rows = [_reference_row(shown)]
    for variant in ABLATIONS:
        cells = [variant]
        for _, experiment in shown:
            for measure in (_last, _best):
                cells.append(_interval(differences(experiment, variant, measure)))
        rows.append(cells)
    return format_table(header, rows)


def _reference_row(shown: Sequence[tuple[str, Experiment]]) -> list[str]:
    cells = [f"{REFERENCE} itself, %"]
    for _, experiment in shown:
        records = experiment.records(REFERENCE)
        for measure in (_last, _best):
            cells.append(f"{statistics.mean(map(measure, records)):.2f} ({len(records)})" if records else "-")
    return cells


def _last(record: Record) -> float:
    return record.last


def _best(record: Record) -> float:
    return record.best


def differences(experiment: Experiment, variant: str, measure: Callable[[Record], float]) -> list[float]:
    """Variant minus DALS for every seed that both were run with: the same data, the same initial weights."""
    reference = {record.seed: measure(record) for record in experiment.records(REFERENCE)}
    return [measure(r) - reference[r.seed] for r in experiment.records(variant) if r.seed in reference]


def half_width(values: Sequence[float]) -> float:
    """Of Student's 95 % confidence interval of the mean of two or more values."""
    from scipy import stats

    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def _interval(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):+.2f}"
    width = f" ± {half_width(values):.2f}" if len(values) > 1 else ""
    return f"{mean}{width} ({len(values)})"
