"""The compiled kernels, run from their PTX by a small machine (tests/ptx) on the tables of the real FusedPass.

Triton's interpreter runs the kernels' Python, one program at a time. Here the programs are those that a GPU gets, up to
the last compiler: vectorized, with their barriers and memory orders, in random interleavings. Every access
has to be aligned, to stay inside the tensors and to read what was written; no two accesses may race.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_dals import host
from fused_dals.buckets import grad_address
from fused_dals.fused import FusedPass
from fused_dals.gather import COMPENSATION_KEY, TensorBatch
from fused_dals.kernels import layout
from fused_dals.kernels.layout import SCAN_TILE, TILE
from fused_dals.launch_plan import LaunchPlan
from fused_dals.live_groups import GroupsVersion
from fused_dals.loss_signal import StepLoss
from fused_dals.reference import dals_reference_
from fused_dals.rounding import join, split
from fused_dals.run_state import RunState, StepInputs
from fused_dals.sharding import Shards
from tests.exact import same
from tests.helpers import identical
from tests.oracle import Oracle, OracleGroup
from tests.test_fused import GROUP

pytest.importorskip("triton")

from tests.ptx.arithmetic import bfloat16, float16, fused_multiply_add
from tests.ptx.launcher import Compiler, EmulatedLauncher, Emulator
from tests.ptx.memory import Wrong

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels itself")

CPU = torch.device("cpu")
CHUNK = 2 * TILE  # half as large as it is or less, for time's sake
WHOLE_CHUNK = layout.chunk_elements
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SCALE = 8.0  # of a GradScaler
RANKS = ("ranks",)  # stands for the process groups that a shard is split over


@dataclass(frozen=True)
class Variant:
    """What a launch is compiled for."""

    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    compensated: bool = False
    unscale: bool = False
    sharded: bool = False
    a_writes: bool = True
    same_runs: bool = False

    def __str__(self) -> str:
        names = "-".join(str(kind).removeprefix("torch.") for kind in self.dtypes)
        marks = [name for name in ("compensated", "unscale", "sharded", "same_runs") if getattr(self, name)]
        return " ".join([names, *marks, "A writes" if self.a_writes else "A reads"])


KINDS: list[dict[str, Any]] = [
    {"dtypes": (F32, F32, F32)},
    {"dtypes": (BF16, F32, F32)},
    {"dtypes": (BF16, BF16, F32), "unscale": True},
    {"dtypes": (BF16, BF16, F32), "compensated": True},
    {"dtypes": (BF16, BF16, BF16), "compensated": True},
    {"dtypes": (F32, F32, BF16)},
    {"dtypes": (BF16, BF16, BF16)},
    {"dtypes": (F16, F16, F32), "unscale": True},
]
VARIANTS = [Variant(**kind, a_writes=writes) for kind in KINDS for writes in (True, False)]
VARIANTS += [Variant((kind, kind, F32), sharded=True) for kind in (F32, BF16)]
VARIANTS.append(Variant((BF16, BF16, BF16), compensated=True, unscale=True))
VARIANTS += [Variant(dtypes, same_runs=True) for dtypes in ((BF16, BF16, F32), (BF16, F32, F32), (F32, F32, BF16))]


def misaligned(tensor: Tensor) -> Tensor:
    """A copy whose address no wide access can use, with neighbours on both sides."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten(), tensor.new_zeros(7)])[1:-7].view(tensor.shape)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def every_second(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]


class Mix:
    """p, g, h, m and compensations of tensors of all sizes and layouts; ``flat`` has all that a kernel may touch."""

    def __init__(self, variant: Variant, sizes: tuple[Any, ...] | None = None) -> None:
        self.variant = variant
        kinds = (*variant.dtypes, variant.dtypes[2])
        odd = [(CHUNK + 3,)] * 4 + [(65, 66), (3, 50), (7, 9)] if sizes is None else []
        sizes = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5) if sizes is None else sizes
        shapes = [*sizes, *odd]
        self.p, self.g, self.h, self.m = ([torch.randn(shape).to(kind) for shape in shapes] for kind in kinds)
        if odd:
            first = len(sizes)
            for i, tensors in enumerate((self.p, self.g, self.h, self.m)):
                tensors[first + i] = misaligned(tensors[first + i])
            for tensors in (self.p, self.h, self.m):
                tensors[first + 4] = transposed(tensors[first + 4])
            self.g[first + 5] = every_second(self.g[first + 5])
            self.p[first + 6] = misaligned(self.p[first + 6])
            if not variant.unscale:
                self.g[first + 6] = self.g[first + 6][:1, :1].expand(7, 9)
        self.c: list[Tensor] = []
        if variant.compensated:
            halves = [split(torch.randn(p.shape).as_strided(p.shape, dense(p))) for p in self.p]
            for p, (upper, _) in zip(self.p, halves, strict=True):
                p.copy_(upper)
            self.c = [lower for _, lower in halves]
        if variant.unscale:
            for g in self.g:
                g.mul_(SCALE)
        self.blends = [0.3 + 0.4 * i / max(1, len(shapes) - 1) for i in range(len(shapes))]

    def copy(self) -> Mix:
        return copy.deepcopy(self)

    def lists(self) -> list[list[Tensor]]:
        """Weights and state, in float32 where two parts make one; gradients as the caller finds them."""
        weights = [join(p, c) for p, c in zip(self.p, self.c, strict=True)] if self.c else self.p
        return [weights, self.g, self.h, self.m]

    def flat(self) -> list[Tensor]:
        return [*self.p, *self.g, *self.h, *self.m, *self.c]


def dense(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty_like(tensor, memory_format=torch.preserve_format).stride()


@dataclass
class Order:
    """How programs take turns, and in what order they find the work."""

    seed: int = 0
    programs: int = 2
    resident: int | None = None
    window: int | None = None


def step(mix: Mix, emulator: Emulator | None, order: Order | None = None, missing: Collection[int] = ()) -> Tensor:
    """One step by the machine, or by Triton's interpreter where there is none; returns the trust ratios.

    ``missing``: who has no gradient in this step, though the tables were made with one.
    """
    order, variant = order or Order(), mix.variant
    state: dict[Tensor, dict[str, Tensor]] = {
        p: {"grad_ema": h, "momentum_buffer": m} for p, h, m in zip(mix.p, mix.h, mix.m, strict=True)
    }
    for p, c in zip(mix.p, mix.c, strict=False):
        state[p][COMPENSATION_KEY] = c
    positions = list(range(len(mix.p)))
    plan = LaunchPlan(window=order.window, stage_a_writes=variant.a_writes, same_runs=variant.same_runs)
    fused = FusedPass(CPU, plan)
    shards = Shards({(0, i): RANKS for i in positions}, CPU) if variant.sharded else None
    batch = TensorBatch(0, positions, mix.p, mix.g, split_over=RANKS if variant.sharded else ())
    fused.prepare([batch], state, [mix.blends], shards)
    fused.follow_grads(host.integers(0 if i in missing else grad_address(mix.g[i]) for i in positions))
    if emulator is not None:
        EmulatedLauncher(emulator, fused, mix.flat, order.seed, order.programs, order.resident)
    loss = StepLoss(torch.ones((), dtype=torch.float64), 1)
    scale = torch.tensor(SCALE) if variant.unscale else None
    fused.begin(StepInputs(RunState().values, loss, grad_scale=scale), [GROUP], GroupsVersion(0, 0))
    (measured,) = fused.finish()
    return measured.values.clone()


def oracle_step(mix: Mix) -> tuple[list[list[Tensor]], list[float]]:
    """What float64 makes of it: p, g, h, m and the trust ratios."""
    names = [str(i) for i in range(len(mix.p))]
    weights, *_ = mix.lists()
    group = OracleGroup(
        names, GROUP["lr"], GROUP["momentum"], GROUP["weight_decay"], trust_clip=GROUP["trust_clip"],
        ema_decay=GROUP["ema_decay"], phase_thresholds=GROUP["phase_thresholds"],
    )  # fmt: skip
    params = {name: p.double().numpy() for name, p in zip(names, weights, strict=True)}
    depths = {name: (blend - 0.3) / 0.4 for name, blend in zip(names, mix.blends, strict=True)}
    oracle = Oracle(params, [group], depths)
    for name, h, m in zip(names, mix.h, mix.m, strict=True):
        oracle.grad_ema[name], oracle.momentum_buffer[name] = h.double().numpy(), m.double().numpy()
    scale = SCALE if mix.variant.unscale else 1.0
    grads = {name: g.double().numpy() / scale for name, g in zip(names, mix.g, strict=True)}
    oracle.step(grads, [1.0])
    arrays = (oracle.params, grads, oracle.grad_ema, oracle.momentum_buffer)
    tensors = [[torch.from_numpy(np.asarray(array[name])) for name in names] for array in arrays]
    return tensors, [oracle.trust_ratio[name] for name in names]


def reference_step(mix: Mix) -> list[list[Tensor]]:
    """What torch's own arithmetic makes of it."""
    kept = ("weight_decay", "trust_coefficient", "trust_clip", "momentum", "lr")
    scalars = {key: GROUP[key] for key in kept} | {"ema_decay": GROUP["ema_decay"][0], "bypass": False}
    for i, tensors in enumerate(zip(mix.p, mix.g, mix.h, mix.m, mix.blends, strict=True)):
        if mix.variant.unscale:
            mix.g[i].div_(SCALE)
        dals_reference_(*tensors, **scalars, compensation=mix.c[i] if mix.c else None)
    return mix.lists()


@pytest.fixture(autouse=True)
def chunks_of_two_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "chunk_elements", lambda *sizes: CHUNK)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as made:
        yield made


@pytest.fixture
def emulator(compiler: Compiler) -> Iterator[Emulator]:
    """Whatever a test runs must not race."""
    made = Emulator(compiler)
    yield made
    assert not made.races, "\n".join(made.races.values())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_is_as_exact_as_torch(variant: Variant, emulator: Emulator, seed: int) -> None:
    check_as_exact_as_torch(variant, emulator, seed)


@pytest.mark.parametrize("capability", [80, 100])
def test_other_gpus(capability: int, seed: int) -> None:
    """sm_100 computes two float32 at a time."""
    with Compiler(capability) as compiler:
        emulator = Emulator(compiler)
        for variant in (Variant((F32, F32, F32)), Variant((BF16, BF16, BF16), compensated=True, a_writes=False)):
            check_as_exact_as_torch(variant, emulator, seed)
    assert not emulator.races
    assert any(opcode.endswith("f32x2") for opcode in emulator.executed) == (capability == 100)


def check_as_exact_as_torch(variant: Variant, emulator: Emulator, seed: int) -> None:
    """Against float64 at most 4 times the error of torch's own float32 arithmetic, plus a rounding of the state.

    Errors are relative to the largest norm of p, g, h and m: what cancels leaves the rounding of its summands.
    """
    mix = Mix(variant)
    before = copy.deepcopy(mix.lists())
    scales = [max(float(t.double().norm()) for t in tensors) for tensors in zip(*mix.lists(), strict=True)]
    plain = mix.copy()
    exact, exact_ratios = oracle_step(mix)
    theirs = reference_step(plain)
    ratios = step(mix, emulator, Order(seed))
    rounding = torch.finfo(BF16 if variant.dtypes[2] == BF16 else F32).eps
    for name, *lists in zip("pghm", before, mix.lists(), theirs, exact, strict=True):
        for old, ours, other, truth, scale in zip(*lists, scales, strict=True):
            *errors, moved = (float((value.double() - truth).norm()) for value in (ours, other, old))
            bound = 4 * errors[1] + rounding * scale
            if name == "p" and ours.numel() < 64:
                bound += 1e-3 * moved  # as far as the ratio may be off, see below
            assert errors[0] <= bound, (name, ours.shape)
            if ours.numel() >= 64 and (name != "g" or variant.unscale):
                assert moved >= 10 * bound, f"{name} might as well have stayed"
    for p, ratio, exact_ratio in zip(mix.p, ratios.tolist(), exact_ratios, strict=True):
        # u may cancel where there is little of it.
        assert ratio == pytest.approx(exact_ratio, rel=3e-7 if p.numel() >= 64 else 1e-3)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.sharded], ids=str)
def test_who_has_no_gradient_is_not_touched(variant: Variant, emulator: Emulator, seed: int) -> None:
    """Nor does anybody else notice, whatever its size and layout; none of its memory is read."""
    full = Mix(variant)
    some, places = full.copy(), range(len(full.p))
    before, missing = some.copy(), set(places[seed % 2 :: 2])
    untouched = {id(t) for i in missing for t in (some.p[i], some.g[i], some.h[i], some.m[i], *some.c[i : i + 1])}
    whole = step(full, emulator, Order(seed))
    flat = some.flat
    some.flat = lambda: [t for t in flat() if id(t) not in untouched]  # type: ignore[method-assign]
    ratios = step(some, emulator, Order(seed, window=1), missing)
    some.flat = flat  # type: ignore[method-assign]
    for i in places:
        other = before if i in missing else full
        for name in ("p", "g", "h", "m", "c")[: 5 if some.c else 4]:
            assert same(getattr(some, name)[i], getattr(other, name)[i]), (name, i)
        assert ratios[i] == (layout.NOT_STEPPED if i in missing and some.p[i].numel() else whole[i])


SMALL = (2 * CHUNK, 3, CHUNK + 700, 1)


@pytest.mark.parametrize("variant", [Variant((F32, F32, F32)), Variant((BF16, BF16, BF16), compensated=True)], ids=str)
def test_any_order_of_programs_ends_and_gives_the_same_bits(variant: Variant, emulator: Emulator, seed: int) -> None:
    """Two to four programs, all resident or one after the other; small windows, so that they wait for each other."""
    start, results = Mix(variant, SMALL), []
    for i in range(15):
        mix = start.copy()
        ratios = step(mix, emulator, Order(seed + i, 2 + i % 3, (None, None, 1, 2)[i % 4], (None, 0, 1, 2, 100)[i % 5]))
        results.append([*mix.flat(), ratios])
    assert all(identical(results[0], other) for other in results[1:])


def test_sums_of_more_chunks_than_threads(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """257 small ones, whose sums of squares the last to arrive adds up in two turns."""
    monkeypatch.setattr(layout, "chunk_elements", lambda *sizes: 512)
    mix = Mix(Variant((F32, F32, F32)), (256 * 512 + 1, 7))
    _, exact = oracle_step(mix)
    assert step(mix, emulator, Order(seed, 4, window=5)).tolist() == pytest.approx(exact, rel=3e-7)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(Variant(**kind)))
def test_both_divisions_of_the_work_give_the_same_bits(kind: dict[str, Any], emulator: Emulator, seed: int) -> None:
    start, results = Mix(Variant(**kind)), []
    for a_writes in (True, False):
        mix = start.copy()
        mix.variant = Variant(**kind, a_writes=a_writes)
        results.append([step(mix, emulator), *mix.flat()])
    assert all(same(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("a_writes", [True, False], ids=["A writes", "A reads"])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=["float32", "compensated"])
def test_float32_has_the_interpreter_s_bits(
    kind: dict[str, Any], a_writes: bool, emulator: Emulator, seed: int
) -> None:
    """Whole, and as bfloat16 with compensation, whose promise of float32's bits test_low_precision.py holds."""
    compiled = Mix(Variant(**kind, a_writes=a_writes))
    interpreted = compiled.copy()
    assert torch.equal(step(compiled, emulator), step(interpreted, None))
    assert identical(compiled.flat(), interpreted.flat())


def test_the_prologue_of_many_groups(emulator: Emulator, seed: int) -> None:
    """The scalars of schedules, phases and clipping as the interpreter has them, in every warp, and the run state."""
    kinds: list[dict[str, Any]] = [
        {}, {"total_steps": 9, "warmup_fraction": 0.4}, {"restart_steps": 3, "restart_mult": 1.5},
        {"restart_steps": 1000}, {"lr": torch.tensor(0.5)}, {"max_grad_norm": 0.1}, {"ema_decay": (1.0, 1.0, 1.0)},
    ]  # fmt: skip
    groups = [{**GROUP, **kinds[i % len(kinds)]} for i in range(70)]
    params, grads = ([torch.randn(2) for _ in groups] for _ in range(2))
    lrs = [group["lr"] for group in groups if isinstance(group["lr"], Tensor)]
    state = {p: {"grad_ema": torch.zeros(2), "momentum_buffer": torch.zeros(2)} for p in params}
    for loss in (torch.tensor(0.97), torch.tensor(math.nan, dtype=torch.float64)):
        results = []
        for compiled in (True, False):
            fused = FusedPass(CPU)
            batches = [TensorBatch(i, [0], [p], [g]) for i, (p, g) in enumerate(zip(params, grads, strict=True))]
            fused.prepare(batches, state, [[0.5]] * len(groups))
            if compiled:
                EmulatedLauncher(emulator, fused, lambda: [*params, *grads, *lrs])
            values = torch.tensor([5.0, 1.0, 0.02, 0.0], dtype=torch.float64)
            inputs = StepInputs(values, StepLoss(loss, 1), scan=next(iter(fused.scan().values())))
            fused._launch_prologue(inputs, groups, GroupsVersion(0, 0))
            results.append((fused.group_table.scalars, values, fused.sync, fused._seed))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_the_scan_of_the_gradients(dtype: torch.dtype, emulator: Emulator, seed: int) -> None:
    """Full tiles, tails, odd addresses, strides: sums of squares and counts of what is not finite, by programs."""
    grads = [torch.randn(SCAN_TILE * 4 + 5).to(dtype), misaligned(torch.randn(SCAN_TILE + 3).to(dtype))]
    grads += [transposed(torch.randn(70, 60).to(dtype)), torch.randn(SCAN_TILE).to(dtype)]
    grads[3][::9], grads[2][3, 4] = math.inf, math.nan
    params = [torch.randn(g.shape) for g in grads]
    state = {p: {"grad_ema": torch.zeros_like(p), "momentum_buffer": torch.zeros_like(p)} for p in params}
    found = []
    for compiled in (True, False):
        fused = FusedPass(CPU)
        fused.prepare([TensorBatch(0, [0, 1, 2, 3], params, grads)], state, [[0.5] * 4])
        fused.programs = 3
        if compiled:
            EmulatedLauncher(emulator, fused, lambda: [*params, *grads], programs=3)
        (rows,) = fused.scan().values()
        found.append(rows.clone())
    torch.testing.assert_close(*found, rtol=1e-15, atol=0, equal_nan=True)
    assert int(found[0][:, 1].sum()) == -(-SCAN_TILE // 9) + 1
    fused.follow_grads(host.integers([0, *map(grad_address, grads[1:3]), 0]))
    (rows,) = fused.scan().values()
    assert int(rows[:, 1].sum()) == 1, "of those that are there"
    assert emulator.executed["ld.global.v4.b32"]


def test_chunks_as_large_as_they_are(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(layout, "chunk_elements", WHOLE_CHUNK)
    chunk = WHOLE_CHUNK(4, 4, 4)
    compiled = Mix(Variant((F32, F32, F32)), (2 * chunk, chunk + TILE + 5, 3))
    interpreted = compiled.copy()
    assert torch.equal(step(compiled, emulator, Order(seed, 3)), step(interpreted, None))
    assert identical(compiled.flat(), interpreted.flat())


@pytest.mark.parametrize("variant", [Variant((F32, F32, F32)), Variant((F32, F32, F32), sharded=True)], ids=str)
def test_trust_ratios_of_zero_and_nan_are_flags_too(
    variant: Variant, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Stage B ends its wait for any of them, and leaves weights as they are where the ratio is 0."""
    emulator.limit = 100_000
    monkeypatch.setitem(GROUP, "trust_clip", (0.0, 0.0))
    mix = Mix(variant, SMALL)
    mix.g[1][0] = math.nan
    before = copy.deepcopy(mix.p)
    ratios = step(mix, emulator, Order(seed, 3)).tolist()
    assert [ratio for i, ratio in enumerate(ratios) if i != 1] == [0, 0, 0] and math.isnan(ratios[1])
    assert all(torch.equal(p, old) for i, (p, old) in enumerate(zip(mix.p, before, strict=True)) if i != 1)
    assert bool(mix.p[1].isnan().all())


# -- negative controls ------------------------------------------------------------------------------------------------


def without_barriers(ptx: str, chosen: Sequence[int]) -> str:
    count = itertools.count()
    return re.sub(r"bar\.sync \t0;", lambda match: "" if next(count) in chosen else match[0], ptx)


def barriers_of_stage_a(ptx: str) -> list[int]:
    """Those of the sums, whose last accesses they hold back, and the one before the arrival."""
    lines = re.findall(r"bar\.sync \t0;|gpu\.acq_rel|gpu\.release|ld\.global\.gpu\.acquire", ptx)
    barriers = [i for i, line in enumerate(lines) if line.startswith("bar")]
    return [n for n, i in enumerate(barriers) if i < lines.index("gpu.acq_rel")]


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "waits do not acquire": (lambda ptx: ptx.replace("gpu.acquire", "gpu.relaxed"), "fused_pass.py"),
    "arrivals do not release": (lambda ptx: ptx.replace("gpu.acq_rel.add", "gpu.acquire.add"), "fused_pass.py"),
    "the last arrival does not acquire": (lambda ptx: ptx.replace("gpu.acq_rel", "gpu.release"), "fused_pass.py"),
    "ratios are not released": (lambda ptx: ptx.replace("gpu.release.exch", "gpu.relaxed.exch"), "fused_pass.py"),
    "no barriers before arrivals": (lambda ptx: without_barriers(ptx, barriers_of_stage_a(ptx)), "ld.global"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_protocols_race(what: str, compiler: Compiler, seed: int) -> None:
    break_it, expected = BROKEN[what]
    broken = Emulator(compiler, lambda kernel, ptx: break_it(ptx) if kernel == "fused_pass" else ptx)
    for i in range(4):
        step(Mix(Variant((F32, F32, F32)), SMALL), broken, Order(seed + i, 3, window=1))
    assert any("global" in race and expected in race for race in broken.races.values())


def test_every_barrier_is_needed(compiler: Compiler, seed: int) -> None:
    """The sums bring most of them."""
    plain = Emulator(compiler)
    step(Mix(Variant((F32, F32, F32)), SMALL), plain)
    (request,) = (request for request in plain._codes if request[0] == "fused_pass")
    ptx, _ = compiler(request)
    unneeded = []
    for i in range(ptx.count("bar.sync")):
        broken = Emulator(compiler, lambda kernel, ptx, i=i: without_barriers(ptx, [i] * (kernel == "fused_pass")))
        for order in (Order(seed, 3, window=1), Order(seed + 1, 2, window=0), Order(seed + 2, 2, window=1)):
            if not broken.races:
                step(Mix(Variant((F32, F32, F32)), SMALL), broken, order)
        if not broken.races:
            unneeded.append(i)
    assert unneeded == []


WRONG: dict[str, tuple[str, str, str]] = {
    "every chunk is full": (r"min\.s64(\s+%rd\d+), (%rd\d+), %rd\d+;", r"mov.b64 \1, \2;", "outside of all tensors"),
    "every address is aligned": (r"setp\.ne\.b64(\s+%p\d+, %rd\d+), 0;", r"setp.gt.s64\1, 1;", "is not aligned"),
    "a ticket that nobody passes on": (r"@%p\d+ st\.shared\.b32.*;", "", "memory that nobody wrote"),
    "arithmetic that the machine lacks": (r"sqrt\.rn\.f64", "sqrt.approx.f64", "unknown to this machine"),
    "a flag that nobody sets": (r"@%p\d+ atom\.global\.gpu\.release.*;", "", "does not end"),
    "some threads leave the loop": (r"setp\.ge\.s32\s+(%p\d+), %r\d+", r"setp.ge.s32 \1, %r1", "not for all threads"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_gpu_would_not_forgive_is_found(what: str, compiler: Compiler, seed: int) -> None:
    old, new, error = WRONG[what]

    def rewrite(kernel: str, ptx: str) -> str:
        if kernel != "fused_pass":
            return ptx
        broken, count = re.subn(old, new, ptx, count=1)
        assert count == 1, f"the PTX has no {old}: this control needs another place to break"
        return broken

    broken = Emulator(compiler, rewrite)
    broken.limit = 10_000
    with pytest.raises(Wrong, match=error):
        step(Mix(Variant((F32, F32, F32))), broken, Order(seed))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_arithmetic_is_exact(seed: int) -> None:
    """A multiplication and addition is rounded once, also where most cancels; storage rounds as torch does."""
    a, b, c = (torch.randint(-(2**31), 2**31, (10_000,)).to(torch.int32).view(F32).numpy() for _ in range(3))
    for summand in (c, -(a * b)):
        found = fused_multiply_add(a, b, summand)
        for *given, ours in zip(a, b, summand, found, strict=True):
            if np.isfinite([*given, ours]).all():
                exact = Fraction(float(given[0])) * Fraction(float(given[1])) + Fraction(float(given[2]))
                beside = [np.nextafter(ours, np.float32(side)) for side in (-np.inf, np.inf)]
                errors = [abs(Fraction(float(one)) - exact) for one in beside if np.isfinite(one)]
                assert abs(Fraction(float(ours)) - exact) <= min(errors)
    finite = a[np.isfinite(a)]
    for rounded, kind in ((bfloat16, BF16), (float16, F16)):
        assert np.array_equal(rounded(finite), torch.from_numpy(finite).to(kind).view(torch.int16).numpy().view("u2"))
