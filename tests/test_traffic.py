"""The cache model of the fused pass: cases by hand, bounds, order in all that it depends on; and the command line."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import traffic
from bench.__main__ import main
from bench.byte_table import STEP_DTYPES, least_bytes, uncached_bytes
from bench.cache_model import PassPlan, Traffic, bounds, chunk_of, predict, window_chunks
from bench.shapes import SHAPES
from bench.traffic import Cell, Score, best_chunk, best_window, cells_of, scores_of
from fused_dals.kernels.layout import CHUNK_BYTES, MOST_IN_B, TILE
from fused_dals.launch_plan import WINDOW_PER_PROGRAM
from fused_dals.worklist import STAGE_A, work_list

FP32 = STEP_DTYPES["fp32"]
CHUNK = chunk_of(FP32)
RESULTS = Path("bench/results/traffic.json")


def plan(sizes: list[int], window: int = 0, chunk: int = 10, **options: Any) -> PassPlan:
    return PassPlan(tuple(sizes), options.pop("dtypes", FP32), window, chunk, **{"evict_first": False, **options})


def traffic_of(replayed: PassPlan, cache: int) -> Traffic:
    (found,) = predict(replayed, cache)
    return found


def test_the_byte_table() -> None:
    """The table of the design: the least, and what stage B reads again where nothing is left in the cache."""
    assert [least_bytes(*(d.itemsize for d in dtypes)) for dtypes in STEP_DTYPES.values()] == [28, 22, 14]
    for writes, expected in ((False, [40, 30, 20]), (True, [36, 28, 18])):
        found = [uncached_bytes(*(d.itemsize for d in dtypes), writes) for dtypes in STEP_DTYPES.values()]
        assert found == expected


def test_one_tensor_by_hand() -> None:
    """Three chunks of 10 float32 elements, 160 bytes a chunk of which stage B needs 80 again, newest first."""
    tensor = plan([30])
    assert traffic_of(tensor, 480).memory_bytes == 30 * 28  # all of it stays
    # 319 bytes hold one chunk, whose p and m B finds, and then what B touches.
    assert traffic_of(tensor, 319).memory_bytes == 30 * 28 + 20 * 8
    assert traffic_of(tensor, 0).memory_bytes == 30 * 36
    # With marks 80 bytes a chunk are kept.
    marked = plan([30], evict_first=True)
    assert traffic_of(marked, 240).memory_bytes == 30 * 28
    assert traffic_of(marked, 239).memory_bytes == 30 * 28 + 10 * 8
    # Where A only reads, 120 bytes a chunk; B finds the last chunk, adds its m, and has no room for the other two.
    reads = plan([30], stage_a_writes=False)
    assert traffic_of(reads, 360).memory_bytes == 30 * 28 + 20 * 12 - 10 * 12
    assert traffic_of(reads, 399).memory_bytes == 30 * 28 + 10 * 12
    assert traffic_of(reads, 440).memory_bytes == 30 * 28


def test_a_tail_counts_its_elements() -> None:
    assert traffic_of(plan([25]), 0).memory_bytes == 25 * 36
    assert traffic_of(plan([25]), 10**6).memory_bytes == 25 * 28
    # The tail's 5 elements are the newest: 80 bytes hold them alone.
    assert traffic_of(plan([25]), 80).memory_bytes == 25 * 28 + 20 * 8


def test_a_window_lets_the_second_tensor_push_the_first_out() -> None:
    sizes = [20, 20]
    assert traffic_of(plan(sizes, window=0), 320).memory_bytes == 40 * 28
    # A0 A1 B0 B1: when B0 begins, the cache holds tensor 1, which B0 pushes out in turn.
    assert traffic_of(plan(sizes, window=4), 320).memory_bytes > 40 * 28


def test_empty_lists_and_tensors() -> None:
    assert traffic_of(plan([]), 100).memory_bytes == 0 and traffic_of(plan([]), 100).per_parameter == 0
    assert traffic_of(plan([0, 10, 0]), 10**6).memory_bytes == 280


@pytest.mark.parametrize("programs", [1, 3])
def test_waiting(programs: int) -> None:
    """One program never waits; of three that share one chunk's tensors, two do."""
    found = traffic_of(plan([10, 10], programs=programs), 10**6)
    assert (found.waiting > 0) == (programs > 1)
    wide = traffic_of(plan([10] * 60, window=30, programs=programs), 10**6)
    assert wide.waiting <= found.waiting


def assume(
    monkeypatch: pytest.MonkeyPatch, item: tuple[float, float], tile: tuple[float, float], ratio: tuple[float, float]
) -> None:
    """Latencies in place of the model's, with bytes from the cache and lone chunks as quick as others."""
    monkeypatch.setattr("bench.cache_model.L2_BYTES_PER_S", math.inf)
    monkeypatch.setattr("bench.cache_model.LONE_CHUNK_SECONDS", 0.0)
    monkeypatch.setattr("bench.cache_model.MIXED_SHARE", 1.0)
    for name, seconds in {"ITEM": item, "TILE": tile, "RATIO": ratio}.items():
        monkeypatch.setattr(f"bench.cache_model.{name}_SECONDS", seconds)


def test_time_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 float32 elements stage A moves 240 bytes and stage B 40, at 1 byte a second."""
    assume(monkeypatch, (200.0, 100.0), (50.0, 20.0), (0.0, 0.0))
    everything = 10**6  # of cache
    one = plan([10], bandwidth=1.0)
    assert traffic_of(one, everything).slowness == pytest.approx((250 + 120) / 280)
    assert traffic_of(one, 0).slowness == pytest.approx((250 + 120 + 80) / 280)
    # Stage A takes three tiles of 4, stage B one, or three as well if its tiles may be no larger.
    tiles = plan([10], bandwidth=1.0, tile=4)
    assert traffic_of(tiles, everything).slowness == pytest.approx((350 + 120) / 280)
    assert traffic_of(replace(tiles, most_in_b=4), everything).slowness == pytest.approx((350 + 160) / 280)
    # At half the speed latencies hide behind the bytes of stage A.
    assert traffic_of(plan([10], bandwidth=0.5), everything).slowness == pytest.approx((240 + 60) / 280)
    # Where A only reads, it moves 120 bytes, and B, which reads m and writes all, 160.
    reads = plan([10], bandwidth=1.0, stage_a_writes=False)
    assert traffic_of(reads, everything).slowness == pytest.approx((250 + 160) / 280)
    assert traffic_of(reads, 0).slowness == pytest.approx((250 + 160 + 120) / 280)
    # Memory serves one after the other: who is done with its own at 240 takes up what is done at 480.
    two = traffic_of(plan([10, 10], window=2, programs=2, bandwidth=1e-9), everything)
    assert two.slowness == pytest.approx(1.0) and two.waiting == pytest.approx(0.25)


def test_the_tile_of_stage_b() -> None:
    """A chunk, no more than the kernel has registers for, no less than stage A's; where A only reads, the same."""
    assert PassPlan((), FP32, 0).tile_of_b == CHUNK
    assert PassPlan((), FP32, 0, chunk=16384).tile_of_b == MOST_IN_B
    assert PassPlan((), FP32, 0, chunk=4096, tile=4096).tile_of_b == 4096
    assert PassPlan((), FP32, 0, most_in_b=0).tile_of_b == PassPlan((), FP32, 0, stage_a_writes=False).tile_of_b == TILE
    coarse = PassPlan((100 * CHUNK,), FP32, 0).coarser(10)
    assert coarse.chunk == 10 * CHUNK and coarse.tile_of_b == CHUNK


def test_stage_b_loads_from_the_cache_at_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 bytes of p and m, or 160 of all four, at half a byte a second."""
    assume(monkeypatch, (500.0, 100.0), (0.0, 0.0), (0.0, 0.0))
    monkeypatch.setattr("bench.cache_model.L2_BYTES_PER_S", 0.5)
    one = plan([10], bandwidth=1.0)
    assert traffic_of(one, 10**6).slowness == pytest.approx((500 + 100 + 160) / 280)
    assert traffic_of(replace(one, chunk=20, merged=2), 10**6).slowness == pytest.approx((500 + 100 + 80) / 280)
    reads = replace(one, stage_a_writes=False)
    assert traffic_of(reads, 10**6).slowness == pytest.approx((500 + 100 + 320) / 280)


def test_a_lone_chunk_need_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors of one chunk, and of three, which coarser chunks do not take for one."""
    assume(monkeypatch, (500.0, 100.0), (0.0, 0.0), (70.0, 0.0))
    monkeypatch.setattr("bench.cache_model.LONE_CHUNK_SECONDS", 60.0)
    assert traffic_of(plan([10], bandwidth=1.0), 10**6).slowness == pytest.approx((500 + 10 + 100) / 280)
    assert traffic_of(plan([30], bandwidth=1.0), 10**6).slowness == pytest.approx((3 * 500 + 70 + 3 * 100) / 840)
    merged = plan([30], bandwidth=1.0, chunk=30, merged=3)
    assert traffic_of(merged, 10**6).slowness == pytest.approx((30 * 24 + 70 + 30 * 4) / 840)


def test_bandwidth_that_nobody_used_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage A waits 260 seconds longer than memory works, and B's bytes come after that."""
    assume(monkeypatch, (500.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    assert traffic_of(plan([10], bandwidth=1.0), 10**6).slowness == pytest.approx((500 + 40) / 280)


def test_the_trust_ratio_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much for a tensor, and for every 1024 chunks; who arrives last does it before anything else."""
    assume(monkeypatch, (500.0, 100.0), (0.0, 0.0), (70.0, 0.0))
    one = traffic_of(plan([10], bandwidth=1.0), 10**6)
    assert one.slowness == pytest.approx((500 + 70 + 100) / 280) and one.waiting == 0
    assume(monkeypatch, (500.0, 100.0), (0.0, 0.0), (70.0, 1024 * 5.0))
    chunks = plan([20], bandwidth=1.0)
    assert traffic_of(chunks, 10**6).slowness == pytest.approx((2 * 500 + 70 + 2 * 5 + 2 * 100) / 560)
    assert traffic_of(replace(chunks, merged=3), 10**6).slowness == pytest.approx(
        (2 * 500 + 70 + 6 * 5 + 2 * 100) / 560
    )
    # Of two programs the second makes the ratio, for which the first waits, and has drawn all that is left.
    two = traffic_of(replace(chunks, programs=2), 10**6)
    assert two.slowness == pytest.approx((500 + 80 + 2 * 100) / 560)
    assert two.waiting == pytest.approx(80 / (80 + 2 * 500 + 80 + 2 * 100))


def test_stage_b_waits_for_a_ratio_that_is_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 and 5 elements, in tiles of 5: A ends at 540 and 520, the ratios are there at 740 and 720, and who has made
    the second one waits with the first one's B until then.
    """
    assume(monkeypatch, (500.0, 100.0), (20.0, 0.0), (200.0, 0.0))
    found = traffic_of(plan([10, 5], window=4, programs=2, bandwidth=1.0, tile=5), 10**6)
    assert found.waiting == pytest.approx(20 / (20 + 540 + 520 + 2 * 200 + 2 * 100))


def test_items_use_the_cache_midway(monkeypatch: pytest.MonkeyPatch) -> None:
    """A of three tensors in the order of their middles: at 3000 of 6000, 5000 of 10,000, 7500 between 6000 and 9000."""
    assume(monkeypatch, (0.0, 0.0), (500.0, 0.0), (0.0, 0.0))
    three = plan([20, 12, 6], window=9, chunk=20, programs=2, bandwidth=1.0, evict_first=True, tile=1)
    # 160 bytes are p and m of the first, which the third pushes out, though it ends before.
    assert traffic_of(three, 160).memory_bytes == 38 * 28 + 20 * 8 + 12 * 8


def test_what_is_used_last_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs at a tensor each, whose chunks are used when half of their time is over."""
    assume(monkeypatch, (0.0, 0.0), (50.0, 0.0), (0.0, 0.0))
    # The first tensor's A lasts from 0 to 500, the second's, which is smaller, from 0 to 288: the first is used last,
    # and of 80 bytes its p and m need all.
    marked = plan([10, 2], window=4, programs=2, bandwidth=1.0, evict_first=True, tile=1)
    assert traffic_of(marked, 80).memory_bytes == 12 * 28 + 2 * 8
    assert traffic_of(marked, 96).memory_bytes == 12 * 28


def test_a_program_that_waits_holds_the_ticket_that_it_drew_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    assume(monkeypatch, (200.0, 100.0), (50.0, 20.0), (0.0, 0.0))
    # The first program is done with its chunk at 250, takes up stage B, draws the other one ahead and waits until 480;
    # there is nothing left for the second program, and the first needs 120 for each.
    found = traffic_of(plan([20], programs=2, bandwidth=1.0), 10**6)
    assert found.slowness == pytest.approx((480 + 120 + 120) / 560)
    assert found.waiting == pytest.approx(230 / (230 + 250 + 480 + 120 + 120))


def least_recently_used(replayed: PassPlan, cache: int) -> int:
    """The same for one program, written down again: a dictionary of every tensor's chunks."""
    p, g, state = (dtype.itemsize for dtype in replayed.dtypes)
    size = {"p": p, "g": g, "h": state, "m": state}
    reads_b = "pm" if replayed.stage_a_writes else "pghm"
    again = set(reads_b) & set("ghpm" if replayed.stage_a_writes else "pgh")
    held: OrderedDict[tuple[int, int, str], int] = OrderedDict()
    moved = 0
    chunks = [-(-n // replayed.chunk) for n in replayed.sizes]
    for tensor, chunk, stage in work_list(chunks, replayed.window):
        elements = min(replayed.chunk, replayed.sizes[tensor] - chunk * replayed.chunk)
        names = reads_b if stage != STAGE_A else "ghpm" if replayed.stage_a_writes else "pgh"
        # Of one item's tensors, what is not needed again goes first; the model keeps or drops an item as a whole.
        for name in names:
            key = tensor, chunk, name
            if key not in held:
                moved += size[name] * elements
            held[key] = size[name] * elements
            held.move_to_end(key)
            if replayed.evict_first and (stage != STAGE_A or name not in again):
                del held[key]
        while sum(held.values()) > cache:
            held.popitem(last=False)
    written = sum(replayed.sizes) * (p + 2 * state)
    return moved + written


lists = st.lists(st.integers(0, 200), max_size=8)


@given(
    lists, st.integers(0, 30), st.sampled_from(list(STEP_DTYPES)), st.booleans(), st.booleans(), st.integers(0, 4000)
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_against_a_plain_lru(sizes: list[int], window: int, dtypes: str, writes: bool, marks: bool, cache: int) -> None:
    """Up to the item that straddles the end of the cache, which the model drops as a whole."""
    replayed = plan(sizes, window, dtypes=STEP_DTYPES[dtypes], stage_a_writes=writes, evict_first=marks)
    found, true = traffic_of(replayed, cache).memory_bytes, least_recently_used(replayed, cache)
    item = 16 * 10
    assert least_recently_used(replayed, cache + item) <= found <= least_recently_used(replayed, max(0, cache - item))
    assert abs(found - true) <= 0.5 * max(found, true)


@given(
    lists, st.integers(0, 30), st.sampled_from(list(STEP_DTYPES)), st.booleans(), st.booleans(), st.integers(1, 9)
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_within_bounds_and_falling_with_the_cache(
    sizes: list[int], window: int, dtypes: str, writes: bool, marks: bool, programs: int
) -> None:
    replayed = plan(
        sizes, window, dtypes=STEP_DTYPES[dtypes], stage_a_writes=writes, evict_first=marks, programs=programs
    )
    least, uncached = bounds(replayed)
    found = predict(replayed, 0, 500, 1000, 2000, 5000, 10**9)
    moved = [traffic.memory_bytes for traffic in found]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] <= uncached * sum(sizes) and moved[-1] == least * sum(sizes)
    assert all(0 <= traffic.waiting < 1 for traffic in found)
    if programs == 1 and sizes:
        assert all(traffic.waiting == 0 for traffic in found)


@pytest.mark.parametrize(("model", "writes"), [("bert_large", True), ("bert_large", False), ("gpt2_xl", True)])
def test_coarser_chunks_change_little(model: str, writes: bool) -> None:
    sizes = tuple(math.prod(shape) for _, shape in SHAPES[model]())
    fine = PassPlan(sizes, FP32, 264, stage_a_writes=writes, programs=264, bandwidth=4.2e12)
    coarse = fine.coarser(traffic.MOST_CHUNKS)
    assert coarse.chunk > fine.chunk
    one, other = (traffic_of(replayed, 30_000_000) for replayed in (fine, coarse))
    close = 0.01 if writes else 0.03
    assert one.per_parameter == pytest.approx(other.per_parameter, rel=close)
    assert one.slowness == pytest.approx(other.slowness, rel=close)
    assert one.waiting == pytest.approx(other.waiting, abs=0.015 if writes else 0.02)


def test_windows_and_chunks() -> None:
    assert window_chunks(0.5, 264) == 132 and window_chunks(0, 264) == 0
    assert window_chunks(math.inf, 264) > 10**9
    assert [chunk_of(dtypes) for dtypes in STEP_DTYPES.values()] == [8192, 16384, 16384]
    assert [chunk_of(dtypes, 1 << 16) for dtypes in STEP_DTYPES.values()] == [4096, 8192, 8192]


def test_pairs_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16-bit numbers only: two tiles together take 70 seconds, one by one 50 each."""
    assume(monkeypatch, (500.0, 0.0), (50.0, 0.0), (0.0, 0.0))
    monkeypatch.setattr("bench.cache_model.PAIR_SECONDS", 70.0)
    bf16, mixed = (plan([10], bandwidth=1.0, tile=5, dtypes=STEP_DTYPES[name]) for name in ("bf16", "mixed"))
    assert traffic_of(bf16, 10**6).slowness == pytest.approx((500 + 70 + 20) / 140)
    assert traffic_of(replace(bf16, in_pairs=False), 10**6).slowness == pytest.approx((500 + 100 + 20) / 140)
    assert traffic_of(mixed, 10**6).slowness == pytest.approx((500 + 100 + 20) / 220)


def test_memory_is_slower_than_in_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    assume(monkeypatch, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    monkeypatch.setattr("bench.cache_model.MIXED_SHARE", 0.5)
    one = plan([10], bandwidth=1.0)
    assert traffic_of(one, 10**6).slowness == pytest.approx(2) and traffic_of(one, 0).slowness == pytest.approx(
        2 * 36 / 28
    )


# -- the command -----------------------------------------------------------------------------------------------------


def window_of(row: dict[str, Any]) -> float:
    """JSON has no infinity."""
    window: float | None = row["window_per_program"]
    return math.inf if window is None else window


def test_the_window_and_chunk_in_use_follow_from_the_predictions() -> None:
    """The committed predictions are those of the present code, and the defaults follow from them."""
    record = json.loads(RESULTS.read_text())
    scores = [Score(**{**row, "window_per_program": window_of(row)}) for row in record["plans"]]
    assert {score.gpu for score in scores} == set(traffic.GPUS)
    assert best_window(scores) == record["best_window_per_program"] == WINDOW_PER_PROGRAM
    assert best_chunk(scores) == record["best_chunk_bytes"] == CHUNK_BYTES
    plans = [(CHUNK_BYTES, WINDOW_PER_PROGRAM)]
    for model, dtypes in (("resnet50", "fp32"), ("gpt2", "bf16")):
        modes = cells_of("H100", [(model, dtypes)], list(traffic.MODES), plans, traffic.MOST_CHUNKS, lambda: 0)
        saved = [Cell(**row) for row in record["modes"] if (row["model"], row["dtypes"]) == (model, dtypes)]
        assert list(modes) == saved and len(saved) == 6
    assert [some["name"] for some in record["tries"]] == list(traffic.TRIES)


def test_scores_are_means_and_losses_are_against_the_best_window() -> None:
    def cell(share: float, model: str, predicted: float, waiting: float, slowness: float) -> Cell:
        mode = "A writes h and m"
        return Cell("A100", 0.9, model, "fp32", mode, CHUNK_BYTES, share, predicted, waiting, slowness, 28, 36)

    first = [cell(0, "a", 28, 0.5, 2.0), cell(0, "b", 35, 0, 1.25)]
    found = scores_of([*first, cell(1, "a", 29.4, 0, 1.05), cell(1, "b", 35, 0, 1.25)])
    assert [score.window_per_program for score in found] == [0, 1]
    assert found[0].excess == pytest.approx(1.125) and found[0].waiting == 0.25
    assert [score.worst_loss for score in found] == pytest.approx([2.0 / 1.05, 1])
    assert [score.slowness for score in found] == pytest.approx([1.625, 1.15])
    assert best_window(found) == 1

    # Of windows that are as fast the one that risks less, or the faster one on the GPU of the targets, where it counts.
    def score(share: float, excess: float, waiting: float, slowness: float, gpu: str = "A100") -> Score:
        return Score(gpu, "A writes h and m", 0.9, CHUNK_BYTES, share, excess, excess, waiting, slowness)

    risky = score(1, 1.1, 0.0, 1.1)
    assert best_window([score(0, 1.0, 0.1, 1.104), risky]) == 0
    assert best_window([score(0, 1.0, 0.1, 1.12), risky]) == 1
    there = [score(0, 1.0, 0.1, 1.104, traffic.TRIES_ON), score(1, 1.1, 0.1, 1.101, traffic.TRIES_ON)]
    assert best_window([score(0, 1.0, 0.1, 1.104), risky, *there]) == 1


def test_marks_that_are_ignored_count_as_a_case_of_their_own() -> None:
    def cell(mode: str, share: float, predicted: float) -> Cell:
        return Cell("A100", 0.9, "a", "fp32", mode, CHUNK_BYTES, share, predicted, 0.0, predicted / 28, 28, 36)

    kept, ignored = traffic.WINDOW_MODES
    found = scores_of([cell(kept, 0, 28), cell(kept, 1, 28), cell(ignored, 0, 29), cell(ignored, 1, 36)])
    assert [score.mode for score in found] == [kept, kept, ignored, ignored]
    assert [score.worst_loss for score in found] == pytest.approx([1, 1, 1, 36 / 29])
    assert best_window(found) == 0


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setitem(SHAPES, "resnet50", lambda: iter([("a", (5000, 40)), ("b", (7,))]))
    out = tmp_path / "deeper" / "traffic.json"
    assert main(["traffic", "--shapes", "resnet50", "--gpus", "L4", "A100", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "PREDICTED" in printed and "resnet50" in printed and "all A first" in printed
    record = json.loads(out.read_text())
    assert record["predicted"] is True and len(record["modes"]) == 3 * 3 * 2
    assert len(record["plans"]) == 2 * 2 * 2 * (len(traffic.WINDOWS) + len(traffic.CHUNKS) - 1)
    assert {row["predicted"] for row in record["modes"] if row["dtypes"] == "fp32"} == {28.0}
