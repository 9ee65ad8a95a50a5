"""Steps that go on with the batches and tables of the last one, through torch operations and beside kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS, stepper
from fused_dals.gather import gather
from fused_dals.live_groups import LiveGroups
from tests.helpers import identical

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(3, 4), (5,), (), (0,), (2, 3), (4,)]
#: A process that trains through torch operations on a CPU has no compiled walk.
pytestmark = pytest.mark.usefixtures("either_walk")

TORCH_PATHS = {"reference": {"fused": False, "foreach": False}, "foreach": {"fused": False, "foreach": True}}
STEPS = 5


class Case:
    """Two groups with a float64 parameter each; ``sought`` is how often everything to step was gathered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, **arguments: Any) -> None:
        torch.manual_seed(seed)
        self.params = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in SHAPES]
        for p in (self.params[1], self.params[-1]):
            p.data = p.data.double()
        groups: list[dict[str, Any]] = [
            {"params": [(f"{i}.a", p) for i, p in enumerate(self.params[:4])]},
            {"params": [(f"{i}.b", p) for i, p in enumerate(self.params[4:])], "weight_decay": 0.0},
        ]
        self.optimizer = DALS(groups, depth=0.3, **arguments)
        self.sought = 0

        def counting(groups: Any, *rest: Any) -> Any:
            self.sought += groups is self.optimizer.param_groups
            return gather(groups, *rest)

        monkeypatch.setattr(stepper, "gather", counting)

    def step(self, count: int = 1, *, anew: bool = False, **given: Any) -> None:
        """With other gradients each time; ``anew``: with nothing that an earlier one prepared."""
        for _ in range(count):
            for p in self.params:
                p.grad = torch.randn_like(p)
            self.step_as_it_is(anew=anew, **given)

    def step_as_it_is(self, *, anew: bool = False, **given: Any) -> None:
        vars(self.optimizer).update(given)
        if anew:
            self.optimizer._runtime.steady = None
        self.optimizer.step(loss=torch.rand((), device=DEVICE))

    def tensors(self) -> list[Tensor]:
        state = [value for p in self.params for value in self.optimizer.state[p].values()]
        grads = [p.grad for p in self.params if p.grad is not None]
        return [*(p.detach() for p in self.params), *state, *grads, self.optimizer._runtime.state.values]


@pytest.mark.parametrize("arguments", TORCH_PATHS.values(), ids=list(TORCH_PATHS))
@pytest.mark.parametrize(
    "extras", [{}, {"max_grad_norm": 0.5}, {"amp_fused": True}], ids=["plain", "clipped", "scaled"]
)
def test_torch_operations_are_prepared_once(
    arguments: dict[str, Any], extras: dict[str, Any], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    scaled = {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)} if extras.get("amp_fused") else {}
    results = []
    for anew in (False, True):
        case = Case(monkeypatch, seed, **arguments, **extras)
        case.step(STEPS, anew=anew, **scaled)
        assert case.sought == (STEPS if anew else 1)
        results.append(case.tensors())
    assert identical(*results)


def test_kernels_beside_torch_operations_are_prepared_once(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Those of float32 by the kernels, those of float64 not: every table finds the gradients that are its own."""
    pytest.importorskip("triton")
    results = []
    for anew in (False, True):
        case = Case(monkeypatch, seed)
        # The default on a GPU, whatever the device: kernels where they can.
        monkeypatch.setattr(stepper, "serves_by_default", lambda param: True)
        case.step(STEPS, anew=anew)
        assert case.sought == (STEPS if anew else 1)
        (fused,) = case.optimizer._runtime.fused.values()
        assert fused.preparations == case.sought and fused.places == [(0, 0), (0, 2), (0, 3), (1, 0)]
        results.append(case.tensors())
    assert identical(*results)


def replace_param(case: Case) -> None:
    group = case.optimizer.param_groups[0]["params"]
    case.params[2] = group[2] = nn.Parameter(torch.ones(5, device=DEVICE))


def put_data_elsewhere(case: Case) -> None:
    case.params[0].data = case.params[0].data.clone()


def widen(case: Case) -> None:
    case.params[0].data = case.params[0].data.double()
    case.optimizer.load_state_dict(case.optimizer.state_dict())  # state follows


def replace_state(case: Case) -> None:
    entry = case.optimizer.state[case.params[0]]
    entry["grad_ema"] = torch.full_like(entry["grad_ema"], 2.0)


def forget_state(case: Case) -> None:
    del case.optimizer.state[case.params[0]]


def round_state(case: Case) -> None:
    case.optimizer.param_groups[0]["state_dtype"] = torch.bfloat16
    case.optimizer.load_state_dict(case.optimizer.state_dict())


def move_param(case: Case) -> None:
    first, second = (group["params"] for group in case.optimizer.param_groups)
    second.append(first.pop(0))
    case.optimizer.param_groups[0].pop("param_names"), case.optimizer.param_groups[1].pop("param_names")


def join(case: Case) -> None:
    case.params.append(nn.Parameter(torch.ones(2, device=DEVICE)))
    case.optimizer.add_param_group({"params": [("late", case.params[-1])]})


@pytest.mark.parametrize("arguments", TORCH_PATHS.values(), ids=list(TORCH_PATHS))
@pytest.mark.parametrize(
    "change",
    [replace_param, put_data_elsewhere, widen, replace_state, forget_state, round_state, move_param, join],
)
def test_what_changes_is_noticed(
    change: Callable[[Case], None], arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    results = []
    for anew in (False, True):
        case = Case(monkeypatch, seed, **arguments)
        case.step(3, anew=anew)
        before = case.sought
        change(case)
        case.step(anew=anew)
        assert case.sought == before + 1
        case.step(2, anew=anew)
        assert case.sought == before + (3 if anew else 1)
        results.append(case.tensors())
    assert identical(*results)


def test_gradients_that_come_and_go(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    case = Case(monkeypatch, seed, fused=False)
    case.step(2)
    for present in ([0, 1, 2, 5], [0, 1, 2, 5], [5], range(6)):
        before = [p.detach().clone() for p in case.params]
        for i, p in enumerate(case.params):
            p.grad = torch.ones_like(p) if i in present else None
        case.step_as_it_is()
        moved = [not torch.equal(p, old) for p, old in zip(case.params, before, strict=True)]
        assert moved == [i in present and p.numel() > 0 for i, p in enumerate(case.params)]
        assert len(case.optimizer.trust_ratios()) == len(present)
    assert case.sought == 4, "the third step here is like the second"


def sparse(p: Tensor) -> Tensor:
    return torch.ones_like(p).to_sparse()


def half_of_it(p: Tensor) -> Tensor:
    return torch.ones(2, 4, device=DEVICE)


@pytest.mark.parametrize(("gradient", "problem"), [(sparse, "is sparse"), (half_of_it, r"\(3, 4\) and its gradient")])
def test_what_cannot_be_stepped_is_named_in_the_midst(
    gradient: Callable[[Tensor], Tensor], problem: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    case = Case(monkeypatch, seed, fused=False)
    case.step(3)
    before = [p.detach().clone() for p in case.params]
    for p in case.params:
        p.grad = torch.ones_like(p)
    first = case.params[0]
    if gradient is half_of_it:  # torch lets nobody assign it
        first.grad.data = gradient(first)
    else:
        first.grad = gradient(first)
    with pytest.raises(RuntimeError, match=rf"parameter '0\.a' of group 0.*{problem}"):
        case.step_as_it_is()
    assert identical(before, [p.detach() for p in case.params])
    case.step()


@pytest.mark.parametrize("arguments", TORCH_PATHS.values(), ids=list(TORCH_PATHS))
def test_neither_gradients_nor_state_are_kept(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    case = Case(monkeypatch, seed, **arguments)
    case.step(3)
    assert case.optimizer._runtime.steady is not None
    state: Sequence[dict[str, Tensor]] = list(case.optimizer.state.values())
    held = [weakref.ref(value) for entry in state for value in entry.values()]
    held += [weakref.ref(p.grad) for p in case.params if p.grad is not None]
    case.optimizer.zero_grad()
    for entry in state:
        entry.clear()
    assert not any(ref() is not None for ref in held)


def test_depths_that_shift_are_noticed(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Names of a group that came and went: those that were there have other ranks among all that are known."""
    pytest.importorskip("triton")
    monkeypatch.setattr(stepper, "serves_by_default", lambda param: True)
    results = []
    for anew in (False, True):
        case = Case(monkeypatch, seed)
        case.optimizer = DALS([(f"{i}.w", p) for i, p in enumerate(case.params)])
        case.step(3, anew=anew)
        before = case.optimizer.depths()
        case.optimizer.add_param_group({"params": [("late.w", nn.Parameter(torch.ones(2, device=DEVICE)))]})
        case.optimizer.param_groups.pop()
        assert case.optimizer.depths() != before
        case.step(3, anew=anew)
        results.append(case.tensors())
    assert identical(*results)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_of_a_refused_step_is_kept_as_it_was(fused: bool, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The user's memory moves on."""
    if fused:
        pytest.importorskip("triton")
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    p.grad = torch.ones_like(p)
    optimizer = DALS([("w", p)], fused=fused)
    for _ in range(3):
        optimizer.step(loss=torch.ones((), device=DEVICE))
    buffer = torch.tensor(1.0, device=DEVICE)
    with pytest.raises(ValueError, match="loss must be a scalar"):
        optimizer.step(lambda: buffer, loss=torch.ones(2, device=DEVICE))
    buffer.fill_(1e6)
    optimizer.step(loss=1.0)
    assert optimizer.state_dict()["param_groups"][0]["loss_ema"] == 1.0


def test_counters_leave_the_groups_settled(either_walk: str, seed: int) -> None:
    """state_dict() writes them, with kernels too; the steps after it go on comparing versions."""
    pytest.importorskip("triton")
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    p.grad = torch.ones_like(p)
    optimizer = DALS([("w", p)], fused=True)
    for _ in range(3):
        optimizer.step(loss=1.0)
        optimizer.state_dict()
    optimizer.step(loss=1.0)
    settled = optimizer._runtime.live_groups._settled
    for _ in range(3):
        optimizer.step(loss=1.0)
    assert optimizer._runtime.live_groups._settled is settled
    assert (settled is None) == (either_walk == "walk in Python")


def test_groups_whose_counters_are_written_are_not_checked_again(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    checked: list[int] = []
    check = LiveGroups._check

    def counting(live: LiveGroups, group: Any, index: int) -> None:
        checked.append(index)
        check(live, group, index)

    monkeypatch.setattr(LiveGroups, "_check", counting)
    case = Case(monkeypatch, seed, fused=False)
    case.step(2)
    seen = list(checked)  # twice, the second time with counters
    case.step(3)
    assert checked == seen and case.optimizer.param_groups[0]["step"] == 5
    case.optimizer.param_groups[1]["momentum"] = 0.5
    case.step()
    assert checked == [*seen, 1]


def test_nothing_is_remembered_where_nobody_can_tell(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A foreign entry in the state may mean anything; every step looks again."""
    case = Case(monkeypatch, seed, fused=False)
    case.step()
    case.optimizer.state[case.params[0]]["mine"] = "a note"
    case.step(3)
    assert case.sought == 4 and case.optimizer._runtime.steady is None
