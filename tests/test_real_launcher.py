"""Triton's own launcher hands the same bytes to NVIDIA's driver, whichever way a kernel is launched.

test_launcher.py replaces Triton's launcher. Here it is the real one, and a stub stands in for the driver
(stub_driver.c), so that no GPU is needed: kernels are compiled for sm_90, and their launches noted.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench.codegen import Variant, variants
from fused_dals import DALS
from fused_dals.fused import FusedPass, Launch
from fused_dals.kernels.layout import COMPILER_OPTIONS
from fused_dals.launcher import Launcher
from tests.processes import ROOT, without_interpreter
from tests.test_launch_again import expected, plain

Note = dict[str, Any]

PROGRAMS = 3
STEPS = 5

#: What all tensors say that they are at; None: where they are. Empty ones are at 0.
ADDRESSES = {"their own": None, "null": 0, "high": 2**63 + 16, "highest": 2**64 - 16}

TYPES = {"*i32": torch.int32, "*i64": torch.int64, "*fp32": torch.float32, "*fp64": torch.float64}
#: What `struct` calls the types of numbers, and a number of each.
NUMBERS: dict[str, tuple[str, Any]] = {"i32": ("i", 1000), "fp32": ("f", 0.5)}


def packed(form: str, values: list[Any]) -> str:
    """As C lays out a struct of these, then two null pointers: Triton's scratch memory, of which no kernel has any."""
    return struct.pack(f"@{form}QQ", *values, 0, 0).hex()


class Driver:
    """Triton's driver over the stub; only what it would ask torch.cuda is answered here."""

    def __init__(self) -> None:
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver

        self.stub = ctypes.CDLL("libcuda.so.1")
        self.stub.take_notes.restype = ctypes.c_char_p
        self.stream = 0
        cuda = CudaDriver()
        cuda.get_current_device = lambda: 0
        cuda.get_current_stream = lambda device: self.stream
        cuda.get_device_capability = lambda device: (9, 0)
        driver.set_active(cuda)

    def notes(self) -> list[Note]:
        """Of the launches since the last call."""
        return [json.loads(line) for line in self.stub.take_notes().splitlines()]


class Launched:
    """A kernel that is launched in every way, with tensors and numbers of its signature."""

    def __init__(self, driver: Driver, variant: Variant) -> None:
        _, self.kernel, signature, constants, num_warps = variant
        self.driver, self.options = driver, {**constants, "num_warps": num_warps}
        self.form = "".join(NUMBERS[kind][0] if kind in NUMBERS else "Q" for kind in signature.values())
        self.arguments = tuple(
            torch.zeros(4, dtype=TYPES[kind]) if kind in TYPES else NUMBERS[kind][1] + at
            for at, kind in enumerate(signature.values())
        )

    def in_all_ways(self) -> list[Note]:
        """By Triton; by a launcher that has prepared nothing, and asks Triton; by addresses; by those once more."""
        launcher = Launcher()
        self.driver.stream = 1
        self.kernel[(PROGRAMS,)](*self.arguments, **self.options, **COMPILER_OPTIONS)
        self.driver.stream = 2
        launcher.launch(self.kernel, PROGRAMS, self.arguments, **self.options)
        self.driver.stream = 3
        again = launcher.launch(self.kernel, PROGRAMS, self.arguments, **self.options)
        assert again is not None
        self.driver.stream = 4
        again.again()
        return self.driver.notes()

    def at_all_addresses(self) -> dict[str, Any]:
        found = {}
        for label, address in ADDRESSES.items():
            elsewhere = patch.object(Tensor, "data_ptr", lambda tensor, address=address: address)
            with nullcontext() if address is None else elsewhere:
                meant = packed(self.form, list(map(plain, self.arguments)))
                found[label] = {"notes": self.in_all_ways(), "meant": meant}
        return found

    def with_one_tensor_elsewhere(self) -> list[str]:
        """What is handed over by address, with one tensor after the other replaced."""
        launcher, found = Launcher(), []
        launcher.launch(self.kernel, PROGRAMS, self.arguments, **self.options)
        self.driver.notes()
        for at, argument in enumerate(self.arguments):
            if isinstance(argument, Tensor):
                arguments = (*self.arguments[:at], argument.clone(), *self.arguments[at + 1 :])
                launcher.launch(self.kernel, PROGRAMS, arguments, **self.options)
                (note,) = self.driver.notes()
                found.append(note["parameters"])
        return found

    def heard_by_a_profiler(self) -> list[tuple[str, str]]:
        """What Triton's hooks are told of a repeated launch, if they are set after it was prepared."""
        from triton import knobs

        launcher, heard = Launcher(), []
        launcher.launch(self.kernel, PROGRAMS, self.arguments, **self.options)
        again = launcher.launch(self.kernel, PROGRAMS, self.arguments, **self.options)
        assert again is not None
        knobs.runtime.launch_enter_hook = lambda launch: heard.append(("enter", launch.get()["name"]))
        knobs.runtime.launch_exit_hook = lambda launch: heard.append(("exit", launch.get()["name"]))
        again.again()
        knobs.runtime.launch_enter_hook = knobs.runtime.launch_exit_hook = None
        self.driver.notes()
        return heard


def of_an_optimizer(driver: Driver) -> list[Note]:
    """Every launch of the pass in some steps, and what its parameters should be by the objects that hold them."""
    found: list[Note] = []
    real = FusedPass._launch_pass

    def launch_and_look(passing: FusedPass, launch: Launch, which: int) -> None:
        before = dict(launch.again)
        driver.notes()
        real(passing, launch, which)
        (note,) = driver.notes()
        *addresses, count = expected(passing, launch, which)[: note["count"] - 2]
        meant = packed("Q" * len(addresses) + "i", [*addresses, count])
        found.append({**note, "meant": meant, "repeated": bool(before) and launch.again == before})

    named = [(f"{i}.weight", torch.nn.Parameter(torch.randn(70, dtype=torch.bfloat16))) for i in range(3)]
    named.append(("last", torch.nn.Parameter(torch.randn(5))))
    optimizer = DALS(named, fused=True)
    with (
        patch("fused_dals.stepper.why_not_fused", lambda param, grad: ""),
        patch.object(FusedPass, "_launch_pass", launch_and_look),
    ):
        for _ in range(STEPS):
            for _, p in named:
                p.grad = torch.randn_like(p)
            optimizer.step(loss=1.0)
    return found


def everything() -> dict[str, Any]:
    driver = Driver()
    found: dict[str, Any] = {"optimizer": of_an_optimizer(driver)}
    one_of_each = {kernel.__name__: (label, kernel, *rest) for label, kernel, *rest in variants()}
    for name, variant in one_of_each.items():
        launched = Launched(driver, variant)
        found[name] = {"at addresses": launched.at_all_addresses(), "elsewhere": launched.with_one_tensor_elsewhere()}
        found[name]["heard"] = launched.heard_by_a_profiler()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """From a process of its own, because this one may interpret Triton, or know another driver."""
    import triton

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").exists():
        pytest.skip("Triton builds its launcher with a C compiler and Python's headers")
    folder = tmp_path_factory.mktemp("driver")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    stub = ["-I", headers, ROOT / "tests" / "stub_driver.c", "-o", folder / "libcuda.so.1"]
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *stub], check=True)
    environment = without_interpreter()
    environment["TRITON_LIBCUDA_PATH"] = str(folder)
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(folder), environment.get("LD_LIBRARY_PATH", "")])
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")  # what was linked with the stub is for nobody else
    program = "import json, sys; from tests.test_real_launcher import everything; json.dump(everything(), sys.stdout)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


kernels = pytest.mark.parametrize("kernel", ["fused_pass", "grad_scan", "prologue", "ratios_of_norms"])


@kernels
@pytest.mark.parametrize("at", ADDRESSES)
def test_every_way_hands_over_the_same(found: dict[str, Any], kernel: str, at: str) -> None:
    notes, meant = found[kernel]["at addresses"][at].values()
    assert [note["parameters"] for note in notes] == 4 * [meant]
    by_triton, *others = [{k: v for k, v in note.items() if k not in ("stream", "asked")} for note in notes]
    assert others == 3 * [by_triton]
    assert by_triton["kernel"] == kernel and by_triton["grid"] == [PROGRAMS, 1, 1] and by_triton["attributes"] == 0


@kernels
def test_each_launch_goes_to_the_stream_of_the_moment(found: dict[str, Any], kernel: str) -> None:
    assert [note["stream"] for note in found[kernel]["at addresses"]["their own"]["notes"]] == [1, 2, 3, 4]


@kernels
def test_the_driver_is_asked_about_tensors_and_not_about_addresses(found: dict[str, Any], kernel: str) -> None:
    asked = [note["asked"] for note in found[kernel]["at addresses"]["their own"]["notes"]]
    tensors = len(found[kernel]["elsewhere"])
    assert asked == [tensors, tensors, 0, 0]


@kernels
def test_a_tensor_elsewhere_is_seen_in_its_place(found: dict[str, Any], kernel: str) -> None:
    """Negative control: a wrong address changes the bytes of its own parameter, so that it would be noticed."""
    usual = found[kernel]["at addresses"]["their own"]["meant"]
    places: list[int] = []
    for parameters in found[kernel]["elsewhere"]:
        assert len(parameters) == len(usual)
        words = [at for at in range(0, len(usual), 16) if parameters[at : at + 16] != usual[at : at + 16]]
        assert len(words) == 1
        places += words
    assert places and sorted(set(places)) == places, "in the order of the arguments, and nowhere twice"


@kernels
def test_a_profiler_hears_of_a_repeated_launch(found: dict[str, Any], kernel: str) -> None:
    assert found[kernel]["heard"] == [["enter", kernel], ["exit", kernel]]


def test_a_step_hands_over_its_tables(found: dict[str, Any]) -> None:
    """Two buckets, each launched by Triton, then by addresses, then again as it was."""
    launches = found["optimizer"]
    assert len(launches) == 2 * STEPS
    assert all(launch["parameters"] == launch["meant"] for launch in launches)
    assert [launch["asked"] > 0 for launch in launches] == 2 * [True] + 2 * (STEPS - 1) * [False]
    assert [launch["repeated"] for launch in launches] == 4 * [False] + 2 * (STEPS - 2) * [True]
