"""The conventions of torch.optim that a drop-in owes."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.machine import allocated_by
from fused_dals import DALS, DALSAcc, DALSFast, batch_update
from fused_dals.batch_update import parts_of
from fused_dals.foreach import dals_foreach_, norms
from fused_dals.reference import dals_reference_
from tests.helpers import PATHS, PRESETS, ConvNet, batch, identical, mlp, snapshot, train_step

ALL = [pytest.param(preset, path, id=f"{preset}-{path}") for preset in PRESETS for path in PATHS]


def build(preset: str, path: str, params: Any, **options: Any) -> DALS:
    return PRESETS[preset](params, foreach=PATHS[path], **options)


@pytest.mark.parametrize(("preset", "path"), ALL)
def test_trains(preset: str, path: str, seed: int) -> None:
    model = ConvNet()
    optimizer = build(preset, path, model)
    losses = [train_step(model, optimizer, batch(torch.float32)) for _ in range(150)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize(("preset", "path"), ALL)
def test_zero_gradients_without_decay_change_no_bit(preset: str, path: str, seed: int) -> None:
    model = ConvNet()
    model.scale.data[0] = -0.0
    optimizer = build(preset, path, model, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step(loss=1.0)
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())
    assert set(optimizer.trust_ratios().values()) == {1.0}


@pytest.mark.parametrize(("preset", "path"), ALL)
def test_missing_gradients_leave_a_tensor_alone(preset: str, path: str, seed: int) -> None:
    model = ConvNet()
    optimizer = build(preset, path, model)
    train_step(model, optimizer, batch(torch.float32))
    still = [model.conv.weight, optimizer.state[model.conv.weight]["grad_ema"]]
    still += [optimizer.state[model.conv.weight]["momentum_buffer"]]
    before = [t.detach().clone() for t in still]
    x, y = batch(torch.float32)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    model.conv.weight.grad = None
    optimizer.step(loss=1.0)
    assert identical(before, still)
    assert "conv.weight" not in optimizer.trust_ratios() and "conv.bias" in optimizer.trust_ratios()


@pytest.mark.parametrize(("preset", "path"), ALL)
def test_state_is_made_for_all_that_trains_at_the_first_step(preset: str, path: str, seed: int) -> None:
    model = ConvNet()
    model.norm.weight.requires_grad_(False)
    optimizer = build(preset, path, model)
    assert not optimizer.state
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    optimizer.step(loss=1.0)
    assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
    model.norm.weight.requires_grad_(True)
    train_step(model, optimizer, batch(torch.float32))
    assert model.norm.weight in optimizer.state


@pytest.mark.parametrize("path", PATHS)
def test_frozen_then_unfrozen(path: str, seed: int) -> None:
    model = ConvNet()
    model.conv.requires_grad_(False)
    frozen = model.conv.weight.detach().clone()
    optimizer = build("dals", path, model)
    for _ in range(2):
        train_step(model, optimizer, batch(torch.float32))
    assert torch.equal(frozen, model.conv.weight)
    model.conv.requires_grad_(True)
    train_step(model, optimizer, batch(torch.float32))
    assert not torch.equal(frozen, model.conv.weight)


@pytest.mark.parametrize("path", PATHS)
def test_tied_parameters_are_stepped_once(path: str, seed: int) -> None:
    model = mlp(4, 4, 4)
    model[2].weight = model[0].weight
    reference = copy.deepcopy(model)
    optimizer = build("dals", path, model)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 3
    with pytest.warns(UserWarning, match="duplicate parameters"):
        named = list(reference.named_parameters(remove_duplicate=False))
        twice = build("dals", path, named)
    for net, opt in ((model, optimizer), (reference, twice)):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        opt.step(loss=1.0)
    assert identical([p.detach() for p in model.parameters()], [p.detach() for p in reference.parameters()])


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("path", PATHS)
def test_zero_size_parameters_anywhere_in_the_list(path: str, where: int) -> None:
    """apex drops all pending updates when the last tensor is empty."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    params.insert(where, nn.Parameter(torch.ones(0, 5)))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = build("dals", path, [(f"p{i}", p) for i, p in enumerate(params)])
    optimizer.step(loss=1.0)
    assert all(bool((p != 1).all()) for p in params)
    assert optimizer.trust_ratios()[f"p{where}"] == 1.0


@pytest.mark.parametrize("path", PATHS)
def test_add_param_group_in_the_middle_of_a_run(path: str, seed: int) -> None:
    model, head = ConvNet(), nn.Linear(3, 3)
    optimizer = build("dals", path, model.named_parameters(), total_steps=50)
    for _ in range(3):
        train_step(model, optimizer, batch(torch.float32))
    optimizer.add_param_group({"params": head.named_parameters(), "lr": 0.5, "momentum": 0.0})
    assert optimizer.param_groups[1]["step"] == 3 and optimizer.param_groups[1]["total_steps"] == 50
    before = head.weight.detach().clone()
    x, y = batch(torch.float32)
    nn.functional.cross_entropy(head(model(x)), y).backward()
    optimizer.step(loss=1.0)
    assert not torch.equal(before, head.weight) and len(optimizer.current_lr()) == 2
    assert optimizer.current_lr()[1] == pytest.approx(optimizer.current_lr()[0] * 0.5 / 0.03)


def test_a_refused_group_leaves_no_trace() -> None:
    model, head = ConvNet(), nn.Linear(3, 3)
    optimizer = DALS(model)
    depths = optimizer.depths()
    for bad in (
        {"params": head.named_parameters(), "momentum": 2.0},
        {"params": head.named_parameters(), "depth": 7.0},
        {"params": head.named_parameters(), "depth": {"nothing": 0.5}},
        {"params": head.named_parameters(), "depth": lambda name, p: 7.0},
        {"params": model.named_parameters()},
        {"params": head.parameters()},
        {"params": head},
        {"lr": 1.0},
        {"params": head.named_parameters(), "weigth_decay": 1.0},
    ):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == 1 and optimizer.depths() == depths


@pytest.mark.parametrize("order", [[DALS, DALSFast, DALSAcc], [DALSAcc, DALSFast, DALS]])
def test_hooks_fire_once(order: list[type[DALS]]) -> None:
    """torch wraps the step of a class at its first use; a subclass must not be wrapped twice."""
    for cls in order:
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        optimizer = cls([("p", p)])
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("post"))
        optimizer.step(loss=1.0)
        assert calls == ["pre", "post"]


def test_closure_runs_once_with_gradients_on_and_its_value_is_returned() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = DALS([("p", p)])
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True] and loss.item() == 2.0 and not torch.equal(p, torch.ones(2))
    assert optimizer.step() is None


def test_gradients_are_only_read(seed: int) -> None:
    """A copy of Grokfast keeps p.grad itself as the EMA; here no state shares memory with a gradient."""
    for preset in PRESETS:
        for path in PATHS:
            for maximize in (False, True):
                model = ConvNet()
                decay = 0.0 if maximize else 0.1
                optimizer = build(preset, path, model, maximize=maximize, weight_decay=decay)
                for p in model.parameters():
                    p.grad = torch.randn_like(p)
                grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                optimizer.step(loss=1.0)
                now = [p.grad for p in model.parameters() if p.grad is not None]
                assert identical(grads, now)
                memory = {t.untyped_storage().data_ptr() for t in now}
                state = [t for entry in optimizer.state.values() for t in entry.values()]
                assert not memory & {t.untyped_storage().data_ptr() for t in state}


def test_gradients_are_let_go(seed: int) -> None:
    """Nothing that a step leaves behind keeps a gradient alive."""
    model = ConvNet()
    optimizer = DALS(model)
    train_step(model, optimizer, batch(torch.float32))
    grads = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()
    assert len(grads) == 9 and not any(ref() is not None for ref in grads)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_float32_gradients_of_bfloat16_parameters(grad_dtype: torch.dtype, seed: int) -> None:
    """Both paths give one result where the gradient is wider than the parameter."""
    tensors = [torch.randn(7, 5).to(d) for d in (torch.bfloat16, grad_dtype, torch.float32, torch.float32)]
    a, b = [t.clone() for t in tensors], [t.clone() for t in tensors]
    scalars: dict[str, Any] = {
        "ema_decay": 0.6, "bypass": False, "weight_decay": 0.1, "trust_coefficient": 0.02, "trust_clip": (0.0, 9.0),
        "momentum": 0.9, "lr": 0.5, "grad_factor": -1.0,
    }  # fmt: skip
    r = dals_reference_(*a, 0.4, **scalars)
    s = dals_foreach_(*([t] for t in b), [0.4], **scalars)
    torch.testing.assert_close(r, s[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(a[0], b[0], rtol=2.0**-7, atol=0)
    torch.testing.assert_close(a[2:], b[2:], rtol=1e-6, atol=1e-6)


def test_state_follows_a_converted_model(seed: int) -> None:
    """A model changed to another dtype (or device) after the first step: a clear error, and the way out works."""
    model = ConvNet()
    optimizer = DALS(model)
    train_step(model, optimizer, batch(torch.float32))
    model.double()
    with pytest.raises(RuntimeError, match=r"'scale' .* now torch\.float64 .* grad_ema torch\.float32 .*load_st"):
        train_step(model, optimizer, batch(torch.float64))
    before = [t.double() for t in snapshot(model, optimizer)]
    optimizer.load_state_dict(optimizer.state_dict())
    assert identical(before, snapshot(model, optimizer))
    train_step(model, optimizer, batch(torch.float64))
    assert {t.dtype for entry in optimizer.state.values() for t in entry.values()} == {torch.float64}


def test_state_stays_in_its_memory(seed: int) -> None:
    model = ConvNet()
    optimizer = DALS(model)
    train_step(model, optimizer, batch(torch.float32))
    addresses = [t.data_ptr() for entry in optimizer.state.values() for t in entry.values()]
    weights = [p.data_ptr() for p in model.parameters()]
    train_step(model, optimizer, batch(torch.float32))
    assert addresses == [t.data_ptr() for entry in optimizer.state.values() for t in entry.values()]
    assert weights == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("path", PATHS)
def test_maximize_is_descent_on_the_negated_gradient(path: str, seed: int) -> None:
    a = ConvNet()
    b = copy.deepcopy(a)
    up, down = build("dals", path, a, maximize=True), build("dals", path, b)
    for _ in range(5):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = -p.grad
        up.step(loss=1.0)
        down.step(loss=1.0)
    assert identical(snapshot(a, up), snapshot(b, down))


@pytest.mark.parametrize("path", PATHS)
def test_memory_layouts(path: str, seed: int) -> None:
    """channels_last, transposed, expanded gradient, gradient of other strides: as the same numbers laid out plainly."""
    conv = torch.randn(4, 3, 2, 2)
    plain = [conv.clone(), torch.randn(5, 3), torch.randn(4)]
    odd = [conv.to(memory_format=torch.channels_last), plain[1].t().contiguous().t(), plain[2].clone()]
    grads = [torch.randn(4, 3, 2, 2), torch.randn(5, 3), torch.full((4,), 0.3)]
    odd_grads = [grads[0].clone(), grads[1].clone(), torch.tensor(0.3).expand(4)]
    results = []
    for tensors, gradients in ((plain, grads), (odd, odd_grads)):
        params = [nn.Parameter(t) for t in tensors]
        optimizer = build("dals", path, [(f"p{i}", p) for i, p in enumerate(params)])
        for _ in range(3):
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
            optimizer.step(loss=1.0)
        for p in params:
            assert optimizer.state[p]["grad_ema"].stride() == p.stride()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-7, atol=1e-7)


def test_groups_override_every_hyperparameter(seed: int) -> None:
    """Two groups with values of their own equal two optimizers."""
    own: dict[str, Any] = {
        "lr": 0.2, "momentum": 0.3, "weight_decay": 0.1, "trust_coefficient": 0.5, "trust_clip": (0.1, 9.0),
        "ema_decay": (0.9, 0.8, 0.1), "phase_thresholds": (0.3, 0.2), "total_steps": 8, "warmup_fraction": 0.25,
        "restart_mult": 3, "depth": 0.9, "maximize": True, "foreach": False,
    }  # fmt: skip
    model = mlp(3, 4, 5)
    single = copy.deepcopy(model)
    grouped = DALS([{"params": list(model[0].named_parameters())}, {"params": [("w", model[2].weight)], **own}])
    alone = [DALS(single[0].named_parameters(), depth=0.5), DALS([("w", single[2].weight)], **own)]
    for loss in (1.0, 0.5, 0.45, 0.4):
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        grouped.step(loss=loss)
        for optimizer in alone:
            optimizer.step(loss=loss)
    grouped_depths = set(grouped.depths().values())
    assert grouped_depths == {0.5, 0.9} or grouped_depths == {0.0, 0.9}
    assert torch.equal(model[2].weight, single[2].weight)


def test_several_dtypes_in_one_group(seed: int) -> None:
    params = [nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float64)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = DALS([(f"p{i}", p) for i, p in enumerate(params)])
    optimizer.step(loss=1.0)
    assert [optimizer.state[p]["grad_ema"].dtype for p in params] == [torch.float32, torch.float32, torch.float64]
    assert list(optimizer.trust_ratios()) == ["p0", "p1", "p2"]
    ratios = list(optimizer.trust_ratios().values())
    assert max(ratios) - min(ratios) < 0.05


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("tensor", "bound"),
    [
        (torch.linspace(1, 2, 1001).bfloat16(), 1e-6),
        (torch.linspace(1, 2, 1001).half(), 1e-6),
        (torch.linspace(-1, 2, 10_000_000), 2e-6),
        (torch.full((10_000_000,), 0.1), 2e-5),  # equal elements round alike; torch's own float32 norm is off by 8e-3
    ],
    ids=["bfloat16", "float16", "ten million", "ten million equal"],
)
def test_norms_are_neither_rounded_nor_adrift(tensor: Tensor, bound: float, path: str) -> None:
    p = nn.Parameter(tensor.clone())
    p.grad = torch.ones_like(p)
    optimizer = build("dals", path, [("p", p)], weight_decay=0.0, trust_clip=(0.0, math.inf), depth=0.0)
    optimizer.step(loss=1.0)
    u = 0.3 + 0.7 * 0.7  # b g + (1 - b) h with h = (1 - 0.3) g
    truth = 0.02 * tensor.double().norm().item() / (u * math.sqrt(tensor.numel()))
    assert optimizer.trust_ratios()["p"] == pytest.approx(truth, rel=bound)


def test_norms_of_a_large_tensor_among_small_ones(seed: int) -> None:
    """Two pieces beside three tensors that are one each."""
    tensors = [torch.randn(n) for n in (3, 40_000, 5, 7)]
    found = norms(tensors, torch.float32)
    assert found.tolist() == pytest.approx([t.double().norm().item() for t in tensors], rel=1e-6)


def test_one_nan_stays_in_its_tensor(seed: int) -> None:
    for path in PATHS:
        model = ConvNet()
        optimizer = build("dals", path, model)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        assert model.conv.bias.grad is not None
        model.conv.bias.grad[1] = math.nan
        optimizer.step(loss=1.0)
        for name, p in model.named_parameters():
            assert p.isfinite().all() == (name != "conv.bias")


def test_state_creation_by_checkpoint_tools_moves_nothing(seed: int) -> None:
    """Distributed checkpointing calls step() with zero gradients and lr 0 on an optimizer without state."""
    for lr in (0.03, torch.tensor(0.03)):
        model = ConvNet()
        optimizer = DALS(model, lr=lr, total_steps=10)
        weights = [p.detach().clone() for p in model.parameters()]
        kept = optimizer.param_groups[0]["lr"]
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.0) if isinstance(lr, Tensor) else 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(closure=None)
        optimizer.param_groups[0]["lr"] = kept
        assert set(optimizer.state) == set(model.parameters())
        assert all(bool((t == 0).all()) for entry in optimizer.state.values() for t in entry.values())
        assert identical(weights, [p.detach() for p in model.parameters()])
        assert optimizer.state_dict()["param_groups"][0]["step"] == 0 and optimizer.phases() == [1]


def test_a_real_first_step_with_lr_0_counts(seed: int) -> None:
    """LambdaLR warm-ups start at lr 0; that step has gradients, and fills the buffers."""
    model = ConvNet()
    optimizer = DALS(model, lr=0.0)
    train_step(model, optimizer, batch(torch.float32))
    assert optimizer.param_groups[0]["step"] == 1
    assert optimizer.state[model.scale]["momentum_buffer"].abs().sum() > 0


def test_a_saved_tensor_notices_the_write() -> None:
    p = nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    DALS([("p", p)]).step(loss=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_grad_scaler_drives_it(seed: int) -> None:
    """In its default way, with unscaled gradients; a step with inf is skipped by the scaler."""
    model = ConvNet()
    optimizer = DALS(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    optimizer.observe_loss(1.0)
    x, y = batch(torch.float32)
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert len(optimizer.trust_ratios()) == len(list(model.parameters()))
    before = snapshot(model, optimizer)
    assert model.scale.grad is not None
    model.scale.grad.fill_(math.inf)
    scaler.step(optimizer)
    assert identical(before, snapshot(model, optimizer))


def test_presets_differ_in_defaults_alone() -> None:
    """The SPEC's table of the three members."""
    p = [("p", nn.Parameter(torch.ones(1)))]
    presets: tuple[type[DALS], ...] = (DALS, DALSFast, DALSAcc)
    table = {cls: cls(p).defaults for cls in presets}
    expected: dict[type[DALS], Any] = {
        DALS: (0.03, 0.9, 1e-4, (0.3, 0.6, 0.7), (0.01, 0.002), 0.05, None),
        DALSFast: (0.05, 0.85, 1e-4, (1.0, 0.6, 0.7), (0.01, 0.002), 0.02, None),
        DALSAcc: (0.03, 0.9, 5e-4, (0.55, 0.7, 0.8), (0.01, 0.001), 0.05, 1000),
    }
    keys = ["lr", "momentum", "weight_decay", "ema_decay", "phase_thresholds", "warmup_fraction", "restart_steps"]
    for cls, values in expected.items():
        assert tuple(table[cls][k] for k in keys) == values
        assert table[cls]["trust_coefficient"] == 0.02 and table[cls]["trust_clip"] == (0.2, 5.0)
        assert table[cls]["restart_mult"] == 2 and table[cls]["total_steps"] is None


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_foreach_makes_no_copy_of_the_gradients(layout: torch.memory_format, seed: int) -> None:
    """Peak extra memory of a float32 step is one update u: 4 bytes a parameter, and nothing stays."""
    p = nn.Parameter(torch.randn(64, 256, 8, 8).to(memory_format=layout))
    p.grad = torch.randn_like(p)
    optimizer = DALS([("p", p)])
    optimizer.step(loss=1.0)
    peak, remaining = allocated_by(lambda: optimizer.step(loss=1.0))
    assert 0.99 * p.numel() * 4 < peak < 1.01 * p.numel() * 4 and remaining < 10_000, (peak, remaining)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_cpu_steps_tensors_together_as_far_as_memory_is_to_be_spared(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Parts of some tensors, one at least; the same bits, and temporaries of one part."""
    sizes = (300, 40, 60, 1000, 1, 1, 1, 99)
    assert list(parts_of([5])) == [slice(0, 1)]
    found, peaks = [], []
    for most in (100, 1 << 40):
        monkeypatch.setattr(batch_update, "MOST_TOGETHER", most)
        torch.manual_seed(seed)
        params = [nn.Parameter(torch.randn(64, size)) for size in sizes]
        optimizer = DALS([(f"{i}", p) for i, p in enumerate(params)], foreach=True, max_grad_norm=1.0)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            peak, _ = allocated_by(lambda optimizer=optimizer: optimizer.step(loss=1.0))
        found.append([p.detach() for p in params] + [torch.tensor(list(optimizer.trust_ratios().values()))])
        peaks.append(peak)
    assert identical(*found)
    monkeypatch.setattr(batch_update, "MOST_TOGETHER", 100)
    assert [(part.start, part.stop) for part in parts_of(sizes)] == [(0, 1), (1, 3), (3, 4), (4, 7), (7, 8)]
    assert peaks[0] < 0.8 * peaks[1], peaks


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_one_tensor_after_the_other_needs_memory_for_one(seed: int) -> None:
    """foreach=False: six tensors of a parameter's size at a time, however many parameters there are."""
    params = [nn.Parameter(torch.randn(64, 256)) for _ in range(20)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = DALS([(f"{i}", p) for i, p in enumerate(params)], foreach=False)
    optimizer.step(loss=1.0)
    peak, remaining = allocated_by(lambda: optimizer.step(loss=1.0))
    size = params[0].numel() * 4
    assert 5 * size < peak < 7 * size and remaining < 10_000, (peak / size, remaining)


@pytest.mark.parametrize("path", PATHS)
def test_norms_beyond_the_squares_of_float32(path: str) -> None:
    """1e-24 and 1e24 have squares that float32 cannot hold; the ratio of equal norms is what it always is."""
    for size in (1e-24, 1e-10, 1e24):
        p = nn.Parameter(torch.full((100,), size))
        p.grad = torch.full((100,), size)
        optimizer = build("dals", path, [("p", p)], weight_decay=0.0, trust_clip=(0.0, 10.0), depth=0.0)
        optimizer.step(loss=1.0)
        assert optimizer.trust_ratios()["p"] == pytest.approx(0.02 / (0.3 + 0.7 * 0.7), rel=1e-5)


def test_only_an_untouched_optimizer_takes_a_step_for_state_creation(seed: int) -> None:
    """Zero gradients and lr 0 in the middle of a run are a step like any other: momentum goes on."""
    model = ConvNet()
    optimizer = DALS(model)
    train_step(model, optimizer, batch(torch.float32))
    before = optimizer.state[model.conv.weight]["momentum_buffer"].clone()
    optimizer.param_groups[0]["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(loss=1.0)
    assert optimizer.param_groups[0]["step"] == 2
    assert not torch.equal(before, optimizer.state[model.conv.weight]["momentum_buffer"])
