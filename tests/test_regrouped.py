"""Groups that are taken out or change places after the optimizer was built, as to freeze a part of a model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fused_dals import DALS, infer_depths
from fused_dals.depth_rule import DepthRule
from tests.helpers import EVERY_PATH, identical, mlp

every_path = pytest.mark.parametrize("path", EVERY_PATH)

RULES: dict[str, Callable[[nn.Module], DepthRule]] = {
    "auto": lambda model: "auto",
    "dict": lambda model: {r"4\..*": 0.2, r"[02]\..*": 0.7},
    "callable": lambda model: lambda name, parameter: 0.9 if name.startswith("4") else 0.1,
    "infer_depths": infer_depths,
}


def build(path: str, rule: str, seed: int) -> tuple[nn.Module, DALS]:
    """Weights in one group and biases in another, as with weight decay for the former alone."""
    torch.manual_seed(seed)
    model = mlp(8, 6, 5, 4)
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in named if p.ndim > 1]},
        {"params": [(name, p) for name, p in named[:4] if p.ndim == 1], "weight_decay": 0.0},
    ]
    return model, DALS(groups, depth=RULES[rule](model), lr=0.1, **EVERY_PATH[path])


def step(model: nn.Module, optimizer: DALS) -> None:
    optimizer.zero_grad()
    loss = model(torch.randn(4, 8)).square().mean()
    loss.backward()
    optimizer.step(loss=loss)


@every_path
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stepped_before", [False, True])
def test_groups_in_another_order(path: str, rule: str, stepped_before: bool, seed: int) -> None:
    """Depths go by names, and no tensor of the model is taken for a flat buffer because another one stood there."""
    found = []
    for reverse in (False, True):
        model, optimizer = build(path, rule, seed)
        if stepped_before:
            step(model, optimizer)
        depths = optimizer.depths()
        if reverse:
            optimizer.param_groups.reverse()
        assert optimizer.depths() == depths
        for _ in range(3):
            step(model, optimizer)
        found.append([p.detach() for p in model.parameters()])
    assert identical(*found)


def test_unnamed_groups_keep_what_was_said_of_them() -> None:
    """Their labels are places, which others may come to stand in."""
    params = [nn.Parameter(torch.ones(i + 1)) for i in range(5)]
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:4]}]
    optimizer = DALS(groups, depth=lambda name, parameter: parameter.numel() / 10)
    first = optimizer.param_groups.pop(0)
    assert list(optimizer.depths().values()) == [0.3, 0.4]
    for some in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert list(some.depths().values()) == [0.3, 0.4]
        some.load_state_dict(some.state_dict())
        some.add_param_group({"params": [nn.Parameter(torch.ones(5))], "depth": lambda name, parameter: 0.8})
        assert list(some.depths().values()) == [0.3, 0.4, 0.8]
    optimizer.param_groups.insert(1, first)
    assert list(optimizer.depths().values()) == [0.3, 0.4, 0.1, 0.2, 0.8]


def test_a_group_in_anothers_place_does_not_inherit_its_depths() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = DALS([{"params": params[:1], "depth": lambda name, parameter: 0.9}])
    optimizer.param_groups.clear()
    with pytest.warns(UserWarning, match="parameters without names"):
        optimizer.add_param_group({"params": params[1:]})
    assert list(optimizer.depths().values()) == [0.0, 1.0]


def test_a_depth_stays_in_the_groups_that_the_caller_holds() -> None:
    model = mlp(4, 5, 2)
    groups = [{"params": list(model.named_parameters()), "depth": {r"0\..*": 0.1, r"2\..*": 0.2}}]
    first = DALS(groups)
    assert first.depths() == DALS(groups).depths() == {"0.weight": 0.1, "0.bias": 0.1, "2.weight": 0.2, "2.bias": 0.2}
    assert "depth" not in first.param_groups[0]
    once: dict[str, Any] = {"params": model.named_parameters(), "depth": lambda name, parameter: 0.3}
    for _ in range(2):
        assert list(DALS([once]).depths().values()) == [0.3] * 4, "a generator is listed in the caller's dict"


def test_a_group_that_joins_again_joins_anew() -> None:
    optimizer = DALS([{"params": [nn.Parameter(torch.ones(1))]}], depth=lambda name, parameter: parameter.numel() / 10)
    group = optimizer.param_groups.pop()
    group["params"] = [nn.Parameter(torch.ones(9))]
    optimizer.add_param_group(group)
    assert list(optimizer.depths().values()) == [0.9]


def test_a_group_that_is_gone_keeps_nothing_alive() -> None:
    model, head = mlp(3, 4, 2), nn.Linear(2, 2)
    optimizer = DALS(model)
    optimizer.add_param_group({"params": [("head." + name, p) for name, p in head.named_parameters()]})
    watched = weakref.ref(head.weight)
    del optimizer.param_groups[1], head
    gc.collect()
    assert watched() is None


def test_new_dicts_for_groups_do_not_pass_for_dead_ones() -> None:
    """Which come to lie where those lay."""
    params = [nn.Parameter(torch.ones(i + 1)) for i in range(4)]
    optimizer = DALS([{"params": [p]} for p in params], depth=lambda name, parameter: parameter.numel() / 10)
    for _ in range(5):
        for i, group in enumerate(optimizer.param_groups):
            optimizer.param_groups[i] = {**group, "lr": 1e-3}
        assert list(optimizer.depths().values()) == [0.1, 0.2, 0.3, 0.4]


def test_a_shallow_copy_leaves_the_original_its_groups() -> None:
    params = [nn.Parameter(torch.ones(i + 1)) for i in range(3)]
    optimizer = DALS([{"params": [p]} for p in params], depth=lambda name, parameter: parameter.numel() / 10)
    first = optimizer.param_groups.pop(0)
    copy.copy(optimizer)
    optimizer.param_groups.append(first)
    assert list(optimizer.depths().values()) == [0.2, 0.3, 0.1]


@every_path
def test_groups_that_somebody_has_copied(path: str) -> None:
    """Their parameters are no flat buffers, whichever group stood in their place."""
    shapes = [(4, 6), (3, 3), (24,)]
    params = [(f"{i}", nn.Parameter(torch.randn(shape))) for i, shape in enumerate(shapes)]
    optimizer = DALS([{"params": params[:2]}, {"params": params[2:]}], **EVERY_PATH[path])
    optimizer.param_groups[:] = [dict(optimizer.param_groups[1])]
    params[2][1].grad = torch.randn(24)
    optimizer.step(loss=1.0)


@every_path
@pytest.mark.parametrize("rule", RULES)
def test_the_first_group_is_taken_out(path: str, rule: str, seed: int) -> None:
    """The others go on as they would beside one whose gradients are missing."""
    found = []
    for taken_out in (True, False):
        model, optimizer = build(path, rule, seed)
        depths = optimizer.depths()
        step(model, optimizer)
        first = optimizer.param_groups[0]["params"]
        if taken_out:
            del optimizer.param_groups[0]
            assert optimizer.depths() == {name: depth for name, depth in depths.items() if name.endswith("bias")}
        for p in first:
            p.requires_grad_(False)
        for _ in range(3):
            step(model, optimizer)
        found.append([p.detach() for p in model.parameters()])
    assert identical(*found)


def test_a_name_of_two_depths_stays_with_its_group() -> None:
    """Two modules of a GAN may have the same names."""
    groups = [{"params": [("weight", nn.Parameter(torch.ones(2, 2)))]} for _ in range(2)]
    depths = iter((0.2, 0.8))
    optimizer = DALS(groups, depth=lambda name, parameter: next(depths))
    first, second = (optimizer._runtime.depths_of(optimizer.param_groups, index) for index in range(2))
    assert (first, second) == ([0.2], [0.8])
