"""``python -m bench traffic``: bytes and time of a fused step, PREDICTED for any GPU; what window and chunk to take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch

from bench import environment, extras, record
from bench.byte_table import STEP_DTYPES
from bench.cache_model import (
    ITEM_SECONDS,
    L2_BYTES_PER_S,
    LONE_CHUNK_SECONDS,
    MIXED_SHARE,
    PAIR_SECONDS,
    RATIO_SECONDS,
    TILE_SECONDS,
    PassPlan,
    bounds,
    chunk_of,
    predict,
    window_chunks,
)
from bench.options import HelpFormatter
from bench.shapes import MODELS, SHAPES
from bench.table import format_table
from fused_dals.kernels.layout import CHUNK_BYTES
from fused_dals.launch_plan import PROGRAMS_PER_SM, WINDOW_PER_PROGRAM

MIB = 1 << 20


Choice = TypeVar("Choice", int, float)


#: Of the data sheet's bandwidth, what a copy gets: 4.23 of 4.8 TB/s on an H200.
COPY_SHARE = 0.88


@dataclass(frozen=True)
class Gpu:
    """What the model needs to know of one: from the makers' data sheets, L2 of the H200 as torch says."""

    l2_mib: int
    multiprocessors: int
    terabytes_per_s: float

    @property
    def l2_bytes(self) -> int:
        return self.l2_mib * MIB

    @property
    def bytes_per_s(self) -> float:
        """Of a large copy, read plus written."""
        return COPY_SHARE * 1e12 * self.terabytes_per_s


GPUS = {
    "A100": Gpu(40, 108, 2.0),
    "H100": Gpu(50, 132, 3.35),
    "H200": Gpu(60, 132, 4.8),
    "B200": Gpu(126, 148, 8.0),
    "RTX 4090": Gpu(72, 128, 1.0),
    "L4": Gpu(48, 58, 0.3),
}
#: Shares of the L2 cache that may really serve: what was found on an H200, whose halves hold lines twice, and nearly
#: all of it.
USABLE = (0.55, 0.9)
#: What stage A does, and whether data that the pass does not need again is marked "evict first". A reads only on AMD,
#: where marks do nothing.
MODES = {
    "A reads only, no marks": {"stage_a_writes": False, "evict_first": False},
    "A writes h and m, no marks": {"stage_a_writes": True, "evict_first": False},
    "A writes h and m": {"stage_a_writes": True, "evict_first": True},
}
#: The modes that windows are judged by: what runs, and the same on hardware that keeps to no marks.
WINDOW_MODES = ("A writes h and m", "A writes h and m, no marks")
WINDOWS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, math.inf)
#: Bytes. Tried with the window in use, as the windows are with the chunk in use; tiles as they are.
CHUNKS = (CHUNK_BYTES // 2, CHUNK_BYTES, 2 * CHUNK_BYTES)
#: Tried on the GPU of the targets, with marks, one thing at a time.
TRIES_ON = "H200"
TRIES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "tiles of 4096": {"tile": 4096},
    "chunks half as large": {"chunk_bytes": CHUNK_BYTES // 2},
    "chunks twice as large": {"chunk_bytes": 2 * CHUNK_BYTES},
    "stage B in tiles of 2048": {"most_in_b": 0},
    "16-bit tiles one by one": {"in_pairs": False},
    "1 program per SM": {"programs_per_sm": 1},
    "3 programs per SM": {"programs_per_sm": 3},
    "4 programs per SM": {"programs_per_sm": 4},
    "no window": {"window_per_program": 0.0},
    "half the window": {"window_per_program": 0.5 * WINDOW_PER_PROGRAM},
    "twice the window": {"window_per_program": 2.0 * WINDOW_PER_PROGRAM},
    "all A before all B": {"window_per_program": math.inf},
    "marks are ignored": {"evict_first": False},
    "A reads only, marks are ignored": {"stage_a_writes": False, "evict_first": False},
}
#: The model is no more exact: replays in coarse chunks are within 1 % of exact ones.
EQUALLY_SLOW = 1.01
#: A replay of so many chunks is within 1 % of one of all, 3 % where A only reads: see tests/test_traffic.py.
MOST_CHUNKS = 30_000


@dataclass(frozen=True)
class Cell:
    """One prediction; bytes per parameter."""

    gpu: str
    usable: float
    model: str
    dtypes: str
    mode: str
    chunk_bytes: int
    window_per_program: float
    predicted: float
    waiting: float
    slowness: float  # time over that of the least bytes at full bandwidth
    least: float
    uncached: float

    @property
    def excess(self) -> float:
        """Bytes over the least."""
        return self.predicted / self.least


@dataclass(frozen=True)
class Try:
    """A plan that differs in one thing from the one in use: means over all lists and dtypes, with USABLE[0] of L2."""

    name: str
    excess: float
    waiting: float
    slowness: float


@dataclass(frozen=True)
class Score:
    """A chunk and window, over all lists and dtypes of one GPU and mode: means, and the worst loss of time
    against the best of all chunks and windows."""

    gpu: str
    mode: str
    usable: float
    chunk_bytes: int
    window_per_program: float
    excess: float
    worst_loss: float
    waiting: float
    slowness: float


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench traffic",
        description="Bytes per parameter that a step of the fused pass moves, PREDICTED by replaying its work list "
        "through a model of the L2 cache, and its time from latencies that one GPU has. One table of what "
        "stage A does, with 55 and 90 % of the cache usable, and one of chunks and of windows between the stages, in "
        "chunks for each program.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(MODELS), help="parameter lists")
    parser.add_argument("--dtypes", nargs="+", choices=STEP_DTYPES, default=list(STEP_DTYPES))
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="for the first table")
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS), help="for the second table")
    parser.add_argument("--exact", action="store_true", help="replay every chunk: takes several times as long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the predictions")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    extras.require("tqdm")
    from tqdm import tqdm

    most_chunks = 1 << 60 if args.exact else MOST_CHUNKS
    lists = [(model, dtypes) for model in args.shapes for dtypes in args.dtypes]
    plans = [(CHUNK_BYTES, window) for window in WINDOWS]
    plans += [(chunk, WINDOW_PER_PROGRAM) for chunk in CHUNKS if chunk != CHUNK_BYTES]
    total = len(lists) * (len(MODES) + len(TRIES) + len(args.gpus) * len(WINDOW_MODES) * len(plans))
    with tqdm(total=total, unit="replay") as bar:

        def of(gpu: str, modes: Sequence[str], plans: Sequence[tuple[int, float]]) -> list[Cell]:
            bar.set_description(gpu)
            return list(cells_of(gpu, lists, modes, plans, most_chunks, bar.update))

        modes = of(args.gpu, list(MODES), [(CHUNK_BYTES, WINDOW_PER_PROGRAM)])
        bar.set_description("tries")
        tries = [tried(name, lists, most_chunks, bar.update) for name in TRIES]
        scores = scores_of([cell for gpu in args.gpus for cell in of(gpu, WINDOW_MODES, plans)])
    print(f"PREDICTED bytes per parameter, {describe(args.gpu)}\n")
    print(mode_tables(modes))
    print(f"\nPREDICTED for other plans on {TRIES_ON}, means over these lists and dtypes\n")
    print(try_table(tries))
    print("\nPREDICTED effect of chunk and window, means over these lists and dtypes\n")
    print(score_table(scores))
    print(f"\nto be taken: a window of {best_window(scores):g} chunks for each program; in use: {WINDOW_PER_PROGRAM:g}")
    print(f"and chunks of {best_chunk(scores)} bytes; in use: {CHUNK_BYTES}")
    if args.json is not None:
        save(args.json, args.gpu, modes, tries, scores)
        print(f"\npredictions: {args.json}")
    return 0


def describe(gpu: str) -> str:
    """What the first table assumes."""
    found = GPUS[gpu]
    usable = " and ".join(f"{100 * share:.0f}" for share in USABLE)
    return (
        f"{gpu} with {found.l2_mib} MiB of L2, {usable} % of it usable (the second in brackets), "
        f"{PROGRAMS_PER_SM * found.multiprocessors} programs, a window of {WINDOW_PER_PROGRAM:g} chunks for each"
    )


def plan_on(
    gpu: Gpu,
    model: str,
    dtypes: str,
    most_chunks: int,
    chunk_bytes: int = CHUNK_BYTES,
    window_per_program: float = WINDOW_PER_PROGRAM,
    programs_per_sm: int = PROGRAMS_PER_SM,
    **options: Any,
) -> PassPlan:
    """A list of tensors on a GPU, as it is in use but for what is given; ``options`` as of ``PassPlan``."""
    sizes = tuple(math.prod(shape) for _, shape in SHAPES[model]())
    programs = programs_per_sm * gpu.multiprocessors
    window, chunk = window_chunks(window_per_program, programs), chunk_of(STEP_DTYPES[dtypes], chunk_bytes)
    plan = PassPlan(sizes, STEP_DTYPES[dtypes], window, chunk, programs=programs, bandwidth=gpu.bytes_per_s, **options)
    return plan.coarser(most_chunks)


def cells_of(
    gpu: str,
    lists: Sequence[tuple[str, str]],
    modes: Sequence[str],
    plans: Sequence[tuple[int, float]],
    most_chunks: int,
    on_replay: Callable[[], object],
) -> Iterator[Cell]:
    """Predictions for every list of tensors with its dtypes, usable share, mode and plan, a chunk and a window."""
    for model, name in lists:
        for mode in modes:
            for chunk, window in plans:
                plan = plan_on(GPUS[gpu], model, name, most_chunks, chunk, window, **MODES[mode])
                predicted = predict(plan, *(int(usable * GPUS[gpu].l2_bytes) for usable in USABLE))
                least, uncached = bounds(plan)
                for usable, found in zip(USABLE, predicted, strict=True):
                    figures = found.per_parameter, found.waiting, found.slowness, least, uncached
                    yield Cell(gpu, usable, model, name, mode, chunk, window, *figures)
                on_replay()


def tried(name: str, lists: Sequence[tuple[str, str]], most_chunks: int, on_replay: Callable[[], object]) -> Try:
    """One of the tries."""
    gpu = GPUS[TRIES_ON]
    found = []
    for model, dtypes in lists:
        plan = plan_on(gpu, model, dtypes, most_chunks, **TRIES[name])
        (traffic,) = predict(plan, int(USABLE[0] * gpu.l2_bytes))
        found.append((traffic.per_parameter / bounds(plan)[0], traffic.waiting, traffic.slowness))
        on_replay()
    return Try(name, *map(fmean, zip(*found, strict=True)))


def scores_of(cells: Sequence[Cell]) -> list[Score]:
    """One row per GPU, mode, usable share, chunk and window."""
    least: dict[tuple[str, str, float, str, str], float] = {}
    for cell in cells:
        case = cell.gpu, cell.mode, cell.usable, cell.model, cell.dtypes
        least[case] = min(cell.slowness, least.get(case, math.inf))
    scores = []
    by_row: dict[tuple[str, str, float, int, float], list[Cell]] = {}
    for cell in cells:
        by_row.setdefault((cell.gpu, cell.mode, cell.usable, cell.chunk_bytes, cell.window_per_program), []).append(
            cell
        )
    for (gpu, mode, usable, chunk, window), members in by_row.items():
        loss = max(cell.slowness / least[gpu, mode, usable, cell.model, cell.dtypes] for cell in members)
        excess, waiting, slowness = (
            fmean(getattr(cell, name) for cell in members) for name in ("excess", "waiting", "slowness")
        )
        scores.append(Score(gpu, mode, usable, chunk, window, excess, loss, waiting, slowness))
    return scores


def best_window(scores: Sequence[Score]) -> float:
    """The window to take with the chunk in use, in chunks for each program."""
    return _best(
        {
            window: [s for s in scores if (s.chunk_bytes, s.window_per_program) == (CHUNK_BYTES, window)]
            for window in WINDOWS
        }
    )


def best_chunk(scores: Sequence[Score]) -> int:
    """The chunk to take with the window in use."""
    return int(
        _best(
            {c: [s for s in scores if (s.chunk_bytes, s.window_per_program) == (c, WINDOW_PER_PROGRAM)] for c in CHUNKS}
        )
    )


def _best(members: dict[Choice, list[Score]]) -> Choice:
    """Of what is about the least slow, in the mean over all GPUs, what is fastest on the GPU of the targets.

    What counts alike in a mean: both usable shares, marks heeded and ignored. How much of the cache serves is not
    known, nor what marks do elsewhere, and too large a window or chunk is what one pays for if it is little. On that
    GPU marks are heeded: its counters say so. Where it is left out, what risks least.
    """
    slowness = {choice: fmean(s.slowness for s in some) for choice, some in members.items() if some}
    risk = {choice: max(s.worst_loss for s in some) for choice, some in members.items() if some}
    there = {
        choice: fmean([s.slowness for s in some if (s.gpu, s.mode) == (TRIES_ON, WINDOW_MODES[0])] or [0.0])
        for choice, some in members.items()
    }
    equal = [choice for choice in slowness if slowness[choice] <= EQUALLY_SLOW * min(slowness.values())]
    return min(equal, key=lambda choice: (there[choice], risk[choice], slowness[choice]))


def mode_tables(cells: Sequence[Cell]) -> str:
    """A table per dtypes: modes by models, with the larger share of the cache in brackets."""
    blocks = []
    for dtypes in dict.fromkeys(cell.dtypes for cell in cells):
        members = [cell for cell in cells if cell.dtypes == dtypes]
        models = list(dict.fromkeys(cell.model for cell in members))
        found = {(cell.mode, cell.model, cell.usable): cell for cell in members}
        rows = []
        for mode in dict.fromkeys(cell.mode for cell in members):
            pairs = [[found[mode, model, usable].predicted for usable in USABLE] for model in models]
            limit = next(cell.uncached for cell in members if cell.mode == mode)
            rows.append([mode, *(f"{less:.1f} ({more:.1f})" for less, more in pairs), f"{limit:.0f}"])
        title = f"{dtypes}, least {members[0].least:.0f}"
        blocks.append(format_table([title, *models, "no cache"], rows))
    return "\n\n".join(blocks)


def try_table(tries: Sequence[Try]) -> str:
    """Plans and what they come to."""
    rows = [[some.name, f"{some.excess:.3f}", f"{100 * some.waiting:.1f} %", f"{some.slowness:.3f}"] for some in tries]
    return format_table(["plan", "bytes / least", "waiting", "slowness"], rows)


def score_table(scores: Sequence[Score]) -> str:
    """Chunks and windows by GPU, mode and usable share."""
    header = [
        "GPU",
        "mode",
        "usable",
        "chunk bytes",
        "window / programs",
        "bytes / least",
        "worst loss",
        "waiting",
        "slowness",
    ]
    rows = [
        [
            score.gpu,
            score.mode,
            f"{100 * score.usable:.0f} %",
            str(score.chunk_bytes),
            "all A first" if math.isinf(score.window_per_program) else f"{score.window_per_program:g}",
            f"{score.excess:.3f}",
            f"{100 * (score.worst_loss - 1):.1f} %",
            f"{100 * score.waiting:.1f} %",
            f"{score.slowness:.3f}",
        ]
        for score in scores
    ]
    return format_table(header, rows)


def save(path: Path, gpu: str, modes: Sequence[Cell], tries: Sequence[Try], scores: Sequence[Score]) -> None:
    """Everything as JSON; an infinite window is null."""

    def plain(row: Cell | Score) -> dict[str, Any]:
        found = asdict(row)
        return {**found, "window_per_program": None if math.isinf(row.window_per_program) else row.window_per_program}

    predicted = {
        "predicted": True,
        "environment": {**environment.describe(torch.get_num_threads()), "source": environment.source_hash()},
        "assumptions": describe(gpu),
        "gpus": {name: asdict(found) for name, found in GPUS.items()},
        "window_per_program_in_use": WINDOW_PER_PROGRAM,
        "best_window_per_program": best_window(scores),
        "chunk_bytes_in_use": CHUNK_BYTES,
        "best_chunk_bytes": best_chunk(scores),
        "latencies_s": {
            "item": ITEM_SECONDS,
            "tile": TILE_SECONDS,
            "pair_of_tiles": PAIR_SECONDS,
            "ratio": RATIO_SECONDS,
            "spared_by_a_lone_chunk": LONE_CHUNK_SECONDS,
        },
        "share_of_a_copys_bandwidth": MIXED_SHARE,
        "l2_bytes_per_s_of_a_multiprocessor": L2_BYTES_PER_S,
        "modes": [plain(cell) for cell in modes],
        "tries": [asdict(some) for some in tries],
        "plans": [plain(score) for score in scores],
    }
    record.save(path, predicted)
