"""What PyTorch's own optimizer tests ask of an optimizer, on every path. docs/torch-optim-tests.md has the table."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fused_dals import DALS
from tests.helpers import identical, snapshot

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

OPTIONS: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
WITHOUT_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
PATHS = ["reference", "foreach", pytest.param("fused", marks=WITHOUT_TRITON)]
EVERY_PATH = pytest.mark.parametrize("path", PATHS)


def net(dtype: torch.dtype = F32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(DEVICE, dtype)


def build(path: str, params: Any, **options: Any) -> DALS:
    return DALS(params, **OPTIONS[path], **options)


def random_grads(*models: nn.Module) -> None:
    """The same random gradients for models of the same make."""
    for params in zip(*(model.parameters() for model in models), strict=True):
        grad = torch.randn_like(params[0])
        for p in params:
            p.grad = grad.clone()


def stepped(path: str, steps: int = 1, **options: Any) -> tuple[nn.Sequential, DALS]:
    model = net()
    optimizer = build(path, model, **options)
    for step in range(steps):
        random_grads(model)
        optimizer.step(loss=1.0 / (step + 1))
    return model, optimizer


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class Bowl:
    """||W x + b||^2 with ||x|| = 1: a quadratic whose curvature is at most 4, whatever the draw."""

    def __init__(self, strided: bool = False) -> None:
        room = (2,) if strided else ()
        tensors = [torch.randn(6, 3, *room, device=DEVICE), torch.randn(6, *room, device=DEVICE)]
        self.weight, self.bias = (nn.Parameter(t[..., 0] if strided else t) for t in tensors)
        self.x = nn.functional.normalize(torch.randn(3, device=DEVICE), dim=0)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [("weight", self.weight), ("bias", self.bias)]

    def loss(self) -> Tensor:
        self.weight.grad = self.bias.grad = None
        loss = (self.weight @ self.x + self.bias).square().sum()
        loss.backward()
        return loss.detach()


def advance(schedulers: list[Any], loss: Tensor) -> None:
    for scheduler in schedulers:
        scheduler.step(loss) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()


# -- the direction of a step, groups, schedulers ------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@EVERY_PATH
def test_the_loss_moves_the_right_way(path: str, strided: bool, maximize: bool, seed: int) -> None:
    bowl = Bowl(strided)
    assert bowl.weight.is_contiguous() != strided
    optimizer = build(path, bowl.named(), lr=0.01, weight_decay=0.0, maximize=maximize)
    start = bowl.loss()
    for _ in range(3):
        assert optimizer.step(bowl.loss) is not None
    assert bowl.loss() > start if maximize else bowl.loss() < start


CHAINS: dict[str, list[Callable[[DALS], Any]]] = {
    "step": [lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5)],
    "warm-up, then steps": [
        lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=3),
        lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    ],
    "three at once": [
        lambda o: lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=2),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
    "averaging": [lambda o: torch.optim.swa_utils.SWALR(o, 0.005, anneal_epochs=3)],
}


@pytest.mark.parametrize("chain", CHAINS)
@EVERY_PATH
def test_schedulers_in_a_row_on_two_groups(path: str, chain: str, seed: int) -> None:
    bowl = Bowl()
    groups = [{"params": [("weight", bowl.weight)]}, {"params": [("bias", bowl.bias)], "lr": torch.tensor(0.02)}]
    optimizer = build(path, groups, lr=0.01, weight_decay=0.0)
    schedulers = [make(optimizer) for make in CHAINS[chain]]
    start, seen = bowl.loss(), set()
    for _ in range(5):
        seen.add(float(optimizer.param_groups[1]["lr"]))
        advance(schedulers, optimizer.step(bowl.loss))
    assert bowl.loss() < start and len(seen) > 1
    assert [isinstance(group["lr"], Tensor) for group in optimizer.param_groups] == [False, True]


@EVERY_PATH
def test_groups_equal_optimizers_of_their_own(path: str, seed: int) -> None:
    """A group without decay, one of another lr and one that ascends: the bits of three optimizers."""
    own: list[dict[str, Any]] = [{"weight_decay": 0.0}, {"lr": 0.2}, {"maximize": True, "lr": torch.tensor(0.5)}]
    start = [torch.randn(3, 4, device=DEVICE) for _ in own]
    grouped, alone = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    groups = [{"params": [(f"p{i}", p)], **extra} for i, (p, extra) in enumerate(zip(grouped, own, strict=True))]
    options = {"lr": 0.1, "weight_decay": 0.3, "depth": 0.5}
    optimizers = [build(path, groups, **options)]
    optimizers += [build(path, [("p", p)], **{**options, **extra}) for p, extra in zip(alone, own, strict=True)]
    for loss in (1.0, 0.5):
        for p, q in zip(grouped, alone, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step(loss=loss)
    assert identical([p.detach() for p in grouped], [p.detach() for p in alone])
    assert not any(torch.equal(p, t) for p, t in zip(grouped, start, strict=True))


@EVERY_PATH
def test_a_group_of_vanishing_lr_stands_still(path: str, seed: int) -> None:
    bowl, idle = Bowl(), nn.Parameter(torch.randn(3, device=DEVICE))
    before, start = idle.detach().clone(), bowl.loss()
    groups = [{"params": bowl.named(), "lr": 0.01}, {"params": [("idle", idle)]}]
    optimizer = build(path, groups, lr=1e-28, weight_decay=0.0)
    for _ in range(4):
        loss = bowl.loss()
        idle.grad = torch.randn_like(idle)
        optimizer.step(loss=loss)
    assert torch.equal(before, idle) and bowl.loss() < start
    assert optimizer.state[idle]["momentum_buffer"].abs().sum() > 0


@pytest.mark.parametrize("dims", [0, 1, 2])
@EVERY_PATH
def test_a_tensor_lr_steps_as_a_number_does(path: str, dims: int, seed: int) -> None:
    model = net()
    twin = copy.deepcopy(model)
    lr = torch.full((1,) * dims, 2.0**-4)
    optimizers = build(path, model, lr=2.0**-4), build(path, twin, lr=lr)
    for _ in range(2):
        random_grads(model, twin)
        for optimizer in optimizers:
            optimizer.step(loss=1.0)
    assert identical(snapshot(model, optimizers[0]), snapshot(twin, optimizers[1]))
    assert optimizers[1].param_groups[0]["lr"] is lr and lr.shape == (1,) * dims


# -- nothing to do, nothing done ----------------------------------------------------------------------------------


@EVERY_PATH
def test_no_gradients_no_change(path: str, seed: int) -> None:
    """Neither of parameters that want gradients and have none, nor of plain tensors, integers among them."""
    model = net()
    before = weights(model)
    optimizer = build(path, model)
    assert optimizer.step(lambda: torch.tensor([1.0])) == 1.0
    assert identical(before, weights(model)) and optimizer.trust_ratios() == {}
    tensors = [torch.randn(2, device=DEVICE), torch.tensor([1, 1], device=DEVICE)]
    kept = [t.clone() for t in tensors]
    build(path, tensors, depth=0.5).step(loss=1.0)
    assert identical(kept, tensors)


@EVERY_PATH
def test_zero_gradients_without_decay_change_nothing(path: str, seed: int) -> None:
    model = net()
    before = weights(model)
    optimizer = build(path, model, weight_decay=0.0)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step(loss=1.0)
    assert identical(before, weights(model)) and set(optimizer.trust_ratios().values()) == {1.0}


@pytest.mark.parametrize("maximize", [False, True])
@EVERY_PATH
def test_gradients_are_never_written(path: str, maximize: bool, seed: int) -> None:
    """Neither their values nor their versions, which autograd counts writes by."""
    model = net()
    optimizer = build(path, model, weight_decay=0.1, maximize=maximize)
    for _ in range(2):
        random_grads(model)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        before = [(g.clone(), g._version) for g in grads]
        optimizer.step(loss=1.0)
        assert all(
            torch.equal(g, old) and g._version == version for g, (old, version) in zip(grads, before, strict=True)
        )


@EVERY_PATH
def test_every_parameter_with_a_gradient_has_state(path: str, seed: int) -> None:
    model, optimizer = stepped(path)
    assert set(optimizer.state) == set(model.parameters())
    for p, entry in optimizer.state.items():
        assert {key: value.shape for key, value in entry.items()} == {"grad_ema": p.shape, "momentum_buffer": p.shape}


# -- one result on every path -------------------------------------------------------------------------------------

#: What rounding may do to weights in seven steps; Triton's interpreter truncates where it stores bfloat16.
TOLERANCE = {F64: 1e-12, F32: 1e-5, F16: 8e-3, BF16: 6e-2}
VARIANTS: dict[str, dict[str, Any]] = {
    "warm-up": {"total_steps": 9, "warmup_fraction": 0.3, "weight_decay": 0.0},
    "bypass": {"ema_decay": (1.0, 1.0, 1.0), "weight_decay": 0.0, "trust_clip": (0.0, 9.0)},
    "ascent": {"maximize": True, "restart_steps": 4, "weight_decay": 0.0},
}


AGAINST_REFERENCE: list[Any] = [("foreach", dtype, variant) for dtype in TOLERANCE for variant in VARIANTS]
AGAINST_REFERENCE += [
    pytest.param("fused", dtype, variant, marks=WITHOUT_TRITON)
    for dtype, variant in ((F32, "warm-up"), (F32, "bypass"), (F32, "ascent"), (F16, "warm-up"), (BF16, "ascent"))
]


@pytest.mark.parametrize(("path", "dtype", "variant"), AGAINST_REFERENCE)
def test_paths_agree_through_freezing_and_missing_gradients(
    path: str, dtype: torch.dtype, variant: str, seed: int
) -> None:
    """Seven steps: one without any gradient, two with a frozen layer, and a 0-dimensional parameter at the end."""
    models = []
    for _ in range(2):
        torch.manual_seed(seed)
        model = net(dtype)
        model.register_parameter("scale", nn.Parameter(torch.ones((), dtype=dtype, device=DEVICE)))
        models.append(model)
    optimizers = [build(p, m, lr=0.3, **VARIANTS[variant]) for p, m in zip(("reference", path), models, strict=True)]
    for step in range(7):
        random_grads(*models)
        for model, optimizer in zip(models, optimizers, strict=True):
            model[2].requires_grad_(step not in (3, 4))
            for p in model.parameters():
                if step == 2 or not p.requires_grad:
                    p.grad = None
            optimizer.step(loss=0.9**step)
    bound, of_state = TOLERANCE[dtype], TOLERANCE[F64 if dtype == F64 else F32]
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=bound, atol=bound)
        for key, value in optimizers[0].state[p].items():
            torch.testing.assert_close(value, optimizers[1].state[q][key], rtol=of_state, atol=of_state)
    assert optimizers[0].phases() == optimizers[1].phases()


@pytest.mark.parametrize("path", PATHS[1:])
def test_dtypes_mixed_in_one_group(path: str, seed: int) -> None:
    """Beside a frozen integer tensor, as the reference path steps them."""
    dtypes = [F32, F16, BF16] + [F64] * (path == "foreach")
    start = [torch.rand(2, 3, dtype=d, device=DEVICE) for d in dtypes]
    results = []
    for each in ("reference", path):
        params: list[Tensor] = [nn.Parameter(t.clone()) for t in start]
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        params.insert(1, torch.arange(6, device=DEVICE))
        optimizer = build(each, [(f"p{i}", p) for i, p in enumerate(params)])
        for _ in range(2):
            optimizer.step(loss=1.0)
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=TOLERANCE.get(p.dtype, 0.0), atol=0.0)


@EVERY_PATH
def test_the_default_dtype_is_no_matter(path: str, seed: int) -> None:
    results = []
    for default in (F32, F64, F16):
        torch.manual_seed(seed)
        model = net()
        grads = [torch.randn_like(p) for p in model.parameters()]
        torch.set_default_dtype(default)
        try:
            optimizer = build(path, model, total_steps=5)
            for loss in (1.0, 0.7):
                for p, grad in zip(model.parameters(), grads, strict=True):
                    p.grad = grad.clone()
                optimizer.step(loss=loss)
            saved = optimizer.state_dict()["param_groups"]
        finally:
            torch.set_default_dtype(F32)
        results.append((snapshot(model, optimizer), saved))
    for tensors, saved in results[1:]:
        assert identical(results[0][0], tensors) and saved == results[0][1]


class Operators(TorchDispatchMode):
    """The names of all operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_foreach_is_the_default(seed: int) -> None:
    """Without foreach= the step is made of torch._foreach operators, and gives the bits of foreach=True."""
    start, results, used = net(), [], []
    for options in ({}, {"foreach": True}, {"foreach": False}):
        torch.manual_seed(seed)
        model = copy.deepcopy(start)
        optimizer = DALS(model, **options)
        random_grads(model)
        with Operators() as operators:
            optimizer.step(loss=1.0)
        results.append(snapshot(model, optimizer))
        used.append(any("_foreach_" in name for name in operators.names))
    assert used == [True, True, False]
    assert identical(results[0], results[1])


@WITHOUT_TRITON
def test_fused_on_the_meta_device(seed: int) -> None:
    """An error while there are gradients; without them such parameters are passed over, and get memory later."""
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = DALS(model, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="'weight' of group 0: it is on the meta device"):
        optimizer.step(loss=1.0)
    optimizer.zero_grad()
    optimizer.step(loss=1.0)
    model.to_empty(device=DEVICE)  # makes new parameters
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.ones_like(p)
    DALS(model, fused=True).step(loss=1.0)
    assert all(bool((p < 1).all()) for p in model.parameters())


def test_real_and_imaginary_parts_apart_are_two_tensors(seed: int) -> None:
    """Why complex parameters are refused: torch asks for the step of the two parts, each of which has norms of its own.

    As pairs of real numbers in one tensor they have one trust ratio, apart they have two.
    """
    z, grad = torch.randn(5, dtype=torch.complex128), torch.tensor([3.0 + 0.1j]).expand(5).to(torch.complex128)
    pairs = nn.Parameter(torch.view_as_real(z).clone())
    parts = [nn.Parameter(part.clone()) for part in (z.real, z.imag)]
    pairs.grad = torch.view_as_real(grad.contiguous()).clone()
    parts[0].grad, parts[1].grad = grad.real.clone(), grad.imag.clone()
    options: dict[str, Any] = {"depth": 0.5, "trust_clip": (0.0, 1e3), "weight_decay": 0.0}
    together, apart = DALS([("z", pairs)], **options), DALS([("re", parts[0]), ("im", parts[1])], **options)
    together.step(loss=1.0)
    apart.step(loss=1.0)
    real, imaginary = apart.trust_ratios().values()
    assert real < together.trust_ratios()["z"] < imaginary
    assert not torch.allclose(pairs, torch.stack([p.detach() for p in parts], -1))


# -- construction and errors --------------------------------------------------------------------------------------


@EVERY_PATH
def test_groups_that_share_or_half_name_parameters_are_refused(path: str) -> None:
    p, q = (nn.Parameter(torch.ones(1, 1, device=DEVICE)) for _ in range(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        build(path, [{"params": p}, {"params": p}], depth=0.5)
    with pytest.raises(ValueError, match="with/without names"):
        build(path, [{"params": [p], "lr": 0.01}, {"params": [("weight", q)]}], depth=0.5)
    with pytest.raises(ValueError, match="with/without names"):
        build(path, [("weight", p), q])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        build(path, [p, p], depth=0.5)
    with pytest.raises(ValueError, match="lr must be"):
        build(path, [p], lr=torch.tensor([0.1, 0.1]))


def test_no_differentiable_step() -> None:
    with pytest.raises(TypeError, match="differentiable"):
        DALS(net(), differentiable=True)


@EVERY_PATH
def test_repr_shows_the_groups(path: str) -> None:
    text = repr(build(path, net(), momentum=0.875))
    assert text.startswith("DALS") and "Parameter Group 0" in text and "momentum: 0.875" in text


# -- copies and checkpoints ---------------------------------------------------------------------------------------


COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("copier", COPIERS)
@EVERY_PATH
def test_a_copy_has_all_public_attributes_and_goes_on_alike(path: str, copier: str, seed: int) -> None:
    model, optimizer = stepped(path, total_steps=9)
    twin, other = COPIERS[copier]((model, optimizer))
    assert [{k for k in vars(o) if k[0] != "_"} for o in (optimizer, other)] == 2 * [
        {"defaults", "state", "param_groups"}
    ]
    random_grads(model, twin)
    for o in (optimizer, other):
        o.step(loss=0.4)
    assert identical(snapshot(model, optimizer), snapshot(twin, other))


def without_names(saved: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "param_names"} for group in saved["param_groups"]]


def as_given(model: nn.Module, named: bool) -> Any:
    return model.named_parameters() if named else model.parameters()


@pytest.mark.filterwarnings("ignore:DALS got parameters without names")
@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, False)])
@EVERY_PATH
def test_a_state_dict_says_the_same_of_equal_runs(path: str, first: bool, second: bool, seed: int) -> None:
    """Named or not: a checkpoint carried to clones goes on alike, and says the same of them afterwards."""
    model = net()
    optimizer = build(path, as_given(model, first))
    random_grads(model)
    optimizer.step(loss=1.0)
    twin = copy.deepcopy(model)
    other = build(path, as_given(twin, second))
    other.load_state_dict(optimizer.state_dict())
    random_grads(model, twin)
    for o in (optimizer, other):
        o.step(loss=0.5)
    assert identical(snapshot(model, optimizer), snapshot(twin, other))
    assert without_names(optimizer.state_dict()) == without_names(other.state_dict())
    other.param_groups.extend(other.param_groups)
    assert without_names(other.state_dict())[-1] == without_names(optimizer.state_dict())[-1]


@pytest.mark.filterwarnings("ignore:DALS got parameters without names")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
@EVERY_PATH
def test_names_outlive_a_checkpoint_if_either_side_has_them(path: str, first: bool, second: bool, seed: int) -> None:
    model = net()
    a, b = (build(path, as_given(model, named)) for named in (first, second))
    random_grads(model)
    a.step(loss=1.0)
    b.load_state_dict(a.state_dict())
    names = [name for name, _ in model.named_parameters()] if first or second else None
    assert b.state_dict()["param_groups"][0].get("param_names") == names
    random_grads(model)
    b.step(loss=1.0)
    if first:
        assert b.depths() == a.depths() == {"0.weight": 0.0, "0.bias": 0.0, "2.weight": 1.0, "2.bias": 1.0}


def test_names_from_a_checkpoint_leave_the_depths_that_were_said() -> None:
    model = net()
    named = DALS(model)
    unnamed = DALS(list(model.parameters()), depth=lambda _, p: 0.25 if p.ndim == 1 else 0.75)
    unnamed.load_state_dict(named.state_dict())
    assert unnamed.depths() == {"0.weight": 0.75, "0.bias": 0.25, "2.weight": 0.75, "2.bias": 0.25}


#: The keys of a group in a checkpoint of version 0.1. It must be readable for good: append to no such list.
KEYS_OF_0_1 = {
    "params", "param_names", "lr", "momentum", "weight_decay", "trust_coefficient", "trust_clip", "ema_decay",
    "phase_thresholds", "total_steps", "warmup_fraction", "restart_steps", "restart_mult", "maximize", "foreach",
    "fused", "step", "loss_ema", "loss_drop",
}  # fmt: skip


@EVERY_PATH
def test_a_checkpoint_of_the_first_version_loads(path: str, seed: int) -> None:
    """Keys that came later are missing in it; the optimizer's own values stand in."""
    model, optimizer = stepped(path, 2, total_steps=9)
    twin = copy.deepcopy(model)
    old = copy.deepcopy(optimizer.state_dict())
    assert KEYS_OF_0_1.issubset(old["param_groups"][0])
    old["param_groups"] = [{k: v for k, v in group.items() if k in KEYS_OF_0_1} for group in old["param_groups"]]
    old["state"] = {
        index: {key: entry[key] for key in ("grad_ema", "momentum_buffer")} for index, entry in old["state"].items()
    }
    other = build(path, twin)
    other.load_state_dict(old)
    random_grads(model, twin)
    for o in (optimizer, other):
        o.step(loss=0.2)
    assert identical(snapshot(model, optimizer), snapshot(twin, other))
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()


def tensors_of(saved: dict[str, Any]) -> list[Tensor]:
    return [value for entry in saved["state"].values() for value in entry.values()]


@pytest.mark.parametrize("weights_only", [True, False])
@EVERY_PATH
def test_a_file_holds_what_the_state_dict_held(path: str, weights_only: bool, seed: int) -> None:
    _, optimizer = stepped(path, 2, lr=torch.tensor(0.25), restart_steps=3)
    saved = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)
    assert loaded["param_groups"] == saved["param_groups"] and identical(tensors_of(loaded), tensors_of(saved))
    assert all(type(group["step"]) is int for group in loaded["param_groups"])  # so there is no tensor to convert


@EVERY_PATH
def test_a_checkpoint_from_the_cpu_goes_on_where_the_parameters_are(path: str, seed: int) -> None:
    """On a GPU the state goes there; the checkpoint itself stays as it was, where it was."""
    model, optimizer = stepped(path, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry.update({key: value.cpu() for key, value in entry.items()})
    kept = copy.deepcopy(saved)
    twin = copy.deepcopy(model)
    other = build(path, twin)
    other.load_state_dict(saved)
    assert identical(tensors_of(saved), tensors_of(kept)) and saved["param_groups"] == kept["param_groups"]
    assert {value.device.type for value in tensors_of(saved)} == {"cpu"}
    assert {value.device.type for value in tensors_of(other.state_dict())} == {DEVICE.type}
    random_grads(model, twin)
    for o in (optimizer, other):
        o.step(loss=0.4)
    assert identical(snapshot(model, optimizer), snapshot(twin, other))


# -- hooks --------------------------------------------------------------------------------------------------------


@EVERY_PATH
def test_state_dict_hooks(path: str, seed: int) -> None:
    """Before: a hook's entry in the state is in the dict, and steps go on. After: what a hook returns is what comes."""
    model, optimizer = stepped(path)
    order: list[str] = []

    def note(o: torch.optim.Optimizer) -> None:
        order.append("note")
        o.state["note"] = 7  # type: ignore[index]

    def take_out(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        order.append("take out")
        return {**saved, "state": {k: v for k, v in saved["state"].items() if k != "note"}, "noted": True}

    before = optimizer.register_state_dict_pre_hook(note)
    assert optimizer.state_dict()["state"]["note"] == 7
    for _ in range(2):
        random_grads(model)
        optimizer.step(loss=1.0)
    optimizer.register_state_dict_pre_hook(lambda _: order.append("first"), prepend=True)
    after = optimizer.register_state_dict_post_hook(take_out)
    order.clear()
    saved = optimizer.state_dict()
    assert order == ["first", "note", "take out"] and saved["noted"] and set(saved["state"]) == {0, 1, 2, 3}
    replaced = optimizer.register_state_dict_post_hook(lambda _, saved: {"lr": saved["param_groups"][0]["lr"]})
    assert optimizer.state_dict() == {"lr": 0.03}
    for handle in (before, after, replaced):
        handle.remove()
    assert optimizer.state_dict().keys() == {"state", "param_groups"}


@EVERY_PATH
def test_load_hooks_their_order_and_removal(path: str, seed: int) -> None:
    model, optimizer = stepped(path)
    saved = copy.deepcopy(optimizer.state_dict())
    order: list[Any] = []

    def in_place(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        order.append("in place")
        state["param_groups"][0]["lr"] = 0.25

    def replaced(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        order.append("replaced")
        state = copy.deepcopy(state)
        state["param_groups"][0].update(lr=0.5, momentum=0.75)
        return state

    first = optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.register_load_state_dict_pre_hook(replaced, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: order.append(o.param_groups[0]["lr"]))
    optimizer.register_load_state_dict_post_hook(lambda _: order.append("early"), prepend=True)
    order.clear()
    optimizer.load_state_dict(saved)
    assert order == ["replaced", "in place", "early", 0.25] and optimizer.param_groups[0]["momentum"] == 0.75
    first.remove()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    random_grads(model)
    optimizer.step(loss=1.0)


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """What the global hooks, here for the length of a test, and others write down."""
    noted: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: noted.append("global before")),
        register_optimizer_step_post_hook(lambda *_: noted.append("global after")),
    ]
    yield noted
    for handle in handles:
        handle.remove()


@EVERY_PATH
def test_step_hooks_global_and_own(path: str, calls: list[str], seed: int) -> None:
    """In torch's order and beside another optimizer; the steps count on when all are removed."""
    model, optimizer = stepped(path)
    others = [optimizer, torch.optim.SGD(model.parameters(), lr=0.0)]
    handles = [o.register_step_pre_hook(lambda *_: calls.append("before")) for o in others]
    handles += [o.register_step_post_hook(lambda *_: calls.append("after")) for o in others]
    expected = ["global before", "before", "after", "global after"]
    calls.clear()
    for o in (*others, optimizer):
        o.step()
    assert calls == 3 * expected
    for handle in handles:
        handle.remove()
    calls.clear()
    optimizer.step()
    assert calls == ["global before", "global after"] and optimizer.state_dict()["param_groups"][0]["step"] == 4


@EVERY_PATH
def test_a_pre_hook_may_change_the_arguments_of_a_step(path: str, seed: int) -> None:
    _, optimizer = stepped(path, 0)
    optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "loss": 8.0}))
    optimizer.step(loss=1.0)
    assert optimizer.state_dict()["param_groups"][0]["loss_ema"] == 8.0


# -- the table ----------------------------------------------------------------------------------------------------


def test_the_table_names_tests_that_exist() -> None:
    here = Path(__file__).parent
    table = (here.parent / "docs" / "torch-optim-tests.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    methods = [row[0] for row in rows]
    assert len(rows) > 40 and len(set(methods)) == len(methods) and all(len(row) == 4 for row in rows)
    for method, applies, tests, remark in rows:
        named = re.findall(r"`(\w+\.py)::(\w+)`", tests)
        assert applies in ("yes", "in part", "no") and (named or applies == "no"), method
        assert remark or applies == "yes", f"{method}: the reason is missing"
        for file, name in named:
            assert re.search(rf"^def {name}\(", (here / file).read_text(), re.MULTILINE), f"{file}::{name}"
