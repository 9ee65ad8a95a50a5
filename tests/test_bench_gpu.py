"""``python -m bench gpu`` without a GPU: all of it but the device itself, on CPU tensors with interpreted kernels."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from bench import gpu, timing
from bench.__main__ import main
from bench.compiled import CompileBudget
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
from bench.gpu import sweep as gpu_sweep
from bench.gpu.contenders import PASS_ALONE, contenders_for
from bench.gpu.correctness import (
    Spec,
)
from bench.gpu.jobs import Deadline, Job, Results, Scale, run_jobs, scale_for, variants_of
from bench.gpu.machine import DeviceHung
from bench.gpu.races import Crowd
from bench.shapes import SHAPES
from fused_dals.host_walk import HOST_WALK
from tests.gpu_stand_ins import FP32, MIXED, TINY, CpuMachine, interpreted


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
