"""The 18 strategies of the paper, the corrected ones and the ablations: their updates, schedules and resumption."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.paper.problem import layers_by_child
from bench.paper.settings import fine_tuning, from_scratch, in_steps
from bench.paper.stepping import LossAware, RandomPhases, Stepper
from bench.paper.strategies import ABLATIONS, CORRECTED, EMA_DECAY, PUBLISHED, STRATEGIES, Setup, slanted_triangle
from bench.published import BEST
from fused_dals import DALS
from fused_dals.schedule import cosine_restarts
from tests.exact import same

STEPS = 7
EPOCHS = 20


def small_setup(seed: int, epochs: int = EPOCHS) -> Setup:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    layers = [names for names in layers_by_child(model) if names]
    return Setup(model, layers, STEPS, epochs, from_scratch(1e-3), seed)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 5, generator=generator)
    return x, x[:, :3].argmax(dim=1)


def train(setup: Setup, stepper: Stepper, start: int, stop: int) -> None:
    for step in range(start, stop):
        x, y = batch(step)
        stepper.step(lambda x=x, y=y: F.cross_entropy(setup.model(x), y))
        if step % STEPS == STEPS - 1:
            stepper.end_epoch()


def rates(stepper: Stepper) -> list[float]:
    return [group["lr"] for group in stepper.optimizer.param_groups]


def test_the_paper_has_18_strategies_and_results_for_each() -> None:
    assert len(PUBLISHED) == 18
    for column, values in BEST.items():
        assert list(values) == list(PUBLISHED), column
    assert set(CORRECTED) | set(ABLATIONS) | set(PUBLISHED) == set(STRATEGIES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_lowers_the_loss(name: str, seed: int) -> None:
    setup = small_setup(seed, epochs=25)
    x, y = batch(0)  # one of those trained on
    before = F.cross_entropy(setup.model(x), y).item()
    train(setup, STRATEGIES[name](setup), 0, 25 * STEPS)
    assert F.cross_entropy(setup.model(x), y).item() < before


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_resumes_to_the_same_bits(name: str, seed: int, tmp_path: Any) -> None:
    whole = small_setup(seed)
    stepper = STRATEGIES[name](whole)
    train(whole, stepper, 0, 18)
    torch.save({"model": whole.model.state_dict(), "stepper": stepper.state_dict()}, tmp_path / "checkpoint")
    train(whole, stepper, 18, 33)

    resumed = small_setup(seed)
    again = STRATEGIES[name](resumed)
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    again.load_state_dict(saved["stepper"])
    train(resumed, again, 18, 33)
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert again.record() == stepper.record()


@pytest.mark.parametrize("name", ["Cosine Decay SGD", "Grokfast", "Lookahead+AdamW", "DALS, random phases"])
def test_the_stepper_is_part_of_the_checkpoint(name: str, seed: int) -> None:
    """Negative control: weights alone do not resume a run."""
    whole = small_setup(seed)
    stepper = STRATEGIES[name](whole)
    train(whole, stepper, 0, 18)
    resumed = small_setup(seed)
    resumed.model.load_state_dict(whole.model.state_dict())
    train(whole, stepper, 18, 33)
    train(resumed, STRATEGIES[name](resumed), 18, 33)
    assert not same(whole.model.state_dict(), resumed.model.state_dict())


def by_hand(name: str, seed: int, update: Any) -> None:
    """Compare a strategy with `update(parameter, gradient, state, gradients at)` over a few steps in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        setup, twin = small_setup(seed), small_setup(seed)
        stepper = STRATEGIES[name](setup)
        states: list[dict[str, Any]] = [{} for _ in twin.model.parameters()]
        for step in range(6):
            x, y = batch(step)
            x = x.double()

            def gradients(x: Tensor = x, y: Tensor = y) -> list[Tensor]:
                loss = F.cross_entropy(twin.model(x), y)
                return list(torch.autograd.grad(loss, list(twin.model.parameters())))

            stepper.step(lambda x=x, y=y: F.cross_entropy(setup.model(x), y))
            update(list(twin.model.parameters()), gradients, states)
    finally:
        torch.set_default_dtype(torch.float32)
    for own, expected in zip(setup.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-9)


def test_lars_scales_the_buffer_by_an_unbounded_ratio(seed: int) -> None:
    def update(params: list[Tensor], gradients: Any, states: list[dict[str, Any]]) -> None:
        for p, g, state in zip(params, gradients(), states, strict=True):
            u = g + 1e-3 * p.detach()
            state["m"] = 0.9 * state.get("m", 0) + u
            p.data -= 0.03 * 0.02 * (p.detach().norm() / u.norm()) * state["m"]

    by_hand("LARS", seed, update)


def test_grokfast_amplifies_the_average_before_a_dampened_buffer(seed: int) -> None:
    def update(params: list[Tensor], gradients: Any, states: list[dict[str, Any]]) -> None:
        for p, g, state in zip(params, gradients(), states, strict=True):
            state["h"] = 0.98 * state.get("h", 0) + 0.02 * g
            g = g + state["h"]
            state["m"] = 0.9 * state["m"] + 0.1 * g if "m" in state else g
            p.data *= 1 - 0.03 * 1e-3
            p.data -= 0.03 * state["m"]

    by_hand("Grokfast", seed, update)


def test_sam_takes_the_gradient_at_the_adaptively_perturbed_weights(seed: int) -> None:
    def update(params: list[Tensor], gradients: Any, states: list[dict[str, Any]]) -> None:
        first = gradients()
        norm = torch.sqrt(sum((p.detach() * g).pow(2).sum() for p, g in zip(params, first, strict=True)))
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, first, strict=True):
            p.data += 0.05 / norm * p.detach() ** 2 * g
        second = gradients()
        for p, old, g, state in zip(params, before, second, states, strict=True):
            state["m"] = 0.9 * state.get("m", 0) + g + 1e-3 * old
            p.data = old - 0.03 * state["m"]

    by_hand("SAM", seed, update)


def test_learning_rates_of_the_layers(seed: int) -> None:
    expected = [0.05 / 2.6**2, 0.05 / 2.6, 0.05]
    for name in ("Discriminative LR", "SAM+Discriminative"):
        assert rates(PUBLISHED[name](small_setup(seed))) == pytest.approx(expected)


def test_stlr_as_run_divides_twice_after_the_first_epoch(seed: int) -> None:
    setup = small_setup(seed)
    stepper = PUBLISHED["STLR+Discriminative"](setup)
    assert rates(stepper) == pytest.approx([0.05 / 2.6**2, 0.05 / 2.6, 0.05])
    for epoch in range(1, 4):
        train(setup, stepper, 0, STEPS)
        factor = slanted_triangle(epoch, EPOCHS)
        assert rates(stepper) == pytest.approx([factor * 0.05 / 2.6**4, factor * 0.05 / 2.6**2, factor * 0.05])


def test_stlr_corrected_divides_once_and_moves_every_step(seed: int) -> None:
    setup = small_setup(seed)
    stepper = CORRECTED["STLR+Discriminative (corrected)"](setup)
    for step in range(20):
        factor = slanted_triangle(step, EPOCHS * STEPS)
        assert rates(stepper) == pytest.approx([factor * 0.05 / 2.6**2, factor * 0.05 / 2.6, factor * 0.05])
        train(setup, stepper, step, step + 1)


def test_slanted_triangle() -> None:
    assert slanted_triangle(0, 100) == pytest.approx(1 / 32)
    assert slanted_triangle(10, 100) == pytest.approx(1)
    assert slanted_triangle(100, 100) == pytest.approx(1 / 32)
    assert slanted_triangle(55, 100) == pytest.approx((1 + 0.5 * 31) / 32)


def test_sgdr_restarts(seed: int) -> None:
    """As run, the counter goes up before a step, so the first cycle has 9. Corrected, three cycles fill the run."""

    def annealed(place: float, length: float) -> float:
        return 1e-5 + (0.05 - 1e-5) * (1 + math.cos(math.pi * place / length)) / 2

    as_run = [annealed(c, 10) for c in range(1, 10)] + [annealed(c, 20) for c in range(20)] + [annealed(0, 40)]
    part = math.ceil(EPOCHS * STEPS / 7)
    corrected = [annealed(c, length * part) for length in (1, 2, 4) for c in range(length * part)][: EPOCHS * STEPS]
    for name, expected in (("SGDR", as_run), ("SGDR (corrected)", corrected)):
        setup = small_setup(seed)
        stepper = STRATEGIES[name](setup)
        for step, rate in enumerate(expected):
            assert rates(stepper) == pytest.approx([rate]), (name, step)
            train(setup, stepper, step, step + 1)
    assert len(corrected) == EPOCHS * STEPS and corrected[-1] < 0.01 * corrected[0]


def test_dals_acc_corrected_ends_with_its_third_cycle(seed: int) -> None:
    setup = small_setup(seed)
    group = dals_of("DALS-Acc (corrected)", setup).param_groups[0]
    factors = [cosine_restarts(t, group["restart_steps"], group["restart_mult"]) for t in range(EPOCHS * STEPS)]
    restarts = [t for t in range(1, len(factors)) if factors[t] > factors[t - 1]]
    assert len(restarts) == 2 and factors[-1] < 0.02
    as_run = dals_of("DALS-Acc", setup).param_groups[0]
    assert as_run["restart_steps"] == 10 * STEPS and as_run["restart_mult"] == group["restart_mult"] == 2


def test_cosine_ends_at_its_floor_with_the_last_step(seed: int) -> None:
    setup = small_setup(seed)
    stepper = PUBLISHED["Cosine Decay SGD"](setup)
    train(setup, stepper, 0, EPOCHS * STEPS)
    assert rates(stepper) == pytest.approx([1e-5])


def test_dals_has_the_depths_of_the_layers(seed: int) -> None:
    setup = small_setup(seed)
    expected = {
        f"{child}.{kind}": depth for child, depth in (("0", 0), ("2", 0.5), ("4", 1)) for kind in ("weight", "bias")
    }
    assert dals_of("DALS", setup).depths() == expected
    assert dals_of("DALS, depth reversed", setup).depths() == {name: 1 - depth for name, depth in expected.items()}
    assert set(dals_of("DALS, depth constant", setup).depths().values()) == {0.5}


def dals_of(name: str, setup: Setup) -> DALS:
    optimizer = STRATEGIES[name](setup).optimizer
    assert isinstance(optimizer, DALS)
    return optimizer


def test_ablations_change_the_part_they_name(seed: int) -> None:
    setup = small_setup(seed)
    for phase in range(3):
        group = dals_of(f"DALS, phase {phase} only", setup).param_groups[0]
        assert group["ema_decay"] == (EMA_DECAY[phase],) * 3
    stepper = STRATEGIES["DALS, no trust ratio"](setup)
    train(setup, stepper, 0, 3)
    assert set(dals_in(stepper).trust_ratios().values()) == {1.0}
    stepper = STRATEGIES["DALS, trust ratio 0.2"](setup)
    train(setup, stepper, 0, 3)
    assert list(dals_in(stepper).trust_ratios().values()) == pytest.approx([0.2] * 6)
    assert dals_of("DALS, no clamp", setup).param_groups[0]["trust_clip"] == (0, math.inf)
    group = dals_of("DALS, no filter", setup).param_groups[0]
    assert group["ema_decay"] == (1, 1, 1)


def dals_in(stepper: Stepper) -> DALS:
    assert isinstance(stepper, LossAware)
    return stepper.optimizer


def test_random_phases_are_as_frequent_as_those_of_the_loss(seed: int) -> None:
    setup = small_setup(seed)
    stepper = ABLATIONS["DALS, random phases"](setup)
    assert isinstance(stepper, RandomPhases)
    assert stepper.draw() == 0 and stepper.recent.maxlen == STEPS
    used = []
    for step in range(40):
        train(setup, stepper, step, step + 1)
        used.append(EMA_DECAY.index(stepper.optimizer.param_groups[0]["ema_decay"][0]))
    assert sum(stepper.phase_counts) == 40 and used[0] == 0 and len(set(used)) > 1
    assert stepper.record()["drawn_counts"] == [used.count(phase) for phase in range(3)]
    # Phases that change while training are followed, whatever there was before the window.
    stepper.recent.extend([0] * STEPS)
    for phase in (1, 2):
        stepper.recent.extend([phase] * STEPS)
        assert {stepper.draw() for _ in range(100)} == {phase}
    window = [0] * (STEPS // 2) + [1] * (STEPS - STEPS // 2)
    stepper.recent.extend(window)
    drawn = [stepper.draw() for _ in range(3000)]
    shares = [drawn.count(phase) / 3000 for phase in range(3)]
    assert shares == pytest.approx([window.count(phase) / STEPS for phase in range(3)], abs=0.06)


def test_fine_tuning_settings() -> None:
    settings = fine_tuning(lr_adam=3e-5, lr_sgd=3e-4)
    assert (settings.adam, settings.lion, settings.sgdr, settings.dals_fast) == (3e-5, 1.5e-5, 6e-4, 6e-4)
    assert (settings.weight_decay, settings.dals_acc_weight_decay) == (0.01, 0.01)
    assert in_steps(settings.restart_steps, 20) == 50
    assert in_steps(settings.acc_restart_steps, 171) == 513
    assert in_steps(from_scratch(1e-4).acc_restart_steps, 157) == 1570
    assert in_steps(from_scratch(1e-4).restart_steps, 157) == 10
