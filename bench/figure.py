"""The demonstration's figure: accuracy, trust ratios by depth, phases over time."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.published import THRESHOLDS
from bench.training import Run

# Okabe and Ito's palette, distinguishable with any colour vision.
RUN_COLORS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RUN_STYLES = ("-", "-", "-", "--", "--")
PHASE_COLORS = ("#E69F00", "#56B4E9", "#0B3C5D")
PHASE_NAMES = ("0 exploration", "1 exploitation", "2 refinement")
TRUST_BOUNDS = (0.2, 5.0)
EARLY_EPOCHS = 10


def draw(runs: Sequence[Run], title: str, path: Path) -> None:
    """Write the figure of these runs as a PNG."""
    family = [run for run in runs if run.phase_share]
    figure = Figure(figsize=(11, 11), layout="constrained")
    figure.suptitle(title)
    top, middle, bottom = np.asarray(figure.subfigures(3, 1, height_ratios=(1.1, 1.1, 1)))
    _accuracy(top.subplots(1, 2), runs)
    _trust_ratios(middle.subplots(1, 2, sharey=True), family[0])
    _phases(bottom.subplots(1, len(family), sharey=True), family)
    for row in (top, middle, bottom):
        handles, labels = row.axes[0].get_legend_handles_labels()
        row.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=120)


def _accuracy(axes: Sequence[Axes], runs: Sequence[Run]) -> None:
    """Left the first epochs with the thresholds of the table, right all epochs from close by."""
    early, late = axes
    epochs = range(1, len(runs[0].accuracy) + 1)
    for run, color, style in zip(runs, RUN_COLORS, RUN_STYLES, strict=True):
        shown = epochs[:EARLY_EPOCHS]
        early.plot(
            shown,
            run.accuracy[: len(shown)],
            style,
            color=color,
            marker="o",
            ms=3.5,
            label=run.strategy,
        )
        late.plot(epochs, run.accuracy, style, color=color, lw=1.2)
    for threshold in THRESHOLDS:
        early.axhline(threshold, color="0.8", lw=0.8, zorder=0)
    early.set(
        title="First epochs (grey lines: 60, 70, 80, 90 %)",
        xlabel="epoch",
        ylabel="test accuracy, %",
    )
    early.xaxis.set_major_locator(MaxNLocator(integer=True))
    settled = np.array([run.accuracy[len(epochs) // 4 :] for run in runs])
    low, high = np.percentile(settled, 2), max(max(run.accuracy) for run in runs)
    margin = 0.1 * (high - low) + 0.1
    late.set(
        title="All epochs, enlarged",
        xlabel="epoch",
        xlim=(0.5, len(epochs) + 0.5),
        ylabel="test accuracy, %",
        ylim=(low - margin, high + margin),
    )
    late.grid(color="0.9", lw=0.6)


def _trust_ratios(axes: Sequence[Axes], run: Run) -> None:
    """One curve per depth, weights and biases apart, on a logarithmic scale."""
    depths = sorted(set(run.depths.values()))
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(depths)))
    for axis, kind in zip(axes, ("weights", "biases"), strict=True):
        for depth, color in zip(depths, colors, strict=True):
            names = [
                name
                for name, value in run.depths.items()
                if value == depth and name.endswith("bias") == (kind == "biases")
            ]
            if names:
                ratios = np.mean([run.trust[name] for name in names], axis=0)
                epochs = range(1, len(ratios) + 1)
                axis.plot(epochs, ratios, color=color, marker=".", ms=4, lw=1.2, label=f"depth {depth:.2f}")
        for bound in TRUST_BOUNDS:
            axis.axhline(bound, color="0.3", lw=0.8, ls=":")
        axis.set(
            title=f"{run.strategy}: trust ratio of the {kind} (dotted: its bounds)",
            xlabel="epoch",
            xlim=(0.5, len(run.accuracy) + 0.5),
            yscale="log",
            yticks=[0.2, 0.5, 1, 2, 5],
            yticklabels=["0.2", "0.5", "1", "2", "5"],
        )
        axis.minorticks_off()
        axis.grid(color="0.9", lw=0.6)
    axes[0].set_ylabel("trust ratio, median of each epoch")


def _phases(axes: Sequence[Axes], family: Sequence[Run]) -> None:
    """The share of each training phase in every epoch, stacked to one."""
    for axis, run in zip(axes, family, strict=True):
        shares = 100 * np.array(run.phase_share).T
        edges = np.arange(shares.shape[1] + 1) + 0.5
        bottom = np.zeros(shares.shape[1])
        for share, color, name in zip(shares, PHASE_COLORS, PHASE_NAMES, strict=True):
            axis.stairs(
                bottom + share,
                edges,
                baseline=bottom,
                fill=True,
                color=color,
                label=f"phase {name}",
            )
            bottom = bottom + share
        axis.set(
            title=f"{run.strategy}: training phases",
            xlabel="epoch",
            xlim=(edges[0], edges[-1]),
            ylim=(0, 100),
        )
    axes[0].set_ylabel("share of steps, %")
