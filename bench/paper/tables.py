"""Results as text: one line per strategy, beside what the paper published; and how to read it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench import published
from bench.paper.paired import differences, interval, last
from bench.paper.results import Experiment, Record
from bench.paper.strategies import ABLATIONS, CORRECTED, PUBLISHED
from bench.paper.tasks import PaperTask
from bench.table import format_epochs, format_table

#: What every strategy is compared with, seed by seed.
BASELINE = "Fixed SGD"
HEADER = (
    "strategy",
    "published",
    "seed 42",
    "best",
    "cross-picked",
    "last",
    f"last - {BASELINE}",
    "60/70/80/90 %",
    "as published",
    "runs",
    "s/run",
)


def results_table(experiment: Experiment, task: PaperTask, epochs: int) -> str:
    """The paper's strategies and the corrected ones, as far as there are results, in the paper's order."""
    rows = []
    for strategy in [*PUBLISHED, *CORRECTED]:
        records = experiment.records(strategy)
        if records:
            compared = interval(differences(experiment, strategy, BASELINE, last))
            rows.append(_cells(strategy, records, compared, task, epochs))
    return format_table(HEADER, rows) if rows else "no results"


def chaos_table(plain: Experiment, nudged: Sequence[Experiment], task: PaperTask) -> str:
    """Best epochs with seed 42: as it is, and with one initial weight changed in its last bit, by strategy."""
    rows = []
    for strategy in PUBLISHED:
        if any(experiment.file(strategy).exists() for experiment in nudged):
            values = [_best_of_reference(experiment, strategy) for experiment in (plain, *nudged)]
            rows.append([strategy, f"{published.BEST[task.published or ''][strategy]:.1f}", *values])
    header = ["strategy", "published", "seed 42", *(f"weight {i} moved" for i in range(1, len(nudged) + 1))]
    return format_table(header, rows) if rows else "no results"


def _best_of_reference(experiment: Experiment, strategy: str) -> str:
    best = [record.best for record in experiment.records(strategy) if record.seed == published.SEED]
    return f"{best[0]:.2f}" if best else "-"


def coverage_table(experiments: Sequence[tuple[str, Experiment]]) -> str:
    """What has been run: one line per experiment, variants of DALS counted apart."""
    rows = []
    for name, experiment in experiments:
        for kind, strategies in (("strategies", [*PUBLISHED, *CORRECTED]), ("variants of DALS", [*ABLATIONS])):
            counts = [len(experiment.records(strategy)) for strategy in strategies]
            runs = [record for strategy in strategies for record in experiment.records(strategy)]
            if runs:
                seeds = sorted({count for count in counts if count})
                hours = sum(sum(record.seconds) for record in runs) / 3600
                rows.append(
                    [
                        name,
                        str(len(runs[0].accuracy)),
                        f"{sum(map(bool, counts))} {kind}",
                        f"{seeds[0]}-{seeds[-1]}" if len(seeds) > 1 else str(seeds[0]),
                        str(len(runs)),
                        f"{hours:.1f}",
                    ]
                )
    return format_table(["experiment", "epochs", "what", "seeds each", "runs", "hours"], rows)


def _cells(strategy: str, records: Sequence[Record], compared: str, task: PaperTask, epochs: int) -> list[str]:
    as_published = epochs == task.epochs
    column = published.BEST.get(task.published or "", {}) if as_published else {}
    first = published.FIRST_EPOCHS.get(strategy, ()) if as_published and task.published == "synthetic" else ()
    reference = next((record for record in records if record.seed == published.SEED), None)
    return [
        strategy,
        f"{column[strategy]:.1f}" if strategy in column else "-",
        f"{reference.best:.2f}" if reference else "-",
        mean_and_deviation([record.best for record in records]),
        mean_and_deviation([record.cross_picked for record in records]),
        mean_and_deviation([record.last for record in records]),
        "" if strategy == BASELINE else compared,
        format_epochs(reference.first_epochs(published.THRESHOLDS)) if reference else "-",
        format_epochs(first),
        str(len(records)),
        f"{statistics.mean(sum(record.seconds) for record in records):.0f}",
    ]


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean and, of two or more values, the standard deviation over the seeds."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def notes() -> list[str]:
    """What the columns mean and how far they can be trusted."""
    return [
        "Accuracy on the test rows in %; with several runs mean ± standard deviation over their seeds.",
        f"published: best epoch, seed {published.SEED}; {published.SOURCE}; for task B of the paper's drafts.",
        f"seed {published.SEED}, best: of the best epoch, picked on the test rows as in the paper: too high.",
        "cross-picked: on one half of the test rows at the epoch that the other half picks; mean of both ways round.",
        f"last - {BASELINE}: seed by seed, mean ± half of the 95 % interval, and of how many seeds. A seed draws the",
        "data of the synthetic tasks anew, so that the deviations of different strategies have much in common.",
        "Cycles of SGDR and DALS-Acc may end anywhere: their last epoch may be one of a high rate.",
        f"60/70/80/90 %: first epoch with at least that accuracy, seed {published.SEED}; as published: the paper's.",
        "One accuracy has a standard error of its own, by its test rows: 0.3 points at 98 % of 2000, so that the first",
        "eight or so of the published synthetic column are a tie; 1.5 at 60 % of 1000, 2 at 60 % of 500.",
        "s/run: wall clock of the training steps. The runs of different strategies did not take turns, and other work",
        "may have shared the machine: no comparison of speed.",
    ]
