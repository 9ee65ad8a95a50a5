"""The step benchmark: shapes, contenders, memory, failures, statistics; and the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compiled, contenders, extras, micro, peers
from bench.__main__ import main
from bench.byte_table import STEP_DTYPES
from bench.compiled import CompileBudget, CompiledReference
from bench.contenders import (
    ADAMW,
    BASELINE,
    COMPILED,
    FOREACH,
    FUSED,
    LOOP,
    REFERENCE,
    Contender,
    NamedParameter,
    Step,
    dals_contenders,
    in_graphs,
    loop_contender,
    torch_contenders,
)
from bench.machine import HostMachine, Launch, available_bytes
from bench.shapes import SHAPES
from bench.step_table import launches_text, row_from, step_cells, steps_text
from bench.timing import Spread, StepRow, make_parameters, ratios, time_contenders

TINY = [("a.weight", (3, 2)), ("a.bias", (3,)), ("b.weight", (4, 3))]
CPU = torch.device("cpu")
FP32 = STEP_DTYPES["fp32"]


class SmallHost(HostMachine):
    """With little memory, and without the time that large copies take."""

    def __init__(self, free: int = 1 << 40) -> None:
        self.free = free

    def copy_bandwidth(self) -> float:
        return 1e9

    def free_bytes(self) -> int:
        return self.free


def everybody(dtypes: str, machine: HostMachine | None = None) -> dict[str, Contender]:
    """Without time to compile."""
    compiled = CompiledReference(STEP_DTYPES[dtypes], CompileBudget(0, 0))
    return micro.contenders_of(STEP_DTYPES[dtypes], machine or HostMachine(), compiled)


def timed(found: dict[str, Contender], dtypes: str = "fp32", free: int = 1 << 40) -> list[StepRow]:
    return time_contenders(SmallHost(free), "tiny", STEP_DTYPES[dtypes], dtypes, TINY, found, 2, 0)


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [("resnet50", 161, 25_557_032), ("gpt2", 148, 124_439_808), ("one_huge", 1, 10**9), ("many_tiny", 10_000, 640_000)],
)
def test_shapes_have_the_known_size(model: str, tensors: int, parameters: int) -> None:
    shapes = list(SHAPES[model]())
    assert len(shapes) == len(dict(shapes)) == tensors
    assert sum(math.prod(shape) for _, shape in shapes) == parameters


# -- contenders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", STEP_DTYPES)
def test_every_contender_is_timed_or_says_why_not(dtypes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = everybody(dtypes)
    rows = {row.contender: row for row in timed(found, dtypes)}
    assert list(rows) == list(found)
    errors = {name: row.error or "" for name, row in rows.items()}
    assert "it is on cpu, and the kernels run on CUDA" in errors.pop(FUSED)
    assert "the time for torch.compile in this run is spent" in errors.pop(COMPILED)
    for name, error in errors.items():
        if name in (peers.OPTIMI, peers.FLASH, peers.LAMB, peers.BNB_LARS):
            assert not error or "pip install" in error or name in (peers.FLASH, peers.BNB_LARS), (name, error)
        else:
            assert not error and len(rows[name].device_samples_s) == 2 and rows[name].bytes_per_s


def test_a_missing_peer_says_how_to_get_it() -> None:
    build = peers._of("no_such_module", "no-such-package", "AdamW")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'no_such_module': pip install no-such-package"):
        build([])


def test_bytes_by_the_table() -> None:
    """Least bytes per parameter; torch keeps its state in the parameters' dtype."""
    expected = {"fp32": (28, 28, 28, 20), "mixed": (22, 14, 14, 10), "bf16": (14, 14, 14, 10)}
    for name, moves in expected.items():
        dtypes = STEP_DTYPES[name]
        theirs = torch_contenders(dtypes)
        found = [dals_contenders(dtypes)[FOREACH], loop_contender(dtypes), theirs[ADAMW], theirs[contenders.SGD]]
        assert tuple(contender.moves for contender in found) == moves


def test_the_loop_is_an_ema_filter_and_lars(seed: int) -> None:
    """Against the same update written with numbers."""
    named = make_parameters([("w", (5,))], FP32, CPU, seed)
    p = named[0][1].detach().clone().double()
    g = named[0][1].grad
    assert g is not None
    kept, g = g.clone(), g.double()
    step = contenders.grokfast_lars(named)
    ema = buffer = torch.zeros(5, dtype=torch.float64)
    for _ in range(3):
        step()
        ema = 0.9 * ema + 0.1 * g
        update = g + 2 * ema + 5e-4 * p
        buffer = 0.9 * buffer + 1e-3 * p.norm() / update.norm() * update
        p = p - contenders.LR * buffer
    torch.testing.assert_close(named[0][1].detach().double(), p, rtol=1e-6, atol=1e-9)
    assert torch.equal(named[0][1].grad, kept)


@pytest.mark.parametrize("dtypes", STEP_DTYPES)
def test_nobody_writes_the_gradients_that_all_share(dtypes: str) -> None:
    found = everybody(dtypes)
    for name, contender in found.items():
        named = make_parameters(TINY, STEP_DTYPES[dtypes], CPU, 0)
        before = [parameter.grad.clone() for _, parameter in named if parameter.grad is not None]
        try:
            step = contender.build(named)
            step()
            step()
        except Exception:
            continue
        for (_, parameter), gradient in zip(named, before, strict=True):
            assert parameter.grad is not None and torch.equal(parameter.grad, gradient), name


class Recorder(SmallHost):
    """A machine whose graphs are the steps themselves."""

    def capture(self, warm_up: Callable[[], object], work: Callable[[], object]) -> Callable[[], object]:
        warm_up()
        return work


def test_contenders_in_graphs_step_what_the_plain_ones_do() -> None:
    """The capturable form is the same optimizer; the number of steps before capture is known."""
    plain = {
        **torch_contenders(FP32),
        FOREACH: dals_contenders(FP32)[FOREACH],
        REFERENCE: dals_contenders(FP32)[REFERENCE],
    }
    for name, contender in in_graphs(plain, Recorder()).items():
        if name.startswith("AdamW"):
            continue  # torch refuses capturable parameters on a CPU
        one, other = (make_parameters(TINY, FP32, CPU, 0) for _ in range(2))
        replay = contender.build(one)
        replay()
        step = plain[name.removesuffix(", graph")].build(other)
        for _ in range(contenders.STEPS_BEFORE_CAPTURE + 1):
            step()
        for (_, a), (_, b) in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_cpu_has_no_graphs() -> None:
    (row,) = timed(in_graphs({BASELINE: torch_contenders(FP32)[contenders.SGD]}, SmallHost()))
    assert row.error == "RuntimeError: a CPU has no CUDA graphs"


# -- measuring -------------------------------------------------------------------------------------------------------


def test_all_start_alike_and_step_the_same_tensors() -> None:
    seen: list[list[torch.nn.Parameter]] = []

    def contender(named: Sequence[NamedParameter]) -> Step:
        seen.append([parameter for _, parameter in named])
        return lambda: None

    timed({"x": Contender(contender, 28, 8), "y": Contender(contender, 28, 8)})
    assert all(one is other for one, other in zip(*seen, strict=True))
    assert all(p.grad is not None and p.grad.std() > 0 for p in seen[0] if p.numel() > 1)


def test_what_does_not_fit_into_memory_is_not_allocated() -> None:
    built: list[str] = []

    def contender(name: str, state: float, tensor_scratch: float = 0.0) -> Contender:
        def build(named: Sequence[NamedParameter]) -> Step:
            built.append(name)
            return lambda: None

        return Contender(build, 28, state, tensor_scratch=tensor_scratch)

    # 21 parameters, 168 bytes with their gradients; the largest tensor has 12.
    found = {"small": contender("small", 8), "large": contender("large", 100), "wide": contender("wide", 8, 200)}
    calls: list[int] = []
    rows = time_contenders(
        SmallHost(1000), "m", FP32, "fp32", TINY, found, 2, 0, after_each=lambda: calls.append(1)
    )  # fmt: skip
    assert built == ["small"] and len(calls) == 3 * 3
    assert rows[0].error is None
    assert [row.error for row in rows[1:]] == [
        "left out: needs 2.27e-06 GB of 9e-07 GB", "left out: needs 2.74e-06 GB of 9e-07 GB"
    ]  # fmt: skip


def test_a_failing_contender_is_a_row_that_says_why() -> None:
    def refuses(named: object) -> Step:
        raise RuntimeError("not\n built")

    def breaks(named: object) -> Step:
        return lambda: 1 / 0

    found = {
        BASELINE: torch_contenders(FP32)[BASELINE],
        "refuses": Contender(refuses, 28, 8),
        "breaks": Contender(breaks, 28, 8),
    }
    rows = timed(found)
    assert [row.error for row in rows] == [None, "RuntimeError: not built", "ZeroDivisionError: division by zero"]
    text = steps_text(rows, None)
    assert "refuses failed: RuntimeError: not built" in text and f"\n{BASELINE} " in text


def test_ratios_are_taken_round_by_round() -> None:
    def row(name: str, samples: list[float], side_by_side: bool = True) -> StepRow:
        found = StepRow("m", "fp32", name, 1, 10, 28, side_by_side, device_samples_s=samples)
        found.device_s = Spread.of(samples)
        return found

    base, own = row(BASELINE, [1.0, 2.0, 4.0]), row("own", [2.0, 4.0, 4.0])
    assert ratios([base, own], BASELINE)["own"] == Spread.of([2, 2, 1])
    assert own.device_s is not None and own.device_s.p10 == pytest.approx(2.4)
    assert ratios([own], BASELINE) == {}
    assert ratios([row(BASELINE, [1.0], False), row("own", [1.0], False)], BASELINE) == {}


def test_columns_that_nobody_has_are_left_out() -> None:
    rows = timed({BASELINE: torch_contenders(FP32)[BASELINE]})
    header, cells = step_cells(rows, None)
    assert header == ["contender", "ms", "p10", "p90", f"x {BASELINE}", "GB/s", "extra MiB"] and cells[0][4] == "1.00"
    rows[0].host_s, rows[0].peak_extra_bytes, rows[0].launches = Spread(2e-6, 0, 0), 3 << 20, 7
    header, cells = step_cells(rows, 1e9)
    assert header[5:] == ["host us", "GB/s", "copy", "extra MiB", "launches"]
    assert [cells[0][i] for i in (5, 8, 9)] == ["2", "3.0", "7"]
    rows[0].contender += contenders.GRAPH
    assert "extra MiB" not in step_cells(rows, 1e9)[0], "a replay's memory was taken at capture"


def test_launches_are_counted_after_all_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender that is not there any more has no count, and neither has one without figures, or one that fails."""

    class Counting(HostMachine):
        def launches(self, work: Callable[[], object]) -> list[Launch]:
            work()
            return [("kernel", "k")] * 3

    monkeypatch.setitem(SHAPES, "tiny", lambda: iter(TINY))
    reference = CompiledReference(FP32, CompileBudget(60, 60), backend="eager")
    rows = timed({**torch_contenders(FP32), COMPILED: reference.contender(), "gone": torch_contenders(FP32)[BASELINE]})
    rows[0].error = "failed"
    for row in rows:
        row.model = "tiny"
    saved: list[int] = []
    micro.count_all_launches(Counting(), {("tiny", "fp32"): reference}, rows, lambda: saved.append(1))
    assert saved == [1]
    counted = {row.contender: row.launches for row in rows}
    assert counted.pop(rows[0].contender) is None and counted.pop("gone") is None and set(counted.values()) == {3}
    (line,) = launches_text(rows).splitlines()[1:]
    assert line.startswith("tiny fp32: ") and f"{COMPILED} 3" in line and "gone" not in line
    reference.resets -= 1  # as if torch had been reset since
    micro.count_all_launches(Counting(), {("tiny", "fp32"): reference}, rows, lambda: None)
    assert f"{COMPILED} not counted: RuntimeError: left out: torch.compile dropped it" in launches_text(rows)


def test_a_list_is_compiled_once_and_lists_do_not_drop_each_other() -> None:
    """For its time, in a graph and to count launches; of ten lists, as torch gives up after eight of the same lines."""
    compiled: list[int] = []

    def backend(module: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return module

    shapes = [[*TINY[: 1 + i % 3], (f"{i}", (2 + i,))] for i in range(10)]
    references = [CompiledReference(FP32, CompileBudget(60, 60), backend=backend) for _ in shapes]
    for _ in range(2):
        for reference, tensors in zip(references, shapes, strict=True):
            named = make_parameters(tensors, FP32, CPU, 0)
            before = [p.detach().clone() for _, p in named]
            reference.build(named)()
            assert not any(torch.equal(old, p) for old, (_, p) in zip(before, named, strict=True))
    assert len(compiled) == len(shapes)


def test_on_a_device_everybody_is_timed_in_a_graph_too() -> None:
    class Device(Recorder):
        queues_work = True

    names = [name for name in everybody("fp32", Device()) if not contenders.is_graph(name)]
    assert set(everybody("fp32", Device())) == {*names, *(name + contenders.GRAPH for name in names)}
    assert {COMPILED, peers.LAMB, peers.BNB_LARS, LOOP} < set(names)
    with pytest.raises(RuntimeError, match="left out: its step waits for the device, which a graph cannot hold"):
        everybody("fp32", Device())[peers.BNB_LARS + contenders.GRAPH].build([])
    assert not any(map(contenders.is_graph, everybody("fp32")))


def test_rows_survive_json() -> None:
    rows = timed({BASELINE: torch_contenders(FP32)[BASELINE], "none": Contender(lambda named: 1 / 0, 28, 8)})  # type: ignore[return-value]
    assert [row_from(json.loads(json.dumps(asdict(row)))) for row in rows] == rows


def test_the_host_as_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.machine.HOST_COPY_BYTES", 1 << 12)
    machine = HostMachine()
    assert machine.copy_bandwidth() > 0 and 1 << 20 < available_bytes() < 1 << 50
    assert machine.launches(lambda: None) == [] and machine.describe()["torch"] == torch.__version__


# -- the command -----------------------------------------------------------------------------------------------------


def test_command_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setitem(SHAPES, "gpt2", lambda: iter(TINY))
    monkeypatch.setattr("bench.machine.HOST_COPY_BYTES", 1 << 12)
    monkeypatch.setattr("bench.micro.find_machine", HostMachine)
    out = tmp_path / "deeper" / "micro.json"
    options = ["--repeats", "2", "--threads", str(torch.get_num_threads()), "--contenders", BASELINE, FOREACH, LOOP]
    assert main(["micro", "--shapes", "gpt2", "--dtypes", "fp32", "bf16", *options, "--json", str(out)]) == 0
    saved: dict[str, Any] = json.loads(out.read_text())
    assert saved["environment"].keys() >= {"device", "threads", "python", "torch", "triton", "fused_dals", "date"}
    assert [(row["dtypes"], row["contender"]) for row in saved["steps"]] == [
        (dtypes, name) for dtypes in ("fp32", "bf16") for name in (BASELINE, FOREACH, LOOP)
    ]
    assert all(len(row["device_samples_s"]) == 2 and row["device_s"]["median"] > 0 for row in saved["steps"])
    parameters = sum(math.prod(shape) for _, shape in TINY)
    assert all(row["peak_extra_bytes"] >= 4 * parameters for row in saved["steps"] if row["contender"] == FOREACH)
    assert saved["copy_bytes_per_s"]["best"] == max(saved["copy_bytes_per_s"]["samples"]) > 0
    printed = capsys.readouterr().out
    assert "gpt2 bf16: 3 tensors, 21 parameters, round by round" in printed and "GB/s" in printed


def test_the_same_through_pytest_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytest_benchmark")
    monkeypatch.setitem(SHAPES, "gpt2", lambda: iter(TINY))
    monkeypatch.setattr("bench.find.find_machine", SmallHost)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # these tests may run side by side, the benchmark does not
    out = tmp_path / "benchmark.json"
    only = ["-k", "loop or (AdamW and fused)", "-p", "no:cacheprovider", "-p", "no:terminal"]
    options = ["--benchmark-only", f"--benchmark-json={out}", "--shapes=gpt2", "--dtypes=bf16", *only]
    assert pytest.main([str(Path(__file__).parents[1] / "bench"), *options]) == 0
    saved = json.loads(out.read_text())["benchmarks"]
    assert {row["params"]["contender"] for row in saved} == {ADAMW, LOOP}
    assert all(row["group"] == "gpt2 bf16" and row["stats"]["median"] > 0 for row in saved)


@pytest.mark.parametrize("command", ["demo", "micro", "traffic", "host"])
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m bench {command}" in capsys.readouterr().out


def test_impossible_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    nobody = ["micro", "--contenders", BASELINE, "Nobody"]
    for options in (["demo", "--epochs", "81"], ["demo", "--jobs", "0"], ["micro", "--repeats", "0"], nobody):
        with pytest.raises(SystemExit) as stop:
            main(options)
        assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--epochs must be from 1 to 80" in said and f"no 'Nobody'; here are '{BASELINE}'" in said


def test_a_missing_extra_is_one_clear_line() -> None:
    with pytest.raises(SystemExit, match=r"no_such_module missing: pip install '\.\[demo\]'"):
        extras.require("json", "no_such_module")


def test_compiling_takes_lists_of_any_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built as the command builds it, with a compiler that does nothing."""
    monkeypatch.setattr(compiled.torch, "compile", lambda update, **options: update)  # type: ignore[attr-defined]
    for name, dtypes in STEP_DTYPES.items():
        contender = CompiledReference(dtypes, CompileBudget(10, 10)).contender()
        (row,) = timed({COMPILED: contender}, name)
        assert row.error is None
