"""Gradients that come and go: the kernels' tables keep whoever had one once, and leave who has none now as it is."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS, awaited, host, stepper
from fused_dals.fused import FusedPass
from fused_dals.gather import Joined
from fused_dals.launch_plan import LaunchPlan
from tests.helpers import identical
from tests.test_capture import capturing

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(3, 4), (5,), (), (1,), (2, 3, 4, 4), (130,), (9000,), (4, 33)]
STEPS = 12
pytestmark = pytest.mark.usefixtures("either_walk")


class Case:
    """Two groups; ``sought`` is how often everything to step was gathered."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, seed: int, dtype: torch.dtype = torch.float32, **arguments: Any
    ) -> None:
        torch.manual_seed(seed)
        self.params = [nn.Parameter(torch.randn(shape, device=DEVICE, dtype=dtype)) for shape in SHAPES]
        self.params[4].data = self.params[4].data.contiguous(memory_format=torch.channels_last)
        self.params[7].data = torch.randn(33, 4, device=DEVICE, dtype=dtype).T
        groups: list[dict[str, Any]] = [
            {"params": [(f"{i}.a", p) for i, p in enumerate(self.params[:4])]},
            {"params": [(f"{i}.b", p) for i, p in enumerate(self.params[4:])], "weight_decay": 0.1},
        ]
        self.optimizer = DALS(groups, depth=0.3, **{"fused": True, **arguments})
        self.given: dict[str, Any] = {}
        if arguments.get("amp_fused"):
            self.given = {"grad_scale": torch.tensor(8.0, device=DEVICE), "found_inf": torch.zeros((), device=DEVICE)}
        self.sought = 0

        def counting(groups: Any, *rest: Any) -> Any:
            self.sought += groups is self.optimizer.param_groups
            return real(groups, *rest)

        real = stepper.gather  # type: ignore[attr-defined]
        monkeypatch.setattr(stepper, "gather", counting)

    def forget(self) -> None:
        """What earlier steps prepared."""
        self.optimizer._runtime.steady = None
        self.optimizer._runtime.last_grads.clear()

    def step(self, has_grad: list[bool]) -> None:
        for p, has in zip(self.params, has_grad, strict=True):
            p.grad = torch.randn_like(p) if has else None
        vars(self.optimizer).update(self.given)
        self.optimizer.step(loss=torch.rand((), device=DEVICE))

    def tensors(self) -> list[Tensor]:
        state = [value for p in self.params for value in self.optimizer.state[p].values()]
        grads = [p.grad for p in self.params if p.grad is not None]
        return [*(p.detach() for p in self.params), *state, *grads, self.optimizer._runtime.state.values]


ALL = [True] * len(SHAPES)


def transposed(p: Tensor) -> Tensor:
    """A gradient whose memory goes the other way round."""
    return torch.randn(p.shape[::-1], device=DEVICE).permute(tuple(reversed(range(p.dim()))))


def some_of(draw: random.Random) -> list[bool]:
    return [draw.random() < 0.6 for _ in SHAPES]


@pytest.mark.parametrize(
    ("dtype", "arguments"),
    [
        (torch.float32, {}),
        (torch.float32, {"amp_fused": True}),
        (torch.float32, {"max_grad_norm": 0.5, "skip_nonfinite": True}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"state_dtype": torch.bfloat16}),
        (torch.bfloat16, {"compensated": True}),
    ],
    ids=["plain", "scaled", "clipped", "mixed", "bf16", "compensated"],
)
def test_any_set_of_gradients_goes_on_with_what_was_prepared(
    dtype: torch.dtype, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """To the bits of steps that are prepared anew. Once everybody has had a gradient nothing is sought any more."""
    results = []
    for anew in (False, True):
        case, draw = Case(monkeypatch, seed, dtype, **arguments), random.Random(seed)
        ratios = []
        for step in range(STEPS):
            if anew:
                case.forget()
            if "found_inf" in case.given:
                case.given["found_inf"] = torch.full((), float(step % 4 == 2), device=DEVICE)
            case.step(ALL if step == 3 else [False] * len(ALL) if step == 7 else some_of(draw))
            is_dropped = bool(case.given.get("found_inf", 0))  # it leaves the ratios of before, or none in new tables
            ratios.append({} if is_dropped else case.optimizer.trust_ratios())
            if step == 3:
                sought = case.sought
        assert case.sought == (STEPS if anew else sought)
        results.append((case.tensors(), ratios))
    (tensors, ratios), (expected, expected_ratios) = results
    assert identical(tensors, expected) and ratios == expected_ratios


@pytest.mark.parametrize("stage_a_writes", [True, False])
def test_a_pass_leaves_alone_who_has_no_gradient(
    stage_a_writes: bool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Beside the foreach path, where stage A writes and where it does not."""
    monkeypatch.setattr(
        stepper, "FusedPass", lambda device: FusedPass(device, LaunchPlan(stage_a_writes=stage_a_writes))
    )
    fused, foreach = Case(monkeypatch, seed), Case(monkeypatch, seed, fused=False, foreach=True)
    draw = random.Random(seed)
    for step in range(STEPS):
        has_grad = ALL if step == 0 else some_of(draw)
        before = [p.detach().clone() for p in fused.params]
        state = copy.deepcopy([fused.optimizer.state[p] for p in fused.params])
        torch.manual_seed(seed + step)
        fused.step(has_grad)
        torch.manual_seed(seed + step)
        foreach.step(has_grad)
        for p, old, entry, has in zip(fused.params, before, state, has_grad, strict=True):
            if not has:
                assert torch.equal(p, old) and identical([*entry.values()], [*fused.optimizer.state[p].values()])
        for a, b in zip(fused.tensors(), foreach.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
        assert fused.optimizer.trust_ratios().keys() == foreach.optimizer.trust_ratios().keys()


def test_versions_move_with_who_is_stepped(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    case = Case(monkeypatch, seed, amp_fused=True)
    case.step(ALL)
    every_second = [i % 2 == 0 for i in range(len(ALL))]
    for i, has_grad in enumerate((every_second, ALL, [i % 3 == 0 for i in range(len(ALL))], every_second, ALL)):
        if i > 2:  # prepared anew, with somebody awaited and with everybody there
            case.optimizer._runtime.steady = None
        before = [p._version for p in case.params]
        case.step(has_grad)
        moved = [p._version > version for p, version in zip(case.params, before, strict=True)]
        assert moved == has_grad
        assert all(p.grad._version > 0 for p in case.params if p.grad is not None), "they are unscaled"


def test_gradients_that_come_back_otherwise_are_prepared_anew(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Laid out or aligned otherwise, of another dtype: right all the same, and right from then on."""

    def odd(p: Tensor) -> Tensor:
        return torch.randn(p.numel() + 1, device=DEVICE)[1:].view(p.shape)

    twins = [Case(monkeypatch, seed), Case(monkeypatch, seed)]
    for step in range(12):
        for anew, case in enumerate(twins):
            torch.manual_seed(seed + step)
            if anew:
                case.forget()
            for i, p in enumerate(case.params):
                make = (transposed, odd, torch.randn_like)[(step + i) % 3]
                p.grad = None if (step + 2 * i) % 5 < 2 else make(p)
            case.optimizer.step(loss=1.0)
        assert identical(twins[0].tensors(), twins[1].tensors())
    other = torch.randn_like(twins[0].params[0])
    for case in twins:
        case.params[0].grad_dtype = None
        case.params[0].grad = other.bfloat16()
        case.optimizer.step(loss=1.0)
    assert identical(twins[0].tensors(), twins[1].tensors())


def half(case: Case, first: bool) -> list[bool]:
    return [(i < len(ALL) // 2) == first for i in range(len(ALL))]


def test_who_trains_no_more_is_not_awaited(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Nor who is gone: the kernels' tables have who trains and had a gradient, no other."""
    case = Case(monkeypatch, seed)
    case.step(half(case, True))
    for p in case.params[:2]:
        p.requires_grad_(False)
    case.step(half(case, False))
    (fused,) = case.optimizer._runtime.fused.values()
    assert fused.places == [(0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    del case.optimizer.param_groups[1]
    case.params[:] = case.params[:4]
    for p in case.params:
        p.requires_grad_(True)
    case.step([True, False, False, False])
    assert fused.places == [(0, 0), (0, 1), (0, 2), (0, 3)], "they train again"


def test_parameters_in_one_place_may_take_turns(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """As ever; both at once are still refused, before anything is written."""
    case = Case(monkeypatch, seed)
    case.params[1].data = case.params[5].data[:5]
    one = [i != 5 for i in range(len(ALL))]
    other = [i != 1 for i in range(len(ALL))]
    for has_grad in (one, other, one, other):
        case.step(has_grad)
    before = case.tensors()[: len(ALL)]
    before = [tensor.clone() for tensor in before]
    with pytest.raises(RuntimeError, match=r"cannot step parameter '1.a' and parameter '1.b': they share memory"):
        case.step(ALL)
    assert identical(before, case.tensors()[: len(ALL)])


def test_state_that_somebody_made_is_laid_out_for_who_is_awaited(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    twins = [Case(monkeypatch, seed), Case(monkeypatch, seed)]
    for anew, case in enumerate(twins):
        torch.manual_seed(seed)
        case.step(ALL)
        p = case.params[0]
        gaps = torch.empty(3, 8, device=DEVICE)[:, ::2]
        case.optimizer.state[p]["momentum_buffer"] = gaps.copy_(case.optimizer.state[p]["momentum_buffer"])
        for has_grad in ([i != 0 for i in range(len(ALL))], ALL):
            if anew:
                case.forget()
            case.step(has_grad)
        assert anew or case.sought == 2
    assert identical(twins[0].tensors(), twins[1].tensors())


@pytest.mark.parametrize("wrong", ["shape", "sparse", "state"])
def test_what_is_wrong_is_said_when_the_gradient_is_there(
    wrong: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    case = Case(monkeypatch, seed)
    case.step(ALL)
    without = [i != 0 for i in range(len(ALL))]
    case.step(without)
    p = case.params[0]
    if wrong == "state":
        case.optimizer.state[p]["grad_ema"] = torch.ones(7, device=DEVICE)
    case.step(without)
    grad = {"shape": torch.ones(2, 6, device=DEVICE), "sparse": torch.eye(3, 4, device=DEVICE).to_sparse()}
    before = [tensor.clone() for tensor in case.tensors()[: len(ALL)]]
    for q, has in zip(case.params, without, strict=True):
        q.grad = torch.randn_like(q) if has else None
    if wrong == "shape":
        p.grad = torch.ones_like(p)
        p.grad.data = grad[wrong]
    else:
        p.grad = grad.get(wrong, torch.ones_like(p))
    words = {"shape": r"its gradient \(2, 6\)", "sparse": "its gradient is sparse", "state": r"its grad_ema \(7,\)"}
    with pytest.raises(RuntimeError, match=f"'0.a'.*{words[wrong]}"):
        case.optimizer.step(loss=1.0)
    assert identical(before, [tensor.clone() for tensor in case.tensors()[: len(ALL)]])


def test_a_copy_and_a_checkpoint_go_on(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    case = Case(monkeypatch, seed)
    case.step(ALL)
    case.step(half(case, True))
    saved = copy.deepcopy(case.optimizer.state_dict())
    other = Case(monkeypatch, seed)
    for p, q in zip(other.params, case.params, strict=True):
        p.data.copy_(q.data)
    other.optimizer.load_state_dict(saved)
    for step in range(4):
        for one in (case, other):
            torch.manual_seed(seed + step)
            one.step(half(one, step % 2 == 0) if step < 3 else ALL)
    assert identical(case.tensors(), other.tensors())


def test_with_float64_parameters_beside_them_nobody_is_awaited(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Those go through torch operations, whose batches are of one set of gradients."""
    monkeypatch.setattr(stepper, "serves_by_default", lambda param: True)
    results = []
    for anew in (False, True):
        case, draw = Case(monkeypatch, seed, fused=None), random.Random(seed)
        case.params[1].data = case.params[1].data.double()
        for _ in range(6):
            if anew:
                case.forget()
            case.step([i == 1 or has for i, has in enumerate(some_of(draw))])
        results.append(case.tensors())
    assert identical(*results)


def test_a_graph_leaves_alone_who_had_no_gradient_at_capture(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whatever the steps before it, and those in between."""
    monkeypatch.setattr(host, "knows", lambda tensor: False)
    twins = [Case(monkeypatch, seed, capturable=True, lr=torch.tensor(0.1, device=DEVICE)) for _ in range(2)]
    loss = torch.ones((), device=DEVICE)
    grads = [torch.randn_like(p) for p in twins[0].params]

    def step(case: Case, has_grad: list[bool]) -> None:
        for p, grad, has in zip(case.params, grads, has_grad, strict=True):
            p.grad = grad.clone(memory_format=torch.preserve_format) if has else None
        case.optimizer.step(loss=loss)

    captured, eager = twins
    for case in twins:
        step(case, ALL)
    with capturing(monkeypatch) as graph:
        step(captured, half(captured, True))
    kept = [p.grad for p in captured.params]
    step(eager, half(eager, True))
    graph.replay()
    step(eager, half(eager, True))
    assert captured.optimizer.trust_ratios() == eager.optimizer.trust_ratios()
    for has_grad in (half(eager, False), ALL):
        graph.replay()
        step(eager, half(eager, True))
        for case in twins:
            step(case, has_grad)
        for p, grad in zip(captured.params, kept, strict=True):
            p.grad = grad
        for a, b in zip(captured.params, eager.params, strict=True):
            assert torch.equal(a, b)


def slices(count: int) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Columns of one matrix, and gradients that are columns of another."""
    both = [torch.randn(8, 4 * count, device=DEVICE) for _ in range(2)]
    params, grads = ([part[:, 4 * i : 4 * i + 3] for i in range(count)] for part in both)
    return [nn.Parameter(p) for p in params], grads


@pytest.mark.parametrize("dense", [True, False])
def test_parameters_with_gaps(dense: bool, seed: int) -> None:
    """Their gradients come back as the columns of a matrix, or dense, as autograd makes them."""
    found = []
    for path in ({"fused": True}, {"fused": False}):
        torch.manual_seed(seed)
        params, grads = slices(4)
        optimizer = DALS([(f"{i}", p) for i, p in enumerate(params)], depth=0.3, **path)
        for step in range(6):
            for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
                gradient = grad if (step + i) % 2 else grad.contiguous()
                p.grad = None if (step + 2 * i) % 3 == 1 else gradient if not dense else grad.contiguous()
            optimizer.step(loss=1.0)
        found.append([p.detach().clone() for p in params])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("odd", ["transposed", "bfloat16"])
def test_gradients_unlike_their_parameters_are_awaited_as_they_were(
    odd: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """By tables, by fingerprints, and by those that the compiled walk takes when it comes late."""

    def gradient(p: Tensor) -> Tensor:
        return transposed(p) if odd == "transposed" else torch.randn_like(p).bfloat16()

    twins = [Case(monkeypatch, seed), Case(monkeypatch, seed)]
    for step in range(8):
        for anew, case in enumerate(twins):
            torch.manual_seed(seed + step)
            if anew:
                case.forget()
            elif step == 4 and case.optimizer._runtime.steady is not None:
                monkeypatch.setattr(type(case.optimizer._runtime.steady.fingerprint), "is_outdated", lambda self: True)
            for i, p in enumerate(case.params):
                p.grad_dtype = None
                plain = step == 6 and i == 0
                p.grad = None if (step + i) % 3 == 1 else torch.randn_like(p) if plain else gradient(p)
            case.optimizer.step(loss=1.0)
        assert identical(twins[0].tensors(), twins[1].tensors()), step
    assert twins[0].sought <= 4


def test_who_could_not_be_stepped_is_not_awaited(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Flat buffers, tensors of too many dimensions, state that is gone or shares memory: others are stepped as ever."""
    case = Case(monkeypatch, seed)
    case.step(ALL)
    without = [i != 4 for i in range(len(ALL))]
    (fused,) = case.optimizer._runtime.fused.values()
    group, p = case.optimizer.param_groups[1], case.params[4]
    entry = case.optimizer.state[p]

    def is_awaited() -> bool:
        case.optimizer._runtime.steady = None
        case.step(without)
        return (1, 0) in fused.places

    assert is_awaited()
    with monkeypatch.context() as patch:
        patch.setattr(Joined, "why_flattened", lambda self, param, place, count: "flat" if param is p else "")
        assert not is_awaited()
    with monkeypatch.context() as patch:
        patch.setattr(awaited, "MAX_DIMS", 3)
        assert not is_awaited()
    kept = dict(entry)
    of_another = case.optimizer.state[case.params[6]]["momentum_buffer"]
    entry["momentum_buffer"] = of_another.as_strided(p.shape, entry["grad_ema"].stride())
    assert not is_awaited()
    entry.update(kept)
    group["fused"] = group["foreach"] = False
    case.optimizer._runtime.steady = None
    case.step([i < 4 for i in range(len(ALL))])
    assert all(place[0] == 0 for place in fused.places), "torch operations serve the second group"
    group["fused"] = True
    assert is_awaited()


def test_who_is_awaited_needs_kernels_to_do_the_whole_step(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    case = Case(monkeypatch, seed)
    case.optimizer.param_groups[1]["fused"] = False
    case.step(ALL)
    case.step([i != 0 for i in range(len(ALL))])
    (fused,) = case.optimizer._runtime.fused.values()
    assert fused.places == [(0, 1), (0, 2), (0, 3)]


def test_gradients_without_elements_share_no_memory(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Two of them begin in no place, which is no reason to look for gradients that are written twice."""
    case = Case(monkeypatch, seed, amp_fused=True)
    for i in (2, 3):
        case.params[i].data = torch.randn(0, device=DEVICE)
    case.step(ALL)
    steady = case.optimizer._runtime.steady
    assert steady is not None and not steady.any_grad_twice()
    case.step(ALL)
    assert case.sought == 1 and case.optimizer._runtime.steady is steady and not steady.any_grad_twice()


def test_who_has_no_elements_is_not_awaited(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Tables are written anew for it, so that trust ratios are of those that were stepped."""
    case = Case(monkeypatch, seed)
    case.params[3].data = torch.randn(0, device=DEVICE)
    case.step(ALL)
    for has_grad in ([i != 3 for i in range(len(ALL))], ALL, [i not in (3, 5) for i in range(len(ALL))]):
        case.step(has_grad)
        assert ("3.a" in case.optimizer.trust_ratios()) == has_grad[3]
    assert case.sought == 4 and len(case.optimizer.trust_ratios()) == len(ALL) - 2
