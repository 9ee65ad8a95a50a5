"""The package as it lies in a checkout that nobody installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT


def test_a_checkout_works_without_being_installed(tmp_path: Path) -> None:
    for name in ("fused_dals", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    program = "from fused_dals import DALS; import fused_dals.kernels.layout as layout; print(layout.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "kernels" / "layout.py"
