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
from bench.gpu.supervisor import Progress, Store, _leave, supervise
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
        quick_to_compile=(),
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
        changed: dict[str, tuple[float, ...]] = {"TILES": (32,), "WARPS": (4,), "PROGRAMS": (1, 2)}
        changed["CHUNKS"] = (2**-7, 2**-6)  # 64 and 128 elements of float32
        for name, values in {**changed, "WINDOWS": (0.5,)}.items():
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
    plans = [(row["plan"]["chunk"], row["plan"]["programs_per_sm"], row["window_per_program"]) for row in rows]
    assert plans[:2] == [(64, 2, None), (128, 2, None)] and plans[2][1] == 1
    assert plans[3][2] is None and rows[3]["plan"]["most_in_b"] == 0
    assert [row["window_per_program"] for row in rows[4:]] == [0.5, 0.5, 0.5]
    choices = [(row["plan"]["stage_a_writes"], row["plan"]["evict_first"]) for row in rows[4:]]
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
            results.lost["races"] = 0
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
SECTIONS_OF_WATCHED = ("races", "races", "races", "host", "launches", "steps", "races")


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
        for section in ("races", "host", "launches", "steps")
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
    (left_out,) = record["left_out"]["compiled"]
    assert left_out == "slow (in the midst of it: the process was ended: no word from it for 2 s)"
    assert not record["failures"]["compiled"]
    assert "_sleeps" in capfd.readouterr().err, "a traceback says where it was"


def watch_a_sleeper(folder: str) -> None:
    supervise(Store(Path(folder, "progress")), Deadline.after(60), _tells_its_number_and_sleeps)


def test_a_process_that_comes_to_no_job_is_started_once_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store, told = Store(tmp_path / "progress"), []
    store.save(Progress(Results([1.0]), {"l2_bytes": 1}, 3, shown=["races"]))
    assert supervise(store, Deadline.after(60), _dies_at_once, lambda progress, why: told.append((progress, why))) == 1
    assert told == [(store.load(), "the process ended with status 1")]
    gpu._give_up(tmp_path / "gpu.json", Scale(models=()), *told[0])
    assert json.loads((tmp_path / "gpu.json").read_text())["ended"] == "the process ended with status 1"
    said = capfd.readouterr()
    assert said.err.count("RuntimeError: no device") == 2 and "error: the process ended with status 1" in said.err
    assert "steps: nothing to do" in said.out and "races: nothing to do" not in said.out, "tables that nobody has seen"
    assert "0 passed, 0 failed, 14 not measured" in said.out


def test_after_the_deadline_no_process_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("bench.gpu.supervisor.LEAST_SECONDS", 1.0)
    monkeypatch.setattr("bench.gpu.supervisor.GRACE_SECONDS", 0.0)
    monkeypatch.setattr("bench.gpu.supervisor.START_SECONDS", 20.0)
    store, deadline = Store(tmp_path / "progress"), Deadline.after(20)
    store.save(Progress(Results([1.0]), {"l2_bytes": 1}))
    begin = time.monotonic()
    assert supervise(store, deadline, _starts_late, lambda progress, why: told.append(why)) == 1
    assert told == ["the time was up before the end; the process was ended: no word from it for 20 s"]
    assert time.monotonic() - begin < 30


def _starts_late(store: Store, deadline: Deadline) -> int:
    time.sleep(600)
    return 0


def _finds_rows_for_ever(store: Store, deadline: Deadline) -> int:
    """A row, and a save, every tenth of a second."""
    progress = store.load()
    store.begin(progress, Job("sweep", "endless", _fine, 3.0), deadline)
    while True:
        progress.results.rows["sweep"].append(len(progress.results.rows["sweep"]))
        store.save(progress)
        time.sleep(0.1)


def test_rows_are_kept_and_give_a_job_no_more_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.gpu.supervisor.STARTS", 1)
    store, told = Store(tmp_path / "progress"), []
    deadline = Deadline.after(60)

    def give_up(progress: Progress, why: str) -> None:
        told.append((progress.results, why))

    monkeypatch.setattr(Deadline, "passed", lambda deadline: True)  # so that it is not started again
    assert supervise(store, deadline, _finds_rows_for_ever, give_up) == 1
    ((results, why),) = told
    assert len(results.rows["sweep"]) > 10 and results.lost["sweep"] == 1
    assert why.endswith("sweep, endless: the process was ended: no word from it for 3 s")


def _says_it_works_and_sleeps(store: Store, deadline: Deadline) -> int:
    progress = store.load()
    progress.described = {"l2_bytes": 1}
    progress.results.rows["races"].append(Check("a", True, ""))
    store.begin(progress, Job("races", "long", _fine, 600.0), deadline)
    time.sleep(600)
    return 0


def watch_a_worker(folder: str) -> None:
    path = Path(folder)
    write = functools.partial(gpu._give_up, path / "gpu.json", Scale(models=()))
    sys.exit(supervise(Store(path / "progress"), Deadline.after(60), _says_it_works_and_sleeps, write))


def test_who_ends_the_run_gets_what_there_is(tmp_path: Path) -> None:
    program = "import sys; from tests.test_bench_gpu import watch_a_worker; watch_a_worker(sys.argv[1])"
    run = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    store, end = Store(tmp_path / "progress"), time.monotonic() + 60
    while store.load().running is None:
        assert time.monotonic() < end and run.poll() is None
        time.sleep(0.05)
    run.terminate()
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 1 and "races (0 s)" in said and "0 passed, 1 failed" in said
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["ended"] == "Ended, races, long: somebody ended the run" and len(record["races"]) == 1


def test_a_process_that_cannot_be_ended_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Process:
        def __init__(self, alive: bool) -> None:
            self.is_alive = lambda: alive

    left: list[int] = []
    monkeypatch.setattr("os._exit", left.append)
    held: Any = [Process(False), Process(False)]
    assert _leave(3, held) == 3 and not left
    _leave(3, [*held, Process(True)])
    assert left == [3] and "cannot be ended" in capsys.readouterr().err


def test_rows_outlive_an_error_that_ends_their_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an illegal access, when nothing of the device works, not even to give memory back."""

    def measured_and_broken(*args: Any, rows: list[timing.StepRow], **kwargs: Any) -> None:
        rows += [timing.StepRow("resnet50", "fp32", name, 1, 1, 28, True) for name in (ADAMW, FUSED, SGD)]
        rows[0].device_samples_s, rows[1].error = [1.0, 2.0], "RuntimeError: illegal memory access"
        raise RuntimeError("no memory back")

    monkeypatch.setattr(gpu_jobs, "time_contenders", measured_and_broken)
    scale, results = Scale(models=("resnet50",), sections=("steps",), step_dtypes=("fp32",)), Results([1.0])
    jobs = gpu_jobs.jobs_of(CpuMachine(), scale, results, Deadline.after(60), 0)
    run_jobs(jobs, results, Deadline.after(60), CpuMachine())
    adamw, fused = results.rows["steps"]
    assert adamw.device_s.median == 1.5 and fused.error == "RuntimeError: illegal memory access"
    assert [failure.error for failure in results.failures["steps"]] == ["RuntimeError: no memory back"]
    targets = {target.label: target.passed for target in gpu_jobs.targets_of(results, 1, scale)}
    assert targets["steps: every step of ours ran"] is False


def test_a_section_that_loses_the_device_again_and_again_is_left_out() -> None:
    results = Results([1.0])

    def hangs() -> list[Any]:
        raise DeviceHung("at work for ever")

    jobs = [Job("correctness", str(i), hangs) for i in range(4)] + [Job("host", "fine", lambda: [1])]
    done = 0
    while done < len(jobs):  # as the supervisor does, with a process for each
        begun: list[Job] = []
        with contextlib.suppress(DeviceLost):
            run_jobs(jobs[done:], results, Deadline.after(60), CpuMachine(), begun.append)
        done += len(begun)
    assert [failure.label for failure in results.failures["correctness"]] == ["0", "1"]
    assert results.left_out["correctness"] == [f"{i} (others before it lost the device)" for i in (2, 3)]
    assert results.rows["host"] == [1] and not results.left_out["host"]


def test_progress_outlives_its_process(ran: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    store = Store(tmp_path / "progress")
    assert store.load() == Progress()
    store.save(Progress(Results([1.0], rows={"host": [Check("a", True, "")]}), {}, 3, ("host", "a", 1.5)))
    assert store.load().results.rows == {"host": [Check("a", True, "")]} and store.load().begun == 3
