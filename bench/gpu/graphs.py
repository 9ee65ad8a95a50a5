"""Whole training steps captured into CUDA graphs: their replays against an eager run, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import ExponentialLR

from bench.gpu.correctness import Check
from bench.gpu.small_training import LR, Training, Verdict, attempt, differing, listed
from bench.machine import Machine

WARMUP_STEPS, REPLAYS = 3, 6
#: The turn whose inputs are NaN, where non-finite steps are dropped.
BAD_TURN = 3

PATHS: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "total_steps": {"total_steps": 40},
    "restart_steps": {"restart_steps": 4, "restart_mult": 1.5},
    "max_grad_norm, skip_nonfinite": {"max_grad_norm": 0.01, "skip_nonfinite": True},
    "bf16 state": {"state_dtype": torch.bfloat16},
}


def check_graphs(machine: Machine, seed: int) -> Iterator[Check]:
    """Everything that a captured step promises."""
    with exact_products():
        for path, chosen in PATHS.items():
            for name, arguments in ARGUMENTS.items():
                yield attempt(
                    f"graph, {path}, {name}: replays are eager steps",
                    lambda options={**chosen, **arguments}: _replays(machine, seed, options),  # type: ignore[misc]
                )
        yield attempt("graph: eager steps and replays take turns", lambda: _turns(machine, seed))
        yield attempt("graph: numbers reach it by refresh_hyperparameters()", lambda: _refreshing(machine, seed))
        for label, check in _refusals(machine, seed).items():
            yield attempt(f"graph, refused: {label}", check)


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 matrix products in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Scheduled(Training):
    """A training that can be captured, with a scheduler that moves its learning rate on the device."""

    def __init__(self, device: torch.device, seed: int, **options: Any) -> None:
        super().__init__(device, seed, **{"lr": torch.tensor(LR, device=device), "capturable": True, **options})
        self.scheduler = ExponentialLR(self.optimizer, gamma=0.8)


def captured_and_eager(
    machine: Machine, seed: int, options: dict[str, Any]
) -> tuple[Scheduled, Callable[[], object], Scheduled]:
    """A training whose next step is a graph, the replay, and its eager twin, as far along."""

    captured, eager = (Scheduled(machine.device, seed, **options) for _ in range(2))

    def warm_up() -> None:
        captured.steps(WARMUP_STEPS)
        captured.optimizer.zero_grad()  # so that the graph's gradients lie in its own memory

    replay = machine.capture(warm_up, captured.step)
    eager.steps(WARMUP_STEPS)
    return captured, replay, eager


def _judge(verdict: Verdict, when: str, captured: Training, eager: Training) -> bool:
    """Whether both are the same; where not, whether it began before the optimizer."""
    names = differing(captured.numbers(), eager.numbers())
    if names:
        ours, theirs = captured.gradients(), eager.gradients()
        same = len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
        origin = "of equal gradients" if same else "and gradients differ too"
        verdict.problems.append(f"{when}: {listed(names)} differ, {origin}")
    return not names


def _replays(machine: Machine, seed: int, options: dict[str, Any]) -> Verdict:
    verdict = Verdict(notes=[f"{REPLAYS} replays"])
    captured, replay, eager = captured_and_eager(machine, seed, options)
    drops = bool(options.get("skip_nonfinite"))
    for turn in range(REPLAYS):
        if turn > 0:  # the first replay is the captured step as it was
            for one in (captured, eager):
                one.scheduler.step()
                one.new_inputs()
                if drops and turn == BAD_TURN:
                    one.x.fill_(torch.nan)
        replay()
        eager.step()
        machine.wait()
        if not _judge(verdict, f"replay {turn}", captured, eager):
            return verdict
    skipped = captured.optimizer.skipped_steps
    verdict.demand(skipped == drops, f"{skipped} steps were dropped")
    verdict.demand(captured.optimizer.phases() == eager.optimizer.phases(), "other phases")
    taken = captured.optimizer.state_dict()["param_groups"][0]["step"]
    verdict.demand(taken == WARMUP_STEPS + REPLAYS - drops, f"{taken} steps are counted")
    return verdict


def _turns(machine: Machine, seed: int) -> Verdict:
    """The eager steps in between have gradients elsewhere, and one of them another set of parameters."""
    verdict = Verdict()
    captured, replay, eager = captured_and_eager(machine, seed, PATHS["fused"])
    crowd = []
    for turn in range(8):
        if turn % 2:
            for one in (captured, eager):
                loss = one.backward()
                if turn == 5:
                    next(one.model.parameters()).grad = None
                one.optimizer.step(loss=loss)
            # Whatever the graph's tables left free is written by others now.
            crowd += [torch.full((1 << k,), -1, dtype=torch.int64, device=machine.device) for k in range(14)]
        else:
            replay()
            eager.step()
        machine.wait()
        names = differing(captured.numbers(), eager.numbers())
        if names:
            verdict.problems.append(f"turn {turn}, {'eager' if turn % 2 else 'replay'}: {listed(names)} differ")
            break
    return verdict


def _refreshing(machine: Machine, seed: int) -> Verdict:
    verdict = Verdict()
    captured, replay, eager = captured_and_eager(machine, seed, {**PATHS["fused"], "lr": LR})

    def both() -> list[str]:
        replay()
        eager.step()
        machine.wait()
        return differing(captured.numbers(), eager.numbers())

    verdict.demand(not both(), "the first replay differs")
    for one in (captured, eager):
        one.optimizer.param_groups[0].update(lr=0.01, momentum=0.5, weight_decay=0.1)
    with machine.no_waiting():
        captured.optimizer.refresh_hyperparameters()
    names = both()
    verdict.demand(not names, f"after refreshing {listed(names)} differ")
    for one in (captured, eager):
        one.optimizer.param_groups[0]["lr"] = 0.3
    verdict.demand(bool(both()), "control: a number reached the graph without refreshing")
    return verdict


def _refusals(machine: Machine, seed: int) -> dict[str, Callable[[], Verdict]]:
    """What cannot be captured is an error that says so, and changes nothing."""

    def refused(words: str, steps: int, **options: Any) -> Verdict:
        verdict = Verdict()
        training = Scheduled(machine.device, seed, **options)
        training.steps(steps)
        before = training.numbers()
        try:
            machine.capture(lambda: None, training.step)
        except RuntimeError as error:
            verdict.demand(words in str(error), f"another error: {error}")
        else:
            verdict.problems.append("it was captured")
        machine.wait()
        names = differing(before, training.numbers())
        verdict.demand(not names, f"{listed(names)} changed")
        return verdict

    found: dict[str, Callable[[], Verdict]] = {}
    for path, chosen in PATHS.items():
        found[f"{path}, not capturable"] = partial(refused, "needs capturable=True", 1, capturable=False, **chosen)
        found[f"{path}, the first step"] = partial(refused, "has not stepped yet", 0, **chosen)
    return found
