"""What the optimizer offers beyond a plain step, on the device: scaling, clipping, narrow storage, torch.compile."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bench.byte_table import Dtypes
from bench.compiled import CompileBudget, OutOfTime, time_limit
from bench.contenders import LR as SMALL_LR
from bench.gpu.correctness import Check
from bench.gpu.graphs import check_graphs, exact_products
from bench.gpu.small_training import Training, Verdict, attempt, differing, listed
from bench.machine import Machine
from bench.shapes import SHAPES
from bench.timing import Sampler, Spread, make_parameters
from fused_dals import DALS
from fused_dals.rounding import join
from fused_dals.self_check import why_kernels_fail

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FP32: Dtypes = (F32, F32, F32)

#: Of these lists the time of one more read of the gradients is measured.
SCAN_MODELS = ("resnet50", "gpt2")
#: Bounds of the gradients' norm: always, sometimes and never reached.
LIMITS = (1e-3, 0.5, 1e6)
CLIPPED_STEPS, COMPENSATED_STEPS, MISSING_STEPS = 4, 10, 6
#: Most seconds that inductor may take here; the eager backend says as much about recompiling.
INDUCTOR_SECONDS = 20.0

Feature = Callable[[], Iterable[Check]]


def features(machine: Machine, samples: int, budget: CompileBudget, seed: int) -> dict[str, Feature]:
    """The checks by name. Their work on the device is a few hundred small steps, and a second of steps of two lists."""
    return {
        "scaling": lambda: _check_scaling(machine, seed),
        "clipping": lambda: _check_clipping(machine, seed),
        "narrow": lambda: _check_narrow(machine, seed),
        "missing": lambda: [
            attempt("gradients that come and go: no wait, bits as prepared anew", lambda: _missing(machine, seed))
        ],
        "graphs": lambda: check_graphs(machine, seed),
        "self-check": lambda: [attempt("fused=None takes the kernels", lambda: _default_path(machine, seed))],
        "scan": lambda: _check_scan(machine, samples, seed),
        "compile": lambda: [
            attempt("torch.compile: a new lr is no new graph", lambda: _compiled(budget, machine, seed))
        ],
    }


FEATURES = ("scaling", "clipping", "narrow", "missing", "graphs", "self-check", "scan", "compile")
#: Those that use the profiler, take times or compile, and so come when times have been taken.
LATE_FEATURES = ("self-check", "scan", "compile")

#: Kernels that only these checks and the contenders of these names need: parameter dtype and arguments.
KERNELS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "max_grad_norm fp32": (F32, {"max_grad_norm": 1.0}),
    "max_grad_norm bf16": (BF16, {"max_grad_norm": 1.0}),
    "amp_fused fp32": (F32, {"amp_fused": True}),
    "compensated, fp32 state": (BF16, {"compensated": True}),
    "compensated, bf16 state": (BF16, {"compensated": True, "state_dtype": BF16}),
    "fp32, bf16 state": (F32, {"state_dtype": BF16}),
}


def compile_kernels(device: torch.device, name: str) -> None:
    """Step one tensor, in a process of its own, so that the kernels are in Triton's cache on disk."""
    dtype, arguments = KERNELS[name]
    p = nn.Parameter(torch.ones(64, dtype=dtype, device=device))
    p.grad = torch.ones_like(p)
    optimizer = DALS([("w", p)], fused=True, **arguments)
    if optimizer._step_supports_amp_scaling:
        _hand_over(optimizer, torch.ones((), device=device), torch.zeros((), device=device))
    for loss in (1.0, torch.ones((), device=device)):
        optimizer.step(loss=loss)
    if device.type == "cuda":
        torch.cuda.synchronize()


def _hand_over(optimizer: DALS, grad_scale: Tensor, found_inf: Tensor) -> None:
    """What a GradScaler sets before a step."""
    vars(optimizer).update(grad_scale=grad_scale, found_inf=found_inf)


# -- the default -----------------------------------------------------------------------------------------------------


def _default_path(machine: Machine, seed: int) -> Verdict:
    verdict = Verdict()
    reason = why_kernels_fail(machine.device)
    verdict.demand(not reason, f"the self-check says: {reason}")
    training = Training(machine.device, seed)
    training.steps(2)
    loss = training.backward().detach()
    machine.wait()
    names = Counter(name for _, name in machine.launches(lambda: training.optimizer.step(loss=loss)))
    kernels = {short: sum(n for name, n in names.items() if short in name) for short in ("fused_pass", "prologue")}
    verdict.demand(all(kernels.values()), f"launched instead: {listed(list(names))}")
    verdict.notes.append(", ".join(f"{n} x {short}" for short, n in kernels.items()))
    return verdict


# -- GradScaler ------------------------------------------------------------------------------------------------------


def _check_scaling(machine: Machine, seed: int) -> Iterator[Check]:
    for path in ("fused", "foreach"):
        yield attempt(
            f"GradScaler, amp_fused, {path}: no wait, and an overflow changes nothing",
            lambda path=path: _scaled_training(machine, seed, {path: True}),  # type: ignore[misc]
        )
        yield attempt(
            f"grad_scale and found_inf by hand, {path}: no wait",
            lambda path=path: _scaled_by_hand(machine, seed, {path: True}),  # type: ignore[misc]
        )


class ScaledTraining(Training):
    """float32 weights, float16 products, a GradScaler."""

    def __init__(self, machine: Machine, seed: int, **arguments: Any) -> None:
        super().__init__(machine.device, seed, **arguments)
        self.scaler = torch.amp.GradScaler(machine.device.type, init_scale=2.0**10, growth_interval=10**6)

    def scaled_backward(self) -> Tensor:
        with torch.autocast(self.x.device.type, F16):
            loss = self.loss()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self) -> None:
        self.scaler.step(self.optimizer, loss=self.scaled_backward())
        self.scaler.update()


def _scaled_training(machine: Machine, seed: int, path: dict[str, Any]) -> Verdict:
    """Beside a run whose scaler unscales by itself: powers of two change no bit."""
    verdict = Verdict()
    ours, theirs = (ScaledTraining(machine, seed, amp_fused=fused, **path) for fused in (True, False))
    for one in (ours, theirs):
        one.steps(2)
    machine.wait()

    def watched_step(poison: bool) -> None:
        loss = ours.scaled_backward()
        if poison:
            ours.gradients()[0].fill_(torch.inf)
        with machine.no_waiting():
            ours.scaler.step(ours.optimizer, loss=loss)
        ours.scaler.update()

    for turn in range(3):
        watched_step(poison=False)
        theirs.step()
        names = differing(ours.numbers(), theirs.numbers())
        verdict.demand(not names, f"step {turn}: {listed(names)} differ from a scaler's own unscaling")
    before = ours.numbers()
    watched_step(poison=True)
    after = ours.numbers()
    count = before.pop("run state") - after.pop("run state")
    names = differing(before, after)
    verdict.demand(not names, f"an overflow changed {listed(names)}")
    verdict.demand(count.tolist() == [0, 0, 0, -1], f"an overflow moved the run state by {(-count).tolist()}")
    verdict.demand(ours.optimizer.skipped_steps == 1, f"{ours.optimizer.skipped_steps} steps are counted as dropped")
    verdict.demand(ours.scaler.get_scale() == 2.0**9, f"the scale is {ours.scaler.get_scale()}")
    watched_step(poison=False)
    names = differing(after, ours.numbers())
    verdict.demand(len(names) > 1, "the step after an overflow changes nothing")
    return verdict


def _scaled_by_hand(machine: Machine, seed: int, path: dict[str, Any]) -> Verdict:
    verdict = Verdict()
    scaled, plain = Training(machine.device, seed, amp_fused=True, **path), Training(machine.device, seed, **path)
    scale, fine = torch.tensor(256.0, device=machine.device), torch.tensor(0.0, device=machine.device)
    for turn in range(3):
        loss = scaled.backward()
        torch._foreach_mul_(scaled.gradients(), 256.0)
        _hand_over(scaled.optimizer, scale, fine)
        if turn == 0:  # tables, and kernels that may not be compiled yet
            scaled.optimizer.step(loss=loss)
        else:
            with machine.no_waiting():
                scaled.optimizer.step(loss=loss)
        plain.step()
        grads = zip(scaled.gradients(), plain.gradients(), strict=True)
        verdict.demand(all(torch.equal(a, b) for a, b in grads), f"step {turn}: .grad is not the unscaled gradient")
        names = differing(scaled.numbers(), plain.numbers())
        verdict.demand(not names, f"step {turn}: {listed(names)} differ from an unscaled run")
    return verdict


# -- gradients that come and go --------------------------------------------------------------------------------------


def _missing(machine: Machine, seed: int) -> Verdict:
    verdict = Verdict()
    ours, anew = (Training(machine.device, seed, fused=True) for _ in range(2))
    for turn in range(MISSING_STEPS):
        losses = [one.backward().detach() for one in (ours, anew)]
        for one in (ours, anew):
            for i, p in enumerate(one.model.parameters()):
                if turn and (i + turn) % 3 != 0:
                    p.grad = None
        anew.optimizer._runtime.steady = None
        anew.optimizer._runtime.last_grads.clear()
        before = ours.optimizer._runtime.fused[machine.device].preparations if turn else 0
        machine.wait()
        with machine.no_waiting() if turn else nullcontext():
            ours.optimizer.step(loss=losses[0])
        anew.optimizer.step(loss=losses[1])
        prepared = ours.optimizer._runtime.fused[machine.device].preparations - before
        verdict.demand(prepared == (turn == 0), f"step {turn}: its tables were written {prepared} times")
        names = differing(ours.numbers(), anew.numbers())
        verdict.demand(not names, f"step {turn}: {listed(names)} differ")
    return verdict


# -- clipping and dropping -------------------------------------------------------------------------------------------


def _check_clipping(machine: Machine, seed: int) -> Iterator[Check]:
    for path in ("fused", "foreach"):
        for limit in LIMITS:
            yield attempt(
                f"max_grad_norm {limit:g}, {path}: as clip_grad_norm_ before the step",
                lambda path=path, limit=limit: _clipped(machine, seed, {path: True}, limit),  # type: ignore[misc]
            )
        yield attempt(
            f"skip_nonfinite, {path}: dropped without a wait",
            lambda path=path: _dropped(machine, seed, {path: True}),  # type: ignore[misc]
        )


def _clipped(machine: Machine, seed: int, path: dict[str, Any], limit: float) -> Verdict:
    verdict = Verdict()
    inside = Training(machine.device, seed, max_grad_norm=limit, **path)
    outside = Training(machine.device, seed, **path)
    worst = 0.0
    for _ in range(CLIPPED_STEPS):
        loss = inside.backward()
        kept = [grad.clone() for grad in inside.gradients()]
        outside.optimizer.zero_grad()
        for p, grad in zip(outside.model.parameters(), kept, strict=True):
            p.grad = grad.clone()
        nn.utils.clip_grad_norm_(outside.model.parameters(), limit)
        for one in (inside, outside):
            one.optimizer.step(loss=loss)
        same = all(torch.equal(a, b) for a, b in zip(inside.gradients(), kept, strict=True))
        verdict.demand(same, "the gradients were written")
    ours, theirs = inside.numbers(), outside.numbers()
    names = differing(ours, theirs)
    for name in names:
        # A factor that differs in its last bits, over a few steps: as the tests have it.
        allowed = 2e-5 * theirs[name].abs() + 1e-6 * theirs[name].abs().max()
        worst = max(worst, float(((ours[name] - theirs[name]).abs() / allowed).max()))
    verdict.demand(worst <= 1, "an error is above its bound")
    verdict.demand(limit < 1e5 or not names, f"a limit that is not reached changed {listed(names)}")
    verdict.notes.append(f"error / bound: {worst:.2f}")
    verdict.figures["error_over_bound"] = worst
    return verdict


def _dropped(machine: Machine, seed: int, path: dict[str, Any]) -> Verdict:
    verdict = Verdict()
    training = Training(machine.device, seed, **path)
    training.steps(2)
    group = training.optimizer.param_groups[0]
    for name, value in (("skip_nonfinite", True), ("max_grad_norm", 0.5)):
        group[name] = value
        loss = training.backward()
        machine.wait()
        with machine.no_waiting():
            training.optimizer.step(loss=loss)
    for count, bad in enumerate((torch.inf, -torch.inf, torch.nan), start=1):
        loss = training.backward()
        training.gradients()[-1].flatten()[-1:].fill_(bad)
        before = training.numbers()
        with machine.no_waiting():
            training.optimizer.step(loss=loss)
        after = training.numbers()
        moved = (after.pop("run state") - before.pop("run state")).tolist()
        names = differing(before, after)
        verdict.demand(not names, f"{bad}: {listed(names)} changed")
        verdict.demand(moved == [0, 0, 0, 1], f"{bad}: the run state moved by {moved}")
        verdict.demand(training.optimizer.skipped_steps == count, f"{training.optimizer.skipped_steps} are counted")
    training.step()
    verdict.demand(len(differing(after, training.numbers())) > 1, "the next step changes nothing")
    return verdict


# -- narrow storage --------------------------------------------------------------------------------------------------


def _check_narrow(machine: Machine, seed: int) -> Iterator[Check]:
    for label, fixed in (("ratio fixed", {"trust_clip": (1.0, 1.0)}), ("ratio free", {})):
        yield attempt(
            f"compensated bf16, {label}: equals float32 master weights bit for bit",
            lambda fixed=fixed: _compensated(machine, seed, fixed),  # type: ignore[misc]
        )
    for path in ("fused", "foreach"):
        yield attempt(
            f"bf16 state, {path}: rounded as the reference rounds",
            lambda path=path: _rounded(machine, seed, {path: True}),  # type: ignore[misc]
        )


def _compensated(machine: Machine, seed: int, fixed: dict[str, Any]) -> Verdict:
    """The loop that people write: float32 masters are stepped with the gradients of their bfloat16 copies.

    With a fixed trust ratio all is elementwise. A free one comes from sums, whose order may depend on the dtype.
    """
    verdict = Verdict()
    options = {"total_steps": 15, "fused": True, **fixed}
    training = Training(machine.device, seed, BF16, compensated=True, **options)
    copied = Training(machine.device, seed, BF16)
    masters = {name: nn.Parameter(p.detach().float()) for name, p in copied.model.named_parameters()}
    stepped = DALS(list(masters.items()), lr=copied.optimizer.param_groups[0]["lr"], **options)
    with exact_products():
        for _ in range(COMPENSATED_STEPS):
            training.step()
            loss = copied.backward()
            with torch.no_grad():
                for name, p in copied.model.named_parameters():
                    assert p.grad is not None
                    masters[name].grad = p.grad.float()
                stepped.step(loss=loss)
                for name, p in copied.model.named_parameters():
                    # Nearest, ties away from zero: what a compensated weight shows.
                    raw = masters[name].view(torch.int32)
                    p.copy_(((raw + 0x8000) >> 16).to(torch.int16).view(BF16))
    differ, total, worst, held = 0, 0, 0.0, 0
    for name, p in training.model.named_parameters():
        compensation = training.optimizer.state[p]["compensation"]
        ours, theirs = join(p.detach(), compensation), masters[name].detach()
        differ += int((ours.view(torch.int32) != theirs.view(torch.int32)).sum())
        total += ours.numel()
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
        held += int((compensation != 0).sum())
    verdict.demand(not differ, f"{differ} of {total} weights differ, relative distance at most {worst:.1e}")
    verdict.demand(held > total // 2, f"only {held} of {total} weights hold more than bfloat16 could")
    verdict.figures.update(differing=differ, weights=total, relative_distance=worst)
    verdict.notes.append(f"{total} weights, {COMPENSATED_STEPS} steps")
    return verdict


def _rounded(machine: Machine, seed: int, path: dict[str, Any]) -> Verdict:
    """One step: all paths draw the same bits, so buffers differ only where a last bit of float32 tips the scale."""
    verdict = Verdict()
    buffers = []
    for arguments in (path, {"foreach": False}):
        # Without decay, whose sum with the gradient may cancel and then has few good digits.
        training = Training(machine.device, seed, state_dtype=BF16, weight_decay=0.0, **arguments)
        training.step()
        kept = [value.flatten() for entry in training.optimizer.state.values() for value in entry.values()]
        verdict.demand({value.dtype for value in kept} == {BF16}, "the state is not bfloat16")
        buffers.append(torch.cat(kept))
    places = [_place(buffer) for buffer in buffers]
    steps = int((places[0] - places[1]).abs().max())
    share = float((places[0] == places[1]).double().mean())
    verdict.demand(share > 0.99, "too few buffer elements agree")
    verdict.demand(steps <= 1, f"elements lie up to {steps} bfloat16 steps apart")
    verdict.notes.append(
        f"{100 * share:.3f} % of {len(places[0])} elements agree bit for bit, the others within {steps}"
    )
    verdict.figures.update(equal_share=share, most_steps=steps)
    return verdict


def _place(values: Tensor) -> Tensor:
    """bfloat16 numbers by their place in the order of all of them."""
    raw = values.view(torch.int16).to(torch.int32)
    return torch.where(raw < 0, -(raw & 0x7FFF), raw)


# -- the scan's time -------------------------------------------------------------------------------------------------


def _check_scan(machine: Machine, samples: int, seed: int) -> Iterator[Check]:
    for model in SCAN_MODELS:
        yield attempt(
            f"max_grad_norm, {model} fp32: time of the scan",
            lambda model=model: _scan_time(machine, model, samples, seed),  # type: ignore[misc]
        )


def _scan_time(machine: Machine, model: str, samples: int, seed: int) -> Verdict:
    """A step with clipping beside one without, in turns, on the same tensors."""
    named = make_parameters(list(SHAPES[model]()), FP32, machine.device, seed)
    loss = torch.ones((), device=machine.device)
    samplers = []
    for limit in (None, 1.0):
        optimizer = DALS(list(named), lr=SMALL_LR, fused=True, max_grad_norm=limit)
        samplers.append(Sampler(machine, lambda optimizer=optimizer: optimizer.step(loss=loss)))  # type: ignore[misc]
    times = [[sampler.sample() for sampler in samplers] for _ in range(samples)]
    plain, clipped = (Spread.of(column).median for column in zip(*times, strict=True))
    ratio = Spread.of([b / a for a, b in times])
    read = sum(p.numel() * p.element_size() for _, p in named)
    extra = max(clipped - plain, 1e-9)
    verdict = Verdict()
    verdict.notes.append(
        f"x {ratio.median:.3f} ({1e3 * plain:.3f} to {1e3 * clipped:.3f} ms); {read:,} bytes read once more, "
        f"{read / extra / 1e9:.0f} GB/s"
    )
    verdict.figures.update(
        ratio=ratio.median, ratio_p10=ratio.p10, ratio_p90=ratio.p90, plain_s=plain, clipped_s=clipped, bytes=read,
        bytes_per_s=read / extra,
    )  # fmt: skip
    return verdict


# -- torch.compile ---------------------------------------------------------------------------------------------------


def _compiled(budget: CompileBudget, machine: Machine, seed: int) -> Verdict:
    """By inductor where the run has time for it, else, or if it takes too long, by the eager backend."""
    limit = min(budget.limit_s, INDUCTOR_SECONDS)
    if limit > 0:
        start = time.monotonic()
        try:
            with time_limit(limit):
                return _compiled_by("inductor", machine, seed)
        except OutOfTime:
            pass
        finally:
            torch.compiler.reset()
            budget.left_s -= time.monotonic() - start
    verdict = _compiled_by("eager", machine, seed)
    torch.compiler.reset()
    return verdict


def _compiled_by(backend: str, machine: Machine, seed: int) -> Verdict:
    from torch._dynamo.testing import CompileCounterWithBackend

    verdict = Verdict()
    counter = CompileCounterWithBackend(backend)
    ours, plain = (Training(machine.device, seed, fused=True) for _ in range(2))

    def training_step(model: nn.Module, optimizer: DALS, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        return loss

    compiled = torch.compile(training_step, backend=counter)
    frames = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, of which no two versions have the same
        for step in range(5):
            for one, run in ((ours, compiled), (plain, training_step)):
                one.optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
                run(one.model, one.optimizer, one.x, one.y)
            frames.append(counter.frame_count)
    machine.wait()
    verdict.demand(frames[0] > 0, "nothing was compiled")
    verdict.demand(len(set(frames[1:])) == 1, "a step was compiled anew")
    a, b = (torch.cat([p.detach().flatten() for p in one.model.parameters()]) for one in (ours, plain))
    error = float((a - b).norm() / b.norm())
    verdict.demand(error < 1e-4, f"the weights are {error:.1e} from those of the plain run")
    verdict.notes.append(f"{backend}, graphs after each step: {frames}, weights within {error:.1e}")
    verdict.figures["error"] = error
    return verdict
