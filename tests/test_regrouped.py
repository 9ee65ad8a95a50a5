"""Groups that are taken out or change places after the optimizer was built, as to freeze a part of a model."""

from __future__ import annotations

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
