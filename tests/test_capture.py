"""Captured steps, without a GPU.

A recorder stands in for the graph: it keeps every operation and kernel launch of a step and runs them again on the same
memory, with no Python of ours in between, as a replay does.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_dals import DALS, capture, foreach, fused, group_table, host, loss_signal, scan, stepper
from tests.helpers import ConvNet, batch, identical, snapshot

pytest.importorskip("triton")

if torch.cuda.is_available():
    pytest.skip("python -m bench gpu captures real graphs", allow_module_level=True)

F32 = torch.float32

#: What makes a number known to the host, or a table out of host data: a graph can hold neither.
FORBIDDEN = {"_local_scalar_dense", "lift_fresh", "is_nonzero", "nonzero", "_pin_memory"}


class Recorder(TorchDispatchMode):
    """Keeps what runs under it, and runs it again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        read_by_host = name == "_local_scalar_dense" and host.knows(args[0])
        assert name not in FORBIDDEN or read_by_host, f"{name} cannot be captured"
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        memory = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}

        def again() -> None:
            fresh = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(fresh), strict=True):
                # What an operation made is where the next one finds it; views and in-place results are there already.
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in memory:
                    old.copy_(new)

        self.calls.append(again)
        return out

    def kernel(self, real: Any) -> Any:
        """A kernel whose launches are kept."""
        recorder = self

        class Kernel:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                def launch(*args: Any, **kwargs: Any) -> None:
                    with torch.utils._python_dispatch._disable_current_modes():
                        real[grid](*args, **kwargs)

                    def again() -> None:
                        real[grid](*args, **kwargs)

                    recorder.calls.append(again)
                    recorder.launches += 1

                return launch

        return Kernel()

    @torch.no_grad()
    def replay(self) -> None:
        for call in self.calls:
            call()


@contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Record what runs inside, with our code believing that the stream is being captured."""
    from fused_dals.kernels import fused_pass, grad_scan, prologue

    recorder = Recorder()
    with monkeypatch.context() as patch:
        for module in (capture, fused, group_table, loss_signal, stepper):
            patch.setattr(module, "is_capturing", lambda device: True)
        for module, name in ((fused_pass, "fused_pass"), (grad_scan, "grad_scan"), (prologue, "prologue")):
            patch.setattr(module, name, recorder.kernel(getattr(module, name)))
        with recorder:
            yield recorder


@pytest.fixture(params=["fused", "foreach as on a device"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    if request.param == "fused":
        return {"fused": True, "capturable": True}
    for module in (foreach, scan):
        monkeypatch.setattr(module, "norms", norms_of_a_device)
    return {"foreach": True, "capturable": True}


class Training:
    """A model with static inputs; a whole step of it."""

    def __init__(self, path: dict[str, Any], **arguments: Any) -> None:
        self.model = ConvNet()
        self.x, self.y = (t.clone() for t in batch(F32))
        self.lr = torch.tensor(0.1)
        self.optimizer = DALS(self.model, lr=arguments.pop("lr", self.lr), **arguments, **path)

    def copy(self, path: dict[str, Any], **arguments: Any) -> Training:
        """The same weights and data, eager."""
        other = Training(path, **arguments)
        other.model.load_state_dict(copy.deepcopy(self.model.state_dict()))
        other.x, other.y = self.x, self.y
        return other

    def step(self) -> None:
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step(loss=loss)


@pytest.fixture(autouse=True)
def the_cpu_is_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody may read what is on it, and a learning rate there is where replays read it."""
    monkeypatch.setattr(host, "knows", lambda tensor: False)


def norms_of_a_device(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """What fused_dals.foreach.norms does off the CPU."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))


def same(a: Training, b: Training) -> bool:
    states = [t.optimizer._runtime.state.values for t in (a, b)]
    return identical(snapshot(a.model, a.optimizer), snapshot(b.model, b.optimizer)) and torch.equal(*states)


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"total_steps": 12},
    {"restart_steps": 4, "restart_mult": 1.5},
    {"max_grad_norm": 0.5, "skip_nonfinite": True},
    {"state_dtype": torch.bfloat16},
    {"ema_decay": (1.0, 0.6, 0.7), "total_steps": 9},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: "-".join(a) or "plain")
def test_replays_are_eager_steps_while_a_scheduler_moves_lr(
    path: dict[str, Any], arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    captured = Training(path, **arguments)
    eager = captured.copy(path, **arguments)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one.optimizer, gamma=0.8) for one in (captured, eager)]
    for one in (captured, eager):
        one.step()
        one.step()
    assert same(captured, eager)
    captured.optimizer.zero_grad()
    with capturing(monkeypatch) as graph:
        captured.step()
    eager.step()
    assert same(captured, eager), "the recorder runs what it records; a graph would not"
    for _ in range(5):
        for scheduler in schedulers:
            scheduler.step()
        captured.x.copy_(torch.randn_like(captured.x))
        graph.replay()
        eager.step()
        assert same(captured, eager)
    assert captured.optimizer.state_dict()["param_groups"][0]["step"] == 8
    assert captured.optimizer.phases() == eager.optimizer.phases()


def test_eager_steps_and_replays_take_turns(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Both have tables of gradients' addresses of their own."""
    path = {"fused": True, "capturable": True}
    captured = Training(path)
    eager = captured.copy(path)
    for one in (captured, eager):
        one.step()
        one.step()
    captured.optimizer.zero_grad()
    with capturing(monkeypatch) as graph:
        captured.step()
    static = [p.grad for p in captured.model.parameters()]
    eager.step()
    own = [torch.empty_like(p) for p in captured.model.parameters()]
    for turn in range(4):
        if turn % 2:
            for p, grad in zip(captured.model.parameters(), own, strict=True):
                p.grad = grad.zero_()
            loss = nn.functional.cross_entropy(captured.model(captured.x), captured.y)
            loss.backward()
            captured.optimizer.step(loss=loss)
        else:
            for p, kept in zip(captured.model.parameters(), static, strict=True):
                p.grad = kept
            graph.replay()
        eager.step()
        assert same(captured, eager)


def test_two_graphs_of_one_optimizer(path: dict[str, Any], monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A whole step and, along the gradients it left, the optimizer's step alone, replayed in turn."""
    captured = Training(path)
    eager = captured.copy(path)
    for one in (captured, eager):
        one.step()
    captured.optimizer.zero_grad()
    with capturing(monkeypatch) as whole:
        captured.step()
    loss = torch.tensor(0.5)
    captured.optimizer.step(loss=loss)
    with capturing(monkeypatch) as alone:
        captured.optimizer.step(loss=loss)
    eager.step()
    for _ in range(2):
        eager.optimizer.step(loss=loss)
    for _ in range(2):
        whole.replay()
        alone.replay()
        eager.step()
        eager.optimizer.step(loss=loss)
        assert same(captured, eager)


def test_numbers_reach_a_graph_by_refreshing(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A learning rate that is a number, momentum and decay: seen after refresh_hyperparameters(), and not before."""
    path = {"fused": True, "capturable": True}
    captured = Training(path, lr=0.1)
    eager = captured.copy(path, lr=0.1)
    for one in (captured, eager):
        one.step()
    captured.optimizer.zero_grad()
    with capturing(monkeypatch) as graph:
        captured.step()
    eager.step()
    for one in (captured, eager):
        one.optimizer.param_groups[0].update(lr=0.01, momentum=0.5, weight_decay=0.1)
    captured.optimizer.refresh_hyperparameters()
    graph.replay()
    eager.step()
    assert same(captured, eager)
    captured.optimizer.param_groups[0]["lr"] = eager.optimizer.param_groups[0]["lr"] = 0.3
    graph.replay()
    eager.step()
    assert not same(captured, eager), "a replay runs no Python"


def test_loading_keeps_a_graph_valid(monkeypatch: pytest.MonkeyPatch, path: dict[str, Any], seed: int) -> None:
    captured = Training(path)
    captured.step()
    weights, saved = copy.deepcopy(captured.model.state_dict()), copy.deepcopy(captured.optimizer.state_dict())
    captured.optimizer.zero_grad()
    with capturing(monkeypatch) as graph:
        captured.step()
    after = snapshot(captured.model, captured.optimizer)
    graph.replay()
    assert not identical(after, snapshot(captured.model, captured.optimizer))
    captured.model.load_state_dict(weights)
    saved["param_groups"][0]["lr"] = captured.lr
    captured.optimizer.load_state_dict(saved)
    graph.replay()
    assert identical(after, snapshot(captured.model, captured.optimizer))


def test_a_captured_step_is_three_launches_and_the_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training({"fused": True, "capturable": True}, max_grad_norm=1.0)
    training.step()
    training.optimizer.zero_grad()
    with capturing(monkeypatch) as graph:
        training.step()
    assert graph.launches == 3


# -- what cannot be captured ------------------------------------------------------------------------------------------


def refused(training: Training, monkeypatch: pytest.MonkeyPatch, words: str, step: Callable[[], None]) -> None:
    before = snapshot(training.model, training.optimizer)
    with pytest.raises(RuntimeError, match=words), capturing(monkeypatch):
        step()
    assert identical(before, snapshot(training.model, training.optimizer))


def test_a_group_that_is_not_capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training({"fused": True})
    training.step()
    refused(training, monkeypatch, "group 0: .* needs capturable=True", training.step)


def test_the_first_step(monkeypatch: pytest.MonkeyPatch, path: dict[str, Any]) -> None:
    training = Training(path)
    refused(training, monkeypatch, "has not stepped yet: take one or more steps", training.step)
    assert not training.optimizer.state


def test_a_learning_rate_on_the_host(monkeypatch: pytest.MonkeyPatch, path: dict[str, Any]) -> None:
    training = Training(path)
    training.step()
    lr = training.lr
    monkeypatch.setattr(host, "knows", lambda tensor: tensor is lr)
    refused(training, monkeypatch, "lr is a tensor on the CPU", training.step)


def test_a_loss_on_the_host(monkeypatch: pytest.MonkeyPatch, path: dict[str, Any]) -> None:
    training = Training(path)
    training.step()
    loss = torch.tensor(1.0)
    monkeypatch.setattr(host, "knows", lambda tensor: tensor is loss)
    refused(
        training,
        monkeypatch,
        "the observed loss is a number or on the CPU",
        lambda: training.optimizer.step(loss=loss),
    )


def test_hyperparameters_that_changed_before_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training({"fused": True, "capturable": True})
    training.step()
    training.optimizer.param_groups[0]["momentum"] = 0.1
    refused(training, monkeypatch, "hyperparameters changed since the last one", training.step)
    training.optimizer.refresh_hyperparameters()
    training.optimizer.zero_grad()
    with capturing(monkeypatch):
        training.step()


def test_a_plan_that_changed_before_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training({"fused": True, "capturable": True})
    training.model.scale.requires_grad_(False)
    training.step()
    training.model.scale.requires_grad_(True)
    refused(training, monkeypatch, "or one has its first gradient", training.step)


def test_clipping_that_was_turned_on_before_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs another table and another kernel, which refreshing the numbers does not make."""
    training = Training({"fused": True, "capturable": True})
    training.step()
    training.optimizer.param_groups[0]["max_grad_norm"] = 1.0
    training.optimizer.refresh_hyperparameters()
    refused(training, monkeypatch, "clipping or dropping was turned on", training.step)
    training.step()
    training.optimizer.zero_grad()
    with capturing(monkeypatch):
        training.step()


def test_a_parameter_without_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state would be zeroed by every replay."""
    monkeypatch.setattr(foreach, "norms", norms_of_a_device)
    training = Training({"foreach": True, "capturable": True})
    training.model.scale.requires_grad_(False)
    training.step()
    training.model.scale.requires_grad_(True)
    refused(training, monkeypatch, "parameter 'scale' has no state yet", training.step)


def test_a_loss_observed_before_capture(monkeypatch: pytest.MonkeyPatch, path: dict[str, Any]) -> None:
    """Its memory goes to somebody else, and replays would read that."""
    training = Training(path)
    training.step()
    training.optimizer.observe_loss(torch.tensor(1.0))
    refused(training, monkeypatch, "a loss was observed before capture began", training.step)


def test_what_a_graph_reads_outlives_other_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds addresses: the tables behind them stay when a step of other tensors writes new ones, and so does a
    learning rate that was a tensor."""
    training = Training({"fused": True, "capturable": True}, max_grad_norm=1.0)
    training.step()
    training.optimizer.zero_grad()
    with capturing(monkeypatch) as graph:
        training.step()
    (fused_pass,) = training.optimizer._runtime.fused.values()
    (launch,) = fused_pass.launches
    of_groups = fused_pass.group_table.memory()
    memory = (*launch.bucket.memory(), *of_groups, fused_pass.sync, launch.baked)
    tables = [weakref.ref(t) for t in memory if t is not None]
    graph.calls.clear()  # the recorder's hold on them, which a graph has not
    del launch, of_groups, memory, training.lr
    training.optimizer.param_groups[0]["lr"] = 0.05
    training.model.scale.grad = None
    more = nn.Parameter(torch.ones(2))
    more.grad = torch.ones(2)
    training.optimizer.add_param_group({"params": [("more", more)]})  # with as many groups the tables stay anyway
    training.optimizer.step(loss=1.0)
    gc.collect()
    assert fused_pass.preparations == 2 and len(tables) == 14 and all(table() is not None for table in tables)


def test_a_learning_rate_that_is_a_number_on_the_foreach_path(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training({"foreach": True, "capturable": True}, lr=0.1)
    training.step()
    refused(
        training, monkeypatch, "group 0: .* lr is a number, which replays of torch operations would keep", training.step
    )


def test_refreshing_what_a_graph_cannot_see(monkeypatch: pytest.MonkeyPatch, path: dict[str, Any]) -> None:
    training = Training(path)
    training.step()
    training.optimizer.zero_grad()
    with capturing(monkeypatch):
        training.step()
    if path.get("foreach"):
        with pytest.raises(RuntimeError, match="holds its numbers, as torch operations do: capture it again"):
            training.optimizer.refresh_hyperparameters()
        return
    training.optimizer.refresh_hyperparameters()
    training.optimizer.param_groups[0]["max_grad_norm"] = 0.1
    with pytest.raises(RuntimeError, match="max_grad_norm or skip_nonfinite was turned on or off"):
        training.optimizer.refresh_hyperparameters()


def test_kernels_beside_torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training({"capturable": True})
    named = list(training.model.named_parameters())
    groups = [{"params": named[:4], "fused": True}, {"params": named[4:], "fused": False}]
    training.optimizer = DALS(groups, lr=training.lr, capturable=True, depth=0.5)
    training.step()
    refused(training, monkeypatch, "kernels and torch operations", training.step)


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # the compiler's own, of which no two versions have the same
@pytest.mark.parametrize("arguments", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_compiled_training_step_does_not_recompile(arguments: dict[str, Any], tensor_lr: bool, seed: int) -> None:
    from torch._dynamo.testing import CompileCounter

    model = ConvNet()
    plain = copy.deepcopy(model)
    x, y = batch(F32)

    def build(model: nn.Module) -> DALS:
        return DALS(model, lr=torch.tensor(0.1) if tensor_lr else 0.1, **arguments)

    def training_step(model: nn.Module, optimizer: DALS) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        return loss

    counter = CompileCounter()
    compiled = torch.compile(training_step, backend=counter)
    optimizer, other = build(model), build(plain)
    frames = []
    for step in range(5):
        for one in (optimizer, other):
            if tensor_lr:
                one.param_groups[0]["lr"].fill_(0.1 / (1 + step))
            else:
                one.param_groups[0]["lr"] = 0.1 / (1 + step)
        compiled(model, optimizer)
        training_step(plain, other)
        frames.append(counter.frame_count)
    assert frames[0] > 0 and frames[1:] == frames[1:2] * 4, frames
    assert identical(snapshot(model, optimizer), snapshot(plain, other))
    torch._dynamo.reset()
