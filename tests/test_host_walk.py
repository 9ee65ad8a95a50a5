"""The compiled walk says what the walk in Python says, leaves the rest to it, and its absence costs time alone."""

from __future__ import annotations

import gc
import os
import pickle
import stat
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS, host_walk
from fused_dals.fingerprint import CompiledFingerprint, Fingerprint, take_fingerprint
from fused_dals.host_walk import HOST_WALK, Build, BuildError, HostWalk
from fused_dals.live_groups import LiveGroups

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

needs_walk = pytest.mark.skipif(HOST_WALK.compiled is None, reason=f"no compiled walk: {HOST_WALK.why_not}")


class Case:
    """Groups and state as an optimizer holds them."""

    def __init__(self) -> None:
        shapes = [(3, 4), (5,), (), (0,), (2, 3, 4)]
        params = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
        params.append(nn.Parameter(torch.randn(4, 6, device=DEVICE).t()))
        self.params = params
        for p in (*params[:3], params[5]):
            p.grad = torch.randn_like(p)
        self.groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:]}, {"params": []}]
        keys = ("grad_ema", "momentum_buffer")
        self.state: dict[Any, dict[str, Any]] = {p: {key: torch.zeros_like(p) for key in keys} for p in params}

    def addresses(self) -> list[int]:
        grads = [p.grad for group in self.groups for p in group["params"]]
        return [grad.data_ptr() for grad in grads if grad is not None]


def renew_grads(case: Case) -> None:
    for p in case.params:
        if p.grad is not None:
            p.grad = torch.randn_like(p)


def nothing(case: Case) -> None:
    pass


def write_values(case: Case) -> None:
    with torch.no_grad():
        case.params[0].add_(1)
    case.state[case.params[1]]["grad_ema"].fill_(3)


def same_list_elsewhere(case: Case) -> None:
    case.groups[0]["params"] = tuple(case.groups[0]["params"])


def replace_param(case: Case) -> None:
    case.groups[0]["params"][1] = nn.Parameter(torch.randn(5, device=DEVICE))


def swap_params(case: Case) -> None:
    case.groups[0]["params"].reverse()


def move_param(case: Case) -> None:
    case.groups[1]["params"].insert(0, case.groups[0]["params"].pop())


def drop_last_param(case: Case) -> None:
    case.groups[1]["params"].pop()


def data_elsewhere(case: Case) -> None:
    case.params[0].data = case.params[0].data.clone()


def data_of_other_dtype(case: Case) -> None:
    case.params[0].data = case.params[0].data.double()


def data_shrunk_in_place(case: Case) -> None:
    case.params[0].data = case.params[0].data.view(-1)[:6]


def data_of_other_strides(case: Case) -> None:
    case.params[1].data = case.params[1].data.as_strided((5,), (0,))


def grad_gone(case: Case) -> None:
    case.params[1].grad = None


def grad_come(case: Case) -> None:
    case.params[4].grad = torch.ones_like(case.params[4])


def grad_transposed(case: Case) -> None:
    case.params[0].grad = torch.randn(4, 3, device=DEVICE).t()


def grad_misaligned(case: Case) -> None:
    case.params[1].grad = torch.randn(6, device=DEVICE)[1:]


def grad_of_other_dtype(case: Case) -> None:
    case.params[0] = case.groups[0]["params"][0]
    case.params[0].grad = None
    grad = torch.randn_like(case.params[0])
    grad.data = grad.data.half()
    case.params[0].grad = torch.zeros_like(case.params[0])
    case.params[0].grad.data = grad


def state_replaced(case: Case) -> None:
    case.state[case.params[0]]["grad_ema"] = torch.zeros(3, 4, device=DEVICE)


def state_swapped(case: Case) -> None:
    entry = case.state[case.params[0]]
    entry["grad_ema"], entry["momentum_buffer"] = entry["momentum_buffer"], entry["grad_ema"]


def state_elsewhere(case: Case) -> None:
    value = case.state[case.params[0]]["grad_ema"]
    value.data = value.data.clone()


def state_forgotten(case: Case) -> None:
    del case.state[case.params[-1]]


def state_grown(case: Case) -> None:
    case.state[case.params[-1]]["extra"] = torch.zeros(1, device=DEVICE)


def state_foreign(case: Case) -> None:
    case.state[case.params[0]]["grad_ema"] = "mine"


def group_come(case: Case) -> None:
    case.groups.append({"params": []})


def group_gone(case: Case) -> None:
    case.groups.pop()


def grad_sparse(case: Case) -> None:
    case.params[0].grad = torch.randn(3, 4, device=DEVICE).to_sparse()


UNCHANGED = [nothing, renew_grads, write_values, same_list_elsewhere]
CHANGED = [
    replace_param, swap_params, move_param, drop_last_param, data_elsewhere, data_of_other_dtype, data_shrunk_in_place,
    data_of_other_strides, grad_gone, grad_come, grad_transposed, grad_misaligned, grad_of_other_dtype, state_replaced,
    state_swapped, state_elsewhere, state_forgotten, state_grown, state_foreign, group_come, group_gone, grad_sparse,
]  # fmt: skip


def print_of(case: Case, kind: str) -> Fingerprint | CompiledFingerprint:
    if kind == "walk in Python":
        return Fingerprint(case.groups, case.state, distributed=False)
    return CompiledFingerprint(HOST_WALK.compiled, case.groups, case.state)


@pytest.mark.parametrize("change", UNCHANGED)
def test_what_a_plan_survives(change: Callable[[Case], None], either_walk: str, seed: int) -> None:
    case = Case()
    known = print_of(case, either_walk)
    change(case)
    found = known.follow(case.groups, case.state)
    assert found is not None and found.dtype == torch.int64 and found.tolist() == case.addresses()


@pytest.mark.parametrize("change", CHANGED)
def test_what_a_plan_does_not_survive(change: Callable[[Case], None], either_walk: str, seed: int) -> None:
    case = Case()
    known = print_of(case, either_walk)
    change(case)
    assert known.follow(case.groups, case.state) is None


class Subclass(Tensor):
    """A tensor that may do anything."""


def subclass_param(case: Case) -> None:
    case.groups[0]["params"][0] = torch.randn(3, device=DEVICE).as_subclass(Subclass)


@needs_walk
@pytest.mark.parametrize("change", [subclass_param, state_foreign, grad_sparse])
def test_what_the_compiled_walk_leaves_to_python(change: Callable[[Case], None], seed: int) -> None:
    case = Case()
    assert isinstance(take_fingerprint(case.groups, case.state, distributed=False), CompiledFingerprint)
    change(case)
    taken = take_fingerprint(case.groups, case.state, distributed=False)
    assert not isinstance(taken, CompiledFingerprint)
    assert (taken is None) == (change is not subclass_param)


@needs_walk
def test_groups_and_state_that_are_something_else_do_not_match(seed: int) -> None:
    case, walk = Case(), HOST_WALK.compiled
    addresses = torch.empty(4, dtype=torch.int64)
    numbers = walk.record(case.groups, case.state, addresses)
    assert walk.matches(numbers, case.groups, case.state, addresses)
    groups: Any
    state: Any
    for groups in (tuple(case.groups), [1, 2, 3], [{}, {}, {}], [{"params": 3}] * 3, [{"params": [1, 2]}] * 3, None):
        assert not walk.matches(numbers, groups, case.state, addresses)
        assert walk.record(groups, case.state, addresses) is None
    for state in ([], {"a": 1}, {"a": {"b": None}}, None):
        assert not walk.matches(numbers, case.groups, state, addresses)
        assert walk.record(case.groups, state, addresses) is None
    for shorter in (numbers[:-8], numbers[:-1], b""):
        assert not walk.matches(shorter, case.groups, case.state, addresses)
    for room in (0, 3, 5):
        assert not walk.matches(numbers, case.groups, case.state, torch.empty(room, dtype=torch.int64))


@needs_walk
def test_misuse_is_an_error(seed: int) -> None:
    case, walk = Case(), HOST_WALK.compiled
    addresses = torch.empty(4, dtype=torch.int64)
    with pytest.raises(TypeError, match="expected 3 arguments, got 1"):
        walk.record(case.groups)
    for wrong in (torch.empty(4), torch.empty(8, dtype=torch.int64)[::2], [1, 2, 3, 4], None):
        with pytest.raises(RuntimeError, match="addresses must be"):
            walk.record(case.groups, case.state, wrong)
    with pytest.raises(RuntimeError, match="bytes that record returned"):
        walk.matches("numbers", case.groups, case.state, addresses)
    with pytest.raises(RuntimeError, match="three lists"):
        walk.same_groups(case.groups, (), [], bytearray())
    with pytest.raises(RuntimeError, match="8 bytes a group"):
        walk.same_groups([{}], [()], [None], bytearray(7))
    for wrong_list in ([1], (case.params[0],), None):
        with pytest.raises(RuntimeError, match="list of tensors"):
            walk.increment_version(wrong_list)


@needs_walk
def test_nothing_is_kept_alive_and_no_count_moves(seed: int) -> None:
    case, walk = Case(), HOST_WALK.compiled
    known = print_of(case, "compiled walk")
    objects = [*case.params, *(value for entry in case.state.values() for value in entry.values()), case.groups[0]]
    counts = list(map(sys.getrefcount, objects))
    groups, values, names = case.groups, [tuple(group.values()) for group in case.groups], [None] * 3
    before = list(map(sys.getrefcount, values))
    for _ in range(100):
        assert known.follow(case.groups, case.state) is not None
        assert walk.same_groups(groups, values, names, bytearray(24))
        walk.increment_version(case.params)
    assert list(map(sys.getrefcount, objects)) == counts and list(map(sys.getrefcount, values)) == before
    grad = weakref.ref(case.params[0].grad)
    case.params[0].grad = None
    assert grad() is None


@needs_walk
def test_an_optimizer_in_a_cycle_is_collected(seed: int) -> None:
    def train() -> weakref.ref[Tensor]:
        p: Any = nn.Parameter(torch.ones(3, device=DEVICE))
        p.grad = torch.ones_like(p)
        p.optimizer = DALS([("p", p)], fused=True)
        for _ in range(3):
            p.optimizer.step(loss=1.0)
        assert isinstance(p.optimizer._runtime.steady.fingerprint, CompiledFingerprint)
        return weakref.ref(p)

    gone = train()
    gc.collect()
    assert gone() is None


@needs_walk
def test_versions_go_up_as_by_torch(seed: int) -> None:
    p = torch.ones(3)
    with torch.inference_mode():
        without_version = torch.ones(3)
    host_walk.increment_version([p, without_version, p])
    assert p._version == 2


@needs_walk
def test_a_lazy_clone_gets_memory_of_its_own_before_a_kernel_writes(seed: int) -> None:
    p = torch.ones(64, device=DEVICE)
    clone = nn.Parameter(torch._lazy_clone(p))
    CompiledFingerprint(HOST_WALK.compiled, [{"params": [clone]}], {})
    assert clone.data_ptr() != p.data_ptr()


def test_groups_are_checked_once_and_what_changes_is_noticed(either_walk: str, seed: int) -> None:
    params = [(f"p{i}", nn.Parameter(torch.ones(2))) for i in range(3)]
    optimizer = DALS([{"params": params[:2]}, {"params": params[2:], "lr": torch.tensor(0.1)}], depth=0.5)
    groups, live = optimizer.param_groups, LiveGroups()

    def moved() -> tuple[int, int, int]:
        before = live.plans, live.tables, live.lrs
        live.check(groups)
        return live.plans - before[0], live.tables - before[1], live.lrs - before[2]

    live.check(groups)
    assert moved() == moved() == (0, 0, 0)
    groups[0]["lr"] = 0.02
    assert moved() == (0, 0, 1) and moved() == (0, 0, 0)
    groups[1]["lr"].fill_(0.3)
    assert moved() == (0, 0, 1) and moved() == (0, 0, 0)
    groups[0]["momentum"] = 0.5
    assert moved() == (0, 1, 0) and moved() == (0, 0, 0)
    groups[0]["depth"] = 0.7
    assert moved() == (1, 1, 0)
    groups[0]["mine"] = object()
    assert moved() == moved() == (0, 0, 0)
    groups[0]["param_names"][0] = "q0"
    assert moved() == (1, 1, 0) and moved() == (0, 0, 0)
    groups[0]["param_names"] = ["".join(["q", "0"]), "p1"]  # equal names, other objects
    assert moved() == moved() == (0, 0, 0)
    groups[0]["trust_clip"] = [0.1, 5.0]  # may change in place: looked at in every step
    assert moved() == (0, 1, 0)
    groups[0]["trust_clip"][0] = 7.0
    with pytest.raises(ValueError, match="group 0: trust_clip"):
        live.check(groups)
    groups[0]["trust_clip"] = (0.2, 5.0)
    assert moved()[1] == 1
    for wrong in (-1.0, float("nan"), "0.1"):
        groups[0]["lr"] = wrong
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match="group 0: lr must be"):
                live.check(groups)
    groups[0]["lr"] = 0.1
    del groups[1]["momentum"]
    with pytest.raises(ValueError, match="group 1: momentum is missing"):
        live.check(groups)


def test_an_optimizer_is_copied_and_pickled_while_the_walk_is_in_use(either_walk: str, seed: int) -> None:
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    p.grad = torch.ones_like(p)
    optimizer = DALS([("p", p)], fused=True)
    for _ in range(3):
        optimizer.step(loss=1.0)
    copied = pickle.loads(pickle.dumps(optimizer))
    (q,) = copied.param_groups[0]["params"]
    q.grad = torch.ones_like(q)
    copied.step(loss=1.0)
    optimizer.step(loss=1.0)
    assert torch.equal(p, q)


# -- getting it ------------------------------------------------------------------------------------------------------


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
    module = Path(HOST_WALK.compiled.__file__)
    go = tmp_path / "go"
    waits = f"while [ ! -e {go} ]; do sleep 0.01; done"
    fresh.setenv("CXX", compiler(tmp_path, waits, 'while [ "$1" != "-o" ]; do shift; done', f'cp {module} "$2"'))
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
    assert "is there" in done.stdout
    off = {**os.environ, host_walk.OFF: "0"}
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=off)
    assert refused.returncode == 1 and host_walk.OFF in refused.stderr
