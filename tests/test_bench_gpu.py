"""``python -m bench gpu`` without a GPU: all of it but the device itself, on CPU tensors with interpreted kernels."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from bench import gpu, timing
from bench.__main__ import main
from bench.byte_table import STEP_DTYPES
from bench.cache_model import window_chunks
from bench.compiled import CompileBudget, OutOfTime, compiled_reference, time_limit
from bench.contenders import (
    ADAMW,
    BF16_STATE,
    CLIPPED,
    COMPENSATED,
    COMPILED,
    FOREACH,
    FUSED,
    SGD,
    Contender,
    Step,
)
from bench.gpu import checks as gpu_checks
from bench.gpu import correctness as gpu_correctness
from bench.gpu import features as gpu_features
from bench.gpu import jobs as gpu_jobs
from bench.gpu import machine as gpu_machine
from bench.gpu import sweep as gpu_sweep
from bench.gpu.contenders import PASS_ALONE, contenders_for
from bench.gpu.correctness import (
    Check,
    Originals,
    Outcome,
    Placed,
    Spec,
    check_grid,
    grid,
    judge,
    reference_step,
    relative_error,
)
from bench.gpu.driver import PassDriver, Plan
from bench.gpu.jobs import Deadline, Job, Results, Scale, run_jobs, scale_for, targets_of, variants_of
from bench.gpu.machine import CudaMachine, DeviceHung, launches_of
from bench.gpu.races import Crowd, hunt_races
from bench.gpu.targets import host_targets, launch_targets, plan_bytes, step_targets
from bench.machine import Launch
from bench.shapes import SHAPES
from bench.step_table import steps_text
from bench.timing import Spread, StepRow, make_parameters, time_contenders
from fused_dals.host_walk import HOST_WALK

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU kernels are compiled, not interpreted")

CPU = torch.device("cpu")
FP32, MIXED, BF16 = STEP_DTYPES.values()
TINY = [("a.weight", (40,)), ("b.weight", (3, 5)), ("b.bias", (5,))]


class CpuMachine:
    """Stands in for the GPU: host clocks, and counters that say what a test wants to hear."""

    queues_work = True

    def __init__(self, free: int = 1 << 40) -> None:
        self.device = CPU
        self.l2_bytes = 1 << 14
        self.free = free
        self.uses = 0

    def describe(self) -> dict[str, Any]:
        return {"device": "none", "driver": None}

    def wait(self) -> None:
        pass

    def seconds(self, work: Callable[[], object], lead_s: float = 0.0) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def copy_bandwidth(self) -> float:
        return 1e9

    def occupy(self, seconds: float) -> None:
        pass

    def keep_busy(self) -> None:
        pass

    def peak_bytes(self, work: Callable[[], object]) -> int:
        work()
        return 0

    def free_bytes(self) -> int:
        return self.free

    def release(self) -> None:
        pass

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Notices the control, which comes first, and nothing after it."""
        yield
        self.uses += 1
        if self.uses == 1:
            raise RuntimeError("called a synchronizing operation")

    def capture(self, warm_up: Callable[[], object], work: Callable[[], object]) -> Callable[[], object]:
        warm_up()
        return work

    def launches(self, work: Callable[[], object]) -> list[Launch]:
        work()
        return [("kernel", "fused_pass"), ("kernel", "prologue"), ("gpu_memcpy", "Memcpy DtoD")]


# -- the whole command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The record and the printed text of a run of everything at the smallest scale."""
    path = tmp_path_factory.mktemp("gpu") / "deeper" / "gpu.json"
    scale = Scale(
        models=("resnet50",),
        specs=(Spec((65,)), Spec((4, 6), "transposed", "plain"), Spec((70,), param_offset=1), Spec((0,))),
        grid_dtypes=(MIXED,),
        chunk=64,
        crowd=Crowd(tiny=4, tiny_elements=20, huge=1, huge_elements=130),
        reruns=(3, 1),
        launch_counts=(2,),
        host_tensors=2,
        host_groups=(1, 2),
        host_samples=2,
        features=("self-check", "scan"),
        step_dtypes=("fp32", "bf16"),
        samples=2,
        copy_samples=1,
        compile_budget=(0.0, 0.0),
        sweep_models=("resnet50",),
        sweep_samples=1,
    )
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(SHAPES, "resnet50", lambda: iter(TINY))
        patch.setattr(gpu_checks, "QUEUE_S", 60.0)
        patch.setattr(timing, "WARMUP_STEPS", 1)
        patch.setattr(gpu_jobs, "SWEEP_DTYPES", ("fp32",))
        patch.setattr(gpu_features, "SCAN_MODELS", ("resnet50",))
        for name, values in (("CHUNKS", (64, 128)), ("WARPS", (4,)), ("PROGRAMS", (1, 2)), ("WINDOW_SHARES", (0.5,))):
            patch.setattr(gpu_sweep, name, values)
        gpu.run(CpuMachine(), scale, path, workers=0)
    record: dict[str, Any] = json.loads(path.read_text())
    return record, printed.getvalue()


@interpreted
def test_every_section_runs_and_nothing_fails(ran: tuple[dict[str, Any], str]) -> None:
    record, printed = ran
    assert record["ended"] == "complete"
    assert record["failures"] == {section: [] for section in gpu_jobs.SECTIONS}
    assert record["environment"].keys() >= {"device", "driver", "cpu", "torch", "triton", "python", "date"}
    for section in gpu_jobs.SECTIONS:
        assert record[section] and section in printed and record["seconds"][section] > 0
    assert "pass" in printed and "FAIL" in printed  # a CPU is slow


@interpreted
def test_checks_hold_in_the_interpreter(ran: tuple[dict[str, Any], str]) -> None:
    record, _ = ran
    for section in gpu_jobs.CHECKED:
        assert [row for row in record[section] if not row["passed"]] == []
    assert [row["passed"] for row in record["compile"]] == [True, HOST_WALK.compiled is not None]
    assert [len(record[section]) for section in gpu_jobs.CHECKED] == [3, 3, 6, 2]
    assert record["features"][1]["figures"]["bytes"] == 4 * 60
    passed = {target["label"]: target["passed"] for target in record["targets"]}
    assert all(passed[f"{section}: all checks hold"] for section in gpu_jobs.CHECKED)
    assert passed["launches per step, 2 tensors, DALS fused"] is True


@interpreted
def test_contenders_run_side_by_side_or_say_why_not(ran: tuple[dict[str, Any], str]) -> None:
    record, printed = ran
    steps = {(row["dtypes"], row["contender"]): row for row in record["steps"]}
    assert [name for dtypes, name in steps if dtypes == "fp32"] == list(contenders_for(FP32, 3, CompileBudget(0, 0)))
    assert [name for dtypes, name in steps if dtypes == "bf16"] == [PASS_ALONE, BF16_STATE, COMPENSATED, ADAMW, SGD]
    assert [key for key, row in steps.items() if row["error"]] == [("fp32", COMPILED)]
    assert "the time for torch.compile in this run is spent" in printed
    assert (steps["fp32", CLIPPED]["bytes_per_parameter"], steps["bf16", COMPENSATED]["bytes_per_parameter"]) == (
        32,
        18,
    )
    row = steps["fp32", FUSED]
    assert row["side_by_side"] and len(row["device_samples_s"]) == len(row["host_samples_s"]) == 2
    assert row["bytes_per_s"] == pytest.approx(28 * 60 / row["device_s"]["median"])


@interpreted
def test_the_sweep_keeps_the_best_of_each_stage(ran: tuple[dict[str, Any], str]) -> None:
    rows = ran[0]["sweep"]
    plans = [(row["plan"]["chunk"], row["plan"]["programs_per_sm"], row["window_share"]) for row in rows]
    assert plans[:2] == [(64, 2, None), (128, 2, None)] and plans[2][1] == 1
    assert [row["window_share"] for row in rows[3:]] == [0.5, 0.5, 0.5]
    choices = [(row["plan"]["stage_a_writes"], row["plan"]["evict_first"]) for row in rows[3:]]
    assert choices == [(True, True), (True, False), (False, True)]
    assert all(row["device_s"]["median"] > 0 and row["error"] is None for row in rows)


def test_without_a_gpu_one_line_and_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^error: no GPU.*$") as stop:
        main(["gpu", "--quick"])
    assert "\n" not in str(stop.value)


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        main(["gpu"])


def test_scales() -> None:
    assert scale_for(None, quick=False).models[-1] == "llama_7b"
    assert scale_for(["gpt2"], quick=True).models == ("gpt2",) and not scale_for(None, quick=True).sweep_models
    variants = variants_of(scale_for(None, quick=False))
    assert len(variants) == len(set(variants)) < 60


# -- jobs ------------------------------------------------------------------------------------------------------------


def test_a_failing_job_is_a_row_and_the_rest_runs() -> None:
    results, ran = Results([1.0]), []

    def breaks() -> Iterator[int]:
        yield 1
        raise RuntimeError("not\n now")

    jobs = [Job("host", "bad", breaks), Job("host", "good", lambda: [2])]
    run_jobs(jobs, results, Deadline(60), lambda job: ran.append(job.label), lambda: None)
    assert results.rows["host"] == [1, 2] and ran == ["bad", "good"]
    assert [(f.label, f.error) for f in results.failures["host"]] == [("bad", "RuntimeError: not now")]
    run_jobs(jobs[1:], results, Deadline(-1), lambda job: None, lambda: None)
    assert results.failures["host"][1].error == "TimeoutError: left out: time is up"


def test_a_hung_device_ends_the_process_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hangs() -> list[Any]:
        raise DeviceHung("still at work")

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("bench.gpu.jobs.jobs_of", lambda *args: [Job("races", "one", hangs)])
    monkeypatch.setattr("os._exit", leave)
    path = tmp_path / "gpu.json"
    with pytest.raises(SystemExit) as stop:
        gpu.run(CpuMachine(), Scale(models=()), path, workers=0)
    assert stop.value.code == 1 and "error: still at work" in capsys.readouterr().err
    assert json.loads(path.read_text())["ended"] == "still at work"


def test_an_event_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        def query(self) -> bool:
            return False

    monkeypatch.setattr(gpu_machine, "HANG_SECONDS", 0.01)
    with pytest.raises(DeviceHung):
        gpu_machine._wait_for(Never())


def test_torch_cuda_has_what_the_machine_uses() -> None:
    used = set(re.findall(r"torch\.(cuda\.\w+|profiler\.\w+)", inspect.getsource(gpu_machine.CudaMachine)))
    assert len(used) > 10
    for name in used:
        module, _, attribute = name.partition(".")
        assert hasattr(getattr(torch, module), attribute), name


class FakeEvent:
    """A CUDA event by the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.asked = 0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3 * (other.at - self.at)


class FakeStream:
    order: ClassVar[list[str]] = []

    def wait_stream(self, other: Any) -> None:
        self.order.append("waits")


class FakeGraph:
    """Notes when it is captured and replayed."""

    @contextlib.contextmanager
    def captures(self) -> Iterator[None]:
        FakeStream.order.append("capture")
        yield
        FakeStream.order.append("end")

    def replay(self) -> None:
        FakeStream.order.append("replay")


class FakeProfile:
    """A profiler that has seen one kernel."""

    def __init__(self, activities: Any) -> None:
        pass

    def start(self) -> None:
        FakeStream.order.append("profiled")

    def stop(self) -> None:
        FakeStream.order.append("stopped")

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text(json.dumps({"traceEvents": [{"cat": "kernel", "name": "k"}]}))


def fail() -> None:
    raise KeyError("none")


def hang() -> None:
    raise DeviceHung("at work for ever")


def test_the_machine_against_a_stand_in_of_torch_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    properties = SimpleNamespace(L2_cache_size=5, major=9, minor=0, multi_processor_count=132, total_memory=7)
    stand_ins = {
        "Event": FakeEvent,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "CUDAGraph": FakeGraph,
        "graph": FakeGraph.captures,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": lambda stream: FakeStream.order.append("back"),
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda device: "H",
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 10,
        "max_memory_allocated": lambda: 13,
        "mem_get_info": lambda: (11, 12),
        "empty_cache": lambda: None,
        "set_sync_debug_mode": modes.append,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.profiler, "profile", FakeProfile)
    monkeypatch.setattr(gpu_machine, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(gpu_machine, "MATMUL_WIDTH", 8)
    machine = CudaMachine(CPU)
    described = machine.describe()
    assert described["device"] == "H" and described["capability"] == "9.0" and "driver" in described
    assert machine.copy_bandwidth() > 0 and machine.l2_bytes == 5 and machine.free_bytes() == 11
    assert machine.seconds(lambda: time.sleep(0.01), lead_s=1e-5) >= 0.01
    machine.keep_busy()
    assert torch.equal(machine.product, machine.factors[0] @ machine.factors[1])
    assert machine.peak_bytes(lambda: None) == 3
    with pytest.raises(KeyError), machine.no_waiting():
        raise KeyError
    assert modes == ["error", "default"]
    FakeStream.order = []
    assert machine.launches(lambda: FakeStream.order.append("work")) == [("kernel", "k")]
    assert FakeStream.order == ["profiled", "work", "stopped"]
    FakeStream.order = []
    with pytest.raises(KeyError):
        machine.launches(fail)
    with pytest.raises(DeviceHung):
        machine.launches(hang)
    assert FakeStream.order == ["profiled", "stopped", "profiled"], "stop() waits, for ever where the device hangs"
    with pytest.raises(KeyError):
        machine.capture(lambda: None, fail)
    assert FakeStream.order[-1] == "back"
    FakeStream.order = []
    machine.capture(lambda: FakeStream.order.append("warm up"), lambda: FakeStream.order.append("work"))()
    assert FakeStream.order == ["waits", "warm up", "waits", "capture", "work", "end", "back", "replay"]


def test_launches_are_what_the_device_executes() -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": "fused_pass"}
    others = [{"cat": "cuda_runtime", "name": "cudaLaunchKernel"}, {"cat": "gpu_user_annotation", "name": "step"}, {}]
    memset = {"cat": "gpu_memset", "name": "Memset (Device)"}
    assert launches_of([kernel, *others, memset]) == [("kernel", "fused_pass"), ("gpu_memset", "Memset (Device)")]


# -- correctness -----------------------------------------------------------------------------------------------------


def test_the_grid_has_every_layout_and_ends_with_an_empty_tensor() -> None:
    specs = grid(64, 3)
    tensors = Originals(specs, FP32, 0).tensors
    assert {spec.param_form for spec in specs} | {spec.grad_form for spec in specs} == set(gpu_correctness.FORMS)
    assert specs[-1] == Spec((0,)) and {0, 1, 63, 64, 65, 192, 197} <= {p.numel() for p in tensors.params}
    assert any(g.stride() == (0, 0) for g in tensors.grads)
    placed = Placed(Originals([Spec((70,), "plain", "plain", 1, 3, 5)], FP32, 0), CPU)
    own = placed.tensors
    kinds = (own.params, own.grads, own.grad_emas, own.momentum_buffers)
    assert [kind[0].data_ptr() % 16 for kind in kinds] == [4, 12, 4, 4]


def test_the_judge_passes_torch_and_fails_what_is_wrong() -> None:
    originals = Originals([Spec((2000,)), Spec((5,)), Spec((0,))], MIXED, 0)
    plain, truth = originals.plain, originals.truth
    assert judge(plain, plain, truth, rounds=True)[0]
    for kind, factor in (("param", 1.05), ("grad_ema", 1 + 1e-6), ("momentum_buffer", 1 + 1e-6), ("param", math.nan)):
        wrong = reference_step(originals.tensors, None)
        wrong.of_kind(kind)[1].mul_(factor)
        passed, shares = judge(wrong, plain, truth, rounds=True)
        assert not passed and not shares[kind] <= 1
    wrong = reference_step(originals.tensors, None)
    wrong.ratios = wrong.ratios * (1 + 2e-6)
    assert not judge(wrong, plain, truth, rounds=True)[0]
    unstepped = reference_step(originals.tensors, None)
    unstepped.params[0][-1] = originals.tensors.params[0][-1]
    passed, shares = judge(unstepped, plain, truth, rounds=True)
    norm = relative_error(unstepped.params[0], truth.params[0]) / relative_error(plain.params[0], truth.params[0])
    assert not passed and shares["param"] > 1 and norm < gpu_correctness.MULTIPLE_OF_MANY, "the norm alone hides it"
    truncated = reference_step(originals.tensors, None)
    bits = truth.params[0].float().view(torch.int32)
    truncated.params[0] = (bits & ~0xFFFF).view(torch.float32).bfloat16()
    assert not judge(truncated, plain, truth, rounds=True)[0]
    assert judge(truncated, plain, truth, rounds=False)[0]


@interpreted
def test_the_grid_holds_where_state_is_rounded_stochastically() -> None:
    """Random bits follow a tensor's position, not its place in a list that is permuted."""
    specs = [Spec((70,)), Spec((5,)), Spec((3, 40), "transposed", "plain"), Spec((64,))]
    checks = list(check_grid(CpuMachine(), (torch.float32, torch.float32, torch.bfloat16), specs, 64, 0))
    assert len(checks) == 2 and all(check.passed for check in checks), checks


def test_a_write_beside_a_tensor_is_seen() -> None:
    placed = Placed(Originals([Spec((4, 6), "every second"), Spec((7,), grad_offset=1)], FP32, 0), CPU)
    for own in (placed.tensors.params, placed.tensors.momentum_buffers):
        own[0].mul_(2)
    assert placed.guards_intact()
    param, gradient = placed.tensors.params[0], placed.tensors.grads[1]
    for wrong in (param.as_strided((1,), (1,), param.storage_offset() + 1), gradient[3:4]):
        before = wrong.clone()
        wrong.fill_(1.0)
        assert not placed.guards_intact()
        wrong.copy_(before)


def _checks_of_a_faulty_plan(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """The grid's checks, with the reference in the kernel's place and a fault under window 0."""

    def step(placed: Placed, plan: Plan, order: Any = None) -> Outcome:
        outcome = reference_step(placed.tensors, None)
        if plan.window == 0:
            outcome.momentum_buffers[0][0] *= 1 + 1e-6
        return outcome

    monkeypatch.setattr(Placed, "step", step)
    return list(check_grid(CpuMachine(), FP32, [Spec((9,))], 64, 0))


def test_other_bits_under_another_window_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for check in _checks_of_a_faulty_plan(monkeypatch):
        assert not check.passed and check.detail.startswith("window 0: other bits than the first run; error / bound")


def test_a_race_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def step(driver: PassDriver) -> torch.Tensor:
        calls.append(driver)
        (launch,) = driver.fused_pass.launches
        if len(calls) == 3:
            launch.owners[2][0] += 1
        return torch.ones(len(launch.owners))

    monkeypatch.setattr(PassDriver, "step", step)
    check = hunt_races(CpuMachine(), FP32, Crowd(3, 10, 1, 100), Plan(chunk=64), 6, 0)
    assert not check.passed and "1 of 6 reruns differ: [2]" in check.detail
    assert "an error is above its bound" in check.detail  # nothing was updated


def test_waiting_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = CpuMachine()
    machine.uses = 1
    monkeypatch.setattr(gpu_checks, "QUEUE_S", 60.0)

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    check = gpu_checks._without_waiting(machine, "x", lambda: None, waits)
    assert not check.passed and "synchronizing" in check.detail
    monkeypatch.setattr(gpu_checks, "QUEUE_S", 0.02)
    check = gpu_checks._without_waiting(machine, "x", lambda: None, lambda: time.sleep(0.02))
    assert not check.passed and "behind a queue of 20 ms" in check.detail


# -- contenders and timing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        ("vit_b_16", 152, 86_567_656),
        ("vit_l_16", 296, 304_326_632),
        ("bert_large", 391, 335_141_888),
        ("gpt2_xl", 580, 1_557_611_200),
        ("llama_1b", 201, 1_100_048_384),
        ("llama_7b", 291, 6_738_415_616),
    ],
)
def test_shapes_have_the_published_size(model: str, tensors: int, parameters: int) -> None:
    shapes = list(SHAPES[model]())
    assert len(shapes) == len(dict(shapes)) == tensors
    assert sum(math.prod(shape) for _, shape in shapes) == parameters


def test_a_smaller_model_where_memory_is_short() -> None:
    assert gpu_jobs.fitting_model(CpuMachine(80 << 30), "llama_7b") == "llama_1b"
    assert gpu_jobs.fitting_model(CpuMachine(139 << 30), "llama_7b") == "llama_7b"
    assert gpu_jobs.fitting_model(CpuMachine(1), "gpt2") == "gpt2"


def test_the_compiled_reference_is_the_reference() -> None:
    named = make_parameters(TINY, FP32, CPU, 0)
    twin = make_parameters(TINY, FP32, CPU, 0)
    budget = CompileBudget(60.0, 60.0)
    step = compiled_reference(named, len(named), budget, backend="eager")
    step()
    assert budget.left_s < 60
    foreach = CONTENDERS_BY_NAME[FOREACH](twin)
    for _ in range(2):
        foreach()
    for (_, a), (_, b) in zip(named, twin, strict=True):
        assert not torch.equal(a, torch.zeros_like(a))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


CONTENDERS_BY_NAME = {name: c.build for name, c in contenders_for(FP32, 3, CompileBudget(0, 0)).items()}


def test_compiling_has_its_limits() -> None:
    named = make_parameters(TINY, FP32, CPU, 0)
    with pytest.raises(RuntimeError, match=r"left out: torch\.compile takes 156 s or more, and has 60 s"):
        compiled_reference(named, 391, CompileBudget(60.0, 60.0))
    with pytest.raises(RuntimeError, match="is spent"):
        compiled_reference(named, 3, CompileBudget(0.0, 60.0))

    def slow(module: Any, inputs: Any) -> Any:
        time.sleep(5)

    with pytest.raises(RuntimeError, match="was not done with it after"):
        compiled_reference(named, 1, CompileBudget(60.0, 0.5), backend=slow)
    start = time.monotonic()
    with pytest.raises(OutOfTime), time_limit(0.05):
        while time.monotonic() < start + 5:
            pass
    with time_limit(5):
        pass


def _counting(calls: list[str], name: str, fails: bool = False) -> Contender:
    def step() -> None:
        calls.append(name)
        if fails and calls.count(name) > 6:
            raise RuntimeError("out of memory")

    return Contender(lambda named: step, 28, 8)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_contenders_take_turns_where_memory_allows(side_by_side: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(timing, "MOST_STEPS", 1)
    contenders = {"x": _counting(calls, "x"), "y": _counting(calls, "y")}
    machine = CpuMachine(10_000 if side_by_side else 1200)
    rows = time_contenders(machine, "m", FP32, "fp32", TINY, contenders, 4, 0)
    assert [row.side_by_side for row in rows] == [side_by_side] * 2
    assert all(row.error is None and len(row.device_samples_s) == 4 for row in rows)
    warm = timing.WARMUP_STEPS + 3 + 1
    expected = ["x", "y"] * 4 if side_by_side else ["x"] * 4
    assert calls[warm * (2 if side_by_side else 1) :][: len(expected)] == expected
    rows = time_contenders(CpuMachine(100), "m", FP32, "fp32", TINY, contenders, 4, 0)
    assert all(row.error is not None and row.error.startswith("left out: needs") for row in rows)


def test_a_contender_that_breaks_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def refuses(named: Any) -> Step:
        raise RuntimeError("not\n built")

    contenders = {
        "refuses": Contender(refuses, 28, 8),
        "breaks": _counting(calls, "breaks", fails=True),
        "works": _counting(calls, "works"),
    }
    rows = time_contenders(CpuMachine(), "m", FP32, "fp32", TINY, contenders, 3, 0)
    assert [row.error for row in rows] == ["RuntimeError: not built", "RuntimeError: out of memory", None]
    text = steps_text(rows, 1e9)
    assert "refuses failed: RuntimeError: not built" in text and "\nworks " in text


# -- targets ---------------------------------------------------------------------------------------------------------


def test_bytes_of_the_plan() -> None:
    l2 = 1 << 20
    assert [plan_bytes([1000, 0], dtypes, l2) for dtypes in (FP32, MIXED, BF16)] == [28_000, 22_000, 14_000]
    large = 1 << 30
    for dtypes, bytes_per_parameter in ((FP32, 36), (MIXED, 28), (BF16, 18)):
        assert plan_bytes([large], dtypes, l2) / large == pytest.approx(bytes_per_parameter, rel=1e-3)
    # p and m are 8 bytes of float32: of twice as many parameters as fit, half is read again.
    assert plan_bytes([2 * l2 // 8], FP32, l2) == 2 * l2 // 8 * 28 + l2 // 8 * 8


def _step_row(model: str, contender: str, milliseconds: float) -> StepRow:
    row = StepRow(model, "fp32", contender, 3, 60, 28, True)
    row.device_s = Spread(milliseconds / 1e3, milliseconds / 1e3, milliseconds / 1e3)
    return row


def test_targets_on_step_times() -> None:
    rows = [
        _step_row("resnet50", FUSED, 0.2),
        _step_row("resnet50", ADAMW, 0.21),
        _step_row("resnet50", FOREACH, 0.45),
        _step_row("resnet50", COMPILED, 0.3),
        _step_row("llama_7b", FUSED, 50.0),
        _step_row("llama_7b", ADAMW, 40.0),
    ]
    limits = {("resnet50", "fp32"): 0.18e-3, ("llama_7b", "fp32"): 40e-3}
    found = {target.label: (target.value, target.passed) for target in step_targets(rows, limits, "fp32")}
    assert list(found.values()) == [
        ("1.11", True),
        ("1.25", False),
        ("0.95", True),
        ("2.25", False),
        ("0.67", True),
        ("1.25", True),
        ("not measured", None),
    ]


def test_targets_on_host_time_and_launches() -> None:
    rows = [
        gpu_checks.HostRow(FUSED, 300, groups, Spread(seconds, seconds, seconds), [])
        for groups, seconds in ((1, 80e-6), (10, 81e-6), (300, 120e-6))
    ]
    assert [target.passed for target in host_targets(rows)] == [True, False, False]
    assert [target.passed for target in host_targets([])] == [None]
    launches = [gpu_checks.LaunchRow(FUSED, 300, kernels=3, copies=1), gpu_checks.LaunchRow(FUSED, 1, error="x")]
    launches.append(gpu_checks.LaunchRow(gpu_checks.WITHOUT_LOSS, 1, kernels=3, memsets=1))
    assert [target.passed for target in launch_targets(launches)] == [True, None, False]


def test_checks_that_fail_or_were_not_made_fail_their_target() -> None:
    results = Results([1.0])
    assert [target.passed for target in targets_of(results, CpuMachine())][:4] == [None] * 4
    results.rows["races"] = [Check("a", True, ""), Check("b", False, "")]
    results.rows["waiting"] = [Check("a", True, "")]
    run_jobs([Job("correctness", "bad", lambda: [][0])], results, Deadline(60), lambda job: None, lambda: None)
    run_jobs([Job("features", "bad", lambda: [][0])], results, Deadline(60), lambda job: None, lambda: None)
    targets = targets_of(results, CpuMachine())
    assert [target.passed for target in targets[:4]] == [False, False, True, False]
    assert targets[1].value == "2 checks, 1 bad"


def test_windows_of_the_sweep() -> None:
    assert window_chunks(0.5, 60 << 20, FP32, 4096) == 480
    assert window_chunks(0.5, 60 << 20, MIXED, 4096) == 640
    assert window_chunks(math.inf, 60 << 20, FP32, 4096) >= 10**9
