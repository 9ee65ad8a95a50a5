"""GradScaler's fused protocol, steps that are dropped on the device, and clipping inside the step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_dals import DALS, host, scalars
from fused_dals.loss_signal import StepLoss
from fused_dals.run_state import StepInputs
from tests.helpers import EVERY_PATH, ConvNet, batch, identical, snapshot, train_step

F32 = torch.float32
INF, NAN = math.inf, math.nan

PATHS = {**EVERY_PATH, "foreach as on a device": {"foreach": True}}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments for a path; one of them takes the CPU for a device whose numbers nobody may wait for."""
    if "device" in request.param:
        monkeypatch.setattr(host, "knows", lambda tensor: False)
    return PATHS[request.param]


def gradients(model: nn.Module, scale: float = 1.0) -> float:
    """Scaled gradients of a model into .grad; returns the loss."""
    x, y = batch(F32)
    loss = nn.functional.cross_entropy(model(x), y)
    model.zero_grad()
    (loss * scale).backward()
    return loss.item()


def everything(model: nn.Module, optimizer: DALS) -> list[Tensor]:
    return [*snapshot(model, optimizer), optimizer._runtime.state.values.clone()]


# -- GradScaler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp_fused", [False, True])
def test_a_scaled_run_is_the_unscaled_run(path: dict[str, Any], amp_fused: bool, seed: int) -> None:
    """Powers of two scale without rounding, so both runs agree to the bit, and the unscaled gradient is in .grad."""
    a = ConvNet()
    b = copy.deepcopy(a)
    scaled, plain = DALS(a, amp_fused=amp_fused, **path), DALS(b, **path)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = batch(F32)
    for _ in range(4):
        loss = nn.functional.cross_entropy(a(data[0]), data[1])
        scaled.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(scaled, loss=loss)
        scaler.update()
        train_step(b, plain, data)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
    assert identical(everything(a, scaled), everything(b, plain))


@pytest.mark.parametrize("bad", [INF, NAN])
def test_a_step_that_overflows_leaves_everything_but_the_count(path: dict[str, Any], bad: float, seed: int) -> None:
    model = ConvNet()
    twin = copy.deepcopy(model)
    optimizer, other = DALS(model, amp_fused=True, **path), DALS(twin, amp_fused=True, **path)
    scaler, twins = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.amp.GradScaler("cpu", init_scale=1024.0)

    def one(model: nn.Module, optimizer: DALS, scaler: torch.amp.GradScaler, data: Any, poison: bool = False) -> None:
        loss = nn.functional.cross_entropy(model(data[0]), data[1])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if poison:
            grad = next(model.parameters()).grad
            assert grad is not None
            grad.flatten()[0] = bad
        scaler.step(optimizer, loss=loss * (100 if poison else 1))
        if not poison:
            scaler.update()

    data = batch(F32)
    for _ in range(2):
        one(model, optimizer, scaler, data)
        one(twin, other, twins, data)
    before = everything(model, optimizer)
    one(model, optimizer, scaler, data, poison=True)
    after = everything(model, optimizer)
    assert identical(before[:-1], after[:-1]) and after[-1].tolist() == [*before[-1].tolist()[:3], 1.0]
    assert optimizer.skipped_steps == 1 and optimizer.state_dict()["param_groups"][0]["skipped_steps"] == 1
    scaler.update()
    assert scaler.get_scale() == 512.0
    for _ in range(3):
        one(model, optimizer, scaler, data)
        one(twin, other, twins, data)
    # Another scale of 2^k changes no bit, and the dropped step has left no trace.
    assert identical(everything(model, optimizer)[:-1], everything(twin, other)[:-1])


def test_unscaled_by_hand_before_clipping(path: dict[str, Any], seed: int) -> None:
    """scaler.unscale_ hands over found_inf without a scale: nothing is divided twice."""
    a = ConvNet()
    b = copy.deepcopy(a)
    scaled, plain = DALS(a, amp_fused=True, **path), DALS(b, **path)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = gradients(a, 8.0)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert p.grad is not None
        q.grad = p.grad / 8
    scaler.scale(torch.ones(()))  # as scaling the loss does: the scale comes into being
    scaler.unscale_(scaled)
    nn.utils.clip_grad_norm_(a.parameters(), 0.1)
    nn.utils.clip_grad_norm_(b.parameters(), 0.1)
    scaler.step(scaled, loss=loss)
    plain.step(loss=loss)
    assert identical(everything(a, scaled), everything(b, plain))


def test_float16_gradients_of_a_scale_that_float16_has_not(path: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = DALS([("w", p)], amp_fused=True, **path)
    p.grad = torch.full_like(p, 1024.0)
    vars(optimizer).update(grad_scale=torch.tensor(65536.0), found_inf=torch.tensor(0.0))
    optimizer.step(loss=1.0)
    assert torch.equal(p.grad, torch.full_like(p, 2.0**-6)) and (p < 1).all()


def test_autograd_notices_that_gradients_were_unscaled(path: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = DALS([("w", p)], amp_fused=True, **path)
    for _ in range(3):
        p.grad = torch.full((4,), 16.0)
        vars(optimizer).update(grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))
        optimizer.step(loss=1.0)
        assert torch.equal(p.grad, torch.full((4,), 2.0)) and p.grad._version > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scale_is_taken_as_it_is(dtype: torch.dtype) -> None:
    """No launch to bring found_inf and the scale from one dtype to another and back."""

    class Conversions(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.overloadpacket.__name__ == "_to_copy"
            return func(*args, **(kwargs or {}))

    p = nn.Parameter(torch.ones(4))
    optimizer = DALS([("w", p)], amp_fused=True, fused=True)
    for _ in range(3):
        p.grad = torch.full((4,), 16.0)
        scale, found = (torch.tensor(value, dtype=dtype) for value in (8.0, 0.0))
        vars(optimizer).update(grad_scale=scale, found_inf=found)
        with Conversions() as conversions:
            optimizer.step(loss=1.0)
    assert torch.equal(p.grad, torch.full((4,), 2.0)) and conversions.count == (0 if dtype == torch.float32 else 2)


def test_an_expanded_gradient_is_unscaled_once(path: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = DALS([("w", p)], amp_fused=True, **path)
    p.grad = torch.tensor(16.0).expand(4, 3)
    vars(optimizer).update(grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))
    optimizer.step(loss=1.0)
    assert torch.equal(p.grad, torch.full((4, 3), 2.0))


def test_without_amp_fused_the_scaler_does_it_all() -> None:
    model = ConvNet()
    assert not DALS(model)._step_supports_amp_scaling and DALS(model, amp_fused=True)._step_supports_amp_scaling
    assert copy.deepcopy(DALS(model, amp_fused=True))._step_supports_amp_scaling
    with pytest.raises(TypeError, match="DALS: amp_fused must be True or False, got 1"):
        DALS(model, amp_fused=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_of_narrow_parameters_are_unscaled_in_float32(path: dict[str, Any], dtype: torch.dtype) -> None:
    """1e-3 / 65536 is 0 in float16: what is written back may be lost, the update must not be."""
    p = nn.Parameter(torch.ones(8, dtype=dtype))
    optimizer = DALS([("w", p)], amp_fused=True, weight_decay=0.0, **path)
    p.grad = torch.full_like(p, 1e-3)
    scaled = p.grad.double()
    vars(optimizer).update(grad_scale=torch.tensor(65536.0), found_inf=torch.tensor(0.0))
    optimizer.step(loss=1.0)
    # After the first step: h = 0.7 g and u = b g + (1 - b) h with b = 0.5, the only parameter's depth being 0.5.
    expected = scaled / 65536 * (0.5 + 0.5 * 0.7)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"].double(), expected, rtol=1e-5, atol=0)


def test_one_gradient_of_two_parameters_is_unscaled_once(path: dict[str, Any]) -> None:
    p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = DALS([("p", p), ("q", q)], amp_fused=True, depth=0.5, **path)
    p.grad = q.grad = torch.full((4,), 8.0)
    vars(optimizer).update(grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))
    optimizer.step(loss=1.0)
    assert torch.equal(p.grad, torch.ones(4)) and torch.equal(q.grad, torch.ones(4))
    assert torch.equal(optimizer.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"])


@pytest.mark.parametrize("shared", ["one for both", "expanded"])
def test_gradients_that_share_memory_in_the_midst_of_a_run(shared: str, path: dict[str, Any], seed: int) -> None:
    """They are unscaled once, as their copies would be; the kernels' tables stay what they are."""

    def run(apart: bool) -> tuple[DALS, list[Tensor]]:
        torch.manual_seed(seed)
        params = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
        optimizer = DALS([(f"{i}.w", p) for i, p in enumerate(params)], amp_fused=True, **path)
        vars(optimizer).update(grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))
        for step in range(6):
            grads = [torch.randn(4, 3), torch.randn(4, 3)]
            if step in (3, 4):
                grads = [grads[0]] * 2 if shared == "one for both" else [grads[0], grads[1][0, 0].expand(4, 3)]
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone(memory_format=torch.contiguous_format) if apart else grad
            optimizer.step(loss=1.0)
        return optimizer, [*params, *(p.grad for p in params if p.grad is not None)]

    (optimizer, found), (_, expected) = run(apart=False), run(apart=True)
    assert all(map(torch.equal, found, expected)) and len(found) == 4
    assert all(fused.preparations == 1 for fused in optimizer._runtime.fused.values())


def test_a_scale_that_comes_in_the_midst_of_a_run(path: dict[str, Any]) -> None:
    """Gradients of equal elements before it, which nobody wrote to, and with it; too many to be read all at once."""
    p = nn.Parameter(torch.ones(100, 70))
    optimizer = DALS([("w", p)], amp_fused=True, **path)
    for step in range(4):
        p.grad = torch.full((1, 70), 16.0 if step < 2 else 64.0).expand(100, 70)
        if step == 2:
            vars(optimizer).update(grad_scale=torch.tensor(4.0), found_inf=torch.tensor(0.0))
        optimizer.step(loss=1.0)
        assert torch.equal(p.grad, torch.full((100, 70), 16.0))


def test_a_scaler_over_parameters_without_gradients(path: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = DALS([("w", p)], amp_fused=True, **path)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    vars(optimizer).update(grad_scale=torch.tensor(8.0), found_inf=0)  # as GradScaler has it then
    optimizer.step(loss=1.0)
    assert torch.equal(p, torch.ones(4)) and optimizer.skipped_steps == 0


# -- skip_nonfinite ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_nonfinite_gradients_change_nothing_and_are_counted(path: dict[str, Any], bad: float, seed: int) -> None:
    model = ConvNet()
    twin = copy.deepcopy(model)
    optimizer, other = DALS(model, skip_nonfinite=True, total_steps=20, **path), DALS(twin, total_steps=20, **path)
    data = batch(F32)
    for step in range(6):
        train_step(model, optimizer, data)
        train_step(twin, other, data)
        gradients(model)
        last = list(model.parameters())[step % 3 - 1]
        assert last.grad is not None
        last.grad.flatten()[-1] = bad
        optimizer.step(loss=0.01)
    assert optimizer.skipped_steps == 6
    assert identical(snapshot(model, optimizer), snapshot(twin, other))
    assert optimizer.phases() == other.phases() and optimizer.current_lr() == other.current_lr()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter's float32 squares
def test_huge_but_finite_gradients_are_no_reason_to_skip(path: dict[str, Any]) -> None:
    """Their squares overflow float32, and a sum of squares would say so."""
    p = nn.Parameter(torch.ones(5000))
    optimizer = DALS([("w", p)], skip_nonfinite=True, lr=0.1, momentum=0.0, **path)
    p.grad = torch.full_like(p, 3e38)
    optimizer.step(loss=1.0)
    assert optimizer.skipped_steps == 0 and optimizer.state[p]["grad_ema"].min() > 1e38


def test_nonfinite_gradients_of_a_first_step(path: dict[str, Any]) -> None:
    model = ConvNet()
    optimizer = DALS(model, skip_nonfinite=True, **path)
    gradients(model)
    next(model.parameters()).grad.fill_(NAN)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(loss=3.0)
    assert identical(before, [p.detach() for p in model.parameters()])
    assert all((value == 0).all() for entry in optimizer.state.values() for value in entry.values())
    assert optimizer._runtime.state.numbers() == {"step": 0, "loss_ema": INF, "loss_drop": 0.0, "skipped_steps": 1}


def test_skipped_steps_come_back_with_a_checkpoint(path: dict[str, Any]) -> None:
    model = ConvNet()
    optimizer = DALS(model, skip_nonfinite=True, **path)
    for bad in (1.0, NAN, NAN):
        gradients(model)
        next(model.parameters()).grad.mul_(bad)
        optimizer.step(loss=1.0)
    other = DALS(model)
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_steps == 2 and other.state_dict()["param_groups"][0]["step"] == 1


# -- max_grad_norm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.5, 1e4])
def test_clipping_is_clip_grad_norm_and_leaves_the_gradients_alone(
    path: dict[str, Any], max_grad_norm: float, seed: int
) -> None:
    a = ConvNet()
    b = copy.deepcopy(a)
    inside, outside = DALS(a, max_grad_norm=max_grad_norm, **path), DALS(b, **path)
    for _ in range(4):
        loss = gradients(a)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        kept = [p.grad.clone() for p in a.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(b.parameters(), max_grad_norm)
        inside.step(loss=loss)
        outside.step(loss=loss)
        assert identical(kept, [p.grad for p in a.parameters() if p.grad is not None])
    for x, y in zip(snapshot(a, inside), snapshot(b, outside), strict=True):
        # A factor that differs in its last bits, over four steps.
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6 * float(y.abs().max()))
    if max_grad_norm == 1e4:
        assert identical(snapshot(a, inside), snapshot(b, outside))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter
def test_gradients_whose_squares_overflow_are_clipped_alike() -> None:
    buffers = []
    for arguments in PATHS.values():
        p = nn.Parameter(torch.ones(5000))
        optimizer = DALS([("w", p)], max_grad_norm=1.0, weight_decay=0.0, **arguments)
        p.grad = torch.full_like(p, 1e25)
        optimizer.step(loss=1.0)
        buffers.append(optimizer.state[p]["momentum_buffer"])
    for buffer in buffers:
        assert buffer.max() > 0
        torch.testing.assert_close(buffer, buffers[0], rtol=1e-5, atol=0)


def test_the_norm_is_that_of_all_groups_and_each_keeps_its_own_limit(path: dict[str, Any], seed: int) -> None:
    a, b = ConvNet(), ConvNet()
    b.load_state_dict(a.state_dict())
    named, twins = list(a.named_parameters()), list(b.named_parameters())
    limits: tuple[dict[str, float], ...] = ({"max_grad_norm": 0.01}, {}, {"max_grad_norm": 1.0})
    parts = [slice(0, 3), slice(3, 6), slice(6, None)]
    clipped: list[dict[str, Any]] = [{"params": named[i], **limit} for i, limit in zip(parts, limits, strict=True)]
    inside = DALS(clipped, depth=0.5, **path)
    outside = DALS([{"params": twins[i]} for i in parts], depth=0.5, **path)
    loss = gradients(a)
    norm = torch.stack([p.grad.norm() for p in a.parameters() if p.grad is not None]).norm()
    for i, (p, q) in enumerate(zip(a.parameters(), b.parameters(), strict=True)):
        limit = 0.01 if i < 3 else 1e9 if i < 6 else 1.0
        assert p.grad is not None
        q.grad = p.grad * (limit / (norm + 1e-6)).clamp(max=1.0)
    inside.step(loss=loss)
    outside.step(loss=loss)
    for x, y in zip(snapshot(a, inside), snapshot(b, outside), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6 * float(y.abs().max() or 1.0))


def test_clipping_and_scaling_together(path: dict[str, Any], seed: int) -> None:
    """The norm is that of the unscaled gradients."""
    a = ConvNet()
    b = copy.deepcopy(a)
    scaled, plain = DALS(a, amp_fused=True, max_grad_norm=0.1, **path), DALS(b, max_grad_norm=0.1, **path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    data = batch(F32)
    for _ in range(3):
        loss = nn.functional.cross_entropy(a(data[0]), data[1])
        scaled.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(scaled, loss=loss)
        scaler.update()
        train_step(b, plain, data)
    for x, y in zip(snapshot(a, scaled), snapshot(b, plain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7 * float(y.abs().max()))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter, where 0 meets infinity
@pytest.mark.parametrize("bad", [INF, NAN])
def test_a_norm_that_is_not_finite_does_as_clip_grad_norm_does(path: dict[str, Any], bad: float, seed: int) -> None:
    a = ConvNet()
    b = copy.deepcopy(a)
    inside, outside = DALS(a, max_grad_norm=1.0, **path), DALS(b, **path)
    gradients(a)
    next(a.parameters()).grad.fill_(bad)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert p.grad is not None
        q.grad = p.grad.clone()
    nn.utils.clip_grad_norm_(b.parameters(), 1.0)
    inside.step(loss=1.0)
    outside.step(loss=1.0)
    for x, y in zip(snapshot(a, inside), snapshot(b, outside), strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_one_read_of_the_gradients_and_no_write(seed: int) -> None:
    """The kernels: three launches in all, and the gradients' version counters stand still."""
    p = nn.Parameter(torch.randn(10_000))
    optimizer = DALS([("w", p)], max_grad_norm=0.5, skip_nonfinite=True, fused=True)
    p.grad = torch.randn_like(p)
    kept, version = p.grad.clone(), p.grad._version
    optimizer.step(loss=1.0)
    assert torch.equal(p.grad, kept) and p.grad._version == version


# -- the scalars ------------------------------------------------------------------------------------------------------


def test_clip_factor_is_that_of_torch() -> None:
    p = nn.Parameter(torch.zeros(3))
    for norm in (0.0, 0.3, 1.0, 7.0, INF, NAN):
        p.grad = torch.tensor([norm, 0.0, 0.0])
        nn.utils.clip_grad_norm_([p], 1.0)
        factor = scalars.clip_factor(torch.tensor(norm, dtype=torch.float64), 1.0)
        assert factor is not None and scalars.clip_factor(torch.tensor(norm), None) is None
        torch.testing.assert_close(torch.tensor(norm) * factor.float(), p.grad[0], rtol=1e-6, atol=0, equal_nan=True)


def test_a_dropped_step_of_the_run_state() -> None:
    values = torch.tensor([5.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    loss = torch.tensor(1.0, dtype=torch.float64)
    taken = StepInputs(values, StepLoss(loss, 1)).next_values().tolist()
    assert taken[0] == 6.0 and taken[1] == pytest.approx(1.95) and taken[3] == 1.0
    dropped = StepInputs(values, StepLoss(loss, 1), found_inf=torch.tensor([2.0])).next_values().tolist()
    assert dropped == [5.0, 2.0, 0.5, 2.0]
