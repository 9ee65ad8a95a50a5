"""The phase rule, the four doors of the loss, and their traps."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_dals import DALS, DALSFast
from fused_dals.fused import FusedPass
from fused_dals.loss_signal import LossSignal
from fused_dals.run_state import StepInputs
from tests.helpers import EVERY_PATH, batch, mlp


def parameter(value: float = 1.0) -> list[tuple[str, Tensor]]:
    p = nn.Parameter(torch.full((3,), value))
    p.grad = torch.ones(3)
    return [("p", p)]


def phases_of(losses: list[Any], **options: Any) -> list[int]:
    optimizer = DALS(parameter(), **options)
    seen = []
    for loss in losses:
        optimizer.step(loss=loss)
        seen += optimizer.phases()
    return seen


def test_phases_follow_the_rule() -> None:
    ema, losses, expected = 4.0, [4.0], [0]
    for drop, phase in [(0.011, 0), (0.009, 1), (0.0021, 1), (0.0019, 2), (0.0, 2), (-0.5, 2), (0.03, 0)]:
        losses.append(ema * (1 - 20 * drop))
        ema = 0.95 * ema + 0.05 * losses[-1]
        expected.append(phase)
    assert phases_of(losses) == expected


def test_a_loss_under_four_fifths_of_the_mean_is_exploration() -> None:
    """The docs' plain words: D > 0.01 is L < 0.8 E."""
    assert phases_of([1.0, 0.79]) == [0, 0]
    assert phases_of([1.0, 0.81]) == [0, 1]


def test_non_finite_losses_are_ignored() -> None:
    bad = [math.nan, math.inf, -math.inf, torch.tensor(math.nan)]
    assert phases_of([1.0, 0.85, *bad, 0.85]) == [0, 1, 1, 1, 1, 1, 1]
    assert phases_of([math.nan, 5.0, 5.0]) == [1, 0, 2]


def test_zero_and_negative_losses() -> None:
    assert phases_of([0.0, 0.0, -1.0]) == [0, 2, 0]
    assert phases_of([-1.0, -2.0]) == [0, 0]


def test_thresholds_of_a_group_are_its_own_and_live() -> None:
    a, b = parameter(), parameter()
    optimizer = DALS([{"params": a}, {"params": [("q", b[0][1])], "phase_thresholds": (0.5, 0.1)}])
    optimizer.step(loss=1.0)
    optimizer.step(loss=0.5)
    assert optimizer.phases() == [0, 2]
    optimizer.param_groups[1]["phase_thresholds"] = (0.01, 0.002)
    assert optimizer.phases() == [0, 0]


def test_the_doors_are_one(seed: int) -> None:
    """The same losses through each door give bit-identical weights."""

    def train(door: str) -> list[Tensor]:
        torch.manual_seed(seed)
        model = mlp(16, 8, 3)
        criterion = nn.CrossEntropyLoss()
        optimizer = DALSFast(model)
        if door == "watch_loss":
            optimizer.watch_loss(criterion)
        for _ in range(20):
            x, y = batch(torch.float32)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = criterion(model(x.flatten(1)), y)
                loss.backward()
                return loss

            if door == "closure":
                optimizer.step(closure)
                continue
            loss = closure()
            if door == "step":
                optimizer.step(loss=loss)
                continue
            if door == "observe tensor":
                optimizer.observe_loss(loss)
            elif door == "observe float":
                optimizer.observe_loss(loss.item())
            elif door == "observe twice":
                optimizer.observe_loss(loss)
                optimizer.observe_loss(loss.reshape(1))
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    first = train("step")
    for door in ("closure", "observe tensor", "observe float", "observe twice", "watch_loss"):
        assert all(torch.equal(a, b) for a, b in zip(first, train(door), strict=True)), door
    with pytest.warns(UserWarning, match="has not been given a loss"):
        without = train("none")
    assert not all(torch.equal(a, b) for a, b in zip(first, without, strict=True))


def test_losses_before_one_step_are_averaged() -> None:
    optimizer = DALS(parameter())
    for loss in (1.0, torch.tensor(2.0), torch.tensor(6, dtype=torch.bfloat16)):
        optimizer.observe_loss(loss)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["loss_ema"] == 3.0


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_a_step_reads_a_loss_of_any_dtype_as_the_number_that_it_is(dtype: torch.dtype, path: str) -> None:
    """To the bit, wherever it is read; and whoever writes to it afterwards changes nothing."""
    if path == "fused":
        pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = []
    for as_number in (False, True):
        p = nn.Parameter(torch.ones(3, device=device))
        p.grad = torch.ones_like(p)
        optimizer = DALS([("p", p)], **EVERY_PATH[path])
        for number in (3.3, 2.7, 1.1):
            loss = torch.tensor(number, device=device).to(dtype)
            optimizer.step(loss=loss.item() if as_number else loss)
            loss.fill_(100)
        values.append(optimizer._runtime.state.values.tolist())
    assert values[0] == values[1] and values[0][0] == 3


def test_a_loss_is_read_where_it_is_if_it_is_alone_and_can_be() -> None:
    cpu = torch.device("cpu")

    def is_read_in_place(loss: Tensor, *, read_on: torch.device | None = cpu, before: bool = False) -> bool:
        signal = LossSignal()
        if before:
            signal.observe(1.0)
        signal.observe(loss, read_on=read_on)
        assert signal.pending is not None and float(signal.pending) == float(loss) + before
        return signal.pending.data_ptr() == loss.data_ptr()

    loss = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float32)
    assert is_read_in_place(loss[0]) and is_read_in_place(loss[:1])
    assert not is_read_in_place(loss[0], read_on=None)
    assert not is_read_in_place(loss[0], read_on=torch.device("cuda", 0)), "a copy there would be made behind our back"
    assert not is_read_in_place(loss[0], before=True)
    assert not is_read_in_place(loss[1]), "Triton would compile another kernel for it"
    assert not is_read_in_place(torch.tensor(2))
    assert not is_read_in_place(loss[0].as_subclass(Subclass))
    assert not is_read_in_place(torch._neg_view(loss[0]))


@pytest.mark.parametrize("capturable", [False, True])
def test_steps_that_may_be_captured_need_one_kernel(capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prologue is compiled for the dtype of the loss, which cannot be done while a graph is being captured."""
    pytest.importorskip("triton")
    dtypes: list[torch.dtype] = []
    real = FusedPass._launch_prologue

    def launch_and_note(passing: FusedPass, inputs: StepInputs, *rest: Any) -> None:
        assert inputs.loss.total is not None
        dtypes.append(inputs.loss.total.dtype)
        real(passing, inputs, *rest)

    monkeypatch.setattr(FusedPass, "_launch_prologue", launch_and_note)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p = nn.Parameter(torch.ones(3, device=device))
    p.grad = torch.ones_like(p)
    optimizer = DALS([("p", p)], fused=True, capturable=capturable)
    for _ in range(3):
        optimizer.step(loss=torch.ones((), device=device))
    later = torch.float64 if capturable else torch.float32
    assert dtypes == [torch.float64, later, later]


class Subclass(Tensor):
    """A tensor that may be anything inside, as a DTensor is."""


def test_an_observed_loss_keeps_no_graph_and_no_alias() -> None:
    optimizer = DALS(parameter())
    loss = (torch.ones(1, requires_grad=True, dtype=torch.float64) * 2).sum()
    optimizer.observe_loss(loss)
    pending = optimizer._runtime.loss.pending
    assert pending is not None and pending.grad_fn is None and not pending.requires_grad
    with torch.no_grad():
        loss.mul_(100)
    optimizer.step()
    assert optimizer.param_groups[0]["loss_ema"] == 2.0
    assert not optimizer._runtime.state.values.requires_grad


def test_no_loss_warns_once_and_stays_in_phase_1() -> None:
    optimizer = DALS(parameter())
    with pytest.warns(UserWarning) as caught:
        optimizer.step()
        optimizer.step()
    assert len(caught) == 1 and optimizer.phases() == [1]
    message = str(caught[0].message)
    assert caught[0].filename == __file__
    for door in ("step(loss=loss)", "observe_loss(loss)", "step(closure)", "watch_loss("):
        assert door in message


def test_a_loaded_or_copied_optimizer_says_so_if_nobody_feeds_it() -> None:
    """watch_loss does not carry over; the phase would stay as it was for good, without a word."""
    optimizer = DALS(parameter())
    optimizer.step(loss=1.0)
    loaded = DALS(parameter())
    loaded.load_state_dict(optimizer.state_dict())
    for other in (loaded, copy.deepcopy(optimizer)):
        other.param_groups[0]["params"][0].grad = torch.ones(3)
        with pytest.warns(UserWarning, match="since it was made, loaded or copied"):
            other.step()
        assert other.phases() == [0]


def test_losses_of_a_refused_step_are_not_kept() -> None:
    optimizer = DALS(parameter())
    optimizer.step(loss=1.0)
    optimizer.param_groups[0]["momentum"] = 2.0
    with pytest.raises(ValueError):
        optimizer.step(loss=1000.0)
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step(loss=1.0)
    assert optimizer.param_groups[0]["loss_ema"] == 1.0


def test_a_bad_loss_leaves_no_good_one_behind() -> None:
    """That of a closure, here, would be averaged into the next step's."""
    optimizer = DALS(parameter())
    optimizer.step(loss=1.0)
    with pytest.raises(TypeError, match="got str"):
        optimizer.step(lambda: torch.tensor(100.0), loss="bad")
    optimizer.step(loss=1.0)
    assert optimizer.param_groups[0]["loss_ema"] == 1.0


def test_no_warning_once_a_loss_was_seen() -> None:
    optimizer = DALS(parameter())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(loss=1.0)
        optimizer.step()


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (torch.ones(2), ValueError, "loss must be a scalar, got shape (2,)"),
        (torch.ones((), dtype=torch.complex64), TypeError, "real"),
        ("0.5", TypeError, None),
        (object(), TypeError, "object"),
        ([1.0], TypeError, "list"),
    ],
)
def test_bad_losses(loss: Any, error: type[Exception], words: str | None) -> None:
    params = parameter()
    optimizer = DALS(params)
    before = params[0][1].detach().clone()
    for call in (lambda: optimizer.observe_loss(loss), lambda: optimizer.step(loss=loss)):
        with pytest.raises(error) as caught:
            call()
        assert words is None or words in str(caught.value)
    assert torch.equal(before, params[0][1]) and not optimizer.state


class WithLoss(nn.Module):
    """A model in the manner of transformers: returns an object with a loss when it got labels."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self) -> Any:
        return self.output


@pytest.mark.parametrize(
    "output",
    [torch.tensor(2.0), torch.tensor([2.0]), SimpleNamespace(loss=torch.tensor(2.0)), {"loss": torch.tensor(2)}],
)
def test_watch_loss_finds_the_loss(output: Any) -> None:
    optimizer = DALS(parameter())
    module = WithLoss(output)
    handle = optimizer.watch_loss(module)
    module()
    optimizer.step()
    assert optimizer.param_groups[0]["loss_ema"] == 2.0
    handle.remove()
    module.output = torch.tensor(1000.0)
    module()
    optimizer.step()
    assert optimizer.param_groups[0]["loss_ema"] == 2.0


def test_watch_loss_looks_only_while_training() -> None:
    optimizer = DALS(parameter())
    module = WithLoss(torch.tensor(2.0))
    optimizer.watch_loss(module)
    module.eval()
    module()
    module.train()
    with torch.no_grad():
        module()
    with pytest.warns(UserWarning, match="has not been given a loss"):
        optimizer.step()


def test_watch_loss_ignores_a_model_without_labels() -> None:
    optimizer = DALS(parameter())
    module = WithLoss(SimpleNamespace(loss=None))
    optimizer.watch_loss(module)
    module()
    assert not optimizer._runtime.loss.observed


@pytest.mark.parametrize("output", [torch.ones(4, 3), SimpleNamespace(logits=1), (torch.ones(()),), {"loss": "x"}])
def test_watch_loss_refuses_what_is_no_loss(output: Any) -> None:
    module = WithLoss(output)
    DALS(parameter()).watch_loss(module)  # the optimizer is gone: nothing to feed, nothing to complain about
    module()
    optimizer = DALS(parameter())
    optimizer.watch_loss(module)
    with pytest.raises(TypeError, match=r"WithLoss returned .* observe_loss"):
        module()


def test_watch_loss_wants_a_module() -> None:
    with pytest.raises(TypeError, match="watch_loss"):
        DALS(parameter()).watch_loss(nn.functional.cross_entropy)


class Squares(nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.layer(x).square().mean()
        return loss


TRACERS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "torch.export": lambda model, x: torch.export.export(model, (x,)),
    "torch.export, strict": lambda model, x: torch.export.export(model, (x,), strict=True),
    "torch.jit.trace": lambda model, x: torch.jit.trace(model, (x,)),
    "vmap": lambda model, x: torch.func.vmap(model)(x),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_pass_that_trains_nothing_is_no_loss(tracer: str) -> None:
    """What a tracer, or vmap for each sample, calls the model for; the next real step goes on as if it had not."""
    model, x = Squares(), torch.randn(3, 4)
    optimizer = DALS(model)
    optimizer.watch_loss(model)
    TRACERS[tracer](model, x)
    assert not optimizer._runtime.loss.observed
    loss = model(x)
    loss.backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["loss_ema"] == pytest.approx(loss.item())


@pytest.mark.parametrize("path", EVERY_PATH)
def test_a_loss_inside_func_grad_is_one(path: str) -> None:
    model, x = Squares(), torch.randn(3, 4)
    optimizer = DALS(model, **EVERY_PATH[path])
    optimizer.watch_loss(model)
    params = dict(model.named_parameters())
    grads = torch.func.grad(lambda params: torch.func.functional_call(model, params, (x,)))(params)
    for name, param in params.items():
        param.grad = grads[name]
    expected = model.layer(x).square().mean().item()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["loss_ema"] == pytest.approx(expected)


def test_losses_without_a_number_are_refused_by_name() -> None:
    optimizer = DALS(parameter())
    with pytest.raises(TypeError, match="this one is of a tracer"), FakeTensorMode():
        optimizer.observe_loss(torch.ones(()))
    with pytest.raises(TypeError, match="this one is one for each sample"):
        torch.func.vmap(lambda x: optimizer.observe_loss(x.sum()))(torch.ones(2, 3))
    for loss in (1 + 2j, np.complex64(1)):
        with pytest.raises(TypeError, match="loss must be a number or a scalar tensor, got complex"):
            optimizer.observe_loss(loss)
    with pytest.raises(TypeError, match="loss must be a dense tensor with a value, got a nested tensor"):
        optimizer.observe_loss(torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged))
    optimizer.step(loss=1.0)


def test_copies_of_a_watched_module_are_not_watched() -> None:
    optimizer = DALS(parameter())
    module = WithLoss(torch.tensor(2.0))
    optimizer.watch_loss(module)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
        other()
    assert not optimizer._runtime.loss.observed
    module()
    assert optimizer._runtime.loss.observed
