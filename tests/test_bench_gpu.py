"""``python -m bench gpu`` without a GPU: all of it but the device itself, on CPU tensors with interpreted kernels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from bench import gpu, timing
from bench.__main__ import main
from bench.contenders import (
    ADAMW,
    BF16_STATE,
    CLIPPED,
    COMPENSATED,
    COMPILED,
    FUSED,
    SGD,
)
from bench.gpu import checks as gpu_checks
from bench.gpu import features as gpu_features
from bench.gpu import jobs as gpu_jobs
from bench.gpu import runner
from bench.gpu import sweep as gpu_sweep
from bench.gpu.compile_ahead import variants_of
from bench.gpu.contenders import PASS_ALONE, contenders_for
from bench.gpu.correctness import Check, Spec
from bench.gpu.machine import DeviceHung
from bench.gpu.races import Crowd
from bench.gpu.runner import Deadline, DeviceLost, Failure, Job, Results, run_jobs
from bench.gpu.scale import Scale, scale_for
from bench.gpu.supervisor import Progress, Store, supervise
from bench.shapes import SHAPES
from fused_dals.host_walk import HOST_WALK
from tests.gpu_stand_ins import FP32, MIXED, TINY, CpuMachine, interpreted
from tests.processes import ROOT, is_running


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
        changed: dict[str, tuple[float, ...]] = {"CHUNKS": (64, 128), "TILES": (32,), "WARPS": (4,), "PROGRAMS": (1, 2)}
        for name, values in {**changed, "WINDOW_SHARES": (0.5,)}.items():
            patch.setattr(gpu_sweep, name, values)
        gpu.run(CpuMachine(), scale, path, 0, Store(path.parents[1] / "progress"), Deadline.after(scale.seconds))
    record: dict[str, Any] = json.loads(path.read_text())
    return record, printed.getvalue()


@interpreted
def test_every_section_runs_and_nothing_fails(ran: tuple[dict[str, Any], str]) -> None:
    record, printed = ran
    assert record["ended"] == "complete"
    assert record["failures"] == {section: [] for section in runner.SECTIONS}
    assert record["environment"].keys() >= {"device", "driver", "cpu", "torch", "triton", "python", "date"}
    for section in runner.SECTIONS:
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
    assert [name for dtypes, name in steps if dtypes == "fp32"] == list(contenders_for(FP32))
    assert [name for dtypes, name in steps if dtypes == "bf16"] == [PASS_ALONE, BF16_STATE, COMPENSATED, ADAMW, SGD]
    assert not any(row["error"] for row in steps.values())
    assert [(row["contender"], row["error"] is None) for row in record["compiled"]] == [
        (FUSED, True),
        (COMPILED, False),
    ]
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
    some = scale_for(None, False, ["compile", "sweep"], 200)
    assert some == replace(scale_for(None, False), sections=("compile", "sweep"), seconds=200)
    jobs = gpu_jobs.jobs_of(CpuMachine(), some, Results(), Deadline.after(1), 0)
    assert [job.section for job in jobs] == ["compile"] + 6 * ["sweep"]
    variants = variants_of(scale_for(None, quick=False))
    assert len(variants) == len(set(variants)) < 60


# -- jobs ------------------------------------------------------------------------------------------------------------


def test_a_failing_job_is_a_row_and_the_rest_runs() -> None:
    results, ran = Results([1.0]), []

    def breaks() -> Iterator[int]:
        yield 1
        raise RuntimeError("not\n now")

    jobs = [Job("host", "bad", breaks), Job("host", "good", lambda: [2])]
    run_jobs(jobs, results, Deadline.after(60), CpuMachine(), after=lambda job: ran.append(job.label))
    assert results.rows["host"] == [1, 2] and ran == ["bad", "good"]
    assert [(f.label, f.error) for f in results.failures["host"]] == [("bad", "RuntimeError: not now")]
    run_jobs(jobs[1:], results, Deadline.after(-1), CpuMachine())
    assert results.left_out["host"] == ["good"] and len(results.failures["host"]) == 1


def test_a_device_that_answers_no_more_ends_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at after every job: it may have left a context in which every call fails, and made a row of it."""
    results, machine = Results([1.0]), CpuMachine()
    error: BaseException

    def fail() -> None:
        raise error

    monkeypatch.setattr(machine, "wait", fail)
    for error in (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceHung("still at work")):
        for label, run in (("bad", lambda: [][0]), ("swallows it", lambda: [1])):
            jobs = [Job("races", label, run), Job("host", "good", lambda: [2])]
            with pytest.raises(DeviceLost, match=rf"after races, {label}: {type(error).__name__}: {error}"):
                run_jobs(jobs, results, Deadline.after(60), machine)
    assert results.rows["races"] == [1, 1] and not results.rows["host"]
    failed = [failure.label for failure in results.failures["races"]]
    assert failed == 2 * ["bad", "bad, afterwards", "swallows it, afterwards"]


def test_a_hung_device_ends_the_process_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hangs() -> list[Any]:
        raise DeviceHung("still at work")

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("bench.gpu.jobs.jobs_of", lambda *args: [Job("races", "one", hangs)])
    monkeypatch.setattr("os._exit", leave)
    path, store = tmp_path / "gpu.json", Store(tmp_path / "progress")
    with pytest.raises(SystemExit) as stop:
        gpu.run(CpuMachine(), Scale(models=()), path, 0, store, Deadline.after(60))
    assert stop.value.code == 1 and "error: still at work" in capsys.readouterr().err
    assert json.loads(path.read_text())["ended"] == "still at work"
    progress = store.load()
    assert (progress.begun, progress.running, progress.status) == (1, None, None)
    assert progress.results.failures["races"] == [Failure("one", "still at work")]


def test_what_cannot_be_shown_or_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that the table cannot show, and a figure that JSON does not have."""
    odd_row = gpu_checks.HostRow("odd", 1, 1, timing.Spread("a", "b", "c"), [])
    odd_figure = Check("odd", True, "", {"figure": torch.tensor(1.0)})  # type: ignore[dict-item]
    jobs = [Job("host", "one", lambda: [odd_row]), Job("races", "one", lambda: [odd_figure])]
    monkeypatch.setattr("bench.gpu.jobs.jobs_of", lambda *args: jobs)
    path = tmp_path / "gpu.json"
    assert gpu.run(CpuMachine(), Scale(models=()), path, 0, Store(tmp_path / "progress"), Deadline.after(60)) == 0
    said = capsys.readouterr()
    assert "error: TypeError: " in said.err and "races" in said.out
    record = json.loads(path.read_text())
    assert record["races"][0]["figures"] == {"figure": "tensor(1.)"} and record["host"][0]["contender"] == "odd"


# -- watched from outside ---------------------------------------------------------------------------------------------


def _fine() -> list[Check]:
    return [Check("fine", True, "")]


def _sleeps() -> list[Check]:
    time.sleep(600)
    return []


def _holds_the_lock() -> list[Check]:
    """As a wait inside a driver does: no thread of Python's runs."""
    ctypes.PyDLL(None).sleep(600)
    return []


def _dies() -> list[Check]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def _starts_another() -> list[Check]:
    Path(os.environ["PID_FILE"]).write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    return _sleeps()


WATCHED = (_fine, _sleeps, _fine, _holds_the_lock, _dies, _starts_another, _fine)
SECTIONS_OF_WATCHED = ("races", "races", "races", "host", "races", "steps", "races")


def _work(folder: Path, store: Store, deadline: Deadline) -> int:
    """What is left of the jobs above, in one of the processes."""
    numbered = enumerate(zip(SECTIONS_OF_WATCHED, WATCHED, strict=True))
    jobs = [Job(section, f"{i} {run.__name__}", run, 3.0) for i, (section, run) in numbered]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.gpu.jobs.jobs_of", lambda *args: jobs)
        return gpu.run(CpuMachine(), Scale(models=()), folder / "gpu.json", 0, store, deadline)


def _dies_at_once(store: Store, deadline: Deadline) -> int:
    raise RuntimeError("no device")


def test_jobs_that_hang_or_kill_their_process_are_failures_and_all_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pid_file = tmp_path / "pid"
    monkeypatch.setenv("PID_FILE", str(pid_file))
    store = Store(tmp_path / "progress")
    assert supervise(store, Deadline.after(120), functools.partial(_work, tmp_path)) == 1, "failures are no success"
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["ended"] == "complete" and [row["label"] for row in record["races"]] == ["fine"] * 3
    failures = {
        failure["label"]: failure["error"]
        for section in ("races", "host", "steps")
        for failure in record["failures"][section]
    }
    assert failures.pop("4 _dies") == "the process ended with status -11"
    assert failures == dict.fromkeys(
        ("1 _sleeps", "3 _holds_the_lock", "5 _starts_another"), "the process was ended: no word from it for 3 s"
    )
    targets = {target["label"]: target["passed"] for target in record["targets"]}
    assert (
        targets["steps: all parts ran"] is targets["host: all parts ran"] is targets["races: all checks hold"] is False
    )
    said = capfd.readouterr()
    assert "error: host, 3 _holds_the_lock: the process was ended" in said.err
    for section in ("host", "races"):
        assert said.out.count(f"\n{section} (") == 1, "shown once, also where its last part came to no end"
    assert not is_running(int(pid_file.read_text())), "what a process has started ends with it"


def _tells_its_number_and_sleeps(store: Store, deadline: Deadline) -> int:
    store.path.with_name("child").write_text(str(os.getpid()))
    time.sleep(600)
    return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_whoever_ends_the_supervisor_ends_its_process(number: int, tmp_path: Path) -> None:
    program = "import sys; from tests.test_bench_gpu import watch_a_sleeper; watch_a_sleeper(sys.argv[1])"
    supervisor = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    child = tmp_path / "child"
    deadline = time.monotonic() + 60
    while not child.exists() or not child.read_text():
        assert time.monotonic() < deadline and supervisor.poll() is None
        time.sleep(0.05)
    supervisor.send_signal(number)
    supervisor.wait()
    while is_running(int(child.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_whose_supervisor_has_ended_begins_nothing(tmp_path: Path) -> None:
    """Ended while the new process was still importing: no signal tells it."""
    program = """if True:
        import multiprocessing, os, pathlib, sys
        from bench.gpu import supervisor
        from bench.gpu.runner import Deadline
        from tests.test_bench_gpu import _tells_its_number_and_sleeps
        multiprocessing.parent_process = lambda: type("Parent", (), {"pid": os.getppid() + 1})
        store = supervisor.Store(pathlib.Path(sys.argv[1], "progress"))
        supervisor._enter(_tells_its_number_and_sleeps, store, Deadline.after(60))
    """
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, timeout=120)
    assert done.returncode == 1 and not (tmp_path / "child").exists()


def _work_late(folder: Path, store: Store, deadline: Deadline) -> int:
    jobs = [Job("compiled", "slow", _sleeps, 30.0), Job("races", "fine", _fine)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.gpu.jobs.jobs_of", lambda *args: jobs)
        patch.setattr("bench.gpu.supervisor.GRACE_SECONDS", -30.0)
        patch.setattr("bench.gpu.supervisor.LEAST_SECONDS", 2.0)
        return gpu.run(CpuMachine(), Scale(models=()), folder / "gpu.json", 0, store, deadline)


def test_a_job_that_the_deadline_cuts_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "progress")
    assert supervise(store, Deadline.after(30), functools.partial(_work_late, tmp_path)) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["left_out"]["compiled"] == ["slow (in the midst of it)"] and not record["failures"]["compiled"]
    assert "_sleeps" in capfd.readouterr().err, "a traceback says where it was"


def watch_a_sleeper(folder: str) -> None:
    supervise(Store(Path(folder, "progress")), Deadline.after(60), _tells_its_number_and_sleeps)


def test_a_process_that_comes_to_no_job_is_started_once_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store, told = Store(tmp_path / "progress"), []
    store.save(Progress(Results([1.0]), {"l2_bytes": 1}, 3))
    assert supervise(store, Deadline.after(60), _dies_at_once, lambda progress, why: told.append((progress, why))) == 1
    assert told == [(store.load(), "the process ended with status 1")]
    gpu._write(tmp_path / "gpu.json", Scale(models=()), *told[0])
    assert json.loads((tmp_path / "gpu.json").read_text())["ended"] == "the process ended with status 1"
    said = capfd.readouterr().err
    assert said.count("RuntimeError: no device") == 2 and "error: the process ended with status 1" in said


def test_progress_outlives_its_process(ran: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    store = Store(tmp_path / "progress")
    assert store.load() == Progress()
    store.save(Progress(Results([1.0], rows={"host": [Check("a", True, "")]}), {}, 3, ("host", "a", 1.5)))
    assert store.load().results.rows == {"host": [Check("a", True, "")]} and store.load().begun == 3
