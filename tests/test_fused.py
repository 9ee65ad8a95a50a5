"""The fused pass: the real kernels against the float64 reference, bit for bit against themselves, launches counted.

Without a GPU the kernels run in Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_dals import DALS
from fused_dals.buckets import WIDE_BYTES
from fused_dals.fused import FusedPass
from fused_dals.gather import TensorBatch
from fused_dals.kernels import layout
from fused_dals.kernels.layout import TILE
from fused_dals.launch_plan import IN_USE, LaunchPlan
from fused_dals.live_groups import GroupsVersion
from fused_dals.loss_signal import StepLoss
from fused_dals.reference import dals_reference_
from fused_dals.run_state import RunState, StepInputs
from tests.helpers import PRESETS, ConvNet, batch, follow_oracle, identical, oracle_of, snapshot, train_step

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CHUNK = layout.chunk_elements(4, 4, 4)

#: parameter, gradient, state
DTYPES = [(p, g, s) for p in (F32, BF16, F16) for g in dict.fromkeys((p, F32)) for s in (F32, BF16)]

#: With a learning rate that moves weights by far more than what bfloat16 rounds away.
GROUP: dict[str, Any] = {
    "lr": 50.0, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02, "trust_clip": (0.0, 5.0),
    "ema_decay": (0.3, 0.6, 0.7), "phase_thresholds": (0.01, 0.002), "total_steps": None, "warmup_fraction": 0.05,
    "restart_steps": None, "restart_mult": 2, "maximize": False, "max_grad_norm": None,
}  # fmt: skip


class Tensors:
    """p, g, h, m of some tensors, a depth-like blend for each, and the same in float64."""

    def __init__(self, sizes: Sequence[Any], dtypes: tuple[torch.dtype, ...] = (F32, F32, F32)) -> None:
        kinds = (dtypes[0], dtypes[1], dtypes[2], dtypes[2])
        self.lists = [[torch.randn(size).to(kind).to(DEVICE) for size in sizes] for kind in kinds]
        self.blends = [0.3 + 0.4 * i / max(1, len(sizes) - 1) for i in range(len(sizes))]

    def copy(self) -> Tensors:
        return copy.deepcopy(self)

    def reordered(self, order: Sequence[int]) -> Tensors:
        other = copy.copy(self)
        other.lists = [[tensors[i].clone() for i in order] for tensors in self.lists]
        other.blends = [self.blends[i] for i in order]
        return other

    def fused_step(self, plan: LaunchPlan = IN_USE, **group: Any) -> Tensor:
        """One step through the kernels; returns the trust ratios."""
        p, g, h, m = self.lists
        state = {param: {"grad_ema": a, "momentum_buffer": b} for param, a, b in zip(p, h, m, strict=True)}
        loss = torch.ones((), dtype=torch.float64, device=DEVICE)
        fused = FusedPass(DEVICE, plan)
        fused.prepare([TensorBatch(0, list(range(len(p))), p, g)], state, [self.blends])
        (measured,) = fused.run(
            StepInputs(RunState().values.to(DEVICE), StepLoss(loss, 1)), [{**GROUP, **group}], GroupsVersion(0, 0)
        )
        return measured.values.clone()

    def reference_step(self, dtype: torch.dtype | None = None, **group: Any) -> list[float]:
        """One step of the reference path, in ``dtype`` throughout where one is given."""
        if dtype is not None:
            self.lists = [[t.to(dtype) for t in tensors] for tensors in self.lists]
        hyper = {**GROUP, **group}
        kept = ("weight_decay", "trust_coefficient", "trust_clip", "momentum", "lr")
        scalars = {key: hyper[key] for key in kept} | {"grad_factor": -1.0 if hyper["maximize"] else 1.0}
        alpha = hyper["ema_decay"][0]
        return [
            dals_reference_(*one, ema_decay=alpha, bypass=alpha == 1, **scalars).item()
            for one in zip(*self.lists, self.blends, strict=True)
        ]

    def flat(self) -> list[Tensor]:
        return [t for tensors in self.lists for t in tensors]


def norm_error(value: Tensor, exact: Tensor, start: Tensor) -> float:
    """Norm of the error over the larger norm of result and start: what cancels leaves the rounding of its summands."""
    scale = max(float(exact.double().norm()), float(start.double().norm()))
    return float((value.double() - exact.double()).norm()) / scale


def assert_as_exact_as_torch(tensors: Tensors, stage_a_writes: bool = True, **group: Any) -> None:
    """The kernels' error against float64 is at most 4 times that of torch's own float32 arithmetic, plus a rounding.

    The interpreter truncates where it stores bfloat16, which a GPU rounds (the codegen test looks at the instruction).
    """
    start, truth, plain = tensors.copy(), tensors.copy(), tensors.copy()
    expected = truth.reference_step(torch.float64, **group)
    plain.reference_step(**group)
    ratios = tensors.fused_step(LaunchPlan(stage_a_writes=stage_a_writes), **group)
    moving = "pm" if {**GROUP, **group}["ema_decay"][0] == 1 else "phm"
    for kind, name in enumerate("pghm"):
        lists = (tensors.lists[kind], plain.lists[kind], truth.lists[kind], start.lists[kind])
        for ours, theirs, exact, before in zip(*lists, strict=True):
            if ours.numel():
                truncated = DEVICE.type == "cpu" and BF16 in (ours.dtype, tensors.lists[3][0].dtype)
                floor = torch.finfo(BF16 if truncated else F32).eps
                bound = 4 * norm_error(theirs, exact, before) + floor
                assert norm_error(ours, exact, before) <= bound, (name, ours.shape)
                if ours.numel() >= 64 and name in moving:
                    assert norm_error(before, exact, before) >= 10 * bound, f"{name} might as well have stayed"
    for p, ratio, exact_ratio in zip(tensors.lists[0], ratios.tolist(), expected, strict=True):
        # u may cancel where there is little of it: a single number loses three digits in one of a thousand draws.
        assert ratio == pytest.approx(exact_ratio, rel=2e-6 if p.numel() >= 64 else 1e-3)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("stage_a_writes", [True, False])
def test_every_dtype(dtypes: tuple[torch.dtype, ...], stage_a_writes: bool, seed: int) -> None:
    chunk = layout.chunk_elements(*(dtype.itemsize for dtype in dtypes))
    assert_as_exact_as_torch(Tensors([5, 3 * TILE + 1, chunk, chunk + 9], dtypes), stage_a_writes)


@pytest.mark.parametrize(
    "size", [0, 1, TILE - 1, TILE, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + TILE + 5]
)
def test_every_size_and_an_empty_tensor_last(size: int, seed: int) -> None:
    assert_as_exact_as_torch(Tensors([(3, 7), size, 0]))


@pytest.mark.parametrize(
    "group",
    [{"maximize": True}, {"ema_decay": (1.0, 0.6, 0.7)}, {"weight_decay": 0.0}, {"trust_clip": (0.2, 0.3)}],
    ids=str,
)
def test_every_branch_of_the_scalars(group: dict[str, Any], seed: int) -> None:
    assert_as_exact_as_torch(Tensors([300, 5]), **group)


def test_norms_of_zero_give_ratio_one(seed: int) -> None:
    tensors = Tensors([4, 4, 4])
    tensors.lists[0][0].zero_()
    for tensor in (tensors.lists[1][1], tensors.lists[2][1]):
        tensor.zero_()
    ratios = tensors.fused_step(weight_decay=0.0).tolist()
    assert ratios[:2] == [1.0, 1.0] and ratios[2] != 1.0


@pytest.mark.parametrize("which", range(4))
def test_misaligned_addresses(which: int, seed: int) -> None:
    """p, g, h or m at an address that 16-byte accesses cannot use."""
    tensors = Tensors([CHUNK + 3, 40])
    room = torch.randn(CHUNK + 8, device=DEVICE)
    odd = room[1 : CHUNK + 4]
    odd.copy_(tensors.lists[which][0])
    tensors.lists[which][0] = odd
    assert odd.data_ptr() % WIDE_BYTES != 0
    before = room[0].item(), room[CHUNK + 4 :].clone()
    aligned = tensors.copy()
    aligned.lists[which][0] = odd.clone()
    expected = aligned.fused_step()
    torch.testing.assert_close(tensors.fused_step(), expected, rtol=1e-6, atol=0)
    for a, b in zip(tensors.flat(), aligned.flat(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert before[0] == room[0].item() and torch.equal(before[1], room[CHUNK + 4 :])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every second column": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "slice of a larger tensor": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 0))[..., 3:, 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["parameter", "gradient", "both"])
def test_strides(layout: str, which: str, seed: int) -> None:
    """Laid out in any way the numbers are those of plain tensors, and nothing beside them is touched."""
    plain = Tensors([(4, 3, 5, 7), 6])
    odd = plain.copy()
    change = LAYOUTS[layout]
    if which != "gradient":
        odd.lists[0][0] = change(odd.lists[0][0])
        for state in odd.lists[2:]:
            state[0] = torch.empty_like(odd.lists[0][0], memory_format=torch.preserve_format).copy_(state[0])
    if which != "parameter":
        odd.lists[1][0] = change(odd.lists[1][0])
    assert any(not tensors[0].is_contiguous() for tensors in odd.lists)
    beside = [t[0]._base.clone() if t[0]._base is not None else None for t in odd.lists[:2]]
    torch.testing.assert_close(odd.fused_step(), plain.fused_step(), rtol=1e-6, atol=0)
    for a, b in zip(odd.flat(), plain.flat(), strict=True):
        torch.testing.assert_close(a.contiguous(), b, rtol=1e-6, atol=1e-7)
    for tensors, kept in zip(odd.lists[:2], beside, strict=True):
        if kept is not None and layout == "slice of a larger tensor":
            changed = (tensors[0]._base != kept).sum()
            assert changed <= tensors[0].numel()


def test_an_expanded_gradient(seed: int) -> None:
    plain, odd = Tensors([(8, 9)]), Tensors([(8, 9)])
    odd.lists = [[t.clone() for t in tensors] for tensors in plain.lists]
    plain.lists[1][0] = torch.full((8, 9), 0.3, device=DEVICE)
    odd.lists[1][0] = torch.tensor(0.3, device=DEVICE).expand(8, 9)
    plain.fused_step()
    odd.fused_step()
    for a, b in zip(odd.flat(), plain.flat(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_too_many_dimensions_are_refused_before_a_write(seed: int) -> None:
    p = torch.nn.Parameter(torch.randn((2,) * 8, device=DEVICE))
    q = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    q.grad, p.grad = torch.ones_like(q), torch.randn_like(p).permute(7, 5, 3, 1, 6, 4, 2, 0)
    optimizer = DALS([("q", q), ("p", p)], fused=True)
    with pytest.raises(RuntimeError, match=r"parameter 'p': its strides .* leave 8 of its 8 .* use foreach=True"):
        optimizer.step(loss=1.0)
    assert not optimizer.state and torch.equal(q, torch.ones_like(q))
    p.grad = torch.randn_like(p)
    optimizer.step(loss=3.0)
    assert optimizer.state_dict()["param_groups"][0]["loss_ema"] == 3.0


SIZES = [3 * CHUNK + 5, 7, 0, CHUNK, CHUNK + TILE + 1, (9, 11), 1]


def test_reruns_and_windows_give_the_same_bits(seed: int) -> None:
    start = Tensors(SIZES)
    results = []
    for window in (None, None, 0, 1, 3, 5, 100):
        run = start.copy()
        ratios = run.fused_step(LaunchPlan(window=window))
        results.append([*run.flat(), ratios])
    for other in results[1:]:
        assert identical(results[0], other)


OTHER_PLANS = {
    "B in the tiles of A": LaunchPlan(most_in_b=0),
    "tiles one by one": LaunchPlan(in_pairs=False),
    "larger tiles": LaunchPlan(tile=2 * TILE),
    "no marks": LaunchPlan(evict_first=False),
    "same runs": LaunchPlan(same_runs=True),
    "4 warps": LaunchPlan(num_warps=4),
}


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, F32), (BF16, BF16, BF16)], ids=str)
def test_no_plan_changes_a_bit(dtypes: tuple[torch.dtype, ...], seed: int) -> None:
    chunk = layout.chunk_elements(*(dtype.itemsize for dtype in dtypes))
    start = Tensors([2 * chunk + 5, chunk, 3 * TILE + 1, 7], dtypes)
    first = start.copy()
    ratios = first.fused_step()
    assert not identical(first.flat(), start.flat())
    for name, plan in OTHER_PLANS.items():
        run = start.copy()
        assert torch.equal(run.fused_step(plan), ratios) and identical(run.flat(), first.flat()), name


def test_permuted_tensors_give_permuted_bits(seed: int) -> None:
    start = Tensors(SIZES)
    order = torch.randperm(len(SIZES)).tolist()
    permuted = start.reordered(order)
    a, b = start.fused_step(LaunchPlan(window=2)), permuted.fused_step(LaunchPlan(window=2))
    assert torch.equal(a[order], b)
    for ours, theirs in zip(start.lists, permuted.lists, strict=True):
        assert identical([ours[i] for i in order], theirs)


def test_one_nan_stays_in_its_tensor_and_padding_is_not_read(seed: int) -> None:
    """State in flat buffers whose padding is NaN, one gradient with a NaN: the other tensors never see it."""
    start = Tensors([5, CHUNK + 3, 130])
    for kind in (2, 3):
        flat = torch.full((3 * (CHUNK + 256),), math.nan, device=DEVICE)
        for i, tensor in enumerate(start.lists[kind]):
            view = flat[i * (CHUNK + 256) :][: tensor.numel()]
            view.copy_(tensor)
            start.lists[kind][i] = view
    clean = start.copy()
    clean.fused_step()
    start.lists[1][1][17] = math.nan
    start.fused_step()
    for kind, tensors in enumerate(start.lists):
        for i, tensor in enumerate(tensors):
            if i != 1:
                assert tensor.isfinite().all() and torch.equal(tensor, clean.lists[kind][i])
    assert start.lists[0][1].isnan().all() and start.lists[2][1].isnan().sum() == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_training_follows_the_oracle(preset: str, seed: int) -> None:
    """Phases, warm-up or restarts, missing gradients: the prologue's scalar work against the SPEC, free-running."""
    schedule: dict[str, Any] = (
        {"restart_steps": 5} if preset == "dals_acc" else {"total_steps": 40, "warmup_fraction": 0.1}
    )
    model = ConvNet().to(DEVICE)
    oracle = oracle_of(model, preset, **schedule)
    errors = follow_oracle(model, PRESETS[preset](model, fused=True, **schedule), oracle, 24)
    assert errors.worst() < 256 * torch.finfo(F32).eps and errors.trust_ratio < 1024 * torch.finfo(F32).eps, errors


@pytest.mark.filterwarnings("ignore:.*the built-in schedule is over")
def test_the_prologue_keeps_the_rules_of_phase_and_schedule(seed: int) -> None:
    """Many groups, each with a schedule of its own, over several steps: eta and phase as the host's functions say."""
    params = [torch.nn.Parameter(torch.ones(2, device=DEVICE)) for _ in range(70)]
    used = [*range(8), 62, 63, 64, 69]  # tensors with a gradient; all groups go through the prologue
    schedules: list[dict[str, Any]] = [
        {}, {"total_steps": 9, "warmup_fraction": 0.4}, {"total_steps": 1}, {"restart_steps": 3, "restart_mult": 1.5},
        {"restart_steps": 4, "restart_mult": 1}, {"restart_steps": 1, "restart_mult": 2}, {"lr": torch.tensor(0.5)},
    ]  # fmt: skip
    groups = [
        {"params": [(f"p{i}", p)], "phase_thresholds": (0.01 * (i % 5), 0.002), **schedules[i % len(schedules)]}
        for i, p in enumerate(params)
    ]
    for group in groups:
        t1, t2 = group["phase_thresholds"]
        group["phase_thresholds"] = (max(t1, t2), t2)
    optimizer = DALS(groups, fused=True, trust_clip=(1.0, 1.0), weight_decay=0.0, momentum=0.0, depth=1.0)
    twin = DALS(copy.deepcopy(groups), foreach=True, trust_clip=(1.0, 1.0), weight_decay=0.0, momentum=0.0, depth=1.0)
    for loss in (1.0, 0.9, math.nan, 0.5, None, 0.7):
        for opt in (optimizer, twin):
            for i in used:
                opt.param_groups[i]["params"][0].grad = torch.ones(2, device=DEVICE)
            opt.step(loss=loss)
        assert optimizer.phases() == twin.phases() and optimizer.current_lr() == twin.current_lr()
        for a, b in zip(optimizer.param_groups, twin.param_groups, strict=True):
            torch.testing.assert_close(a["params"][0], b["params"][0], rtol=1e-6, atol=1e-6)
    assert optimizer.state_dict()["param_groups"][0]["loss_ema"] == pytest.approx(
        twin.state_dict()["param_groups"][0]["loss_ema"], rel=1e-15
    )


def count_launches(optimizer: DALS, monkeypatch: pytest.MonkeyPatch) -> int:
    """Kernels and memory operations that a step issues; in the interpreter, calls of the kernels."""
    from fused_dals.kernels import fused_pass, prologue

    calls = []
    if DEVICE.type == "cuda":
        optimizer.step(loss=1.0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step(loss=1.0)
        return sum("CUDA" in str(event.device_type) for event in profile.events())
    for module, name in ((fused_pass, "fused_pass"), (prologue, "prologue")):

        class Counted:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return lambda *args, **kwargs: calls.append(grid)

        monkeypatch.setattr(module, name, Counted())
    optimizer.step(loss=1.0)
    return len(calls)


@pytest.mark.parametrize("count", [1, 300, 10_000])
def test_at_most_three_launches(count: int, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whatever the number of tensors and groups."""
    params = [(f"p{i}", torch.nn.Parameter(torch.ones(3, device=DEVICE))) for i in range(count)]
    for _, p in params:
        p.grad = torch.ones_like(p)
    for groups in ([{"params": params}], [{"params": params[i::7]} for i in range(min(7, count))]):
        assert count_launches(DALS([dict(g) for g in groups], fused=True), monkeypatch) <= 3


def test_tables_are_written_only_when_something_changed(either_walk: str, seed: int) -> None:
    model = ConvNet().to(DEVICE)
    optimizer = DALS(model, fused=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step(loss=1.0)
    fused = optimizer._runtime.fused[DEVICE]
    optimizer.step(loss=1.0)
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step(loss=1.0)
    assert fused.preparations == 1
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step(loss=1.0)
    assert fused.preparations == 1, "gradients at new addresses need no more than their addresses"
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.step(loss=1.0)
    assert fused.preparations == 1, "a number needs no more than its group's row"
    optimizer.param_groups[0]["depth"] = 0.5
    optimizer.step(loss=1.0)
    assert fused.preparations == 2


def swap_parameter(model: ConvNet, optimizer: DALS) -> None:
    new = torch.nn.Parameter(model.conv.weight.detach().clone() + 1)
    optimizer.param_groups[0]["params"][1] = model.conv.weight = new


def swap_data(model: ConvNet, optimizer: DALS) -> None:
    model.conv.weight.data = model.conv.weight.data.clone() + 1


def change_strides(model: ConvNet, optimizer: DALS) -> None:
    weight: Any = model.head[0].weight
    weight.data = weight.data.t().contiguous().t()


def same_memory_other_strides(model: ConvNet, optimizer: DALS) -> None:
    bias: Any = model.head[0].bias  # 16 elements: every second one of the same memory twice over
    bias.data = bias.data.as_strided((8,), (2,))
    bias.grad = None
    for entry in optimizer.state[bias]:
        optimizer.state[bias][entry] = optimizer.state[bias][entry][:8].clone()


def replace_state(model: ConvNet, optimizer: DALS) -> None:
    entry = optimizer.state[model.conv.weight]
    entry["momentum_buffer"] = torch.ones_like(entry["momentum_buffer"])


def swap_data_of_state(model: ConvNet, optimizer: DALS) -> None:
    momentum_buffer = optimizer.state[model.conv.weight]["momentum_buffer"]
    momentum_buffer.data = torch.ones_like(momentum_buffer)


def forget_state(model: ConvNet, optimizer: DALS) -> None:
    del optimizer.state[model.conv.weight]


def freeze(model: ConvNet, optimizer: DALS) -> None:
    model.conv.requires_grad_(False)
    model.conv.weight.grad = model.conv.bias.grad = None


def change_depth(model: ConvNet, optimizer: DALS) -> None:
    optimizer.param_groups[0]["depth"] = 0.9


def add_group(model: ConvNet, optimizer: DALS) -> None:
    extra = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    extra.grad = torch.ones_like(extra)
    optimizer.add_param_group({"params": [("extra", extra)]})


def misalign_gradient(model: ConvNet, optimizer: DALS) -> None:
    model.conv.weight.grad = torch.ones(37, device=DEVICE)[1:].view(4, 1, 3, 3)


def move_between_groups(model: ConvNet, optimizer: DALS) -> None:
    group = optimizer.param_groups[0]
    tail = {**group, "lr": 0.3, "params": group["params"][5:], "param_names": group["param_names"][5:]}
    optimizer.param_groups.append(tail)
    group["params"], group["param_names"] = group["params"][:5], group["param_names"][:5]


def rename_in_place(model: ConvNet, optimizer: DALS) -> None:
    optimizer.param_groups[0]["param_names"].reverse()


def load(model: ConvNet, optimizer: DALS) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["momentum_buffer"] += 1
    saved["param_groups"][0]["step"] = 7
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    "change",
    [
        swap_parameter, swap_data, change_strides, same_memory_other_strides, replace_state, swap_data_of_state,
        forget_state, freeze, change_depth, add_group, misalign_gradient, move_between_groups, rename_in_place, load,
    ],
)  # fmt: skip
def test_whatever_changes_between_steps_is_noticed(
    change: Callable[[ConvNet, DALS], None], either_walk: str, seed: int
) -> None:
    """A fused run and a foreach run meet the same surprise between two steps, and go on alike."""
    results = []
    for path in ({"fused": True}, {"foreach": True}):
        torch.manual_seed(seed)
        model = ConvNet().to(DEVICE)
        optimizer = DALS(model, total_steps=20, **path)
        for step in range(4):
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = torch.randn_like(p)
            if step == 2:
                change(model, optimizer)
                for p in model.parameters():
                    if p.requires_grad and p.grad is None:
                        p.grad = torch.randn_like(p)
            optimizer.step(loss=1.0)
        results.append([p.detach() for group in optimizer.param_groups for p in group["params"]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_state_is_flat_padded_and_does_not_drag_the_bucket_into_a_checkpoint(seed: int) -> None:
    model = ConvNet().to(DEVICE)
    optimizer = DALS(model, fused=True)
    train_step(model, optimizer, tuple(t.to(DEVICE) for t in batch(F32)))
    emas = [optimizer.state[p]["grad_ema"] for p in model.parameters()]
    assert len({t.untyped_storage().data_ptr() for t in emas}) == 1
    assert all(t.data_ptr() % 128 == emas[0].data_ptr() % 128 for t in emas)
    assert all(t.shape == p.shape and t.stride() == p.stride() for t, p in zip(emas, model.parameters(), strict=True))
    for entry in optimizer.state_dict()["state"].values():
        assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in entry.values())


def test_checkpoints_move_between_fused_and_foreach(seed: int) -> None:
    model = ConvNet().to(DEVICE)
    fused = DALS(model, fused=True, total_steps=20)
    data = tuple(t.to(DEVICE) for t in batch(F32))
    for _ in range(2):
        train_step(model, fused, data)
    twin = copy.deepcopy(model)
    foreach = DALS(twin, foreach=True, total_steps=20)
    saved = fused.state_dict()
    saved["param_groups"][0].update(fused=None, foreach=True)
    foreach.load_state_dict(saved)
    assert identical(snapshot(model, fused), snapshot(twin, foreach))
    again = DALS(model, fused=True, total_steps=20)
    saved = foreach.state_dict()
    saved["param_groups"][0].update(fused=True, foreach=None)
    again.load_state_dict(saved)
    train_step(model, again, data)
    assert again.state_dict()["param_groups"][0]["step"] == 3 and again.phases() == [2]
    other = copy.deepcopy((model, again))
    for m, o in ((model, again), other):
        train_step(m, o, data)
    assert identical(snapshot(model, again), snapshot(*other))


def test_groups_whose_border_moves_are_noticed(seed: int) -> None:
    """The same tensors in the same order, but one belongs to the other group now."""
    results = []
    for path in ({"fused": True}, {"foreach": True}):
        torch.manual_seed(seed)
        params = [torch.nn.Parameter(torch.randn(5, device=DEVICE)) for _ in range(4)]
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.01}]
        optimizer = DALS(groups, depth=0.5, **path)
        for step in range(4):
            for p in params:
                p.grad = torch.randn_like(p)
            if step == 2:
                first, second = (group["params"] for group in optimizer.param_groups)
                second.insert(0, first.pop())
            optimizer.step(loss=1.0)
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_fused_wins_over_foreach_false(seed: int) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    p.grad = torch.ones_like(p)
    optimizer = DALS([("p", p)], fused=True, foreach=False)
    optimizer.step(loss=1.0)
    assert optimizer._runtime.fused[DEVICE].preparations == 1


def test_autograd_notices_the_write(either_walk: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    DALS([("p", p)], fused=True).step(loss=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_mixed_paths_share_one_phase(seed: int) -> None:
    """One fused group, one foreach group, one of float64 that the kernels cannot serve: one loss moves all."""
    params = [torch.nn.Parameter(torch.ones(4, device=DEVICE, dtype=d)) for d in (F32, F32, torch.float64)]
    groups = [{"params": [(f"p{i}", p)]} for i, p in enumerate(params)]
    groups[0]["fused"] = True  # type: ignore[assignment]
    optimizer = DALS(groups)
    for loss in (1.0, 0.9, 0.9):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(loss=loss)
    for p in params[1:]:
        torch.testing.assert_close(params[0].double(), p.double(), rtol=1e-6, atol=1e-6)


def test_errors_name_what_the_kernels_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float64, device=DEVICE))
    p.grad = torch.ones_like(p)
    optimizer = DALS([("w", p)], fused=True)
    with pytest.raises(RuntimeError, match=r"fused=True cannot step parameter 'w': it is torch.float64"):
        optimizer.step(loss=1.0)
    assert not optimizer.state
    q = torch.nn.Parameter(torch.ones(2))
    q.grad = torch.ones_like(q)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"parameter 'w': it is on cpu, and the kernels run on CUDA"):
        DALS([("w", q)], fused=True).step(loss=1.0)
    monkeypatch.setattr("fused_dals.fused.triton_is_installed", lambda: False)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        DALS([("w", q)], fused=True).step(loss=1.0)
    DALS([("w", q)]).step(loss=1.0)
