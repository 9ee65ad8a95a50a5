"""Errors that a person can act on: right type, names argument, group and parameter, nothing written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed.device_mesh
import torch.distributed.tensor
from torch import nn

from fused_dals import DALS, DALSAcc, DALSFast
from tests.helpers import EVERY_PATH, ConvNet, batch, identical, mlp, snapshot, train_step

NAN, INF = math.nan, math.inf

BAD_VALUES: list[tuple[str, Any, type[Exception]]] = [
    *[("lr", v, ValueError) for v in (-1e-9, NAN, INF, -INF, torch.tensor(-1.0), torch.tensor(NAN), torch.ones(2))],
    *[("lr", v, TypeError) for v in ("0.1", None, [0.1], True)],
    *[("momentum", v, ValueError) for v in (-0.1, 1.0, 1.5, NAN, INF)],
    *[("momentum", v, TypeError) for v in ("0.9", None, (0.9, 0.99))],
    *[("weight_decay", v, ValueError) for v in (-1e-4, NAN, INF)],
    *[("weight_decay", v, TypeError) for v in ("0", None)],
    *[("trust_coefficient", v, ValueError) for v in (0.0, -0.02, NAN, INF)],
    *[("trust_clip", v, ValueError) for v in ((5.0, 0.2), (-1.0, 1.0), (NAN, 1.0), (0.2, NAN), (INF, INF))],
    *[("trust_clip", v, TypeError) for v in (5.0, "ab", None, ("a", "b"))],
    *[("trust_clip", v, ValueError) for v in ((0.2,), (0.1, 0.2, 0.3))],
    *[("ema_decay", v, ValueError) for v in ((0.3, 0.6), (0.3, 0.6, 0.7, 0.8), (0.3, 0.6, 1.1), (NAN,) * 3)],
    *[("ema_decay", v, TypeError) for v in (0.9, None, ("a", "b", "c"), (None, 0.6, 0.7))],
    *[("phase_thresholds", v, ValueError) for v in ((0.002, 0.01), (NAN, 0.0), (INF, 0.0))],
    *[("phase_thresholds", v, TypeError) for v in (0.01, None)],
    *[("total_steps", v, ValueError) for v in (0, -5)],
    *[("total_steps", v, TypeError) for v in (10.5, "10", True)],
    *[("warmup_fraction", v, ValueError) for v in (-0.1, 1.1, NAN)],
    *[("restart_steps", v, ValueError) for v in (0, -1)],
    *[("restart_steps", v, TypeError) for v in (1.5, "x")],
    *[("restart_mult", v, ValueError) for v in (0.5, 0, NAN, INF)],
    *[("maximize", v, TypeError) for v in (None, 1, "yes")],
    *[("foreach", v, TypeError) for v in (1, "yes")],
    *[("fused", v, TypeError) for v in (1, "yes")],
]


def identify(value: Any) -> str:
    return str(value).replace(" ", "")[:40]


@pytest.mark.parametrize(("name", "value", "error"), BAD_VALUES, ids=identify)
def test_a_bad_value_is_refused_everywhere(name: str, value: Any, error: type[Exception], seed: int) -> None:
    """In the constructor, in a group, and written into a live group, before any weight changes."""
    model = mlp(3, 4, 2)
    named = list(model.named_parameters())
    with pytest.raises(error, match=f"DALS: {name} must be"):
        DALS(model, **{name: value})
    with pytest.raises(error, match=f"group 1: {name} must be"):
        DALS([{"params": named[:1]}, {"params": named[1:], name: value}])
    optimizer = DALS(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    before = snapshot(model, optimizer)
    optimizer.param_groups[0][name] = value
    with pytest.raises(error, match=f"group 0: {name} must be"):
        optimizer.step(loss=0.1)
    assert identical(before, snapshot(model, optimizer))
    assert optimizer._runtime.state.numbers() == {"step": 1, "loss_ema": 1.0, "loss_drop": math.inf, "skipped_steps": 0}


@pytest.mark.parametrize("cls", [DALS, DALSFast, DALSAcc])
def test_unknown_arguments_are_named(cls: type[DALS]) -> None:
    with pytest.raises(TypeError, match="momentun"):
        cls(mlp(2, 2), momentun=0.9)
    with pytest.raises(TypeError):
        cls(mlp(2, 2), 0.1, 0.9)


@pytest.mark.parametrize(
    ("key", "meant"),
    [("momentun", "momentum"), ("weigth_decay", "weight_decay"), ("trust_coeficient", "trust_coefficient")],
)
def test_a_misspelt_group_key_is_found(key: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"group 0: unknown key '{key}'; did you mean '{meant}'"):
        DALS([{"params": mlp(2, 2).named_parameters(), key: 0.1}])


@pytest.mark.parametrize("key", ["amp_fused", "loss_group", "partition_group"])
def test_a_group_cannot_have_what_is_of_the_whole_optimizer(key: str) -> None:
    with pytest.raises(TypeError, match=f"group 0: {key} is of the optimizer as a whole"):
        DALS([{"params": mlp(2, 2).named_parameters(), key: None}])
    optimizer = DALS(mlp(2, 2))
    with pytest.raises(TypeError, match=f"group 1: {key} is of the optimizer as a whole"):
        optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(1)))], key: False})
    assert len(optimizer.param_groups) == 1


def test_a_list_changed_in_place_is_checked(seed: int) -> None:
    model = ConvNet()
    optimizer = DALS(model, ema_decay=[0.3, 0.6, 0.7])
    train_step(model, optimizer, batch(torch.float32))
    assert optimizer.param_groups[0]["ema_decay"] == (0.3, 0.6, 0.7)
    decay = optimizer.param_groups[0]["ema_decay"] = [0.3, 0.6, 0.7]
    train_step(model, optimizer, batch(torch.float32))
    decay[0] = NAN
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="ema_decay"):
        optimizer.step(loss=1.0)
    assert identical(before, snapshot(model, optimizer))


@pytest.mark.parametrize("path", EVERY_PATH.values(), ids=list(EVERY_PATH))
def test_a_lazy_module_is_left_until_it_has_a_shape(path: dict[str, Any]) -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    optimizer = DALS(model, **path)
    for _ in range(2):
        model[1].weight.grad, model[1].bias.grad = torch.ones(2, 3), torch.ones(2)
        optimizer.step(loss=1.0)
    assert model[0].weight not in optimizer.state
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step(loss=1.0)
    assert model[0].weight in optimizer.state


def test_foreign_group_keys_are_the_users_own() -> None:
    group = {"params": mlp(2, 2).named_parameters(), "name": "all", "lr_scale": 0.5, "initial_lr": 1.0, "betas": (0, 0)}
    assert DALS([group]).param_groups[0]["lr_scale"] == 0.5


def test_two_schedules_are_refused() -> None:
    for build in (
        lambda: DALS(mlp(2, 2), total_steps=10, restart_steps=5),
        lambda: DALSAcc(mlp(2, 2), total_steps=10),
        lambda: DALS([{"params": mlp(2, 2).named_parameters(), "restart_steps": 3}], total_steps=10),
    ):
        with pytest.raises(ValueError, match="two schedules"):
            build()


@pytest.mark.parametrize("name", ["total_steps", "restart_steps"])
def test_numbers_of_steps_say_what_is_wrong(name: str) -> None:
    for value, error, words in (
        (100.0, TypeError, r"an integer >= 1 \(make it one: int\(...\)\), got 100.0"),
        (0, ValueError, "an integer >= 1, got 0"),
        (2**63, ValueError, "an integer >= 1 of 63 bits, got"),
    ):
        with pytest.raises(error, match=f"DALS: {name} must be None or {words}"):
            DALS(mlp(2, 2), **{name: value})


def test_a_loss_in_the_place_of_the_closure() -> None:
    model, optimizer = stepped()
    before = snapshot(model, optimizer)
    for loss in (torch.tensor(1.0), 1.0):
        with pytest.raises(TypeError, match=r"step's first argument is a closure, got .*; pass .* step\(loss=loss\)"):
            optimizer.step(loss)
    assert identical(before, snapshot(model, optimizer))


def test_a_watched_criterion_without_reduction() -> None:
    criterion = nn.MSELoss(reduction="none")
    optimizer = DALS(mlp(2, 2))
    optimizer.watch_loss(criterion)
    with pytest.raises(TypeError, match="give it reduction='mean'"):
        criterion(torch.ones(3), torch.ones(3))


def test_foreach_with_fused() -> None:
    with pytest.raises(RuntimeError, match="foreach and fused cannot both be True"):
        DALS(mlp(2, 2), foreach=True, fused=True)
    DALS(mlp(2, 2), fused=False)


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([], ValueError, "empty parameter list"),
        (nn.ReLU(), ValueError, "empty parameter list"),
        ((), ValueError, "empty parameter list"),
        (torch.ones(3), TypeError, "iterable of Tensors or dicts"),
        ([1.0], TypeError, "can only optimize Tensors"),
        (["weight"], TypeError, "can only optimize Tensors"),
        ([("a", nn.Parameter(torch.ones(1))), nn.Parameter(torch.ones(1))], ValueError, "with/without names"),
        ([{"lr": 0.1}], ValueError, "group 0: 'params' is missing"),
        ([{"params": nn.Linear(2, 2)}], TypeError, "group 0: 'params' is a module"),
        ([{"params": {torch.ones(1)}}], TypeError, "ordered collections"),
        ([torch.ones(2, requires_grad=True) * 2], ValueError, "non-leaf"),
        (3, TypeError, "int"),
        (None, TypeError, "None"),
    ],
    ids=identify,
)
def test_params_that_are_none(params: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        DALS(params)
    assert words in str(caught.value)


def stepped() -> tuple[ConvNet, DALS]:
    model = ConvNet()
    optimizer = DALS(model)
    train_step(model, optimizer, batch(torch.float32))
    return model, optimizer


def assert_refused(model: nn.Module, optimizer: DALS, words: str) -> None:
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step(loss=0.5)
    assert words in str(caught.value)
    assert identical(before, snapshot(model, optimizer))


def test_sparse_gradients(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True))
    optimizer = DALS(model)
    model[0](model[1](torch.tensor([1, 2]))).sum().backward()
    assert_refused(model, optimizer, "parameter '1.weight' of group 0: its gradient is sparse")
    unnamed = DALS(model.parameters(), depth=0.5)
    assert_refused(model, unnamed, "'param_groups[0].params[2]' of group 0")


def test_complex_gradients(seed: int) -> None:
    model = nn.Module()
    model.real = nn.Parameter(torch.ones(2))
    model.freq = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = DALS(model)
    model.real.grad, model.freq.grad = torch.ones(2), torch.ones(2, dtype=torch.complex64)
    assert_refused(model, optimizer, "parameter 'freq' of group 0: it is torch.complex64")
    model.freq.grad = None
    optimizer.step(loss=1.0)


def test_meta_parameters() -> None:
    model = nn.Linear(2, 2, device="meta")
    optimizer = DALS(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="'weight' of group 0: it is on the meta device"):
        optimizer.step(loss=1.0)


def test_shapes_that_changed_under_the_optimizer(seed: int) -> None:
    model, optimizer = stepped()
    model.conv.weight.data = torch.ones(2, 2)
    model.conv.weight.grad = torch.ones(2, 2)
    assert_refused(model, optimizer, "'conv.weight' of group 0: it has shape (2, 2) and its grad_ema (4, 1, 3, 3)")
    del optimizer.state[model.conv.weight]
    optimizer.step(loss=1.0)
