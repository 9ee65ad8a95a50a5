"""The GPU command's checks of graphs, scaling, clipping, narrow storage and compiling, on CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
pytest.importorskip("tqdm")

if torch.cuda.is_available():
    pytest.skip("python -m bench gpu makes these checks on the device", allow_module_level=True)

from bench.compiled import CompileBudget, OutOfTime
from bench.gpu import features as gpu_features
from bench.gpu import graphs as gpu_graphs
from bench.gpu import small_training
from bench.gpu.compile_ahead import compilations_of
from bench.gpu.correctness import Check
from bench.gpu.features import FEATURES, features
from bench.gpu.graphs import check_graphs
from bench.gpu.scale import Scale
from bench.gpu.small_training import Training, Verdict, attempt, differing
from bench.shapes import SHAPES
from fused_dals import foreach, host, scan, stepper
from fused_dals.fingerprint import take_fingerprint
from fused_dals.fused import FusedPass
from fused_dals.gather import STATE_KEYS
from tests.gpu_stand_ins import TINY, CpuMachine
from tests.test_capture import capturing, norms_of_a_device

CPU = torch.device("cpu")
SEED = 5


class Recording(CpuMachine):
    """A recorder stands in for graphs. It runs what it records, so that the first replay is done already."""

    def __init__(self) -> None:
        super().__init__()
        self.uses = 1
        self.waits: list[str] = []

    def capture(self, warm_up: Callable[[], object], work: Callable[[], object]) -> Callable[[], object]:
        warm_up()
        with pytest.MonkeyPatch.context() as patch, capturing(patch) as recorder:
            work()
        done = False

        def replay() -> None:
            nonlocal done
            if done:
                recorder.replay()
            done = True

        return replay

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Notices numbers read by the host and what depends on values."""
        with NoReading():
            yield


class NoReading(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero"):
            raise RuntimeError(f"called a synchronizing operation: {name}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("INPUTS", 7), ("WIDTH", 13), ("OUTPUTS", 3), ("ROWS", 6)):
        monkeypatch.setattr(small_training, name, value)

    def two_tensors(generator: torch.Generator) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(7, 3))
        nn.init.normal_(model[0].weight, generator=generator)
        nn.init.normal_(model[0].bias, generator=generator)
        return model

    monkeypatch.setattr(small_training, "small_model", two_tensors)
    monkeypatch.setattr(gpu_graphs, "WARMUP_STEPS", 2)
    monkeypatch.setattr(gpu_features, "LIMITS", (1e-3, 1e6))
    monkeypatch.setattr(gpu_features, "CLIPPED_STEPS", 2)
    monkeypatch.setattr(gpu_features, "COMPENSATED_STEPS", 5)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """The CPU taken for a device, whose numbers nobody may wait for."""
    monkeypatch.setattr(host, "knows", lambda tensor: False)
    for module in (foreach, scan):
        monkeypatch.setattr(module, "norms", norms_of_a_device)
    monkeypatch.setattr(gpu_features, "SCAN_MODELS", ("tiny",))
    monkeypatch.setitem(SHAPES, "tiny", lambda: iter(TINY))
    return Recording()


def run(machine: CpuMachine, name: str) -> list[Check]:
    return list(features(machine, 2, CompileBudget(0.0, 0.0), SEED)[name]())


def bad(checks: list[Check]) -> list[Check]:
    return [check for check in checks if not check.passed]


COUNTS = {"self-check": 1, "scaling": 4, "clipping": 6, "narrow": 4, "missing": 1, "scan": 1, "compile": 1}


@pytest.mark.parametrize("name", COUNTS)
def test_the_checks_hold(machine: Recording, name: str) -> None:
    checks = run(machine, name)
    assert bad(checks) == [] and len(checks) == COUNTS[name]


def test_tables_that_are_written_anew_are_noticed(machine: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a plan is for one set of gradients alone."""
    monkeypatch.setattr(stepper, "take_fingerprint", lambda *args: take_fingerprint(*args[:3]))
    (check,) = run(machine, "missing")
    assert not check.passed and "tables were written 1 times" in check.detail


def test_names() -> None:
    assert tuple(features(CpuMachine(), 1, CompileBudget(0, 0), 0)) == FEATURES
    assert len(compilations_of(Scale(models=()))) == len(compilations_of(Scale(models=(), features=()))) + 6


def test_graphs(machine: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    some = ("plain", "max_grad_norm, skip_nonfinite")
    monkeypatch.setattr(gpu_graphs, "ARGUMENTS", {name: gpu_graphs.ARGUMENTS[name] for name in some})
    monkeypatch.setattr(gpu_graphs, "REPLAYS", 4)
    checks = list(check_graphs(machine, SEED))
    assert bad(checks) == [] and len(checks) == 10


# -- what is wrong is seen -------------------------------------------------------------------------------------------


def test_an_exception_is_a_check_that_fails() -> None:
    def breaks() -> Verdict:
        raise RuntimeError("no\n such thing")

    assert attempt("x", breaks) == Check("x", False, "RuntimeError: no such thing")
    assert attempt("x", lambda: Verdict(["a"], ["b"], {"c": 1.0})) == Check("x", False, "a; b", {"c": 1.0})


def test_twins_are_equal_and_one_bit_is_seen() -> None:
    a, b = (Training(CPU, SEED, foreach=True) for _ in range(2))
    for one in (a, b):
        one.steps(2)
    found = a.numbers()
    assert differing(found, b.numbers()) == [] and len(found) == 1 + 2 * 3
    next(iter(b.model.parameters())).data.view(torch.int32)[0, 0] += 1
    assert differing(found, b.numbers()) == ["0.weight"]
    assert differing(found, {}) == list(found)


def test_a_graph_that_does_not_follow_is_seen(machine: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose replays do nothing, and one that can be captured although it must not."""
    monkeypatch.setattr(gpu_graphs, "REPLAYS", 2)

    def does_nothing(self: Recording, warm_up: Callable[[], object], work: Callable[[], object]) -> Callable[[], None]:
        warm_up()
        return lambda: None

    monkeypatch.setattr(Recording, "capture", does_nothing)
    monkeypatch.setattr(gpu_graphs, "ARGUMENTS", {"plain": {}})
    monkeypatch.setattr(gpu_graphs, "PATHS", {"fused": {"fused": True}})
    checks = list(check_graphs(machine, SEED))
    assert len(checks) == 5 and bad(checks) == checks
    assert "replay 0: run state, 0.weight, " in checks[0].detail and "it was captured" in checks[-1].detail


def test_waiting_is_seen(machine: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FusedPass.begin

    def waits(self: FusedPass, inputs: Any, groups: Any, version: int) -> Any:
        inputs.values[0].item()
        return real(self, inputs, groups, version)

    monkeypatch.setattr(FusedPass, "begin", waits)
    by_hand = gpu_features._scaled_by_hand
    check = attempt("x", lambda: by_hand(machine, SEED, {"fused": True}))
    assert not check.passed and "synchronizing" in check.detail
    assert attempt("x", lambda: by_hand(machine, SEED, {"foreach": True})).passed


def test_other_rounding_is_seen(machine: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FusedPass.finish

    def shifted(self: FusedPass) -> Any:
        measured = real(self)
        for training in trainings:
            for entry in training.optimizer.state.values():
                for key in STATE_KEYS:
                    entry[key].view(torch.int16)[..., ::20] += 2
        return measured

    trainings: list[Training] = []
    monkeypatch.setattr(FusedPass, "finish", shifted)
    build = Training.__init__

    def remembered(self: Training, *args: Any, **arguments: Any) -> None:
        build(self, *args, **arguments)
        trainings.append(self)

    monkeypatch.setattr(Training, "__init__", remembered)
    check = attempt("x", lambda: gpu_features._rounded(machine, SEED, {"fused": True}))
    assert not check.passed and "too few" in check.detail and "up to 2 bfloat16 steps" in check.detail


def test_places_of_bfloat16() -> None:
    values = torch.tensor([-1.0, -(2.0**-133), -0.0, 0.0, 2.0**-133, 1.0], dtype=torch.bfloat16)
    places: Tensor = gpu_features._place(values)
    assert places.tolist() == [-0x3F80, -1, 0, 0, 1, 0x3F80]


def test_inductor_that_takes_too_long_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def by(backend: str, machine: Any, seed: int) -> Verdict:
        asked.append(backend)
        if backend == "inductor":
            raise OutOfTime
        return Verdict()

    monkeypatch.setattr(gpu_features, "_compiled_by", by)
    budget = CompileBudget(5.0, 5.0)
    assert gpu_features._compiled(budget, CpuMachine(), SEED) == Verdict() and asked == ["inductor", "eager"]
    assert budget.left_s < 5.0
