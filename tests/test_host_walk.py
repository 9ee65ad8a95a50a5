"""The compiled walk is there or not, whatever the machine lacks; its absence costs time alone."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS, host_walk
from fused_dals.buckets import grad_address
from fused_dals.fingerprint import CompiledFingerprint, Fingerprint
from fused_dals.host_walk import HOST_WALK, Build, BuildError, HostWalk
from fused_dals.live_groups import CHANGED
from tests.helpers import needs_walk
from tests.processes import ROOT, is_running

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@needs_walk
def test_misuse_is_an_error(seed: int) -> None:
    walk = HOST_WALK.compiled
    groups, addresses = [{"params": [nn.Parameter(torch.ones(3))]}], torch.empty(0, dtype=torch.int64)
    with pytest.raises(TypeError, match="expected 5 arguments, got 1"):
        walk.record(groups)
    for wrong in (torch.empty(4), torch.empty(8, dtype=torch.int64)[::2], [1, 2], None):
        with pytest.raises(RuntimeError, match="addresses must be"):
            walk.record(groups, {}, wrong, False, None)
    with pytest.raises(RuntimeError, match="what record returned"):
        walk.matches("numbers", groups, {}, addresses)
    with pytest.raises(RuntimeError, match=r"^known must be a list$"):
        walk.same_groups(groups, (), bytearray())
    with pytest.raises(RuntimeError, match="8 bytes a group"):
        walk.same_groups([{}], [((), (), None)], bytearray(7))
    wrong_entry: Any
    for wrong_entry in (1, (), ((), ()), ([], [], None)):
        with pytest.raises(RuntimeError, match=r"known must hold|must be tuples"):
            walk.same_groups([{}], [wrong_entry], bytearray(8))
    assert walk.same_groups((), [((), (), None)], bytearray(8)) == CHANGED
    for wrong in (None, torch.empty(1), torch.empty(4, dtype=torch.float64)[::2], [1]):
        with pytest.raises(RuntimeError, match="numbers must be"):
            walk.read_plain_lrs([{"lr": 0.1}], wrong)
    for wrong_list in ([1], (groups[0]["params"][0],), None):
        with pytest.raises(RuntimeError, match="list of tensors"):
            walk.increment_version(wrong_list)


@needs_walk
def test_versions_go_up_as_by_torch(seed: int) -> None:
    p = torch.ones(3)
    with torch.inference_mode():
        without_version = torch.ones(3)
    host_walk.increment_version([p, without_version, p])
    assert p._version == 2


WITH_MANY_TENSORS = """if True:
    import os, sys, torch
    from fused_dals.fingerprint import CompiledFingerprint
    from fused_dals.host_walk import HOST_WALK
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3000)]
    for p in params:
        p.grad = torch.ones_like(p)
    groups, state = [{"params": params}], {p: {"momentum_buffer": torch.ones(2)} for p in params}

    def steps():
        known = CompiledFingerprint(HOST_WALK.want(wait=True), groups, state, distributed=False)
        for step in range(50):
            assert known.follow(groups, state).tolist() == [p.grad.data_ptr() for p in params]
            HOST_WALK.compiled.increment_version(params)
        params[step * 59].grad = None
        assert known.follow(groups, state) is None
        assert {p._version for p in params} == {step + 1}
        return True
"""


def run_with_many_tensors(program: str) -> list[str]:
    """What a process prints that has more tensors than one thread looks at."""
    done = subprocess.run([sys.executable, "-c", WITH_MANY_TENSORS + program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_walk
def test_many_tensors_on_one_core() -> None:
    """Where nobody helps."""
    program = """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    before = len(os.listdir("/proc/self/task"))
    steps()
    print(len(os.listdir("/proc/self/task")) - before)
    """
    assert run_with_many_tensors(program) == ["0"]


@needs_walk
def test_helpers_are_left_behind_in_a_forked_process() -> None:
    """It gets others."""
    program = """
    before = len(os.listdir("/proc/self/task"))
    steps()
    helpers = len(os.listdir("/proc/self/task")) - before
    params[-50].grad = None
    child = os.fork()
    if child == 0:
        known = CompiledFingerprint(HOST_WALK.compiled, groups, state, distributed=False)
        same = known.follow(groups, state) is not None
        os._exit(10 * same + len(os.listdir("/proc/self/task")))
    print(helpers, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    helpers, of_child = map(int, run_with_many_tensors(program))
    assert helpers == min(3, len(os.sched_getaffinity(0)) - 1) and of_child == 10 + 1 + helpers


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """An empty cache, and no compiler but what the test names."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(host_walk.OFF, raising=False)
    yield monkeypatch


def compiler(folder: Path, *lines: str) -> str:
    """A program in the compiler's place."""
    path = folder / "compiler"
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def copying_compiler(folder: Path, *before: str) -> str:
    """One that has the result already."""
    found = 'while [ "$1" != "-o" ]; do shift; done'
    return compiler(folder, *before, found, f'cp {HOST_WALK.compiled.__file__} "$2"')


def test_without_a_compiler_the_reason_is_kept(fresh: pytest.MonkeyPatch) -> None:
    fresh.delenv("CXX", raising=False)
    fresh.setattr("shutil.which", lambda name: None)
    walk = HostWalk()
    assert walk.want() is None and "there is no C++ compiler" in walk.why_not
    fresh.undo()
    assert walk.want(wait=True) is None and not walk.came(), "it was asked once"


def test_a_compiler_that_fails_is_quoted(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CXX", compiler(tmp_path, "echo 'Python.h: fatal error: no such file' >&2", "exit 3"))
    walk = HostWalk()
    assert walk.want(wait=True) is None
    assert "status 3: Python.h: fatal error: no such file" in walk.why_not
    fresh.setenv("CXX", str(tmp_path / "nowhere"))
    with pytest.raises(BuildError, match="does not start"):
        Build()


def test_a_result_that_is_no_module_is_no_walk(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writes = 'while [ "$1" != "-o" ]; do shift; done; echo nonsense > "$2"'
    fresh.setenv("CXX", compiler(tmp_path, writes))
    walk = HostWalk()
    assert walk.want(wait=True) is None and "cannot be loaded" in walk.why_not


def test_a_compiler_may_have_arguments(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = tmp_path / "temporary"
    folders.mkdir()
    fresh.setattr("tempfile.tempdir", str(folders))
    fresh.setenv("CXX", "g++ '")
    assert HostWalk().want(wait=True) is None and list(folders.iterdir()) == []
    fresh.setenv("CXX", compiler(tmp_path, 'echo "error: called with $1" >&2', "exit 1") + " g++")
    walk = HostWalk()
    assert walk.want(wait=True) is None and "called with g++" in walk.why_not


def test_nothing_that_fails_is_raised(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A step asks when its work is done."""
    fresh.setenv("CXX", "c++")
    for name, value in (("SOURCE", tmp_path / "nowhere.cpp"), ("FLAGS", (3,))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host_walk, name, value)
            walk = HostWalk()
            assert walk.want(wait=True) is None and walk.why_not
    fresh.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    walk = HostWalk()
    assert walk.want(wait=True) is None and "nowhere" in walk.why_not


@needs_walk
def test_a_file_in_the_cache_that_does_not_load_is_built_anew(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = Path(HOST_WALK.compiled.__file__).name
    cached = Path(host_walk._cache().put(b"cut off", name, binary=True))
    fresh.setenv("CXX", copying_compiler(tmp_path))
    assert HostWalk().want(wait=True) is not None and cached.stat().st_size > 7
    fresh.setenv("CXX", "nothing")
    assert HostWalk().want(wait=True) is not None, "it is in the cache now"


@needs_walk
def test_threads_may_step_while_it_is_built(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CXX", copying_compiler(tmp_path, "sleep 0.2"))
    walk, errors = HostWalk(), []

    def step() -> None:
        try:
            while not walk.came() and not walk.why_not:
                walk.want()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=step) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == [] and walk.compiled is not None, walk.why_not


@needs_walk
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_copy_leaves_the_build_alone(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = """if True:
        import os, sys, time
        from fused_dals.host_walk import HOST_WALK
        HOST_WALK.want()
        child = os.fork()
        if child == 0:
            HOST_WALK.came()
            sys.exit(0)  # by way of all that is to be done at the end of a process
        os.waitpid(child, 0)
        print(HOST_WALK.want(wait=True) is not None, HOST_WALK.why_not)
    """
    fresh.setenv("CXX", copying_compiler(tmp_path, "sleep 1"))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"], done.stdout + done.stderr


def test_a_process_that_ends_takes_the_compiler_with_it(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = tmp_path / "temporary"
    folders.mkdir()
    fresh.setenv("TMPDIR", str(folders))
    new, pid = tmp_path / "new", tmp_path / "pid"
    fresh.setenv("CXX", compiler(tmp_path, f"sleep 60 & echo $! > {new}", f"mv {new} {pid}", "wait"))
    program = f"""if True:
        import pathlib, time
        from fused_dals.host_walk import HOST_WALK
        HOST_WALK.want()
        while not pathlib.Path({str(pid)!r}).exists() and not HOST_WALK.why_not:
            time.sleep(0.01)
    """
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
    part = int(pid.read_text())  # of the compiler, as g++ has them
    deadline = time.monotonic() + 30
    while is_running(part):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.05)
    assert list(folders.iterdir()) == []


def test_it_can_be_left_out(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(host_walk.OFF, "0")
    walk = HostWalk()
    assert walk.want(wait=True) is None and host_walk.OFF in walk.why_not


def test_a_cache_that_cannot_be_written(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fresh.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    walk = HostWalk()
    assert walk.want(wait=True) is None and "cache" in walk.why_not


@needs_walk
def test_steps_go_on_while_it_is_built_and_use_it_afterwards(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU nobody waits for the compiler; the numbers are the same before and after."""
    go = tmp_path / "go"
    fresh.setenv("CXX", copying_compiler(tmp_path, f"while [ ! -e {go} ]; do sleep 0.01; done"))
    params = []
    for background in (False, True):
        walk = HostWalk()
        for name in ("fused_dals.fingerprint", "fused_dals.stepper", "fused_dals.live_groups", "fused_dals.host_walk"):
            fresh.setattr(f"{name}.HOST_WALK", walk)
        p = nn.Parameter(torch.linspace(-1, 1, 50, device=DEVICE))
        optimizer = DALS([("p", p)], depth=0.5, fused=True)
        for step in range(6):
            if background and step == 1:
                assert walk.want() is None and not walk.why_not
            if background and step == 3:
                go.touch()
                assert walk._build is not None and walk._build._process is not None
                walk._build._process.wait()
            p.grad = torch.full_like(p, 0.1 * step)
            optimizer.step(loss=1.0)
            steady = optimizer._runtime.steady
            assert steady is not None
            assert isinstance(steady.fingerprint, CompiledFingerprint if background and step >= 3 else Fingerprint)
        assert optimizer._runtime.fused[DEVICE].preparations == 1
        params.append(p.detach())
    assert torch.equal(*params)


@needs_walk
def test_the_command_builds_it_or_says_why_not() -> None:
    command = [sys.executable, "-m", "fused_dals"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "a piece of C++" in done.stdout and "It is built" in done.stdout
    off = {**os.environ, host_walk.OFF: "0"}
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=off)
    assert refused.returncode == 1 and host_walk.OFF in refused.stderr and "same results" in refused.stderr
    without_triton = (
        "import sys, runpy; sys.modules['triton'] = None; runpy.run_module('fused_dals', run_name='__main__')"
    )
    refused = subprocess.run([sys.executable, "-c", without_triton], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "same results" in refused.stderr
    assert "It could not be built here: Triton is not installed" in refused.stderr


@needs_walk
def test_both_walks_say_where_planned_gradients_are(seed: int) -> None:
    """Of thousands, which threads share: the same addresses, 0 for who has none, or that something else changed."""
    draw = random.Random(seed)
    params = [nn.Parameter(torch.randn(draw.choice([(3,), (2, 5), (), (1, 4)]), device=DEVICE)) for _ in range(1300)]
    params[7].data = torch.randn(3, 2, device=DEVICE).T
    empty = params[5]
    empty.data = torch.empty(0, 4, device=DEVICE)
    groups = [{"params": params[:600]}, {"params": params[600:]}]
    state: dict[Tensor, dict[str, Tensor]] = {p: {"h": torch.zeros_like(p)} for p in params}

    def set_grads(share: float) -> None:
        for p in params:
            p.grad = torch.randn_like(p) if draw.random() < share else None
        empty.grad = torch.empty_like(empty)

    set_grads(0.5)
    unplanned = params[draw.randrange(8, len(params))]
    unplanned.grad = None
    awaiting = [p for p in params if p.grad is None and p is not unplanned]
    awaited = [(p, torch.empty_strided(p.shape, p.stride(), device="meta")) for p in awaiting]
    compiled = CompiledFingerprint(HOST_WALK.want(wait=True), groups, state, False, awaited)
    in_python = Fingerprint(groups, state, False, awaited)
    for share in (0.0, 0.3, 0.9, 1.0):
        set_grads(share)
        unplanned.grad = None
        found = [known.follow(groups, state) for known in (compiled, in_python)]
        expected = [0 if p.grad is None else grad_address(p.grad) for p in params if p is not unplanned]
        assert all(addresses is not None and addresses.tolist() == expected for addresses in found)

    def wrong_dtype() -> None:
        params[7].grad_dtype = None
        params[7].grad = torch.randn_like(params[7], dtype=torch.bfloat16)

    def wrong_strides() -> None:
        params[7].grad = torch.randn(2, 3, device=DEVICE)

    def wrong_alignment() -> None:
        params[7].grad = torch.randn(7, device=DEVICE)[1:].as_strided((2, 3), (1, 2))

    def not_planned() -> None:
        unplanned.grad = torch.randn_like(unplanned)

    def no_elements() -> None:
        empty.grad = None

    for change in (wrong_dtype, wrong_strides, wrong_alignment, not_planned, no_elements):
        set_grads(0.5)
        unplanned.grad = None
        change()
        assert [known.follow(groups, state) for known in (compiled, in_python)] == [None, None], change.__name__
        params[7].grad = None
    unplanned.grad = None
    strict = CompiledFingerprint(HOST_WALK.compiled, groups, state, False), Fingerprint(groups, state, False)
    assert all(known.follow(groups, state) is not None for known in strict)
    next(p for p in params if p.grad is not None).grad = None
    assert [known.follow(groups, state) for known in strict] == [None, None], "where none may miss"
