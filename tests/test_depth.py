"""Depths: the rule, the forms of params it must see through, overrides and their errors."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fused_dals import DALS, infer_depths
from fused_dals.depth import depths_from_names
from tests.helpers import ConvNet, mlp


class Transformer(nn.Module):
    """Names as in the wild: integers beyond nine, a norm at the end, a tied head, root parameters."""

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.zeros(4, 8))
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"norm1": nn.LayerNorm(8), "attn": nn.Linear(8, 8), "norm2": nn.LayerNorm(8), "mlp": mlp(8, 9, 8)}
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight


def ranks_by_definition(model: nn.Module) -> dict[str, float]:
    """The SPEC's sentence on the module tree itself: rank of the parameter-owning module in registration order."""
    first_owner: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            first_owner.setdefault(id(parameter), name)
    owners = list(dict.fromkeys(first_owner.values()))
    return {
        name: owners.index(first_owner[id(p)]) / (len(owners) - 1) if len(owners) > 1 else 0.5
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("model", [ConvNet(), Transformer(), mlp(3, 4), mlp(3, 4, 5, 6)])
def test_auto_is_the_rank_of_the_owning_module(model: nn.Module) -> None:
    expected = ranks_by_definition(model)
    assert infer_depths(model) == expected
    assert DALS(model).depths() == expected
    assert DALS(model.named_parameters()).depths() == expected
    assert DALS([{"params": model.named_parameters()}]).depths() == expected
    assert DALS([{"params": [pair]} for pair in model.named_parameters()]).depths() == expected


def test_four_linear_children_are_thirds_apart() -> None:
    """Task A's net, both granularities."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(2, 2) for _ in range(4))

    for granularity in ("modules", "children"):
        depths = infer_depths(Net(), granularity=granularity)
        assert list(depths.values()) == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])


def test_children_rule() -> None:
    assert infer_depths(ConvNet(), "children") == {
        "scale": 0.0, "conv.weight": 0.0, "conv.bias": 0.0, "norm.weight": 0.5, "norm.bias": 0.5,
        "head.0.weight": 1.0, "head.0.bias": 1.0, "head.2.weight": 1.0, "head.2.bias": 1.0,
    }  # fmt: skip
    with_activation = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    assert set(infer_depths(with_activation, "children").values()) == {0.0, 2 / 3}, "children without parameters count"
    assert set(infer_depths(nn.Sequential(nn.Linear(2, 2)), "children").values()) == {0.5}
    assert set(infer_depths(nn.Linear(2, 2), "children").values()) == {0.5}
    assert infer_depths(nn.ReLU()) == {}


def test_infer_depths_errors() -> None:
    with pytest.raises(ValueError, match="granularity must be"):
        infer_depths(ConvNet(), "layers")
    with pytest.raises(TypeError, match=r"torch.nn.Module, got list"):
        infer_depths([1])


class ResNetLike(nn.Module):
    """A stem, blocks and a head; norms without bias everywhere, so that they stand alone in the no-decay group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        for i in range(1, 5):
            block = nn.ModuleDict(
                {
                    "conv1": nn.Conv2d(4, 4, 3, bias=False),
                    "bn1": nn.BatchNorm2d(4),
                    "conv2": nn.Conv2d(4, 4, 3, bias=False),
                    "bn2": nn.BatchNorm2d(4),
                }
            )
            setattr(self, f"layer{i}", nn.Sequential(block, nn.ModuleDict(dict(block.items()))))
        self.fc = nn.Linear(4, 2)


@pytest.mark.parametrize("no_decay_first", [False, True])
@pytest.mark.parametrize("model", [ResNetLike(), ConvNet(), mlp(3, 4, 5, 6)])
def test_decay_and_no_decay_groups_keep_the_models_order(model: nn.Module, no_decay_first: bool) -> None:
    """The usual split puts norms and biases into a second group; depths must not follow that order."""
    split: list[list[Any]] = [[], []]
    for name, p in model.named_parameters():
        split[(p.ndim < 2) != no_decay_first].append((name, p))
    depths = DALS([{"params": group} for group in split]).depths()
    # Which of a convolution and its norm comes first no group tells: one rank off where the first group has the norm.
    assert depths == pytest.approx(ranks_by_definition(model), abs=1 / 18 + 1e-9 if no_decay_first else 1e-9)


def test_split_groups_of_a_transformer_keep_blocks_in_order_and_infer_depths_is_exact() -> None:
    """What no group frames (the last norm and an untied head) is a guess; the model's own depths are not."""
    model = Transformer()
    split: list[list[Any]] = [[], []]
    for name, p in model.named_parameters():
        split[p.ndim < 2].append((name, p))
    depths = DALS([{"params": group} for group in split]).depths()
    for layer in range(11):
        assert max(d for n, d in depths.items() if n.startswith(f"layers.{layer}.")) < min(
            d for n, d in depths.items() if n.startswith(f"layers.{layer + 1}.")
        )
    exact = ranks_by_definition(model)
    assert DALS([{"params": group} for group in split], depth=infer_depths(model)).depths() == exact
    head_first = [[("fc." + n, p) for n, p in nn.Linear(2, 2).named_parameters()], mlp(3, 4, 2).named_parameters()]
    assert DALS([{"params": g} for g in head_first], depth={r"fc\..*": 1.0}).depths()["fc.weight"] == 1.0


def test_contradicting_groups_fall_back_to_the_order_of_appearance() -> None:
    depths = depths_from_names([["a.w", "b.w", "c.w"], ["c.v", "a.v"]])
    assert [depths[name] for name in ("a.w", "b.w", "c.w")] == [0.0, 0.5, 1.0]


def test_equal_names_in_two_groups_are_told_apart() -> None:
    """Generator and discriminator in one optimizer."""
    g, d = mlp(2, 2, 2), mlp(2, 2, 2)
    depths_of_d: dict[str, float] = {**infer_depths(d), "0.weight": 0.9}
    optimizer = DALS(
        [
            {"params": g.named_parameters(), "depth": lambda name, p: 0.1},
            {"params": d.named_parameters(), "depth": depths_of_d},
        ]
    )
    depths = optimizer.depths()
    assert len(depths) == 8 and list(depths.values()) == [0.1] * 4 + [0.9, 0.0, 1.0, 1.0]
    for p in (*g.parameters(), *d.parameters()):
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    assert list(optimizer.trust_ratios()) == list(depths)
    del optimizer.param_groups[1]
    assert len(optimizer.trust_ratios()) == 4


class Halves(nn.Module):
    """Two submodules whose parameters have the same names, as seen from each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.base: nn.Module = mlp(2, 3, 4)
        self.head: nn.Module = mlp(4, 2)


def test_a_name_in_two_groups_is_warned_of_once() -> None:
    model = Halves()
    halves = lambda: [{"params": model.base.named_parameters()}, {"params": model.head.named_parameters()}]  # noqa: E731
    with pytest.warns(
        UserWarning, match=r"group 1: parameter name '0.weight' is that of two parameters.*prefix="
    ) as seen:
        DALS(halves())
    assert len(seen) == 1 and seen[0].filename == __file__
    rules: list[Any] = [{"0.weight": 0.5}, infer_depths(model.base)]
    for depth in rules:
        with pytest.warns(UserWarning, match="'0.weight' is that of two parameters"):
            DALS(halves(), depth=depth)
    with pytest.warns(UserWarning, match="'0.bias' is that of two parameters"):
        groups = halves()
        DALS([groups[0], {**groups[1], "depth": {"0.weight": 1.0}}])


def test_names_of_the_whole_model_and_depths_of_ones_own_are_not_warned_of() -> None:
    model = Halves()
    groups = [{"params": getattr(model, name).named_parameters(prefix=name)} for name in ("base", "head")]
    assert DALS(groups).depths() == infer_depths(model)
    groups = [{"params": getattr(model, name).named_parameters(prefix=name)} for name in ("base", "head")]
    assert DALS(groups, depth=infer_depths(model)).depths() == infer_depths(model)
    with pytest.raises(ValueError, match=r"does not know parameter '0.bias'; .*named_parameters\(prefix="):
        DALS([{"params": model.head.named_parameters()}], depth=infer_depths(model))
    halves = (model.base, model.head)
    DALS([{"params": half.named_parameters(), "depth": infer_depths(half)} for half in halves])
    DALS([{"params": half.named_parameters(), "depth": 0.5} for half in halves])
    DALS([{"params": half.named_parameters()} for half in halves], depth=lambda name, p: 0.5)


def test_names_that_no_depth_goes_by_are_not_warned_of_and_two_in_one_group_are() -> None:
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    for depth in (0.1, {"w": 0.1}):
        DALS([{"params": [("w", a)], "depth": depth}, {"params": [("w", b), ("v", c)]}])
        DALS([{"params": [("w", b), ("v", c)]}, {"params": [("w", a)], "depth": depth}])
    with pytest.warns(UserWarning, match="group 0: parameter name 'w' is that of two parameters"):
        DALS([("w", a), ("w", b), ("v", c)])


def test_a_group_may_leave_and_come_back() -> None:
    model = mlp(2, 2, 2)
    optimizer = DALS([{"params": [pair]} for pair in model.named_parameters()])
    group = optimizer.param_groups.pop()
    optimizer.add_param_group({"params": list(zip(group["param_names"], group["params"], strict=True))})
    assert optimizer.depths() == infer_depths(model)


def test_a_literal_key_is_no_expression() -> None:
    named = [("a.1.b", nn.Parameter(torch.ones(1))), ("a11.b", nn.Parameter(torch.ones(1)))]
    assert DALS(named, depth={"a.1.b": 0.99}).depths() == {"a.1.b": 0.99, "a11.b": 1.0}


def test_a_pickled_optimizer_keeps_what_a_lambda_said() -> None:
    optimizer = DALS(mlp(2, 2, 2), depth=lambda name, p: 0.25)
    assert pickle.loads(pickle.dumps(optimizer)).depths() == optimizer.depths()
    assert set(copy.deepcopy(optimizer).depths().values()) == {0.25}


def test_names_that_no_longer_fit_are_reported() -> None:
    optimizer = DALS(mlp(2, 2, 2))
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(1)))
    with pytest.warns(UserWarning, match="param_names has 4 entries for 5 parameters"):
        optimizer.depths()


def test_wrapped_names_change_nothing() -> None:
    names = [name for name, _ in Transformer().named_parameters()]
    plain = list(depths_from_names([names]).values())
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        assert list(depths_from_names([[prefix + name for name in names]]).values()) == plain


def compiled(model: nn.Module) -> nn.Module:
    wrapped: Any = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "torch.compile": compiled,
    "both": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("granularity", ["modules", "children"])
def test_infer_depths_looks_through_wrappers(wrap: Callable[[nn.Module], nn.Module], granularity: Any) -> None:
    model = Transformer()
    plain, wrapped = infer_depths(model, granularity), infer_depths(wrap(model), granularity)
    assert list(wrapped) == [name for name, _ in wrap(model).named_parameters()]
    assert list(wrapped.values()) == list(plain.values())
    # Depths of the one serve names of the other.
    assert DALS(wrap(model), depth=plain).depths() == wrapped
    assert DALS([{"params": model.named_parameters()}], depth=wrapped).depths() == plain


def test_depths_of_a_model_serve_names_of_modules_in_wrappers() -> None:
    model = Halves()
    depths = infer_depths(model)
    model.head = compiled(nn.DataParallel(model.head))
    assert list(DALS(model, depth=depths).depths().values()) == list(depths.values())
    assert (
        DALS(model.named_parameters(), depth=depths).depths()["head._orig_mod.module.0.bias"] == depths["head.0.bias"]
    )


def test_modules_that_only_a_wrappers_name_tells_apart_are_not_confused() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"module": nn.Linear(1, 1)}), "b": nn.Linear(1, 1)})
    model["a"].register_parameter("weight", nn.Parameter(torch.ones(1)))
    depths = infer_depths(model)
    assert DALS(model, depth=depths).depths() == depths
    with pytest.raises(ValueError, match=r"depth does not know parameter 'a\._orig_mod\.weight'"):
        DALS([("a._orig_mod.weight", nn.Parameter(torch.ones(1)))], depth=depths)


def test_without_names_depth_is_the_rank_in_the_group_and_says_so_once() -> None:
    model = mlp(3, 4, 5)
    with pytest.warns(UserWarning, match="named_parameters") as caught:
        optimizer = DALS(model.parameters())
    assert len(caught) == 1 and caught[0].filename == __file__
    assert list(optimizer.depths().values()) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert list(optimizer.depths())[3] == "param_groups[0].params[3]"
    with pytest.warns(UserWarning):
        optimizer = DALS([{"params": model[0].parameters()}, {"params": [model[2].weight]}])
    assert list(optimizer.depths().values()) == [0, 1, 0.5]


@pytest.mark.parametrize("depth", [0.25, lambda name, p: 0.25])
def test_a_given_depth_needs_no_names(depth: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(DALS(mlp(3, 4, 5).parameters(), depth=depth).depths().values()) == {0.25}
        groups = [{"params": mlp(3, 4).parameters(), "depth": depth}]
        assert set(DALS(groups).depths().values()) == {0.25}


def test_dict_names_win_over_expressions_and_both_over_auto() -> None:
    model = ConvNet()
    rule = {r"head\..*": 0.9, "head.0.bias": 0.1, r"head\.2.*": 0.8}
    depths = DALS(model, depth=rule).depths()
    assert depths["head.0.weight"] == depths["head.2.weight"] == 0.9
    assert depths["head.0.bias"] == 0.1
    assert depths["conv.weight"] == infer_depths(model)["conv.weight"]
    assert DALS(model.named_parameters(), depth=rule).depths() == depths


def test_callable_sees_name_and_parameter() -> None:
    depths = DALS(ConvNet(), depth=lambda name, p: 0.0 if p.ndim == 1 else 0.9 if "head" in name else 0.5).depths()
    assert depths["norm.bias"] == 0.0 and depths["head.0.weight"] == 0.9 and depths["conv.weight"] == 0.5


def test_group_depth_wins_and_is_live() -> None:
    model = ConvNet()
    named = list(model.named_parameters())
    optimizer = DALS([{"params": named[:3]}, {"params": named[3:], "depth": 0.2}], depth={"conv.bias": 0.6})
    depths = optimizer.depths()
    assert depths["conv.bias"] == 0.6 and {depths[n] for n, _ in named[3:]} == {0.2}
    optimizer.param_groups[0]["depth"] = 0.4
    assert {optimizer.depths()[n] for n, _ in named[:3]} == {0.4}
    del optimizer.param_groups[1]["depth"]
    assert optimizer.depths()[named[-1][0]] == 1.0


def test_depth_follows_parameters_that_are_swapped() -> None:
    """Wrappers replace the tensors of a group after the optimizer was built; names and places stay."""
    model = mlp(3, 4, 5)
    optimizer = DALS(model)
    expected = optimizer.depths()
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    assert optimizer.depths() == expected


def test_added_groups_join_the_scale() -> None:
    body, head = mlp(3, 4, 5), nn.Linear(5, 2)
    optimizer = DALS([("body." + n, p) for n, p in body.named_parameters()])
    assert optimizer.depths()["body.2.bias"] == 1.0
    optimizer.add_param_group({"params": [("head." + n, p) for n, p in head.named_parameters()]})
    assert optimizer.depths()["body.2.bias"] == 0.5 and optimizer.depths()["head.bias"] == 1.0


def test_a_frozen_backbone_counts() -> None:
    model = mlp(3, 4, 5)
    model[0].requires_grad_(False)
    assert DALS(model).depths()["2.weight"] == 1.0


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        ({"conv.weight": 1.5}, "'conv.weight' must be in [0, 1], got 1.5"),
        ({"conv.weight": float("nan")}, "'conv.weight' must be in [0, 1], got nan"),
        ({"nothing": 0.5}, "DALS: depth key 'nothing' matches no parameter"),
        ({"conv": 0.5}, "depth key 'conv' matches no parameter"),
        ({"conv.(": 0.5}, "depth key 'conv.(' is no parameter name and no regular expression"),
        (
            lambda name, p: -0.1 if name == "norm.bias" else 0.5,
            "group 0: depth of 'norm.bias' must be in [0, 1], got -0.1",
        ),
        ("deep", "depth must be 'auto'"),
        (2.0, "DALS: depth must be in [0, 1], got 2.0"),
    ],
)
def test_depth_errors(depth: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        DALS(ConvNet(), depth=depth)
    assert words in str(caught.value)
    groups = [{"params": nn.Linear(1, 1).parameters()}, {"params": ConvNet().named_parameters(), "depth": depth}]
    groups[0]["params"] = nn.Linear(1, 1).named_parameters()
    with pytest.raises(ValueError, match="group 1: "):
        DALS(groups)


@pytest.mark.parametrize("depth", [None, [0.5], torch.tensor(0.5)])
def test_what_a_depth_may_be_is_listed(depth: Any) -> None:
    with pytest.raises(TypeError) as caught:
        DALS(ConvNet(), depth=depth)
    assert "'auto', a number in [0, 1], a dict of names to numbers, or f(name, parameter), got" in str(caught.value)


@pytest.mark.parametrize("depth", [lambda name: 0.5, lambda: 0.5, lambda name, p, more: 0.5])
def test_a_callable_of_other_arguments(depth: Any) -> None:
    with pytest.raises(TypeError, match=r"DALS: a depth callable is f\(name, parameter\), got one that takes \("):
        DALS(ConvNet(), depth=depth)


def test_an_error_inside_a_callable_is_its_own() -> None:
    with pytest.raises(TypeError, match="not 'list'"):
        DALS(ConvNet(), depth=lambda name, p: float([name]))


def test_a_key_that_is_a_module_says_how_to_name_all_of_it() -> None:
    with pytest.raises(ValueError, match="whole name") as caught:
        DALS(ConvNet(), depth={"head.0": 0.5})
    assert r"For all of 'head.0' write r'head\.0\..*'." in str(caught.value)
    DALS(ConvNet(), depth={r"head\.0\..*": 0.5})


@pytest.mark.parametrize("depth", [{"conv.weight": 0.5}, lambda name, p: 0.5, "auto"])
def test_a_live_depth_is_a_number(depth: Any) -> None:
    optimizer = DALS(ConvNet())
    optimizer.param_groups[0]["depth"] = depth
    for look in (optimizer.depths, optimizer.step):
        with pytest.raises(TypeError, match=r"group 0: depth in param_groups must be a number .* when a group joins"):
            look()


@pytest.mark.parametrize("depth", [None, [0.5], {"conv.weight": "deep"}, lambda name, p: None])
def test_depth_of_a_wrong_type(depth: Any) -> None:
    with pytest.raises(TypeError, match="depth"):
        DALS(ConvNet(), depth=depth)


def test_names_in_a_dict_need_named_parameters() -> None:
    for depth in ({"conv.weight": 0.5}, dict(infer_depths(ConvNet()))):
        with pytest.raises(ValueError, match=r'pass the model itself.*"params": \[\(name, parameter\)'):
            DALS(ConvNet().parameters(), depth=depth)
