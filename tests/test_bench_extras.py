"""The benchmarks' command line: without a command, and without an optional dependency."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import COMMANDS, main
from tests.processes import ROOT, without_interpreter


def run_without(module: str, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process in which ``module`` cannot be imported."""
    program = f"import sys; sys.modules[{module!r}] = None; sys.path.insert(0, {str(ROOT)!r}); {code}"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder, env=without_interpreter(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def test_without_a_command_the_list_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("command", ["micro", "host", "train", "report"])
def test_a_missing_dependency_is_one_line(command: str, tmp_path: Path) -> None:
    done = run_without("numpy", f"from bench.__main__ import main; main([{command!r}])", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr  # torch itself warns of a missing NumPy
    assert done.stderr.splitlines()[-1] == "error: numpy missing: pip install '.[demo]'"


def test_another_missing_module_is_an_error_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bench.table", None)
    monkeypatch.delitem(sys.modules, "bench.host", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"bench\.table"):
        main(["host", "--help"])


@pytest.mark.parametrize("command", ["micro", "train", "demo", "host", "traffic", "report"])
def test_no_help_says_that_a_default_is_none(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "None" not in printed
    assert "(default: 20)" in printed or command not in ("micro", "train")


def test_the_example_names_what_is_missing(tmp_path: Path) -> None:
    example = ROOT / "examples" / "train_fsdp2.py"
    hide = (
        "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == 'tqdm' else find(n); "
        f"import runpy; sys.argv = ['x']; runpy.run_path({str(example)!r}, run_name='__main__')"
    )
    done = run_without("tqdm", hide, tmp_path)
    assert done.returncode == 1 and done.stderr.endswith("error: tqdm missing: pip install '.[demo]'\n")
    assert not list(tmp_path.iterdir())
