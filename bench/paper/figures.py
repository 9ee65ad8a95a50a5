"""The figures of the paper's benchmark: accuracy by epoch, accuracy by time, ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.paper.results import Experiment, Record
from bench.paper.strategies import CORRECTED, PUBLISHED

COLUMNS = 2

#: Colour by generation of the paper, after Okabe and Ito; members of one differ by line style.
GENERATIONS = {
    "#999999": ("Fixed SGD", "Cosine Decay SGD", "SGDR", "SGDR (corrected)"),
    "#56B4E9": ("Adam", "AdamW", "AdaBound"),
    "#009E73": ("LARS", "Discriminative LR"),
    "#E69F00": ("RAdam", "Lion", "Lookahead+AdamW"),
    "#CC79A7": ("SAM", "SAM+Discriminative", "Grokfast"),
    "#0072B2": ("STLR+Discriminative", "STLR+Discriminative (corrected)"),
    "#D55E00": ("DALS", "DALS-Fast", "DALS-Acc", "DALS-Acc (corrected)"),
}
LINES = ("-", "--", ":", "-.")
STYLE = {name: (color, LINES[place]) for color, names in GENERATIONS.items() for place, name in enumerate(names)}

Shown = Sequence[tuple[str, Experiment]]


def draw_curves(shown: Shown, path: Path, by_time: bool = False) -> None:
    """Mean test accuracy over the seeds after each epoch, one panel per experiment.

    `by_time`: the best mean so far against the seconds that the training steps took.
    """
    figure = Figure(figsize=(12, 1.6 + 4.2 * math.ceil(len(shown) / COLUMNS)), layout="constrained")
    panels = figure.subplots(math.ceil(len(shown) / COLUMNS), COLUMNS, squeeze=False).flat
    handles = {}
    for axis, (title, experiment) in zip(panels, shown, strict=False):
        runs = {name: experiment.records(name) for name in STYLE if experiment.records(name)}
        means = {name: _mean(records, lambda record: record.accuracy) for name, records in runs.items()}
        for name, mean in means.items():
            color, line = STYLE[name]
            if by_time:
                x = _mean(runs[name], lambda record: list(np.cumsum(record.seconds)))
                mean = np.maximum.accumulate(mean)
            else:
                x = np.arange(1, len(mean) + 1)
            width = 1.8 if name.startswith("DALS") else 1.0
            handles[name], *_ = axis.plot(x, mean, line, color=color, lw=width)
        _frame(axis, title, list(means.values()), by_time)
    for axis in figure.axes[len(shown) :]:
        axis.set_visible(False)
    ordered = [name for name in STYLE if name in handles]
    figure.legend([handles[name] for name in ordered], ordered, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=85)


def _frame(axis: Axes, title: str, means: Sequence[np.ndarray], by_time: bool) -> None:
    """Limits that show where the strategies end up, with whatever lies lower cut off."""
    later = np.concatenate([mean[len(mean) // 4 :] for mean in means])
    low, high = np.percentile(later, 3), max(mean.max() for mean in means)
    margin = 0.08 * (high - low) + 0.1
    axis.set(
        title=title,
        xlabel="seconds of training steps" if by_time else "epoch",
        ylabel="best test accuracy so far, %" if by_time else "test accuracy, %",
        ylim=(low - margin, high + margin),
    )
    if by_time:
        axis.set_xscale("log")
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(color="0.9", lw=0.6)


def _mean(records: Sequence[Record], values: Callable[[Record], list[float]]) -> np.ndarray:
    mean: np.ndarray = np.mean([values(record) for record in records], axis=0)
    return mean


def ranks(experiment: Experiment, measure: Callable[[Record], float]) -> dict[str, float]:
    """Rank among the paper's strategies by the mean over the seeds, 1 for the best; equal means share the mean of their
    ranks. The corrected ones have the rank that they would take there.
    """
    means = {
        name: round(statistics.mean(map(measure, records)), 9)
        for name in [*PUBLISHED, *CORRECTED]
        if (records := experiment.records(name))
    }
    found = {}
    for name, value in means.items():
        others = [means[other] for other in PUBLISHED if other in means and other != name]
        found[name] = 1 + sum(other > value for other in others) + others.count(value) / 2
    return found


def draw_ranks(shown: Shown, path: Path) -> None:
    """Heat maps of ranks, strategy by experiment: by the best epoch as in the paper, and by the last."""
    names = [*PUBLISHED, *CORRECTED]
    measures: list[tuple[str, Callable[[Record], float]]] = [
        ("by the best epoch (the paper's measure)", lambda record: record.best),
        ("by the last epoch", lambda record: record.last),
    ]
    figure = Figure(figsize=(3.5 + 1.9 * len(shown) * len(measures) / 2 + 2, 8), layout="constrained")
    for axis, (title, measure) in zip(figure.subplots(1, len(measures), sharey=True), measures, strict=True):
        found = [ranks(experiment, measure) for _, experiment in shown]
        counts = [sum(name in PUBLISHED for name in column) for column in found]
        labels = [f"{label} (of {count})" for (label, _), count in zip(shown, counts, strict=True)]
        table = np.array([[column.get(name, np.nan) for column in found] for name in names])
        shade = (table - 1) / (np.array([max(column.values(), default=2) for column in found]) - 1)
        axis.imshow(shade, cmap=matplotlib.colormaps["viridis_r"], aspect="auto", vmin=0, vmax=1)
        for (row, column), rank in np.ndenumerate(table):
            if not np.isnan(rank):
                dark = shade[row, column] > 0.5
                axis.text(column, row, f"{rank:g}", ha="center", va="center", color="white" if dark else "black")
        axis.set_title(f"Rank {title}", fontsize=10)
        axis.set_xticks(range(len(shown)), labels, rotation=30, ha="right", fontsize=8)
        axis.set_yticks(range(len(names)), names)
    figure.savefig(path, dpi=85)
