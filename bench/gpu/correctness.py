"""The kernels' numbers: a grid of dtypes, sizes, alignments, strides and plans against float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.byte_table import SHORT_NAMES, Dtypes
from bench.compiled import even_blends, hyperparameters
from bench.gpu.driver import PassDriver, TensorSet
from bench.gpu.runner import DeviceLost
from bench.machine import Machine
from fused_dals import DALS
from fused_dals.launch_plan import LaunchPlan
from fused_dals.reference import dals_reference_

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

#: parameter, gradient, state
DTYPES: list[Dtypes] = [(p, g, s) for p in (F32, BF16, F16) for g in dict.fromkeys((p, F32)) for s in (F32, BF16)]

#: Times the error of torch's own arithmetic, or half a unit in the last place where that is more. A tensor of many
#: elements averages its rounding errors, so that its bound can be tight: truncation would be twice as far off.
MULTIPLE, MULTIPLE_OF_MANY, MANY_ELEMENTS = 4.0, 1.5, 1000
#: The reference sums norms in float64, the kernel a chunk in float32.
MULTIPLE_OF_RATIO = 8.0

KINDS = ("param", "grad_ema", "momentum_buffer")
#: An unclamped trust ratio near 1, so that an error of the norms shows.
HYPERPARAMETERS = hyperparameters(lr=0.03, weight_decay=0.01, trust_coefficient=1.0)
GUARD_ELEMENTS = 64
LAST = 10**9


@dataclass(frozen=True)
class Check:
    """One thing that holds or does not."""

    label: str
    passed: bool
    detail: str
    figures: dict[str, float] = field(default_factory=dict)


# -- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A tensor of the grid: its shape, and how parameter and gradient lie in memory."""

    shape: tuple[int, ...]
    param_form: str = "plain"
    grad_form: str = "plain"
    param_offset: int = 0
    grad_offset: int = 0
    state_offset: int = 0


def _every_second(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2]


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every second": _every_second,
    "expanded": lambda t: t.flatten()[:1].clone().expand(t.shape),
}


def grid(chunk: int, many: int) -> list[Spec]:
    """Tensors of every size, alignment and stride that matters; ``many`` chunks in the largest one."""
    sizes = (1, chunk // 2 + 1, chunk - 1, chunk, chunk + 1, 0, 3 * chunk, many * chunk + 5)
    specs = [Spec((size,)) for size in sizes] + [Spec(()), Spec((3, 0, 2))]
    for offsets in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 1, 5)):
        specs.append(Spec((2 * chunk + 3,), "plain", "plain", *offsets))
    strided = (
        ("transposed", (24, chunk // 8)),
        ("channels_last", (8, 3, 5, chunk // 32)),
        ("every second", (9, chunk)),
    )
    for form, shape in strided:
        specs += [Spec(shape, *forms) for forms in ((form, "plain"), ("plain", form), (form, form))]
    return [*specs, Spec((5, chunk // 4 + 1), "plain", "expanded"), Spec((0,))]


class Originals:
    """The values of a grid on the CPU, and what two computations on the CPU make of them."""

    def __init__(self, specs: Sequence[Spec], dtypes: Dtypes, seed: int) -> None:
        self.specs, self.dtypes = specs, dtypes
        self.blends = even_blends(len(specs))
        generator = torch.Generator().manual_seed(seed)
        self.tensors = TensorSet([], [], [], [], self.blends)
        for spec in specs:
            # All of an element's numbers have one sign: nothing cancels, and relative errors mean something.
            sign = torch.randint(2, spec.shape, generator=generator) * 2.0 - 1
            if spec.grad_form == "expanded":
                sign = torch.ones(spec.shape)
            p, g, h, m = (sign * (0.5 + torch.rand(spec.shape, generator=generator)) for _ in range(4))
            param = FORMS[spec.param_form](p.to(dtypes[0]))
            state_like = torch.empty_like(param, dtype=dtypes[2], memory_format=torch.preserve_format)
            self.tensors.params.append(param)
            self.tensors.grads.append(FORMS[spec.grad_form](g.to(dtypes[1])))
            self.tensors.grad_emas.append(state_like.copy_(h))
            self.tensors.momentum_buffers.append(torch.empty_like(state_like).copy_(m))
        self.truth = reference_step(self.tensors, F64)
        self.plain = reference_step(self.tensors, None)


@dataclass
class Outcome:
    """What a step leaves."""

    params: list[Tensor]
    grad_emas: list[Tensor]
    momentum_buffers: list[Tensor]
    ratios: Tensor

    def of_kind(self, kind: str) -> list[Tensor]:
        return {"param": self.params, "grad_ema": self.grad_emas, "momentum_buffer": self.momentum_buffers}[kind]

    def same_bits(self, other: Outcome) -> bool:
        """Whether both hold the same numbers; NaN equals nothing."""
        return torch.equal(self.ratios, other.ratios) and all(
            torch.equal(a, b) for kind in KINDS for a, b in zip(self.of_kind(kind), other.of_kind(kind), strict=True)
        )


def reference_step(tensors: TensorSet, dtype: torch.dtype | None, **overrides: Any) -> Outcome:
    """A step of the reference, in ``dtype`` throughout or in the tensors' own; the tensors stay as they are."""
    hyper = {**HYPERPARAMETERS, **overrides}
    names = ("weight_decay", "trust_coefficient", "trust_clip", "momentum", "lr")
    scalars = {name: hyper[name] for name in names} | {"grad_factor": -1.0 if hyper["maximize"] else 1.0}
    outcome = Outcome([], [], [], torch.empty(0))
    ratios = []
    lists = (tensors.params, tensors.grads, tensors.grad_emas, tensors.momentum_buffers)
    for *one, blend in zip(*lists, tensors.blends, strict=True):
        p, g, h, m = (t.clone() if dtype is None else t.to(dtype) for t in one)
        alpha = hyper["ema_decay"][0]
        ratios.append(dals_reference_(p, g, h, m, blend, ema_decay=alpha, bypass=alpha == 1, **scalars))
        outcome.params.append(p)
        outcome.grad_emas.append(h)
        outcome.momentum_buffers.append(m)
    outcome.ratios = torch.stack(ratios)
    return outcome


class Placed:
    """A grid's tensors on a device, each amid memory that no step may read (it is NaN) or write."""

    def __init__(self, originals: Originals, device: torch.device) -> None:
        self.guarded: list[tuple[Tensor, Tensor, Tensor]] = []
        source, specs = originals.tensors, originals.specs
        self.tensors = TensorSet([], [], [], [], source.blends)
        for i, spec in enumerate(specs):
            for own, values, offset, written in (
                (self.tensors.params, source.params, spec.param_offset, True),
                (self.tensors.grads, source.grads, spec.grad_offset, False),
                (self.tensors.grad_emas, source.grad_emas, spec.state_offset, True),
                (self.tensors.momentum_buffers, source.momentum_buffers, spec.state_offset, True),
            ):
                own.append(self._amid_guards(values[i], device, offset, written))

    def _amid_guards(self, value: Tensor, device: torch.device, offset: int, written: bool) -> Tensor:
        span = 0
        if value.numel():
            span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        start = GUARD_ELEMENTS + offset
        buffer = torch.full((start + span + GUARD_ELEMENTS,), torch.nan, dtype=value.dtype)
        buffer[start : start + span] = value.as_strided((span,), (1,))
        free = torch.zeros(len(buffer), dtype=torch.bool)
        if written:
            free.as_strided(value.shape, value.stride(), start).fill_(True)
        buffer, free = buffer.to(device), free.to(device)
        self.guarded.append((buffer, free, _bits(buffer).clone()))
        return buffer.as_strided(value.shape, value.stride(), start)

    def step(self, plan: LaunchPlan, order: Sequence[int] | None = None, **overrides: Any) -> Outcome:
        """One step of the tensors, listed in another ``order`` where one is given; the outcome is in the grid's."""
        order = range(len(self.tensors.params)) if order is None else order
        driver = PassDriver(self.tensors.reordered(order), plan, {**HYPERPARAMETERS, **overrides})
        ratios = torch.empty(len(order), device=self.tensors.params[0].device)
        places = torch.tensor(list(order), device=ratios.device)  # before the step: this copy waits for the device
        ratios[places] = driver.step()
        own = self.tensors
        return Outcome(own.params, own.grad_emas, own.momentum_buffers, ratios)

    def guards_intact(self) -> bool:
        """Whether only what belongs to parameters and state has changed."""
        return not any(bool(((_bits(buffer) != before) & ~free).any()) for buffer, free, before in self.guarded)


def _bits(buffer: Tensor) -> Tensor:
    return buffer.view({2: torch.int16, 4: torch.int32}[buffer.element_size()])


# -- judging ---------------------------------------------------------------------------------------------------------


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; NaN where there is a NaN."""
    exact = truth.double()
    return float((value.to(exact.device).double() - exact).norm() / exact.norm().clamp_min(1e-300))


def farthest(value: Tensor, truth: Tensor) -> float:
    """The largest difference of an element over the largest element of the truth: what a norm of many may hide."""
    exact = truth.double()
    return float((value.to(exact.device).double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300))


def judge(outcome: Outcome, plain: Outcome, truth: Outcome, rounds: bool) -> tuple[bool, dict[str, float]]:
    """Whether the errors stay in their bounds, and for each kind the worst share of its bound that an error is.

    ``rounds``: whether conversions round. Triton's interpreter truncates to bfloat16, and gets a whole unit.
    """
    shares = {}
    for kind in KINDS:
        lists = (outcome.of_kind(kind), plain.of_kind(kind), truth.of_kind(kind))
        triples = [triple for triple in zip(*lists, strict=True) if triple[0].numel() > 0]
        # Small tensors are judged together: one element's error can be 0 by luck.
        plain_errors = [relative_error(theirs, exact) for _, theirs, exact in triples]
        worst_plain = max(plain_errors)
        farthest_plain = max(farthest(theirs, exact) for _, theirs, exact in triples)
        shares[kind] = 0.0
        for (ours, _, exact), plain_error in zip(triples, plain_errors, strict=True):
            eps = torch.finfo(ours.dtype).eps
            bound = MULTIPLE * max(worst_plain, eps / 2)
            if rounds and ours.numel() >= MANY_ELEMENTS:
                bound = MULTIPLE_OF_MANY * max(plain_error, eps / 8)
            shares[kind] = _worse(shares[kind], relative_error(ours, exact) / bound)
            shares[kind] = _worse(shares[kind], farthest(ours, exact) / (MULTIPLE * max(farthest_plain, eps / 2)))
    true_ratios = truth.ratios.double()
    off, plain_off = (
        ((o.to(true_ratios.device).double() / true_ratios - 1).abs().max()).item()
        for o in (outcome.ratios, plain.ratios)
    )
    shares["trust_ratio"] = off / (MULTIPLE_OF_RATIO * max(plain_off, torch.finfo(F32).eps / 2))
    return all(share <= 1 for share in shares.values()), shares


def _worse(a: float, b: float) -> float:
    """The larger one, NaN above all."""
    return b if b != b or b > a else a


def describe_shares(shares: dict[str, float]) -> str:
    return "error / bound: " + ", ".join(f"{kind} {share:.2f}" for kind, share in shares.items())


def dtypes_label(dtypes: Dtypes) -> str:
    p, g, state = (SHORT_NAMES[dtype] for dtype in dtypes)
    return f"p {p}, g {g}, state {state}"


def writer_label(plan: LaunchPlan) -> str:
    return "A writes h and m" if plan.a_writes() else "A only reads"


# -- the grid --------------------------------------------------------------------------------------------------------


def check_grid(
    machine: Machine, dtypes: Dtypes, specs: Sequence[Spec], chunk: int | None, seed: int
) -> Iterator[Check]:
    """One check per way of writing h and m: numbers, guards, and bits over windows, reruns and permutations."""
    originals = Originals(specs, dtypes, seed)
    rounds = machine.device.type != "cpu"
    order = random.Random(seed).sample(range(len(specs)), len(specs))
    for stage_a_writes in (True, False):
        plan = LaunchPlan(chunk=chunk, stage_a_writes=stage_a_writes)
        problems: list[str] = []

        def run(
            plan: LaunchPlan, what: str, order: Sequence[int] | None = None, problems: list[str] = problems
        ) -> Outcome:
            placed = Placed(originals, machine.device)
            outcome = placed.step(plan, order)
            try:
                machine.wait()
            except DeviceLost as lost:
                raise DeviceLost(f"{writer_label(plan)}, {what}: {lost}") from lost
            if not placed.guards_intact():
                problems.append(f"{what}: memory beside the tensors was written")
            return outcome

        first = run(plan, "first run")
        passed, shares = judge(first, originals.plain, originals.truth, rounds)
        if not passed:
            problems.append("an error is above its bound")
        for what, other, listed in (
            ("rerun", plan, None),
            ("window 0", replace(plan, window=0), None),
            ("window 3", replace(plan, window=3), None),
            ("window all", replace(plan, window=LAST), None),
            ("permuted", plan, order),
        ):
            if not first.same_bits(run(other, what, listed)):
                problems.append(f"{what}: other bits than the first run")
        who = writer_label(plan)
        yield Check(
            f"{dtypes_label(dtypes)}, {who}", not problems, "; ".join([*problems, describe_shares(shares)]), shares
        )


def check_optimizer(machine: Machine, seed: int) -> Check:
    """DALS(fused=True) over several steps with groups, phases and a missing gradient, against float64 on the CPU."""
    shapes = [(64, 3, 7, 7), (1000,), (33, 129), (), (0,), (5000,), (17,), (128, 128)]
    generator = torch.Generator().manual_seed(seed)
    losses = [1.0, 0.7, 0.69, 0.9, 0.5]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in losses]
    results: list[Outcome] = []
    for device, dtype, path in (
        (machine.device, F32, {"fused": True}),
        (torch.device("cpu"), F32, {"foreach": False}),
        (torch.device("cpu"), F64, {"foreach": False}),
    ):
        params = [nn.Parameter(t.to(device, dtype)) for t in start]
        named = [(f"layer{i}.weight", p) for i, p in enumerate(params)]
        groups = [
            {"params": named[:3], "trust_coefficient": 1.0},
            {"params": named[3:6], "lr": 0.01, "maximize": True},
            {"params": named[6:], "weight_decay": 0.1, "ema_decay": (1.0, 0.5, 0.7)},
        ]
        optimizer = DALS(groups, total_steps=10, **path)  # type: ignore[arg-type]
        for step, loss in enumerate(losses):
            for i, (p, grad) in enumerate(zip(params, grads[step], strict=True)):
                p.grad = None if (step + i) % 5 == 3 else grad.to(device, dtype)
            optimizer.step(loss=torch.tensor(loss, device=device, dtype=F64))
            machine.wait()  # by polling: a copy to or from the device would wait for a kernel that never ends
        state = [optimizer.state[p] for p in params]
        ratios = torch.tensor(list(optimizer.trust_ratios().values()), dtype=F64)
        emas, momenta = [s["grad_ema"] for s in state], [s["momentum_buffer"] for s in state]
        results.append(Outcome([p.detach() for p in params], emas, momenta, ratios))
    ours, plain, truth = results
    passed, shares = judge(ours, plain, truth, rounds=False)
    return Check("DALS(fused=True), 5 steps, 3 groups, all phases", passed, describe_shares(shares), shares)
