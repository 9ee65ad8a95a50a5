"""examples/train_fsdp2.py as its reader runs it: two processes, a checkpoint, resumed to the same losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, without_interpreter
from tests.ranks import LOOPBACK

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLE = ROOT / "examples" / "train_fsdp2.py"
SMALL = ["--width", "16", "--layers", "1", "--batch", "2", "--save-every", "2"]


def torchrun(processes: int, *options: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(EXAMPLE), *SMALL, *options],
        env={**without_interpreter(), "OMP_NUM_THREADS": "1", **LOOPBACK}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_and_its_resumption(tmp_path: Path) -> None:
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    (straight / "step-000099").mkdir(parents=True)  # of an older, longer run
    said = torchrun(2, "--steps", "4", "--out", str(straight))
    assert "2 processes (cpu)" in said and "steps 1 to 4" in said and (straight / "loss.png").stat().st_size > 5000
    assert sorted(folder.name for folder in straight.glob("step-*")) == ["step-000002", "step-000004"]
    history = json.loads((straight / "history.json").read_text())
    # As if the run had ended after its second step.
    parted.mkdir()
    (parted / "step-000002").symlink_to(straight / "step-000002")
    cut = {key: values[:2] for key, values in history.items()}
    (parted / "history.json").write_text(json.dumps(cut))
    assert "steps 3 to 4" in torchrun(2, "--steps", "4", "--resume", "--out", str(parted))
    assert json.loads((parted / "history.json").read_text()) == history
