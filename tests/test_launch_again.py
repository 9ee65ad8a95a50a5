"""A pass that is launched again as it was gets what a launch from scratch would get, whatever happened in between.

The interpreter compiles nothing, so kernels that note their launches stand in for compiled ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from fused_dals import DALS, fused
from fused_dals.fused import FusedPass, Launch
from fused_dals.kernels import fused_pass, grad_scan, prologue
from fused_dals.launcher import Launched
from fused_dals.live_groups import GroupsVersion
from fused_dals.run_state import StepInputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Noted:
    """A kernel, and what Triton compiled of it: notes the last launch, tensors as their addresses."""

    def __init__(self, arg_names: list[str]) -> None:
        self.arg_names = arg_names
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Noted]:
        def launch(*arguments: Any, num_warps: int = 0, **constants: Any) -> Noted:
            constants_in_order = [constants[name] for name in self.arg_names if name in constants]
            self.programs, self.arguments = grid[0], [*map(plain, arguments), *constants_in_order]
            self.launches += 1
            return self

        return launch


def plain(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


class Watch:
    """Holds every launch of pass and prologue against the tables of the moment; counts those made as before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        modules: dict[Any, str] = {fused_pass: "fused_pass", grad_scan: "grad_scan", prologue: "prologue"}
        kernels = {name: Noted(getattr(module, name).arg_names) for module, name in modules.items()}
        for module, name in modules.items():
            monkeypatch.setattr(module, name, kernels[name])
        self.kernel = kernels["fused_pass"]
        self.again = self.prologue_again = 0
        real, real_prologue = FusedPass._launch_pass, FusedPass._launch_prologue

        def launch_prologue_and_look(
            passing: FusedPass, inputs: StepInputs, groups: list[dict[str, Any]], version: GroupsVersion
        ) -> None:
            before = kernels["prologue"].launches
            real_prologue(passing, inputs, groups, version)
            assert kernels["prologue"].launches == before + 1
            assert kernels["prologue"].arguments == expected_of_prologue(passing, inputs, len(groups))

        monkeypatch.setattr(FusedPass, "_launch_prologue", launch_prologue_and_look)
        real_again = Launched.again_with

        def again_with_and_count(launched: Launched, place: int, address: int) -> bool:
            done = real_again(launched, place, address)
            self.prologue_again += done
            return done

        monkeypatch.setattr(Launched, "again_with", again_with_and_count)

        def launch_and_look(passing: FusedPass, launch: Launch, which: int) -> None:
            before, known = self.kernel.launches, dict(launch.again)
            real(passing, launch, which)
            assert self.kernel.launches == before + 1
            self.again += bool(known) and launch.again == known
            assert self.kernel.arguments == expected(passing, launch, which), "not the tables of eager steps"
            assert self.kernel.programs == passing.programs
            owners = launch.owners
            assert launch.bucket.grads.tolist() == [0 if p.grad is None else p.grad.data_ptr() for p in owners]
            assert launch.bucket.tensors[:, 0].tolist() == [p.data_ptr() for p in owners]

        monkeypatch.setattr(FusedPass, "_launch_pass", launch_and_look)


def expected_of_prologue(passing: FusedPass, inputs: StepInputs, groups: int) -> list[Any]:
    """The arguments of the prologue, from the objects that hold them now."""
    table, loss = passing.group_table, inputs.loss
    assert loss.total is not None and loss.count is not None
    tensors = [table.rows, table.lrs, table.addresses, table.scalars, passing._seed, inputs.values, loss.total]
    scaling = [
        passing._zero if inputs.found_inf is None else inputs.found_inf,
        passing._one if inputs.grad_scale is None else inputs.grad_scale,
    ]
    scan = passing._no_scan if inputs.scan is None else inputs.scan
    flags = [0 if inputs.scan is None else len(scan), float(inputs.skip_nonfinite), groups]
    scanned = [plain(scan), *flags, plain(passing.sync), passing.sync.numel()]
    return [*map(plain, tensors), float(loss.count), *map(plain, scaling), *scanned]


def expected(passing: FusedPass, launch: Launch, which: int) -> list[Any]:
    """The arguments of the kernel, from the objects that hold them now."""
    bucket, (param, grad, state, compensated) = launch.bucket, launch.key
    work, groups = bucket.lists[which], passing.group_table
    tensors = [bucket.tensors, bucket.grads, bucket.dims, bucket.blends, groups.scalars, work.items, bucket.partials]
    tensors += [passing._no_scan, bucket.ratios, bucket.arrivals, bucket.ready, bucket.counters[which], passing._seed]
    types = [fused._triton_dtype(dtype) for dtype in (param, grad, state)]
    flags = [compensated, passing._unscale, False]
    plan = passing.plan
    shape = [bucket.chunk, plan.tile, plan.most_in_b, plan.in_pairs]
    shape += [passing.stage_a_writes, plan.evict_first, plan.same_runs]
    return [*map(plain, tensors), work.count, *types, *flags, *shape]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    yield Watch(monkeypatch)


def parameters() -> list[tuple[str, nn.Parameter]]:
    named = [(f"p{i}", nn.Parameter(torch.randn(70, device=DEVICE))) for i in range(3)]
    named.append(("half", nn.Parameter(torch.randn(9, device=DEVICE, dtype=torch.bfloat16))))
    return named


def renew_gradients(optimizer: DALS) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)


def hand_over_a_scale(optimizer: DALS) -> None:
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)  # type: ignore[attr-defined]


def take_the_scale_back(optimizer: DALS) -> None:
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def add_a_group(optimizer: DALS) -> None:
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(5, device=DEVICE)))]})


def add_an_empty_group(optimizer: DALS) -> None:
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [], "param_names": []})
    optimizer.refresh_hyperparameters()


def move_a_parameter(optimizer: DALS) -> None:
    p = optimizer.param_groups[0]["params"][0]
    p.data = p.data.clone()


def load(optimizer: DALS) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def clip(optimizer: DALS) -> None:
    optimizer.param_groups[0]["max_grad_norm"] = 1.0


def clip_no_more(optimizer: DALS) -> None:
    optimizer.param_groups[0]["max_grad_norm"] = None


def drop_bad_steps(optimizer: DALS) -> None:
    for group in optimizer.param_groups:
        group["skip_nonfinite"] = True


def take_bad_steps(optimizer: DALS) -> None:
    for group in optimizer.param_groups:
        group["skip_nonfinite"] = False


def observe_another_loss(optimizer: DALS) -> None:
    optimizer.observe_loss(torch.ones((), dtype=torch.float64))


def change_lr(optimizer: DALS) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def drop_a_gradient(optimizer: DALS) -> None:
    optimizer.param_groups[0]["params"][1].grad = None


CHANGES = [
    hand_over_a_scale, take_the_scale_back, add_a_group, add_an_empty_group, move_a_parameter, load, clip, change_lr,
    clip_no_more, observe_another_loss, drop_bad_steps, take_bad_steps, drop_a_gradient, hand_over_a_scale,
    take_the_scale_back, observe_another_loss,
]  # fmt: skip


def test_every_launch_is_what_it_would_be_from_scratch(watch: Watch, either_walk: str, seed: int) -> None:
    optimizer = DALS(parameters(), depth=0.5, fused=True, amp_fused=True)
    with_a_loss_alone = 0  # beside the gradients, of the changes
    for change in [None, *CHANGES, None]:
        renew_gradients(optimizer)
        if change is not None:
            change(optimizer)
        for _ in range(4):  # two from scratch, as Triton compiles at the first
            optimizer.step(loss=1.0)
            if change is not drop_a_gradient:
                renew_gradients(optimizer)
        clips_or_drops = any(g["max_grad_norm"] is not None or g["skip_nonfinite"] for g in optimizer.param_groups)
        with_a_loss_alone += not clips_or_drops and not hasattr(optimizer, "grad_scale")
    assert watch.again >= 2 * (len(CHANGES) + 2)
    assert 2 * with_a_loss_alone <= watch.prologue_again <= 4 * with_a_loss_alone


def test_a_run_state_that_has_gone_is_not_launched_with(watch: Watch, seed: int) -> None:
    """As of the groups' table; the watch holds what is launched against what there is."""
    optimizer = DALS(parameters(), depth=0.5, fused=True)
    for _ in range(4):
        renew_gradients(optimizer)
        optimizer.step(loss=1.0)
    before = watch.prologue_again
    optimizer._runtime.state.values = optimizer._runtime.state.values.clone()
    optimizer.step(loss=1.0)
    assert watch.prologue_again == before
    optimizer.step(loss=1.0)
    assert watch.prologue_again == before + 1


def test_a_table_that_has_gone_is_not_launched_with(watch: Watch, seed: int) -> None:
    """The groups' table moves where their number changes, which here nobody but the launch itself could notice."""
    optimizer = DALS(parameters(), depth=0.5, fused=True)
    for _ in range(4):
        renew_gradients(optimizer)
        optimizer.step(loss=1.0)
    (passing,) = optimizer._runtime.fused.values()
    passing.group_table.scalars = passing.group_table.scalars.clone()
    before = watch.again
    optimizer.step(loss=1.0)
    assert watch.again == before
    optimizer.step(loss=1.0)
    assert watch.again == before + len(passing.launches)


def test_a_step_that_is_captured_is_launched_from_scratch(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """It has a table of its own for the gradients' addresses, and no later step may be launched with that."""
    optimizer = DALS(parameters(), depth=0.5, fused=True)
    for _ in range(4):
        renew_gradients(optimizer)
        optimizer.step(loss=1.0)
    (passing,) = optimizer._runtime.fused.values()
    (launch, _) = passing.launches
    own_table = torch.zeros_like(launch.bucket.grads)
    with monkeypatch.context() as patch:
        patch.setattr("fused_dals.fused.is_capturing", lambda device: True)
        patch.setattr(passing, "_grads_of", lambda launch: own_table)
        known = dict(launch.again)
        with pytest.raises(AssertionError, match="not the tables of eager steps"):
            passing._launch_pass(launch, 0)
        assert watch.kernel.arguments[1] == own_table.data_ptr() and launch.again == known
    optimizer.step(loss=1.0)
