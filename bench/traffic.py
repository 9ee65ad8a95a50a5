"""``python -m bench traffic``: bytes that a fused step moves, PREDICTED for any GPU; what window to take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import fused_dals
from bench import extras, record
from bench.byte_table import STEP_DTYPES
from bench.cache_model import PassPlan, bounds, predict, window_chunks
from bench.shapes import MODELS, SHAPES
from bench.table import format_table
from fused_dals.buckets import WINDOW_SHARE_OF_L2
from fused_dals.fused import PROGRAMS_PER_SM

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """What the model needs to know of one: from the makers' data sheets."""

    l2_mib: int
    multiprocessors: int


GPUS = {
    "A100": Gpu(40, 108),
    "H100": Gpu(50, 132),
    "B200": Gpu(126, 148),
    "RTX 4090": Gpu(72, 128),
    "L4": Gpu(48, 58),
}
#: Shares of the L2 cache that may really serve: nearly all of it, and what hashing, and lines held twice, may leave.
USABLE = (0.9, 0.6)
#: What stage A does, and whether data that the pass does not need again is marked "evict first". A reads only on AMD,
#: where marks do nothing.
MODES = {
    "A reads only, no marks": {"stage_a_writes": False, "evict_first": False},
    "A writes h and m, no marks": {"stage_a_writes": True, "evict_first": False},
    "A writes h and m": {"stage_a_writes": True, "evict_first": True},
}
#: The modes that windows are judged by: what runs, and the same on hardware that keeps to no marks.
WINDOW_MODES = ("A writes h and m", "A writes h and m, no marks")
WINDOW_SHARES = (0.0, 0.125, 0.25, 0.375, 0.4375, 0.5, 0.5625, 0.625, 0.75, 1.0, math.inf)
#: The model is no more exact: replays in coarse chunks are within 1 % of exact ones.
EQUALLY_SLOW = 1.01
#: A replay of so many chunks is within 1 % of one of all; tests/test_traffic.py holds it to that.
MOST_CHUNKS = 50_000


@dataclass(frozen=True)
class Cell:
    """One prediction; bytes per parameter."""

    gpu: str
    usable: float
    model: str
    dtypes: str
    mode: str
    window_share: float
    predicted: float
    waiting: float
    least: float
    uncached: float

    @property
    def excess(self) -> float:
        """Bytes over the least."""
        return self.predicted / self.least

    @property
    def slowness(self) -> float:
        """The same if time that programs wait is lost altogether; in fact the others have more bandwidth then."""
        return self.excess / (1 - self.waiting)


@dataclass(frozen=True)
class ShareScore:
    """A window's predictions over all lists and dtypes of one GPU and mode: means, and its worst loss."""

    gpu: str
    mode: str
    usable: float
    window_share: float
    excess: float
    worst_loss: float
    waiting: float
    slowness: float


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench traffic",
        description="Bytes per parameter that a step of the fused pass moves, PREDICTED by replaying its work list "
        "through a model of the L2 cache; nothing is measured. One table of what stage A does, with 90 and 60 % of the "
        "cache usable, and one of windows between the stages, as shares of the cache.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(MODELS), help="parameter lists")
    parser.add_argument("--dtypes", nargs="+", choices=STEP_DTYPES, default=list(STEP_DTYPES))
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="for the first table; the H200 is an H100 here")
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS), help="for the table of windows")
    parser.add_argument("--exact", action="store_true", help="replay every chunk: minutes instead of seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the predictions")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    extras.require("tqdm")
    from tqdm import tqdm

    most_chunks = 1 << 60 if args.exact else MOST_CHUNKS
    lists = [(model, dtypes) for model in args.shapes for dtypes in args.dtypes]
    total = len(lists) * (len(MODES) + len(args.gpus) * len(WINDOW_MODES) * len(WINDOW_SHARES))
    with tqdm(total=total, unit="replay") as bar:

        def of(gpu: str, modes: Sequence[str], shares: Sequence[float]) -> list[Cell]:
            bar.set_description(gpu)
            return list(cells_of(gpu, lists, modes, shares, most_chunks, bar.update))

        modes = of(args.gpu, list(MODES), [WINDOW_SHARE_OF_L2])
        windows = [cell for gpu in args.gpus for cell in of(gpu, WINDOW_MODES, WINDOW_SHARES)]
    scores = scores_of(windows)
    print(f"PREDICTED bytes per parameter, {describe(args.gpu)}\n")
    print(mode_tables(modes))
    print("\nPREDICTED effect of the window, means over these lists and dtypes\n")
    print(window_table(scores))
    print(f"\nto be taken: {best_share(scores):g} of the L2 cache; in use: {WINDOW_SHARE_OF_L2:g}")
    if args.json is not None:
        save(args.json, args.gpu, modes, scores)
        print(f"\npredictions: {args.json}")
    return 0


def describe(gpu: str) -> str:
    """What the first table assumes."""
    found = GPUS[gpu]
    usable = " and ".join(f"{100 * share:.0f}" for share in USABLE)
    return (
        f"{gpu} with {found.l2_mib} MiB of L2, {usable} % of it usable (the second in brackets), "
        f"{PROGRAMS_PER_SM * found.multiprocessors} programs, window {WINDOW_SHARE_OF_L2:g} of the L2"
    )


def cells_of(
    gpu: str,
    lists: Sequence[tuple[str, str]],
    modes: Sequence[str],
    shares: Sequence[float],
    most_chunks: int,
    on_replay: Callable[[], object],
) -> Iterator[Cell]:
    """Predictions for every list of tensors with its dtypes, usable share, mode and window."""
    l2_bytes, programs = GPUS[gpu].l2_mib * MIB, PROGRAMS_PER_SM * GPUS[gpu].multiprocessors
    for model, name in lists:
        sizes = tuple(math.prod(shape) for _, shape in SHAPES[model]())
        for mode in modes:
            for share in shares:
                window = window_chunks(share, l2_bytes, STEP_DTYPES[name])
                plan = PassPlan(sizes, STEP_DTYPES[name], window, programs=programs, **MODES[mode])
                plan = plan.coarser(most_chunks)
                predicted = predict(plan, *(int(usable * l2_bytes) for usable in USABLE))
                least, uncached = bounds(plan)
                for usable, found in zip(USABLE, predicted, strict=True):
                    figures = found.per_parameter, found.waiting, least, uncached
                    yield Cell(gpu, usable, model, name, mode, share, *figures)
                on_replay()


def scores_of(cells: Sequence[Cell]) -> list[ShareScore]:
    """One row per GPU, mode, usable share and window."""
    least: dict[tuple[str, str, float, str, str], float] = {}
    for cell in cells:
        case = cell.gpu, cell.mode, cell.usable, cell.model, cell.dtypes
        least[case] = min(cell.predicted, least.get(case, math.inf))
    scores = []
    by_row: dict[tuple[str, str, float, float], list[Cell]] = {}
    for cell in cells:
        by_row.setdefault((cell.gpu, cell.mode, cell.usable, cell.window_share), []).append(cell)
    for (gpu, mode, usable, share), members in by_row.items():
        loss = max(cell.predicted / least[gpu, mode, usable, cell.model, cell.dtypes] for cell in members)
        excess, waiting, slowness = (
            fmean(getattr(cell, name) for cell in members) for name in ("excess", "waiting", "slowness")
        )
        scores.append(ShareScore(gpu, mode, usable, share, excess, loss, waiting, slowness))
    return scores


def best_share(scores: Sequence[ShareScore]) -> float:
    """Of the windows with about the least mean slowness over all GPUs and usable shares, the one that risks least.

    What counts alike: every GPU, both usable shares, marks heeded and ignored. How much of the cache serves is not
    known, nor what marks do, and too large a window is what one pays for if it is little.
    """
    members = {share: [s for s in scores if s.window_share == share] for share in {s.window_share for s in scores}}
    slowness = {share: fmean(s.slowness for s in some) for share, some in members.items()}
    risk = {share: max(s.worst_loss for s in some) for share, some in members.items()}
    equal = [share for share in slowness if slowness[share] <= EQUALLY_SLOW * min(slowness.values())]
    return min(equal, key=lambda share: (risk[share], slowness[share]))


def mode_tables(cells: Sequence[Cell]) -> str:
    """A table per dtypes: modes by models, with the pessimistic share of the cache in brackets."""
    blocks = []
    for dtypes in dict.fromkeys(cell.dtypes for cell in cells):
        members = [cell for cell in cells if cell.dtypes == dtypes]
        models = list(dict.fromkeys(cell.model for cell in members))
        found = {(cell.mode, cell.model, cell.usable): cell for cell in members}
        rows = []
        for mode in dict.fromkeys(cell.mode for cell in members):
            pairs = [[found[mode, model, usable].predicted for usable in USABLE] for model in models]
            limit = next(cell.uncached for cell in members if cell.mode == mode)
            rows.append([mode, *(f"{full:.1f} ({less:.1f})" for full, less in pairs), f"{limit:.0f}"])
        title = f"{dtypes}, least {members[0].least:.0f}"
        blocks.append(format_table([title, *models, "no cache"], rows))
    return "\n\n".join(blocks)


def window_table(scores: Sequence[ShareScore]) -> str:
    """Windows by GPU, mode and usable share."""
    header = ["GPU", "mode", "usable", "window x L2", "bytes / least", "worst loss", "waiting", "slowness"]
    rows = [
        [
            score.gpu,
            score.mode,
            f"{100 * score.usable:.0f} %",
            "all A first" if math.isinf(score.window_share) else f"{score.window_share:g}",
            f"{score.excess:.3f}",
            f"{100 * (score.worst_loss - 1):.1f} %",
            f"{100 * score.waiting:.1f} %",
            f"{score.slowness:.3f}",
        ]
        for score in scores
    ]
    return format_table(header, rows)


def save(path: Path, gpu: str, modes: Sequence[Cell], scores: Sequence[ShareScore]) -> None:
    """Everything as JSON; an infinite window is null."""

    def plain(row: Cell | ShareScore) -> dict[str, Any]:
        found = asdict(row)
        return {**found, "window_share": None if math.isinf(row.window_share) else row.window_share}

    predicted = {
        "predicted": True,
        "fused_dals": fused_dals.__version__,
        "assumptions": describe(gpu),
        "gpus": {name: asdict(found) for name, found in GPUS.items()},
        "window_share_in_use": WINDOW_SHARE_OF_L2,
        "best_window_share": best_share(scores),
        "modes": [plain(cell) for cell in modes],
        "windows": [plain(score) for score in scores],
    }
    record.save(path, predicted)
