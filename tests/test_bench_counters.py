"""`bench counters`: what ncu says, read; who is stepped, and whose launches are whose. No GPU: a stand-in for ncu."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tqdm")

from bench import counters
from bench.__main__ import main
from bench.cache_model import plan_in_use
from bench.counters import Counted, launches_of, table, take_steps
from bench.gpu.driver import PassDriver
from bench.report.results import load
from bench.report.text import speed_page
from bench.shapes import SHAPES
from tests.gpu_stand_ins import CPU, TINY, interpreted

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
#: As of an H200, of Nsight Compute 2025.3.
FACTS = '"1458","python3.12","127.0.0.1","fused_pass","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0"'


def line(launch: int, metric: str, unit: str, value: int) -> str:
    return f'"{launch}",{FACTS},"Command line profiler metrics","{metric}","{unit}","{value:,}"'


def lines(launch: int, read: int, written: int, nanoseconds: int) -> list[str]:
    values = {"dram__bytes_read.sum": read, "dram__bytes_write.sum": written, "gpu__time_duration.sum": nanoseconds}
    units = dict(counters.METRICS.values())
    return [line(launch, name, units[name], value) for name, value in values.items()]


SAID = [
    "==WARNING== Note: Running with uncontrolled GPU caches. Profiling results may be inconsistent.",
    "==PROF== Connected to process 1458 (/usr/bin/python3.12)",
    HEADER,
    *lines(0, 418_447_104, 304_975_104, 228_192),
    *lines(1, 418_021_888, 305_966_848, 223_648),
    *lines(2, 1_000, 400, 5_000),
    *lines(3, 900, 500, 4_000),
]


def test_launches_are_read_in_order() -> None:
    found = list(launches_of("\n".join(SAID)))
    assert found[1] == {"bytes_read": 418021888.0, "bytes_written": 305966848.0, "nanoseconds": 223648.0}
    assert len(found) == 4 and not list(launches_of("==ERROR== ERR_NVGPUCTRPERM"))
    with pytest.raises(ValueError, match=r"ncu gives gpu__time_duration.sum in us, not in ns"):
        list(launches_of("\n".join([HEADER, line(0, "gpu__time_duration.sum", "us", 5)])))


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An ncu that notes how it was called, writes rows where the steps would, and says something."""

    def make(rows: list[Counted], said: list[str], status: int = 0) -> Path:
        program, called = tmp_path / "ncu", tmp_path / "called"
        program.write_text(
            f"#!{sys.executable}\nimport json, sys, pathlib, dataclasses\n"
            f"pathlib.Path({str(called)!r}).write_text(json.dumps(sys.argv[1:]))\n"
            f"pathlib.Path(sys.argv[-1]).write_text({chr(10).join(json.dumps(vars(row)) for row in rows)!r})\n"
            f"print({chr(10).join(said)!r})\n"
            f"print('no right to read counters', file=sys.stderr)\nsys.exit({status})\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return called

    return make


LISTS = [("resnet50", "fp32"), ("gpt2", "fp32"), ("vit_b_16", "fp32")]


def test_rows_get_the_second_of_their_own_launches(ncu: Any) -> None:
    """One that had no memory has launched nothing, and the next one's launches are not taken for its."""
    rows = [
        Counted("resnet50", "fp32", 25_557_032),
        Counted("gpt2", "fp32", 9, error="left out"),
        Counted("vit_b_16", "fp32", 100),
    ]
    called = ncu(rows, SAID)
    first, none, last = counters.count(LISTS)
    assert first.bytes_read == 418021888.0 and first.pass_alone_s == pytest.approx(223648e-9)
    assert first.bytes_per_parameter == pytest.approx(28.328, abs=1e-3)
    assert none.error == "left out" and last.bytes_per_parameter == 14.0
    text = table([first, none, last])
    assert "28.33" in text and "gpt2 fp32 not counted: left out" in text
    options = json.loads(called.read_text())
    assert options[options.index("--kernel-name") + 1] == "fused_pass"
    assert options[options.index("-m") : -1] == [
        "-m", "bench", "counters", "--shapes", "resnet50", "gpt2", "vit_b_16", "--dtypes", "fp32", "--take-steps",
    ]  # fmt: skip


def test_what_ncu_cannot_do_is_said(ncu: Any) -> None:
    ncu([Counted("resnet50", "fp32", 5)], ["==ERROR== ERR_NVGPUCTRPERM"], status=1)
    rows = counters.count(LISTS)
    assert {row.error for row in rows} == {"ncu ended with 1: no right to read counters"} and len(rows) == 3
    ncu([Counted("resnet50", "fp32", 5)], SAID[:6])
    assert [row.error for row in counters.count(LISTS)] == ["ncu has told of 1 launches", "not reached", "not reached"]


@interpreted
def test_steps_are_taken_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the process under ncu takes them; where one fails midway the launches that follow would be anybody's."""
    for model in ("resnet50", "gpt2"):
        monkeypatch.setitem(SHAPES, model, lambda: iter(TINY))
    path = tmp_path / "steps"
    take_steps(CPU, [("resnet50", "fp32"), ("gpt2", "bf16")], path)
    rows = [Counted(**json.loads(row)) for row in path.read_text().splitlines()]
    assert [(row.model, row.parameters, row.error) for row in rows] == [("resnet50", 60, None), ("gpt2", 60, None)]


@interpreted
@pytest.mark.parametrize("free", [1000.0, 2000.0])
def test_what_fails_before_a_launch_costs_one_list_and_later_all(
    free: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("resnet50", "gpt2"):
        monkeypatch.setitem(SHAPES, model, lambda: iter(TINY))
    monkeypatch.setattr(counters, "_free_bytes", lambda device: free)
    steps = iter(range(9))

    def step(driver: PassDriver) -> None:
        if next(steps) == 1:
            raise RuntimeError("lost")

    monkeypatch.setattr(PassDriver, "step", step)
    path = tmp_path / "steps"
    take_steps(CPU, [("resnet50", "fp32"), ("gpt2", "fp32")], path)
    errors = [json.loads(row)["error"] for row in path.read_text().splitlines()]
    if free == 1000.0:
        assert errors == ["MemoryError: left out: needs 9.6e-07 GB of 9e-07 GB"] * 2
    else:
        assert errors == ["RuntimeError: lost"], "which launches are whose would not be known"


def test_the_report_shows_them(tmp_path: Path) -> None:
    row = {"model": "resnet50", "dtypes": "fp32", "parameters": 25_557_032, "bytes_per_parameter": 28.3}
    environment = {
        "device": "G",
        "driver": "1",
        "multiprocessors": 132,
        "l2_bytes": 60 << 20,
        "torch": "2",
        "date": "2026-01-01",
    }
    record = {
        "environment": environment,
        "what": counters.WHAT,
        "settings": {"plan": plan_in_use()},
        "counters": [row, {**row, "model": "gpt2", "bytes_per_parameter": None, "error": "left out"}],
    }
    (tmp_path / "counters-some.json").write_text(json.dumps(record))
    page = speed_page(load(tmp_path))
    assert "| resnet50 fp32 |" in page and "| 28.3 |" in page and "gpt2" not in page


def test_without_a_gpu_or_ncu_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: no GPU"):
        main(["counters"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="error: ncu missing: it is part of Nsight Compute"):
        main(["counters"])
