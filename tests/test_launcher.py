"""Launches past Triton's preparation hand the same arguments to the same kernel; Triton itself compiles, nothing runs.

A process of its own, because this one may interpret Triton; a stand-in for the driver, which writes down what it is to
launch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")

from fused_dals.kernels import layout
from fused_dals.launcher import Launcher
from tests.processes import ROOT, without_interpreter

STEPS = 4
LOSS_AT = 6  # among the prologue's arguments


def written_down(*kinds_of_losses: str) -> list[dict[str, Any]]:
    """Steps of one optimizer on the CPU under a driver that launches nothing: each launch, and who prepared it.

    It clips; or where losses are given, it does nothing beside them.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from fused_dals import DALS

    found: list[dict[str, Any]] = []
    prepared_by_triton: list[str] = []
    step = 0

    class Writer:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.name, self.params = metadata.name, src.fn.params

        def __call__(self, *call: Any) -> None:
            grid, (stream, function), arguments = call[:3], call[3:5], call[9:]
            shown = [str(a.data_ptr()) if isinstance(a, torch.Tensor) else str(a) for a in arguments]
            row = {"step": step, "kernel": self.name, "grid": grid, "stream": stream, "function": function}
            row |= {"arguments": shown, "by_triton": self.name in prepared_by_triton}
            row |= {"tensors": [p.name for p, a in zip(self.params, arguments, strict=True) if torch.is_tensor(a)]}
            numbers = [p for p, a in zip(self.params, arguments, strict=True) if isinstance(a, int)]
            row |= {"specialized": [p.name for p in numbers if not p.is_constexpr and not p.do_not_specialize]}
            found.append(row)

    loaded = iter(range(1, 1000))
    utils = SimpleNamespace(
        load_binary=lambda *binary: (object(), next(loaded), 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
    )
    driver.set_active(
        SimpleNamespace(
            launcher_cls=Writer,
            utils=utils,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 7,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    run = JITFunction.run

    def noted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        prepared_by_triton[:] = [kernel.__name__]
        try:
            return run(kernel, *args, **kwargs)
        finally:
            prepared_by_triton.clear()

    JITFunction.run = noted
    torch.manual_seed(0)
    named = [(f"{i}.weight", torch.nn.Parameter(torch.randn(70, dtype=torch.bfloat16))) for i in range(3)]
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimizer = DALS(named, fused=True, max_grad_norm=None if kinds_of_losses else 1.0)
    with patch("fused_dals.stepper.why_not_fused", lambda param, grad: ""):
        kept = [torch.ones((), dtype=getattr(torch, kind)) for kind in kinds_of_losses]  # no address comes twice
        for step, loss in enumerate(kept):
            optimizer.step(loss=loss)
            of_step = next(row for row in found if row["step"] == step and row["kernel"] == "prologue")
            of_step["loss"] = str(loss.data_ptr())
        if kept:
            return found
        for step in range(STEPS):
            if step == STEPS - 1:
                (fused,) = optimizer._runtime.fused.values()
                fused._one = torch.ones(2)[1:]  # misaligned
            optimizer.step(loss=1.0)
    return found


@pytest.fixture(scope="module")
def launches() -> list[dict[str, Any]]:
    return in_a_process()


def in_a_process(*kinds_of_losses: str) -> list[dict[str, Any]]:
    call = f"written_down(*{kinds_of_losses!r})"
    program = f"import json, sys; from tests.test_launcher import written_down; json.dump({call}, sys.stdout)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=without_interpreter(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def of(launches: list[dict[str, Any]], kernel: str) -> list[dict[str, Any]]:
    return [launch for launch in launches if launch["kernel"] == kernel]


def test_triton_prepares_the_first_launch_alone(launches: list[dict[str, Any]]) -> None:
    for kernel in ("grad_scan", "fused_pass"):
        assert [launch["by_triton"] for launch in of(launches, kernel)] == [True] + [False] * (STEPS - 1)


def test_later_launches_are_the_same(launches: list[dict[str, Any]]) -> None:
    """Function, grid, stream and arguments, of tensors the address; the loss is another tensor at every step."""
    for kernel, loss_at in (("grad_scan", None), ("prologue", LOSS_AT), ("fused_pass", None)):
        first, *later = of(launches, kernel)[: STEPS - 1]
        expected = [value for at, value in enumerate(first["arguments"]) if at != loss_at]
        for launch in later:
            assert [value for at, value in enumerate(launch["arguments"]) if at != loss_at] == expected
            assert all(launch[key] == first[key] for key in ("grid", "stream", "function"))
            assert first["tensors"] and not launch["tensors"], "Triton asks the driver about every tensor"


def test_a_step_with_a_loss_alone_repeats_the_prologue_with_that_loss() -> None:
    """Each loss is read where it is, whatever came before; another dtype is another kernel."""
    kinds = ["float32"] * 4 + ["float64"] * 3 + ["bfloat16", "float32", "float32", "bfloat16", "bfloat16"]
    # The first step copies its loss, and what comes after it may be read in place.
    found = of(in_a_process(*kinds), "prologue")[1:]
    assert [launch["arguments"][LOSS_AT] for launch in found] == [launch["loss"] for launch in found]
    functions: dict[str, set[int]] = {}
    for kind, launch in zip(kinds[1:], found, strict=True):
        functions.setdefault(kind, set()).add(launch["function"])
        others = [value for at, value in enumerate(launch["arguments"]) if at != LOSS_AT]
        assert others == [value for at, value in enumerate(found[0]["arguments"]) if at != LOSS_AT]
        assert launch["grid"] == found[0]["grid"] and launch["stream"] == found[0]["stream"]
    assert [len(some) for some in functions.values()] == [1, 1, 1] and len(set.union(*functions.values())) == 3
    assert [launch["by_triton"] for launch in found].count(True) == 2, "the first of each kind but float64"


def test_a_pointer_that_is_not_aligned_is_left_to_triton(launches: list[dict[str, Any]]) -> None:
    *before, last = of(launches, "prologue")
    assert last["by_triton"] and last["function"] not in {launch["function"] for launch in before}


def test_no_number_is_specialized_for(launches: list[dict[str, Any]]) -> None:
    """A kernel that was compiled for a count of 1, or of a multiple of 16, would be wrong for others."""
    by_triton = [launch for launch in launches if launch["by_triton"]]
    assert by_triton and not any(launch["specialized"] for launch in by_triton)


class Kernel:
    """Notes its launches, by itself and as compiled; the latter with all arguments in the order of the signature."""

    arg_names = ("x", "count", "WIDTH", "TYPE")

    def __init__(self, compiles: bool = True) -> None:
        self.compiles = compiles
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.calls.append(("triton", grid, arguments, constants))
            return Compiled(self.calls) if self.compiles else None

        return launch


class Compiled:
    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.calls.append(("compiled", grid, arguments))


def test_constants_keep_the_order_of_the_signature() -> None:
    kernel, launcher, x = Kernel(), Launcher(), torch.ones(2)
    again = [launcher.launch(kernel, 3, (x, count), num_warps=4, TYPE="t", WIDTH=7) for count in (1, 2)]
    options = {"num_warps": 4, **layout.COMPILER_OPTIONS}
    assert kernel.calls[0] == ("triton", (3,), (x, 1), {"TYPE": "t", "WIDTH": 7, **options})
    assert kernel.calls[1] == ("compiled", (3, 1, 1), (x.data_ptr(), 2, 7, "t"))
    assert again[0] is None and again[1] is not None
    again[1].again()
    assert kernel.calls[2:] == kernel.calls[1:2]
    elsewhere = torch.ones(8)
    assert again[1].again_with(0, elsewhere.data_ptr()) and not again[1].again_with(0, elsewhere[1:].data_ptr())
    assert kernel.calls[3:] == [("compiled", (3, 1, 1), (elsewhere.data_ptr(), 2, 7, "t"))]


def test_what_triton_compiles_anew_for_is_left_to_it() -> None:
    """Other constants, warps or dtypes, another kernel; and the interpreter's, which compiles nothing."""
    kernel, launcher, x = Kernel(), Launcher(), torch.ones(2)
    for warps, width, tensor in ((4, 7, x), (8, 7, x), (4, 8, x), (4, 7, x.double()), (4, 7, torch.ones(8)[1:])):
        launcher.launch(kernel, 3, (tensor, 1), num_warps=warps, WIDTH=width, TYPE="t")
    launcher.launch(other := Kernel(compiles=False), 3, (x, 1), num_warps=4, WIDTH=7, TYPE="t")
    launcher.launch(other, 3, (x, 1), num_warps=4, WIDTH=7, TYPE="t")
    assert {call[0] for call in (*kernel.calls, *other.calls)} == {"triton"}
    launcher.launch(kernel, 3, (x, 1), num_warps=4, WIDTH=7, TYPE="t")
    assert kernel.calls[-1][0] == "compiled"
