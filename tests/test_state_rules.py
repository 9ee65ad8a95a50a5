"""What real training does to an optimizer's state and parameters, on every path and with every kind of state."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS
from tests.helpers import EVERY_PATH, ConvNet, batch, identical, snapshot, train_step

F32, BF16 = torch.float32, torch.bfloat16
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16 state": {"state_dtype": BF16},
    "compensated": {"compensated": True},
    "compensated, bfloat16 state": {"compensated": True, "state_dtype": BF16},
    "clipped": {"max_grad_norm": 0.3, "skip_nonfinite": True},
}

every_path = pytest.mark.parametrize("path", EVERY_PATH)
every_kind = pytest.mark.parametrize("kind", KINDS)


class Net(ConvNet):
    """Takes float32 inputs whatever its parameters are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.scale.dtype)).float()


def net(kind: str) -> Net:
    return Net().to(BF16 if "compensated" in kind else F32)


def build(model: nn.Module, path: str, kind: str = "plain") -> DALS:
    return DALS(model, lr=0.2, total_steps=20, **EVERY_PATH[path], **KINDS[kind])


def file(saved: Any, **load: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, **load)


def tensors_and_text(saved: dict[str, Any]) -> dict[str, Any]:
    """As formats for tensors carry it: a flat dict of contiguous tensors of their own, the rest as text."""
    flat = {f"{i}.{key}": value.contiguous() for i, entry in saved["state"].items() for key, value in entry.items()}
    storages = [value.untyped_storage() for value in flat.values()]
    assert len({s.data_ptr() for s in storages}) == len(storages), "no two share memory"
    assert all(s.nbytes() == v.nbytes for s, v in zip(storages, flat.values(), strict=True)), "none drags more along"
    raw = {name: (bytes(v.view(torch.uint8).flatten().tolist()), v.dtype, v.shape) for name, v in flat.items()}
    groups = json.loads(json.dumps(saved["param_groups"], default=str))
    for group in groups:
        group["state_dtype"] = getattr(torch, group["state_dtype"].removeprefix("torch."))
        group.update({key: tuple(value) for key, value in group.items() if isinstance(value, list) and key != "params"})
        group["param_names"] = list(group["param_names"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, (data, dtype, shape) in raw.items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    return {"state": state, "param_groups": groups}


CARRIERS: dict[str, Callable[[Any], Any]] = {
    "weights only": lambda saved: file(saved, weights_only=True),
    "tensors and text": tensors_and_text,
    "pickle": lambda saved: pickle.loads(pickle.dumps(saved)),
}


@every_path
@every_kind
@pytest.mark.parametrize("carrier", CARRIERS)
def test_resuming_is_bit_identical(path: str, kind: str, carrier: str, seed: int) -> None:
    model, data = net(kind), batch(F32)
    optimizer = build(model, path, kind)
    for _ in range(3):
        train_step(model, optimizer, data)
    other = copy.deepcopy(model)
    resumed = build(other, path, kind)
    resumed.load_state_dict(CARRIERS[carrier](optimizer.state_dict()))
    assert identical(snapshot(model, optimizer), snapshot(other, resumed))
    for _ in range(2):
        train_step(model, optimizer, data)
        train_step(other, resumed, data)
    assert identical(snapshot(model, optimizer), snapshot(other, resumed))


@every_path
@every_kind
def test_a_running_optimizer_takes_a_checkpoint_into_its_memory(path: str, kind: str, seed: int) -> None:
    model, data = net(kind), batch(F32)
    optimizer = build(model, path, kind)
    train_step(model, optimizer, data)
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train_step(model, optimizer, data)
    after = snapshot(model, optimizer)
    memory = [value.data_ptr() for entry in optimizer.state.values() for value in entry.values()]
    train_step(model, optimizer, data)
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    assert memory == [value.data_ptr() for entry in optimizer.state.values() for value in entry.values()]
    train_step(model, optimizer, data)
    assert identical(after, snapshot(model, optimizer))


@every_kind
@pytest.mark.parametrize(("one", "two"), [("fused", "foreach"), ("foreach", "fused"), ("reference", "fused")])
def test_a_checkpoint_moves_between_paths_without_a_bit_lost(one: str, two: str, kind: str, seed: int) -> None:
    model, data = net(kind), batch(F32)
    optimizer = build(model, one, kind)
    for _ in range(2):
        train_step(model, optimizer, data)
    other = copy.deepcopy(model)
    moved = build(other, two, kind)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group.update({"foreach": None, "fused": None} | EVERY_PATH[two])
    moved.load_state_dict(saved)
    assert identical(snapshot(model, optimizer), snapshot(other, moved))
    back = build(model, one, kind)
    saved = moved.state_dict()
    for group in saved["param_groups"]:
        group.update({"foreach": None, "fused": None} | EVERY_PATH[one])
    back.load_state_dict(saved)
    train_step(model, back, data)
    again, twin = build(other, one, kind), copy.deepcopy(saved)
    again.load_state_dict(twin)
    train_step(other, again, data)
    assert identical(snapshot(model, back), snapshot(other, again))
    assert back.state_dict()["param_groups"][0]["step"] == 3


@every_path
@every_kind
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_optimizer_train_alike(path: str, kind: str, copier: Any, seed: int) -> None:
    model, data = net(kind), batch(F32)
    optimizer = build(model, path, kind)
    train_step(model, optimizer, data)
    other, twin = copier((model, optimizer))
    train_step(model, optimizer, data)
    train_step(other, twin, data)
    assert identical(snapshot(model, optimizer), snapshot(other, twin))


@every_path
def test_a_partial_checkpoint_is_no_larger_than_its_tensors(path: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    optimizer = DALS(model, **EVERY_PATH[path])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict()["state"][3], buffer)
    assert buffer.tell() < 4096


@every_path
@every_kind
def test_state_is_complete_after_the_first_step(path: str, kind: str, seed: int) -> None:
    """For every parameter that trains, gradient or not, and none before."""
    model = net(kind)
    for p in model.head[2].parameters():
        p.requires_grad_(False)
    optimizer = build(model, path, kind)
    assert not optimizer.state
    model.scale.grad = torch.ones_like(model.scale)
    optimizer.step(loss=1.0)
    keys = {"grad_ema", "momentum_buffer"} | ({"compensation"} if "compensated" in kind else set())
    trains = [p for p in model.parameters() if p.requires_grad]
    assert all(set(optimizer.state[p]) == keys for p in trains) and len(optimizer.state) == len(trains)
    for p in trains:
        dtypes = {key: value.dtype for key, value in optimizer.state[p].items()}
        state = BF16 if "bfloat16" in kind else F32
        assert dtypes["grad_ema"] == dtypes["momentum_buffer"] == state
        assert all(value.shape == p.shape and value.stride() == p.stride() for value in optimizer.state[p].values())


@every_path
@every_kind
def test_layers_thaw_gradients_come_late_and_groups_join(path: str, kind: str, seed: int) -> None:
    """The same as if all had been so from the start, for those that were there all along."""
    model, data = net(kind), batch(F32)
    body = [(name, p) for name, p in model.named_parameters() if not name.startswith("head")]
    head = [(name, p) for name, p in model.named_parameters() if name.startswith("head")]
    model.conv.requires_grad_(False)
    optimizer = DALS(body, lr=0.2, depth=0.5, **EVERY_PATH[path], **KINDS[kind])
    train_step(model, optimizer, data)
    frozen = model.conv.weight.detach().clone()
    model.conv.requires_grad_(True)
    assert "grad_ema" not in optimizer.state.get(model.conv.weight, {})
    train_step(model, optimizer, data)
    assert not torch.equal(frozen, model.conv.weight) and "grad_ema" in optimizer.state[model.conv.weight]
    optimizer.add_param_group({"params": head, "depth": 1.0})
    kept = head[0][1].detach().clone()
    train_step(model, optimizer, data)
    assert not torch.equal(kept, head[0][1])
    model.conv.weight.requires_grad_(False)
    model.conv.weight.grad = None
    frozen, state = model.conv.weight.detach().clone(), optimizer.state[model.conv.weight]["grad_ema"].clone()
    train_step(model, optimizer, data)
    assert torch.equal(frozen, model.conv.weight)
    assert torch.equal(state, optimizer.state[model.conv.weight]["grad_ema"])


@every_path
def test_parameters_swapped_before_the_first_step(path: str, seed: int) -> None:
    """As wrappers do after an optimizer was built: what is in the groups is stepped, at the depth of its name."""
    model, data = ConvNet(), batch(F32)
    twin = copy.deepcopy(model)
    optimizer, other = build(model, path), build(twin, path)
    depths = optimizer.depths()
    fresh = copy.deepcopy(model)
    group = optimizer.param_groups[0]
    names = {name: p for name, p in fresh.named_parameters()}
    group["params"] = [names[name] for name in group["param_names"]]
    for _ in range(3):
        train_step(fresh, optimizer, data)
        train_step(twin, other, data)
    assert optimizer.depths() == depths and identical(snapshot(fresh, optimizer), snapshot(twin, other))
    assert not any(p in optimizer.state for p in model.parameters())


@every_path
@every_kind
def test_replaced_data_is_stepped_where_it_is(path: str, kind: str, seed: int) -> None:
    model, data = net(kind), batch(F32)
    twin = copy.deepcopy(model)
    optimizer, other = build(model, path, kind), build(twin, path, kind)
    for step in range(4):
        for p in model.parameters():
            if step:
                p.data = p.data.clone()
        train_step(model, optimizer, data)
        train_step(twin, other, data)
    assert identical(snapshot(model, optimizer), snapshot(twin, other))


@every_path
def test_a_converted_model_is_refused_with_the_way_out_and_goes_on_after_it(path: str, seed: int) -> None:
    """As after a move to another device, which a CPU cannot show."""
    if path == "fused":
        pytest.skip("the kernels do not serve float64")
    model, data = Net(), batch(F32)
    optimizer = build(model, path)
    train_step(model, optimizer, data)
    model.double()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"load_state_dict\(optimizer.state_dict\(\)\) moves the state after it"):
        train_step(model, optimizer, data)
    assert identical(before, snapshot(model, optimizer))
    optimizer.load_state_dict(optimizer.state_dict())
    train_step(model, optimizer, data)
    assert all(value.dtype == torch.float64 for entry in optimizer.state.values() for value in entry.values())


@every_path
@pytest.mark.parametrize("last", [1, 2])
def test_memory_that_runs_out_leaves_no_half_state(path: str, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever catches it and frees memory can step again."""
    model = Net()
    optimizer = build(model, path)
    model(batch(F32)[0]).square().mean().backward()
    calls = 0

    def short(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == last:
                raise torch.OutOfMemoryError("no memory")
            return make(*args, **kwargs)

        return made

    with monkeypatch.context() as patch:
        for name in ("zeros", "zeros_like"):
            patch.setattr(torch, name, short(getattr(torch, name)))
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step(loss=1.0)
    assert calls == last and not any(optimizer.state.values())
    optimizer.step(loss=1.0)
    assert optimizer.state_dict()["param_groups"][0]["step"] == 1
