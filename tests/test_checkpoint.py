"""Checkpoints: bit-identical resumption through every format, precision kept, and nothing lost on a bad one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS
from tests.helpers import EVERY_PATH, PATHS, PRESETS, ConvNet, batch, identical, snapshot, train_step

SCHEDULES: dict[str, dict[str, Any]] = {
    "warmup": {"restart_steps": None, "total_steps": 40, "warmup_fraction": 0.5},
    "restarts": {"restart_steps": 7, "restart_mult": 1.5},
}

every_path = pytest.mark.parametrize("path", EVERY_PATH)


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CARRIERS: dict[str, Callable[[Any], Any]] = {
    "dict": lambda state: state,
    "torch.save": through_file,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "deepcopy": copy.deepcopy,
}


def resumed_run(
    stop: int, carry: Callable[[Any], Any], build: Callable[[nn.Module], DALS], dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and state of an unbroken run of 30 steps, and of one that stopped after ``stop`` and went on anew."""
    torch.manual_seed(seed)
    data = [batch(dtype) for _ in range(30)]
    start = ConvNet().to(dtype)

    model = copy.deepcopy(start)
    optimizer = build(model)
    for one in data:
        train_step(model, optimizer, one)
    unbroken = snapshot(model, optimizer)

    first = copy.deepcopy(start)
    before = build(first)
    for one in data[:stop]:
        train_step(first, before, one)
    saved = carry({"model": first.state_dict(), "optimizer": before.state_dict()})
    second = ConvNet().to(dtype)
    second.load_state_dict(saved["model"])
    after = build(second)
    after.load_state_dict(saved["optimizer"])
    for one in data[stop:]:
        train_step(second, after, one)
    return unbroken, snapshot(second, after)


@pytest.mark.parametrize("stop", [0, 1, 3, 10, 11, 29])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("preset", PRESETS)
def test_resuming_is_bit_identical(preset: str, schedule: str, stop: int, seed: int) -> None:
    """Mid warm-up, mid cycle, mid phase, before the first step."""

    def build(model: nn.Module) -> DALS:
        return PRESETS[preset](model, **SCHEDULES[schedule])

    assert identical(*resumed_run(stop, through_file, build, torch.float32, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_carrier_and_dtype(carrier: str, path: str, dtype: torch.dtype, seed: int) -> None:
    assert identical(
        *resumed_run(9, CARRIERS[carrier], lambda m: DALS(m, foreach=PATHS[path], total_steps=30), dtype, seed)
    )


def test_a_forgotten_counter_would_show(seed: int) -> None:
    """Negative control: a resumption that loses the step count or the loss EMA is not bit-identical."""
    for key, value in (("step", 0), ("loss_ema", float("inf"))):

        def forget(state: Any, key: str = key, value: Any = value) -> Any:
            state = copy.deepcopy(state)
            state["optimizer"]["param_groups"][0][key] = value
            return state

        assert not identical(*resumed_run(9, forget, lambda m: DALS(m, total_steps=30), torch.float32, seed)), key


def test_a_checkpoint_moves_between_the_paths(seed: int) -> None:
    model = ConvNet()
    fast = DALS(model)
    for _ in range(3):
        train_step(model, fast, batch(torch.float32))
    slow = DALS(model, foreach=False)
    saved = fast.state_dict()
    saved["param_groups"][0]["foreach"] = False
    slow.load_state_dict(saved)
    assert identical(snapshot(model, fast), snapshot(model, slow))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_float32_state(dtype: torch.dtype, seed: int) -> None:
    model = ConvNet().to(dtype)
    optimizer = DALS(model)
    train_step(model, optimizer, batch(dtype))
    fresh = DALS(model)
    fresh.load_state_dict(through_file(optimizer.state_dict()))
    for p in model.parameters():
        for key in ("grad_ema", "momentum_buffer"):
            value = fresh.state[p][key]
            assert value.dtype == torch.float32 and torch.equal(value, optimizer.state[p][key])
            assert not torch.equal(value, value.to(dtype).float()) or value.numel() < 8, "float32 must be needed"


def test_loading_copies_into_existing_state_and_aliases_nothing(seed: int) -> None:
    model = ConvNet()
    a, b = DALS(model), DALS(model)
    train_step(model, a, batch(torch.float32))
    train_step(model, b, batch(torch.float32))
    addresses = [value.data_ptr() for p in model.parameters() for value in b.state[p].values()]
    b.load_state_dict(a.state_dict())
    assert addresses == [value.data_ptr() for p in model.parameters() for value in b.state[p].values()]
    fresh = DALS(model)
    fresh.load_state_dict(a.state_dict())
    p = next(model.parameters())
    before = a.state[p]["grad_ema"].clone()
    fresh.state[p]["grad_ema"].add_(1)
    assert torch.equal(before, a.state[p]["grad_ema"])


@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_copies_of_the_optimizer_train_on_alike(copier: str, seed: int) -> None:
    """Copied together with its model an optimizer goes on as the original does, counters and depths included."""
    model = ConvNet()
    optimizer = DALS(model, total_steps=20, depth={"head.*": 0.3})
    for _ in range(5):
        train_step(model, optimizer, batch(torch.float32))
    pair = (model, optimizer)
    other_model, other = copy.deepcopy(pair) if copier == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.depths() == optimizer.depths() and other.current_lr() == optimizer.current_lr()
    assert other.phases() == optimizer.phases() and other.trust_ratios() == optimizer.trust_ratios()
    for _ in range(5):
        data = batch(torch.float32)
        train_step(model, optimizer, data)
        train_step(other_model, other, data)
    assert identical(snapshot(model, optimizer), snapshot(other_model, other))
    assert {k for k in vars(optimizer) if k[0] != "_"} == {k for k in vars(other) if k[0] != "_"}


def test_hyperparameters_and_foreign_keys_come_back_names_stay(seed: int) -> None:
    model = ConvNet()
    saved_from = DALS(model, lr=torch.tensor(0.07), momentum=0.5)
    saved_from.param_groups[0].update({"mine": "x", "initial_lr": 0.2, "depth": 0.25})
    train_step(model, saved_from, batch(torch.float32))
    saved = through_file(saved_from.state_dict())
    saved["param_groups"][0]["param_names"] = ["module." + n for n in saved["param_groups"][0]["param_names"]]
    optimizer = DALS(model)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert group["momentum"] == 0.5 and torch.equal(group["lr"], torch.tensor(0.07))
    assert group["mine"] == "x" and group["initial_lr"] == 0.2
    assert group["param_names"][0] == "scale" and set(optimizer.depths().values()) == {0.25}


def test_state_dict_holds_tensors_of_the_parameters_shape_and_plain_numbers(seed: int) -> None:
    model = ConvNet()
    optimizer = DALS(model, total_steps=9)
    train_step(model, optimizer, batch(torch.float32))
    saved = optimizer.state_dict()
    for p, entry in zip(model.parameters(), saved["state"].values(), strict=True):
        assert {k: v.shape for k, v in entry.items()} == {"grad_ema": p.shape, "momentum_buffer": p.shape}
    for key, value in saved["param_groups"][0].items():
        flat = value if isinstance(value, (list, tuple)) else [value]
        assert all(v is None or isinstance(v, (int, float, str, torch.dtype)) for v in flat), key


def test_load_hooks_run_and_may_replace_the_dict(seed: int) -> None:
    model = ConvNet()
    optimizer = DALS(model)
    saved = optimizer.state_dict()
    calls = []

    def pre(_: Any, state: Any) -> Any:
        calls.append("pre")
        state = copy.deepcopy(state)
        state["param_groups"][0]["momentum"] = 0.25
        return state

    optimizer.register_load_state_dict_pre_hook(pre)
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("post"))
    optimizer.load_state_dict(saved)
    assert calls == ["pre", "post"] and optimizer.param_groups[0]["momentum"] == 0.25


def test_foreign_state_entries_do_not_break_saving(seed: int) -> None:
    model = ConvNet()
    optimizer = DALS(model)
    train_step(model, optimizer, batch(torch.float32))
    optimizer.state[model.scale]["note"] = "mine"
    assert optimizer.state_dict()["state"][0]["note"] == "mine"


#: As torch's optimizers load them: under keys that are no parameter's.
OTHERS: dict[Any, Any] = {"global": {"k": [3]}, "ema": {"shadow": torch.ones(5)}, ("a", 1): 3}


@every_path
def test_what_somebody_else_keeps_in_the_state_comes_along(path: str, seed: int) -> None:
    """As with torch's optimizers: of a parameter, as Lookahead keeps its slow weights, and of none."""
    model = ConvNet()
    optimizer = DALS(model, **EVERY_PATH[path])
    optimizer.state[model.scale]["slow"] = torch.ones(4)  # before there is any other state
    for _ in range(2):
        train_step(model, optimizer, batch(torch.float32))
    kernel, bias = [*model.parameters()][1:3]
    optimizer.state[kernel]["count"] = 3
    optimizer.state[kernel]["history"] = [1, {"at": torch.ones(2)}]
    for key, value in OTHERS.items():
        optimizer.state[key] = value
    frozen = [*model.parameters()][-2].requires_grad_(False)
    del optimizer.state[frozen]
    frozen.grad = None
    optimizer.state[frozen].update(tag=7, shadow=torch.ones(2))
    saved = copy.deepcopy(optimizer.state_dict())
    train_step(model, optimizer, batch(torch.float32))
    optimizer.state[kernel]["count"] = 4
    optimizer.state[bias]["later"] = 1
    optimizer.state["late"] = 1  # type: ignore[index]
    optimizer.load_state_dict(saved)
    assert optimizer.state[kernel]["count"] == 3 and "later" not in optimizer.state[bias]
    assert torch.equal(optimizer.state[model.scale]["slow"], torch.ones(4))
    keys = set(optimizer.state)
    assert set(OTHERS) <= keys and "late" not in keys
    for key, value in OTHERS.items():
        found: Any = optimizer.state[key]
        assert torch.equal(found["shadow"], value["shadow"]) if key == "ema" else found == value
    assert optimizer.state[frozen]["tag"] == 7 and torch.equal(optimizer.state[frozen]["shadow"], torch.ones(2))
    history = optimizer.state[kernel]["history"]
    history.append(2)
    history[1]["at"] += 1
    assert len(saved["state"][1]["history"]) == 2 and torch.equal(saved["state"][1]["history"][1]["at"], torch.ones(2))
    train_step(model, optimizer, batch(torch.float32))


def test_a_depth_that_was_set_since_goes_with_the_checkpoint(seed: int) -> None:
    model = ConvNet()
    optimizer = DALS(model)
    depths, saved = optimizer.depths(), copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["depth"] = 0.9
    optimizer.load_state_dict(saved)
    assert optimizer.depths() == depths and "depth" not in optimizer.param_groups[0]


@every_path
@pytest.mark.parametrize("inside", ["load", "first step", "construction", "state_dict"])
def test_inference_mode_leaves_state_that_can_be_trained(path: str, inside: str, seed: int) -> None:
    """A loader that is a torch.inference_mode function, say."""
    found = []
    for mode in (True, False):
        torch.manual_seed(seed)
        model = ConvNet()
        data = batch(torch.float32)
        first = DALS(model, **EVERY_PATH[path])
        train_step(model, first, data)
        saved = copy.deepcopy(first.state_dict())
        with torch.inference_mode(mode and inside == "construction"):
            optimizer = DALS(model, **EVERY_PATH[path])
        if inside == "load":
            with torch.inference_mode(mode):
                optimizer.load_state_dict(saved)
        if inside == "first step":
            loss = nn.functional.cross_entropy(model(data[0]), data[1])
            loss.backward()
            with torch.inference_mode(mode):
                optimizer.step(loss=loss)
        if inside == "state_dict":
            for p in [*model.parameters()][:3]:
                p.requires_grad_(False)
            train_step(model, optimizer, data)
            for p in model.parameters():
                p.requires_grad_(True)
            with torch.inference_mode(mode):
                optimizer.state_dict()
        for _ in range(2):
            train_step(model, optimizer, data)
        found.append(snapshot(model, optimizer))
    assert identical(*found)


@every_path
def test_parameters_of_inference_mode_are_stepped_inside_it(path: str, seed: int) -> None:
    with torch.inference_mode():
        p = nn.Parameter(torch.randn(5), requires_grad=False)
        p.grad = torch.randn(5)
        optimizer = DALS([("p", p)], **EVERY_PATH[path])
        before = p.clone()
        for _ in range(3):
            optimizer.step(loss=1.0)
        assert not torch.equal(p, before)


def test_a_closure_runs_in_the_mode_of_its_caller(seed: int) -> None:
    model = ConvNet()
    optimizer = DALS(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    modes = []

    def closure() -> Tensor:
        modes.append(torch.is_inference_mode_enabled())
        loss: Tensor = model(torch.randn(2, 1, 4, 4)).mean()
        return loss

    with torch.inference_mode():
        optimizer.step(closure)
    optimizer.step(closure)
    assert modes == [True, False]
    train_step(model, optimizer, batch(torch.float32))


@every_path
def test_a_frozen_parameter_of_inference_mode_keeps_nobody_inside_it(path: str, seed: int) -> None:
    model = ConvNet()
    with torch.inference_mode():
        frozen = nn.Parameter(torch.randn(3), requires_grad=False)
    optimizer = DALS([*model.named_parameters(), ("frozen", frozen)], **EVERY_PATH[path])
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with torch.inference_mode():
        optimizer.step(loss=1.0)
    train_step(model, optimizer, batch(torch.float32))


@pytest.mark.parametrize("foreach", [True, False])
def test_state_of_inference_mode_is_refused_before_anything_is_written(foreach: bool, seed: int) -> None:
    model = ConvNet()
    optimizer = DALS(model, foreach=foreach)
    train_step(model, optimizer, batch(torch.float32))
    with torch.inference_mode():
        optimizer.state[[*model.parameters()][-2]]["grad_ema"] = torch.zeros(3, 16)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"head\.2\.weight.*grad_ema was made in torch\.inference_mode\(\)"):
        train_step(model, optimizer, batch(torch.float32))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.load_state_dict(optimizer.state_dict())  # brings it into memory that can be written
    train_step(model, optimizer, batch(torch.float32))


def test_state_appears_and_vanishes_with_the_checkpoint(seed: int) -> None:
    model = ConvNet()
    optimizer = DALS(model)
    empty = copy.deepcopy(optimizer.state_dict())
    train_step(model, optimizer, batch(torch.float32))
    optimizer.load_state_dict(empty)
    assert not optimizer.state and optimizer.param_groups[0]["step"] == 0 and optimizer.phases() == [1]


def spoil(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        saved["param_groups"][0][key] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return change


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = value

    return change


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no state": (drop("state"), "'state' is missing"),
    "no groups": (drop("param_groups"), "'param_groups' is missing"),
    "group too many": (lambda s: s["param_groups"].append(s["param_groups"][0]), "different number of parameter"),
    "params missing": (drop("param_groups", 0, "params"), "group 0: 'params' is missing"),
    "params too few": (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size"),
    "no step": (drop("param_groups", 0, "step"), "'step' is missing"),
    "negative step": (spoil("step", -1), "'step' must be an integer >= 0"),
    "fractional step": (spoil("step", 1.5), "'step' must be an integer >= 0"),
    "text loss": (spoil("loss_ema", "low"), "'loss_ema' must be a number"),
    "no momentum": (drop("param_groups", 0, "momentum"), "momentum is missing"),
    "bad lr": (spoil("lr", -1.0), "group 0: lr must be"),
    "bad clip": (spoil("trust_clip", (5.0, 0.2)), "trust_clip must be"),
    "foreign id": (put({"grad_ema": 1}, "state", 99), "state entry 99 belongs to no parameter"),
    "missing entry": (drop("state", 1, "grad_ema"), "'conv.weight' has entries ['momentum_buffer']"),
    "needless entry": (put(torch.zeros(4, dtype=torch.int16), "state", 2, "compensation"), "'compensation'"),
    "another optimizer's": (put({"exp_avg": torch.ones(4)}, "state", 2), "['exp_avg']"),
    "by name": (put({"grad_ema": torch.ones(4)}, "state", "conv.bias"), "state entry 'conv.bias' belongs to no"),
    "wrong shape": (put(torch.ones(3), "state", 1, "grad_ema"), "grad_ema of parameter 'conv.weight' has shape (3,)"),
    "wrong type": (put("x", "state", 2, "momentum_buffer"), "momentum_buffer of parameter 'conv.bias' must be a"),
    "wrong dtype": (put(torch.ones(4, dtype=torch.int64), "state", 2, "grad_ema"), "must be a floating tensor, got"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_checkpoint_changes_nothing_and_is_named(bad: str, seed: int) -> None:
    change, words = BAD[bad]
    model = ConvNet()
    optimizer = DALS(model)
    train_step(model, optimizer, batch(torch.float32))
    before, groups = snapshot(model, optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["grad_ema"] += 1
    saved["param_groups"][0]["momentum"] = 0.1
    change(saved)
    with pytest.raises((ValueError, TypeError)) as caught:
        optimizer.load_state_dict(saved)
    assert words in str(caught.value)
    assert identical(before, snapshot(model, optimizer))
    assert optimizer.state_dict()["param_groups"] == groups


def test_counters_must_agree_between_groups(seed: int) -> None:
    model = ConvNet()
    named = list(model.named_parameters())
    optimizer = DALS([{"params": named[:2]}, {"params": named[2:]}])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["step"] = 9
    with pytest.raises(ValueError, match="group 1: 'step' is 9, in group 0 it is 0"):
        optimizer.load_state_dict(saved)


def test_groups_are_copied_not_shared(seed: int) -> None:
    a, b = DALS(ConvNet(), lr=torch.tensor(0.1)), DALS(ConvNet())
    saved = a.state_dict()
    b.load_state_dict(saved)
    b.param_groups[0]["lr"].fill_(9.0)
    assert a.param_groups[0]["lr"] == torch.tensor(0.1)


def test_numpy_numbers_survive_a_weights_only_load() -> None:
    np = pytest.importorskip("numpy")
    optimizer = DALS(ConvNet(), lr=np.float64(0.1), momentum=np.float32(0.5), total_steps=np.int64(5))
    group = through_file(optimizer.state_dict())["param_groups"][0]
    assert (group["lr"], group["momentum"], group["total_steps"]) == (0.1, 0.5, 5)


def test_another_optimizers_checkpoint_is_refused(seed: int) -> None:
    model = ConvNet()
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="written by another optimizer"):
        DALS(model).load_state_dict(adam.state_dict())
