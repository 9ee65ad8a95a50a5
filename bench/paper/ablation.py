"""What each part of DALS is worth: every variant against DALS itself, seed by seed, with an interval."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.paper.paired import best, differences, interval, last
from bench.paper.results import Experiment
from bench.paper.strategies import ABLATIONS
from bench.table import format_table

REFERENCE = "DALS"
MEASURES = (last, best)


def ablation_table(experiments: Sequence[tuple[str, Experiment]]) -> str:
    """One line per variant; for each (title, experiment) with any, the difference in the last and the best epoch."""
    shown = [(title, experiment) for title, experiment in experiments if any(map(experiment.records, ABLATIONS))]
    if not shown:
        return "no results"
    header = ["variant", *(f"{title}: {measure.__name__}" for title, _ in shown for measure in MEASURES)]
    rows = [_reference_row(shown)]
    for variant in ABLATIONS:
        cells = [
            interval(differences(experiment, variant, REFERENCE, measure))
            for _, experiment in shown
            for measure in MEASURES
        ]
        rows.append([variant, *cells])
    return format_table(header, rows)


def _reference_row(shown: Sequence[tuple[str, Experiment]]) -> list[str]:
    cells = [f"{REFERENCE} itself, %"]
    for _, experiment in shown:
        records = experiment.records(REFERENCE)
        for measure in MEASURES:
            cells.append(f"{statistics.mean(map(measure, records)):.2f} ({len(records)})" if records else "-")
    return cells
