"""What somebody puts in the place of gradients, parameters and state: stepped right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS
from fused_dals.gather import FLAT_BYTES, flat_zeros
from fused_dals.memory_order import is_plain
from tests.helpers import EVERY_PATH

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=EVERY_PATH, name="path")
def _path(request: pytest.FixtureRequest) -> dict[str, Any]:
    return EVERY_PATH[request.param]


def steps(
    path: dict[str, Any], make: Callable[[], Tensor], change: Callable[[DALS, Any], None], **options: Any
) -> tuple[DALS, Any]:
    """Two steps, a change, two more; the same gradients for all."""
    torch.manual_seed(0)
    p: Any = nn.Parameter(make().to(DEVICE))
    optimizer = DALS([("w", p)], **{"lr": 0.1, **options}, **path)
    for step in range(4):
        if step == 2:
            change(optimizer, p)
        p.grad = torch.randn(p.shape, device=DEVICE).to(p.dtype)
        optimizer.step(loss=1.0)
    return optimizer, p


def images() -> Tensor:
    return torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)


def momentum_of_other_strides(optimizer: DALS, p: Any) -> None:
    optimizer.state[p]["momentum_buffer"] = torch.arange(120.0, device=DEVICE).reshape(2, 3, 4, 5) * 0.1


def momentum_with_gaps(optimizer: DALS, p: Any) -> None:
    optimizer.state[p]["momentum_buffer"] = (torch.arange(240.0, device=DEVICE) * 0.1).reshape(2, 3, 4, 10)[..., ::2]


def ema_of_other_strides(optimizer: DALS, p: Any) -> None:
    optimizer.state[p]["grad_ema"] = optimizer.state[p]["grad_ema"].contiguous()


def momentum_negated(optimizer: DALS, p: Any) -> None:
    optimizer.state[p]["momentum_buffer"] = torch._neg_view(optimizer.state[p]["momentum_buffer"].clone())


def momentum_set(optimizer: DALS, p: Any) -> None:
    optimizer.state[p]["momentum_buffer"].set_(torch.ones(2, 3, 4, 5, device=DEVICE))


@pytest.mark.parametrize(
    "change",
    [momentum_of_other_strides, momentum_with_gaps, ema_of_other_strides, momentum_negated, momentum_set],
)
def test_state_in_any_layout(change: Callable[[DALS, Any], None]) -> None:
    """Kernels go through state as it lies, so that it is laid out anew for them."""
    (_, expected), (_, of_foreach), (optimizer, found) = (
        steps(EVERY_PATH[path], images, change) for path in ("reference", "foreach", "fused")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_foreach, expected, rtol=1e-5, atol=1e-6)
    (fused,) = optimizer._runtime.fused.values()
    assert fused.preparations == 2, "once more, after the change"


def test_memory_beside_a_slice_of_state_is_not_touched() -> None:
    matrix = torch.ones(6, 14, device=DEVICE)

    def slice_of_one(optimizer: DALS, p: Any) -> None:
        optimizer.state[p]["grad_ema"] = matrix[:, :7].zero_()

    (_, expected), (_, found) = (
        steps(path, lambda: torch.randn(6, 7), slice_of_one) for path in (EVERY_PATH["reference"], EVERY_PATH["fused"])
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (matrix[:, 7:] == 1).all()


@pytest.mark.parametrize("key", ["grad_ema", "momentum_buffer", "compensation"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda good: torch.zeros(1, dtype=good.dtype, device=DEVICE), r"has shape \(6, 7\) and its {key} \(1,\)"),
        (lambda good: torch.zeros(6, 7, dtype=good.dtype, device="meta"), r"its {key} \S+ on meta"),
        (lambda good: good.double(), r"its {key} torch.float64 on"),
        (lambda good: "mine", r"its state has str for {key}, not a tensor"),
    ],
    ids=["shape", "device", "dtype", "no tensor"],
)
def test_state_that_does_not_fit_is_refused(key: str, wrong: Any, said: str, path: dict[str, Any]) -> None:
    def replace(optimizer: DALS, p: Any) -> None:
        optimizer.state[p][key] = wrong(optimizer.state[p][key])
        params.append(p)
        before.append(p.detach().clone())

    before: list[Tensor] = []
    params: list[Any] = []

    with pytest.raises(RuntimeError, match=f"parameter 'w' of group 0: .*{said.format(key=key)}"):
        steps(path, lambda: torch.randn(6, 7).bfloat16(), replace, compensated=True)
    assert torch.equal(params[0], before[0])


def test_a_compensation_that_comes_later_lies_as_the_other_state() -> None:
    """A parameter that has become channels_last in between: its state has not."""

    def compensate(optimizer: DALS, p: Any) -> None:
        optimizer.param_groups[0]["compensated"] = True

    def turn_and_compensate(optimizer: DALS, p: Any) -> None:
        p.data = p.data.contiguous(memory_format=torch.channels_last)
        compensate(optimizer, p)

    (plain, expected), (turned, found) = (
        steps(EVERY_PATH["fused"], lambda: torch.randn(2, 3, 4, 5).bfloat16(), change)
        for change in (compensate, turn_and_compensate)
    )
    assert torch.equal(found, expected) and not found.is_contiguous()
    assert plain.state[expected]["compensation"].any()
    assert torch.equal(turned.state[found]["compensation"], plain.state[expected]["compensation"])


# -- gradients --------------------------------------------------------------------------------------------------------


def test_autograd_negates_lazily(path: dict[str, Any]) -> None:
    """A gradient that comes of complex numbers may be a view that negates; read as it lies, the step goes uphill."""
    p = nn.Parameter(torch.full((1,), 0.5, device=DEVICE))
    optimizer = DALS([("w", p)], lr=0.1, **path)
    for _ in range(3):
        p.grad = None
        w = torch.complex(torch.ones(1, device=DEVICE), p).conj() * torch.tensor(2 + 3j, device=DEVICE)
        loss = (w.real + w.imag).sum()
        loss.backward()
        assert p.grad is not None and p.grad.is_neg(), "torch resolves it now: this test shows nothing"
        optimizer.step(loss=loss)
    assert float(p.detach()) < 0.45


def test_negated_and_plain_gradients_take_turns() -> None:
    p, q = (nn.Parameter(torch.ones(40, device=DEVICE)) for _ in range(2))
    optimizers = [DALS([("w", p)], fused=True), DALS([("w", q)], fused=True)]
    for step in range(5):
        grad = torch.randn(40, device=DEVICE)
        p.grad = torch._neg_view(-grad) if step % 2 else grad.clone()
        q.grad = grad
        for optimizer in optimizers:
            optimizer.step(loss=1.0)
    assert torch.equal(p, q)


def wrapper(inner: Tensor) -> Tensor:
    """A tensor around two others, without memory of its own."""
    two: Any = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    return two(inner, inner.clone())  # type: ignore[no-any-return]


def test_wrappers_are_left_to_torch_operations() -> None:
    p: Any = nn.Parameter(wrapper(torch.ones(6, 7, device=DEVICE)))
    p.grad = wrapper(torch.ones(6, 7, device=DEVICE))
    with pytest.raises(
        RuntimeError, match="fused=True cannot step parameter 'w': it is a TwoTensor whose numbers do not"
    ):
        DALS([("w", p)], fused=True).step(loss=1.0)
    assert (p.a == 1).all()
    DALS([("w", p)], foreach=False).step(loss=1.0)
    assert (p.a < 1).all() and torch.equal(p.a, p.b)


def test_wrappers_share_no_memory() -> None:
    """All of them have an address that is none."""
    params: Any = [nn.Parameter(wrapper(torch.ones(6, device=DEVICE))) for _ in range(2)]
    optimizer = DALS([(f"{i}.w", p) for i, p in enumerate(params)], foreach=False)
    for p in params:
        p.grad = wrapper(torch.ones(6, device=DEVICE))
    optimizer.step(loss=1.0)
    assert all((p.a < 1).all() for p in params)


def test_a_gradient_without_memory_is_refused_by_the_kernels() -> None:
    p = nn.Parameter(torch.ones(6, 7, device=DEVICE))
    optimizer = DALS([("w", p)], fused=True)
    p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    before = p.detach().clone()
    p.grad = torch._efficientzerotensor((6, 7), device=DEVICE)
    with pytest.raises(RuntimeError, match="its gradient is a Tensor whose numbers do not simply lie at its address"):
        optimizer.step(loss=1.0)
    assert torch.equal(p, before)


def test_a_wider_gradient_is_refused_before_anything_moves() -> None:
    p: Any = nn.Parameter(torch.ones(6, device=DEVICE))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch knows no gradients of other dtypes")
    p.grad_dtype = torch.float64
    p.grad = torch.ones(6, dtype=torch.float64, device=DEVICE)
    optimizer = DALS([("w", p)], fused=True)
    with pytest.raises(RuntimeError, match=r"its gradient is torch.float64, and the kernels serve"):
        optimizer.step(loss=1.0)
    assert optimizer.state_dict()["param_groups"][0]["step"] == 0 and (p == 1).all()


# -- flat buffers -----------------------------------------------------------------------------------------------------


def test_large_state_has_its_memory_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_dals.gather.FLAT_BYTES", 4000)
    sizes = [3, 1001, 5, 990, 9, 0, 2000, 7]
    zeros = flat_zeros([torch.empty(size) for size in sizes], torch.float32)
    assert [z.numel() for z in zeros] == sizes and not any(z.any() for z in zeros)
    owners = [z.untyped_storage().data_ptr() for z in zeros]
    of_large = [owners[1], owners[6]]
    assert [owners.count(owner) for owner in of_large] == [1, 1]
    assert all(zeros[i].untyped_storage().nbytes() == 4 * sizes[i] for i in (1, 6))
    assert all(z.storage_offset() * 4 % 128 == 0 for z in zeros)
    assert len({owner for owner, size in zip(owners, sizes, strict=True) if size}) == 6
    assert FLAT_BYTES >= 1 << 20


def test_a_checkpoint_copies_small_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_dals.gather.FLAT_BYTES", 4000)
    params = [nn.Parameter(torch.ones(size, device=DEVICE)) for size in (3, 5, 1001)]
    optimizer = DALS([(f"{i}.w", p) for i, p in enumerate(params)], fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    saved = optimizer.state_dict()["state"]
    addresses = [optimizer.state[p]["grad_ema"].data_ptr() for p in params]
    assert [saved[i]["grad_ema"].data_ptr() == address for i, address in enumerate(addresses)] == [False, False, True]


# -- memory that is shared --------------------------------------------------------------------------------------------


def test_state_that_shares_memory_is_refused() -> None:
    """Kernels write to all state at once, in an order that nobody chose."""
    params = [nn.Parameter(torch.ones(8, device=DEVICE)) for _ in range(2)]
    optimizer = DALS([(f"{i}.w", p) for i, p in enumerate(params)], fused=True)

    def step() -> None:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)

    step()
    kept = dict(optimizer.state[params[0]])
    zeros = torch.zeros(8, device=DEVICE)
    before = [p.detach().clone() for p in params]
    optimizer.state[params[0]].update(grad_ema=zeros, momentum_buffer=zeros)
    with pytest.raises(RuntimeError, match=r"grad_ema of parameter '0\.w' and momentum_buffer of .*: they share"):
        step()
    optimizer.state[params[0]] = dict(optimizer.state[params[1]])
    with pytest.raises(RuntimeError, match=r"(\w+) of parameter '0\.w' and \1 of parameter '1\.w': they share"):
        step()
    optimizer.state[params[0]].update(kept, grad_ema=torch.zeros(1, device=DEVICE).expand(8))
    with pytest.raises(RuntimeError, match=r"grad_ema of parameter '0\.w': several of its elements share"):
        step()
    assert all(map(torch.equal, params, before))
    optimizer.state[params[0]].update(kept)
    step()
    assert not any(map(torch.equal, params, before))


def test_what_else_is_in_the_state_is_left_alone() -> None:
    """And so is state of a parameter that is not stepped, whatever it is."""
    params = [nn.Parameter(torch.ones(8, device=DEVICE)) for _ in range(2)]
    optimizer = DALS([(f"{i}.w", p) for i, p in enumerate(params)], fused=True)
    optimizer.state[params[1]] = {"grad_ema": None, "momentum_buffer": "mine"}
    for step in range(4):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step(loss=1.0)
        optimizer.state[params[0]].update(note="hello", count=torch.tensor(float(step)))
    assert optimizer.state[params[0]]["note"] == "hello" and optimizer.state[params[1]]["grad_ema"] is None


def step_with_such_state(odd: Callable[[], Tensor]) -> None:
    """It is laid out anew, as is everything that is not plain; that of two parameters shares no memory."""
    params = [nn.Parameter(torch.ones(12, device=DEVICE)) for _ in range(2)]
    optimizer = DALS([(f"{i}.w", p) for i, p in enumerate(params)], depth=0.5, fused=True)
    for step in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
            if step == 1:
                optimizer.state[p].update(grad_ema=odd(), momentum_buffer=odd())
        optimizer.step(loss=1.0)
    assert torch.equal(*params) and all(map(is_plain, optimizer.state[params[0]].values()))


@pytest.mark.parametrize("kind", ["wrapper", "zeros", "freed"])
@pytest.mark.parametrize("place", ["param", "grad", "state"])
def test_what_has_no_memory_behind_an_offset(kind: str, place: str) -> None:
    """Its address is no address, and not 0 either."""

    def odd() -> Tensor:
        if kind == "wrapper":
            two: Any = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
            b, c = (torch.ones(20, device=DEVICE) for _ in range(2))
            return two(b[8:20], c[8:20])  # type: ignore[no-any-return]
        if kind == "zeros":
            return torch._efficientzerotensor((20,), device=DEVICE)[8:]
        whole = torch.ones(20, device=DEVICE)
        view = whole[8:]
        whole.untyped_storage().resize_(0)
        return view

    value = odd()
    assert not is_plain(value)
    if place == "state":
        if kind != "freed":  # which nobody can copy
            step_with_such_state(odd)
        return
    p: Any = nn.Parameter(value if place == "param" else torch.ones(12, device=DEVICE))
    optimizer = DALS([("w", p)], fused=True)
    if place == "grad":
        for _ in range(3):
            p.grad = torch.ones(12, device=DEVICE)
            optimizer.step(loss=1.0)
        p.grad = value
    else:
        p.grad = odd() if kind == "wrapper" else torch.ones(12, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"whose numbers do not simply lie at its address"):
        optimizer.step(loss=1.0)
