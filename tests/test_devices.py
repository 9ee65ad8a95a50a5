"""Which path a device gets by default, and several devices in one optimizer.

Without a GPU the CPU under another index stands in for a second device: the same code moves the same scalars to it.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from bench.host import without_launches
from fused_dals import DALS, self_check, stepper
from fused_dals.fused import FusedPass
from fused_dals.gather import TensorBatch
from fused_dals.launcher import Launcher
from tests.helpers import ConvNet, batch, identical, snapshot, train_step

pytest.importorskip("triton")

CPU, OTHER = torch.device("cpu"), torch.device("cpu", 1)
F32 = torch.float32


# -- the default ------------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the steps that the kernels take, on a CPU that passes for a GPU on which they work."""
    taken: list[int] = []
    real = FusedPass.begin

    def begin(self: FusedPass, *arguments: Any) -> Any:
        taken.append(len(self.launches))
        return real(self, *arguments)

    monkeypatch.setattr(FusedPass, "begin", begin)
    monkeypatch.setattr(stepper, "serves_by_default", lambda param: param.dtype != torch.float64)
    return taken


@pytest.mark.parametrize(
    ("arguments", "kernels"),
    [
        ({}, True),
        ({"fused": True}, True),
        ({"fused": False}, False),
        ({"foreach": True}, False),
        ({"foreach": False}, False),
        ({"foreach": True, "fused": False}, False),
    ],
    ids=str,
)
def test_none_means_the_kernels_where_they_serve(arguments: dict[str, Any], kernels: bool, passes: list[int]) -> None:
    model = ConvNet()
    optimizer = DALS(model, **arguments)
    for _ in range(2):
        train_step(model, optimizer, batch(F32))
    assert bool(passes) == kernels
    storages = {entry["grad_ema"].untyped_storage().data_ptr() for entry in optimizer.state.values()}
    assert (len(storages) == 1) == kernels, "state is flat for the kernels, and for them alone"


def test_what_the_kernels_cannot_do_falls_back_silently(passes: list[int], seed: int) -> None:
    """A float64 parameter, and one with more strides than they follow; the others still take the kernels."""
    wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
    tangled = nn.Parameter(torch.randn([2] * 8).permute(0, 2, 4, 6, 1, 3, 5, 7)[..., ::2])
    plain = nn.Parameter(torch.randn(5))
    optimizer = DALS([("wide", wide), ("tangled", tangled), ("plain", plain)])
    twins = [p.detach().clone() for p in (wide, tangled, plain)]
    for p in (wide, tangled, plain):
        p.grad = torch.randn(p.shape, dtype=p.dtype).transpose(0, -1).contiguous().transpose(0, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.step(loss=1.0)
    assert passes and not any(torch.equal(p, twin) for p, twin in zip((wide, tangled, plain), twins, strict=True))
    assert len(optimizer.trust_ratios()) == 3
    assert optimizer.state[wide]["grad_ema"].dtype == torch.float64


def test_off_the_gpu_the_default_is_foreach() -> None:
    assert not self_check.serves_by_default(torch.ones(1))
    model = ConvNet()
    optimizer = DALS(model)
    train_step(model, optimizer, batch(F32))
    assert not optimizer._runtime.fused


# -- several devices --------------------------------------------------------------------------------------------------

PAIRS = {
    "kernels on both": (True, True),
    "kernels and foreach": (True, False),
    "foreach and kernels": (False, True),
    "foreach on both": (False, False),
}


def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of odd index live on the other device."""
    monkeypatch.setattr(TensorBatch, "device", property(lambda batch: OTHER if batch.group_index % 2 else CPU))


def in_groups(model: nn.Module, fused: tuple[bool, bool], **arguments: Any) -> DALS:
    named = list(model.named_parameters())
    parts = [named[:3], named[3:6], named[6:]]
    groups = [{"params": part, "fused": fused[i % 2]} for i, part in enumerate(parts)]
    return DALS(groups, depth=0.5, **arguments)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"total_steps": 7},
        {"restart_steps": 3, "restart_mult": 1},
        {"max_grad_norm": 0.3, "skip_nonfinite": True},
        {"ema_decay": (1.0, 0.6, 0.7)},
    ],
    ids=lambda a: "-".join(a),
)
def test_two_devices_step_as_one(
    pair: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    a = ConvNet()
    b = copy.deepcopy(a)
    apart, together = in_groups(a, PAIRS[pair], **arguments), in_groups(b, PAIRS[pair], **arguments)
    data = batch(F32)
    for step in range(5):
        for model, optimizer in ((a, apart), (b, together)):
            with monkeypatch.context() as patch:
                if optimizer is apart:
                    two_devices(patch)
                if step == 2 and "skip_nonfinite" in arguments:
                    loss = nn.functional.cross_entropy(model(data[0]), data[1])
                    optimizer.zero_grad()
                    loss.backward()
                    last = list(model.parameters())[4]
                    last.grad = torch.full_like(last, math.nan)
                    optimizer.step(loss=loss)
                else:
                    train_step(model, optimizer, data)
    if "max_grad_norm" in arguments:  # sums of squares are added in another order
        for x, y in zip(snapshot(a, apart), snapshot(b, together), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        assert apart.skipped_steps == together.skipped_steps == 1
    else:
        assert identical(snapshot(a, apart), snapshot(b, together))
    assert apart.phases() == together.phases()
    counters = [one.state_dict()["param_groups"][0] for one in (apart, together)]
    assert counters[0]["step"] == counters[1]["step"] and counters[0]["loss_ema"] == pytest.approx(
        counters[1]["loss_ema"], rel=1e-5
    )


@pytest.mark.parametrize("pair", PAIRS)
def test_infinite_gradients_on_one_device_drop_the_step_on_both(
    pair: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """GradScaler sums found_inf over devices; so does skip_nonfinite."""
    model = ConvNet()
    optimizer = in_groups(model, PAIRS[pair], amp_fused=True)
    two_devices(monkeypatch)
    data = batch(F32)
    train_step(model, optimizer, data)
    before = snapshot(model, optimizer)
    vars(optimizer).update(grad_scale=torch.tensor(2.0), found_inf=torch.tensor(1.0))
    train_step(model, optimizer, data)
    assert identical(before, snapshot(model, optimizer)) and optimizer.skipped_steps == 1
    vars(optimizer).update(found_inf=torch.tensor(0.0))
    train_step(model, optimizer, data)
    assert not identical(before, snapshot(model, optimizer))


def test_a_second_device_is_what_its_stand_in_is_taken_for() -> None:
    """The negative control of this file: the two compare unequal, and batches are parted by them."""
    assert CPU != OTHER and len({CPU, OTHER}) == 2
    p = torch.ones(2)
    assert TensorBatch(1, [0], [p], [p]).device == CPU


# -- defaults that a program may have ---------------------------------------------------------------------------------


def test_the_default_device_is_no_matter_for_tables() -> None:
    """The kernels' tables hold what they should; the interpreter itself does not run under another default device."""
    a, b = ConvNet(), ConvNet()
    tables = []
    for model, device in ((a, "cpu"), (b, "meta")):
        optimizer = DALS(model, fused=True, max_grad_norm=0.5)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with without_launches(), torch.device(device):
            optimizer.step(loss=1.0)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with without_launches(), torch.device(device):
            optimizer.step(loss=1.0)  # gradients elsewhere
        (fused,) = optimizer._runtime.fused.values()
        (launch,) = fused.launches
        addresses = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
        assert launch.bucket.grads.tolist() == addresses
        bucket = launch.bucket
        rows = [fused.group_table.rows, bucket.lists[0].items, bucket.scan_lists()[()], bucket.blends]
        tables.append([row.clone() for row in rows])
        assert all(table.device == CPU for table in rows)
    assert identical(*tables)


@pytest.mark.parametrize("arguments", [{"foreach": False}, {"foreach": True}], ids=str)
def test_the_default_device_is_no_matter(arguments: dict[str, Any], seed: int) -> None:
    """Tables and scalars are made where they belong; on the meta device they would hold nothing."""
    a = ConvNet()
    b = copy.deepcopy(a)
    options: dict[str, Any] = {"max_grad_norm": 0.5, "skip_nonfinite": True, "restart_steps": 3, **arguments}
    data = batch(F32)
    one, two = DALS(a, **options), DALS(b, **options)
    for _ in range(3):
        for model, optimizer, device in ((a, one, "cpu"), (b, two, "meta")):
            x, y = data
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            with torch.device(device):
                optimizer.step(loss=loss)
    with torch.device("meta"):
        saved = two.state_dict()
        two.load_state_dict(saved)
    assert identical(snapshot(a, one), snapshot(b, two))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_learning_rate_of_any_dtype_is_read_live(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device of the parameters, where nobody may wait for it: the kernels read it, or a copy of it."""
    monkeypatch.setattr("fused_dals.host.knows", lambda tensor: False)
    lr = torch.tensor(0.5, dtype=dtype)
    p = nn.Parameter(torch.ones(4))
    optimizer = DALS([("w", p)], lr=lr, fused=True)
    p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    assert (p < 1).all()
    lr.fill_(0.0)
    before = p.detach().clone()
    optimizer.step(loss=1.0)
    assert torch.equal(before, p)
    lr.fill_(0.5)
    optimizer.step(loss=1.0)
    assert (p < before).all()


def test_a_device_is_entered_unless_it_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, whatever device its arguments are on."""
    entered: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device))
    passing = FusedPass(CPU)
    for index in (0, 1):
        passing.device = torch.device("cuda", index)
        passing._current_device()
    assert entered == [torch.device("cuda", 1)]


def test_every_launch_is_made_inside_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[bool] = []
    inside: list[FusedPass] = []

    @contextmanager
    def entered(passing: FusedPass) -> Iterator[None]:
        inside.append(passing)
        yield
        inside.pop()

    def launch(*arguments: Any, **constants: Any) -> None:
        launched.append(bool(inside))

    monkeypatch.setattr(FusedPass, "_current_device", entered)
    monkeypatch.setattr(Launcher, "launch", launch)
    p = nn.Parameter(torch.ones(4))
    optimizer = DALS([("w", p)], fused=True, max_grad_norm=1.0)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
    assert launched == [True] * 3 * 3, "scan, prologue and pass"
