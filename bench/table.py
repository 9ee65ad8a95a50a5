"""The demonstration's results as text: one table, and what to keep in mind when reading it."""

from collections.abc import Sequence

from bench import published
from bench.training import Run, first_epochs


def results_table(runs: Sequence[Run], with_published: bool) -> str:
    """One line per run; with the published columns when there are any for the task."""
    header = ["strategy", "best", "last", "60/70/80/90 %", "seconds"]
    if with_published:
        header = ["strategy", "best", "published", "last", "60/70/80/90 %", "published", "seconds"]
    rows = [_cells(run, with_published) for run in runs]
    return format_table(header, rows)


def _cells(run: Run, with_published: bool) -> list[str]:
    best = [f"{max(run.accuracy):.2f}"]
    last = [f"{run.accuracy[-1]:.2f}"]
    first = [format_epochs(first_epochs(run.accuracy, published.THRESHOLDS))]
    if with_published:
        published_best = published.BEST_SYNTHETIC.get(run.strategy)
        best.append("-" if published_best is None else f"{published_best:.1f}")
        first.append(format_epochs(published.FIRST_EPOCHS.get(run.strategy, ())))
    return [run.strategy, *best, *last, *first, f"{run.seconds:.1f}"]


def format_epochs(epochs: Sequence[int | None]) -> str:
    """Epoch numbers joined by slashes, a dash for a threshold that was never reached."""
    return "/".join("-" if epoch is None else str(epoch) for epoch in epochs) or "-"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain text: the first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def reading_notes(epochs: int, horizon: int, test_rows: int, with_published: bool) -> list[str]:
    """What the table's numbers mean and how far they can be trusted."""
    notes = [
        "best, last: test accuracy in %, of the best and of the last epoch trained.",
        "60/70/80/90 %: first epoch with at least that test accuracy.",
        "seconds: wall clock of the training steps, one thread per run, without evaluation.",
    ]
    if with_published:
        shorter = f", the start of the same {horizon}-epoch schedules: compare first epochs, not best"
        notes += [
            f"published: {published.SOURCE}; best of {published.EPOCHS} epochs, seed {published.SEED}. "
            f"Trained here: {epochs} of {horizon} epochs{shorter if epochs < horizon else ''}.",
            f"One seed and {test_rows} test rows: a standard error of about 0.32 points. The published "
            "protocol picks the best epoch on the test set.",
            "Training is chaotic: changing the last bits of one weight can move the 90 % epoch of DALS-Fast "
            "and DALS-Acc by one.",
        ]
    else:
        notes.append(
            f"Trained: {epochs} of {horizon} epochs; nothing published for this task. One seed, "
            f"{test_rows} test rows: one row is {100 / test_rows:.2f} points."
        )
    return notes
