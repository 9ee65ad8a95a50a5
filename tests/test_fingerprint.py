"""What a plan survives: the fingerprint in Python and the compiled walk say the same, and keep nothing alive."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS
from fused_dals.fingerprint import CompiledFingerprint, Fingerprint, take_fingerprint
from fused_dals.host_walk import HOST_WALK
from tests.helpers import needs_walk

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Case:
    """Groups and state as an optimizer holds them; ``others`` are so many parameters more on either side."""

    def __init__(self, others: int = 0) -> None:
        shapes = [(3, 4), (5,), (), (0,), (2, 3, 4)]
        params = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
        params += [nn.Parameter(torch.randn(4, 6, device=DEVICE).t()) for _ in range(2)]
        params.append(nn.Parameter(torch.randn(2, 3, 2, device=DEVICE).permute(1, 0, 2)))
        self.params = params
        for p in (*params[:3], params[5], params[7]):
            p.grad = torch.randn_like(p)
        before, after = ([nn.Parameter(torch.zeros(2, device=DEVICE)) for _ in range(others)] for _ in range(2))
        for p in (*before[::3], *after[::5]):
            p.grad = torch.zeros_like(p)
        self.groups: list[dict[str, Any]] = [
            {"params": [*before, *params[:2]]},
            {"params": [*params[2:], *after]},
            {"params": []},
        ]
        keys = ("grad_ema", "momentum_buffer")
        self.state: dict[Any, dict[str, Any]] = {
            p: {key: torch.zeros_like(p) for key in keys} for p in (*before, *params, *after)
        }

    def addresses(self) -> list[int]:
        grads = [p.grad for group in self.groups for p in group["params"]]
        return [grad.data_ptr() for grad in grads if grad is not None]


def renew_grads(case: Case) -> None:
    for p in case.params:
        if p.grad is not None:
            p.grad = torch.randn_like(p)


def nothing(case: Case) -> None:
    pass


def write_values(case: Case) -> None:
    with torch.no_grad():
        case.params[0].add_(1)
    case.state[case.params[1]]["grad_ema"].fill_(3)


def same_list_elsewhere(case: Case) -> None:
    case.groups[0]["params"] = tuple(case.groups[0]["params"])


def same_state_written_again(case: Case) -> None:
    entry = case.state[case.params[1]]
    for key in list(entry):
        entry[key] = entry.pop(key)


def same_state_in_another_dict(case: Case) -> None:
    case.state[case.params[1]] = dict(case.state[case.params[1]])


def replace_param(case: Case) -> None:
    case.groups[0]["params"][1] = nn.Parameter(torch.randn(5, device=DEVICE))


def swap_params(case: Case) -> None:
    case.groups[0]["params"].reverse()


def move_param(case: Case) -> None:
    case.groups[1]["params"].insert(0, case.groups[0]["params"].pop())


def drop_last_param(case: Case) -> None:
    case.groups[1]["params"].pop()


def data_elsewhere(case: Case) -> None:
    case.params[0].data = case.params[0].data.clone()


def data_of_other_dtype(case: Case) -> None:
    case.params[0].data = case.params[0].data.double()


def data_shrunk_in_place(case: Case) -> None:
    case.params[0].data = case.params[0].data.view(-1)[:6]


def data_of_another_shape(case: Case) -> None:
    case.params[0].data = case.params[0].data.view(4, 3)


def grad_negated(case: Case) -> None:
    assert case.params[0].grad is not None
    case.params[0].grad = torch._neg_view(case.params[0].grad)


def grad_without_memory(case: Case) -> None:
    case.params[0].grad = torch._efficientzerotensor((3, 4), device=DEVICE)


def state_of_other_strides(case: Case) -> None:
    """The same memory, in another order."""
    case.state[case.params[0]]["grad_ema"].as_strided_((3, 4), (1, 3))


def state_of_another_dtype(case: Case) -> None:
    value = case.state[case.params[0]]["grad_ema"]
    value.data = value.data.view(torch.int32)


def data_of_other_strides(case: Case) -> None:
    case.params[1].data = case.params[1].data.as_strided((5,), (0,))


def grad_gone(case: Case) -> None:
    case.params[1].grad = None


def grad_come(case: Case) -> None:
    case.params[4].grad = torch.ones_like(case.params[4])


def grad_transposed(case: Case) -> None:
    case.params[0].grad = torch.randn(4, 3, device=DEVICE).t()


def grad_misaligned(case: Case) -> None:
    case.params[1].grad = torch.randn(6, device=DEVICE)[1:]


def grad_of_other_dtype(case: Case) -> None:
    assert case.params[0].grad is not None
    case.params[0].grad.data = torch.randn_like(case.params[0]).half()


def grad_of_another_shape(case: Case) -> None:
    """Of as many elements; torch asks for the parameter's shape where a gradient is assigned, and not here."""
    assert case.params[0].grad is not None
    case.params[0].grad.data = torch.randn(4, 3, device=DEVICE)


def grad_of_fewer_elements(case: Case) -> None:
    assert case.params[0].grad is not None
    case.params[0].grad.data = torch.randn(1, 4, device=DEVICE)


def state_of_another_shape(case: Case) -> None:
    value = case.state[case.params[0]]["grad_ema"]
    value.data = value.data.view(4, 3)


def state_transposed(case: Case) -> None:
    case.state[case.params[0]]["grad_ema"].t_()


def grad_moved(case: Case) -> None:
    """To a parameter of the same shape: as many gradients as before, with the same addresses."""
    case.params[6].grad, case.params[5].grad = case.params[5].grad, None


def strides_of_another_order(case: Case) -> None:
    """Of the same size and in the same memory, contiguous neither before nor after."""
    data = case.params[7].data
    case.params[7].data = data.as_strided(data.shape, (2, 4, 1))


def grad_strides_of_another_order(case: Case) -> None:
    assert case.params[7].grad is not None
    grad = case.params[7].grad.data
    case.params[7].grad.data = grad.as_strided(grad.shape, (2, 4, 1))


class Wrapper(Tensor):
    """A tensor whose operations are Python's, as those of a DTensor are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError("no operation")


def grad_wrapped(case: Case) -> None:
    case.params[5].grad = Wrapper(torch.zeros(6, 4, device=DEVICE))


def state_replaced(case: Case) -> None:
    case.state[case.params[0]]["grad_ema"] = torch.zeros(3, 4, device=DEVICE)


def state_swapped(case: Case) -> None:
    entry = case.state[case.params[0]]
    entry["grad_ema"], entry["momentum_buffer"] = entry["momentum_buffer"], entry["grad_ema"]


def state_under_each_others_name(case: Case) -> None:
    """The same tensors in the same order."""
    h, m = case.state[case.params[0]].values()
    case.state[case.params[0]] = {"momentum_buffer": h, "grad_ema": m}


def state_under_each_others_parameter(case: Case) -> None:
    """The same entries in the same order."""
    entries, params = list(case.state.values()), list(case.state)
    first, second = (next(i for i, p in enumerate(params) if p is case.params[place]) for place in (0, 1))
    params[first], params[second] = params[second], params[first]
    case.state.clear()
    case.state.update(zip(params, entries, strict=True))


def memory_freed_behind_an_offset(case: Case) -> None:
    whole = torch.zeros(20, device=DEVICE)
    case.state[case.params[0]]["grad_ema"].set_(whole.untyped_storage(), 8, (3, 4), (4, 1))
    whole.untyped_storage().resize_(0)


def state_elsewhere(case: Case) -> None:
    value = case.state[case.params[0]]["grad_ema"]
    value.data = value.data.clone()


def state_forgotten(case: Case) -> None:
    case.kept = case.state.pop(case.params[-1])  # type: ignore[attr-defined]


def state_in_other_tensors(case: Case) -> None:
    entry = case.state[case.params[2]]
    case.kept = entry  # type: ignore[attr-defined]
    case.state[case.params[2]] = {key: torch.zeros_like(value) for key, value in entry.items()}


def last_states_forgotten(case: Case) -> None:
    """Half of all, so that what is left begins as what was recorded."""
    for p in list(case.state)[len(case.state) // 2 :]:
        del case.state[p]


def memory_freed(case: Case) -> None:
    case.params[0].untyped_storage().resize_(0)


def grad_that_shares_its_memory(case: Case) -> None:
    """As aligned as the one before; who writes to it gives it memory of its own."""
    case.kept = case.params[0].grad  # type: ignore[attr-defined]
    case.params[0].grad = torch._lazy_clone(case.params[0].grad)


def state_wrapped(case: Case) -> None:
    """The very same Python object, with another tensor inside."""
    value = case.state[case.params[0]]["grad_ema"]
    torch.utils.swap_tensors(value, Wrapper(torch.zeros(3, 4, device=DEVICE)))


def state_grown(case: Case) -> None:
    case.state[case.params[-1]]["extra"] = torch.zeros(1, device=DEVICE)


def state_foreign(case: Case) -> None:
    case.state[case.params[0]]["grad_ema"] = "mine"


def group_come(case: Case) -> None:
    case.groups.append({"params": []})


def group_gone(case: Case) -> None:
    case.groups.pop()


def grad_sparse(case: Case) -> None:
    case.params[0].grad = torch.randn(3, 4, device=DEVICE).to_sparse()


UNCHANGED = [
    nothing, renew_grads, write_values, same_list_elsewhere, same_state_written_again, same_state_in_another_dict,
]  # fmt: skip
CHANGED = [
    replace_param, swap_params, move_param, drop_last_param, data_elsewhere, data_of_other_dtype, data_shrunk_in_place,
    data_of_other_strides, strides_of_another_order, grad_gone, grad_come, grad_moved, grad_transposed, grad_misaligned,
    state_under_each_others_name, state_under_each_others_parameter, memory_freed_behind_an_offset,
    data_of_another_shape, grad_negated, grad_without_memory,
    grad_of_another_shape, grad_of_fewer_elements, state_of_another_shape, state_transposed, state_of_other_strides,
    state_of_another_dtype, grad_of_other_dtype, grad_strides_of_another_order,
    grad_wrapped, grad_sparse, state_replaced, state_swapped,
    state_elsewhere, state_forgotten, state_in_other_tensors, last_states_forgotten, state_grown, state_foreign,
    state_wrapped, memory_freed, group_come, group_gone,
]  # fmt: skip


def print_of(case: Case, kind: str) -> Fingerprint | CompiledFingerprint:
    if kind == "walk in Python":
        return Fingerprint(case.groups, case.state, distributed=False)
    return CompiledFingerprint(HOST_WALK.compiled, case.groups, case.state, distributed=False)


#: Parameters on either side of those that change: none, or so many that threads share the walk.
FEW_OR_MANY = pytest.mark.parametrize("others", [0, 600], ids=["few", "many"])


@FEW_OR_MANY
@pytest.mark.parametrize("change", UNCHANGED)
def test_what_a_plan_survives(change: Callable[[Case], None], others: int, either_walk: str, seed: int) -> None:
    case = Case(others)
    known = print_of(case, either_walk)
    change(case)
    for _ in range(2):
        found = known.follow(case.groups, case.state)
        assert found is not None and found.dtype == torch.int64 and found.tolist() == case.addresses()
    case.state[case.params[1]]["grad_ema"] = torch.zeros(5, device=DEVICE)
    assert known.follow(case.groups, case.state) is None


@FEW_OR_MANY
@pytest.mark.parametrize("change", CHANGED)
def test_what_a_plan_does_not_survive(change: Callable[[Case], None], others: int, either_walk: str, seed: int) -> None:
    case = Case(others)
    known = print_of(case, either_walk)
    change(case)
    for _ in range(2):
        assert known.follow(case.groups, case.state) is None


@pytest.mark.parametrize("of_state", [False, True], ids=["parameter", "state"])
def test_memory_that_is_negated_where_it_lies(of_state: bool, either_walk: str, seed: int) -> None:
    """Without the tensor of no elements that a case has, whose address makes Python look twice at all others."""
    case = Case()
    case.groups = [{"params": case.params[:2]}]
    case.state = {p: case.state[p] for p in case.params[:2]}
    known = print_of(case, either_walk)
    assert known.follow(case.groups, case.state) is not None
    changed = case.state[case.params[0]]["grad_ema"] if of_state else case.params[0]
    changed.data = torch._neg_view(changed.data)
    assert known.follow(case.groups, case.state) is None


@needs_walk
@FEW_OR_MANY
def test_a_gradient_that_shares_its_memory_is_left_to_python(others: int, seed: int) -> None:
    """A lazy clone is read where it is, and its address is not taken for one that can be written to."""
    case = Case(others)
    known = print_of(case, "compiled walk")
    grad_that_shares_its_memory(case)
    assert known.follow(case.groups, case.state) is None
    found = print_of(case, "walk in Python").follow(case.groups, case.state)
    assert found is not None and found.tolist() == case.addresses() and 0 not in found.tolist()


class Subclass(Tensor):
    """A tensor that may do anything."""


def subclass_param(case: Case) -> None:
    case.groups[0]["params"][0] = torch.randn(3, device=DEVICE).as_subclass(Subclass)


@needs_walk
@pytest.mark.parametrize("change", [subclass_param, state_foreign, grad_sparse, grad_wrapped])
def test_what_the_compiled_walk_leaves_to_python(change: Callable[[Case], None], seed: int) -> None:
    case = Case()
    assert isinstance(take_fingerprint(case.groups, case.state, distributed=False), CompiledFingerprint)
    change(case)
    taken = take_fingerprint(case.groups, case.state, distributed=False)
    assert not isinstance(taken, CompiledFingerprint)
    assert (taken is None) == (change is not subclass_param)


@needs_walk
def test_groups_and_state_that_are_something_else_do_not_match(seed: int) -> None:
    case, walk = Case(), HOST_WALK.compiled
    addresses = torch.empty(5, dtype=torch.int64)
    known = walk.record(case.groups, case.state, addresses, False, None)
    assert walk.matches(known, case.groups, case.state, addresses)
    groups: Any
    state: Any
    for groups in (tuple(case.groups), [1, 2, 3], [{}, {}, {}], [{"params": 3}] * 3, [{"params": [1, 2]}] * 3, None):
        assert not walk.matches(known, groups, case.state, addresses)
        assert walk.record(groups, case.state, addresses, False, None) is None
    for state in ([], {"a": 1}, {"a": {"b": None}}, None):
        assert not walk.matches(known, case.groups, state, addresses)
        assert walk.record(case.groups, state, addresses, False, None) is None
    for room in (0, 4, 6):
        assert not walk.matches(known, case.groups, case.state, torch.empty(room, dtype=torch.int64))


@needs_walk
def test_nothing_is_kept_alive_and_no_count_moves(seed: int) -> None:
    case, walk = Case(), HOST_WALK.compiled
    known = print_of(case, "compiled walk")
    objects = [*case.params, *(value for entry in case.state.values() for value in entry.values()), case.groups[0]]
    counts = list(map(sys.getrefcount, objects))
    groups = case.groups
    entries = [(tuple(group), tuple(group.values()), None) for group in groups]
    before = list(map(sys.getrefcount, entries))
    for _ in range(100):
        assert known.follow(case.groups, case.state) is not None
        assert walk.same_groups(groups, entries, bytearray(24))
        walk.increment_version(case.params)
    assert list(map(sys.getrefcount, objects)) == counts and list(map(sys.getrefcount, entries)) == before
    grad = weakref.ref(case.params[0].grad)
    case.params[0].grad = None
    assert grad() is None


def test_state_that_is_moved_away_frees_its_memory(either_walk: str, seed: int) -> None:
    """As where rollouts or an evaluation need the memory between two steps."""
    params = [nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(2)]
    optimizer = DALS([(f"{i}.w", p) for i, p in enumerate(params)], fused=True)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
    assert optimizer._runtime.steady is not None
    held = [weakref.ref(value) for entry in optimizer.state.values() for value in entry.values()]
    kept = [{key: value.cpu().clone() for key, value in entry.items()} for entry in optimizer.state.values()]
    for entry in optimizer.state.values():
        for key in list(entry):
            entry[key] = entry[key].to("meta")
    assert not any(ref() is not None for ref in held)
    for entry, values in zip(optimizer.state.values(), kept, strict=True):
        entry.update({key: value.to(DEVICE) for key, value in values.items()})
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = DALS([(f"{i}.w", p) for i, p in enumerate(twins)], fused=True)
    other.load_state_dict(optimizer.state_dict())
    for either in (params, twins):
        for p in either:
            p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    other.step(loss=1.0)
    assert all(map(torch.equal, params, twins))


@needs_walk
def test_an_optimizer_in_a_cycle_is_collected(seed: int) -> None:
    def train() -> weakref.ref[Tensor]:
        p: Any = nn.Parameter(torch.ones(3, device=DEVICE))
        p.grad = torch.ones_like(p)
        p.optimizer = DALS([("p", p)], fused=True)
        for _ in range(3):
            p.optimizer.step(loss=1.0)
        assert isinstance(p.optimizer._runtime.steady.fingerprint, CompiledFingerprint)
        return weakref.ref(p)

    gone = train()
    gc.collect()
    assert gone() is None


@needs_walk
def test_a_lazy_clone_gets_memory_of_its_own_before_a_kernel_writes(seed: int) -> None:
    is_shared: Callable[[Tensor], bool] = torch._C._is_cow_tensor  # type: ignore[attr-defined]
    clone = nn.Parameter(torch._lazy_clone(torch.ones(64, device=DEVICE)))
    assert is_shared(clone)
    groups = [{"params": [clone]}]
    known = CompiledFingerprint(HOST_WALK.compiled, groups, {}, distributed=False)
    assert not is_shared(clone) and known.follow(groups, {}) is not None
    other = torch._lazy_clone(clone)
    assert known.follow(groups, {}) is None, "it shares its memory again, and nothing but Python may copy it"
    CompiledFingerprint(HOST_WALK.compiled, groups, {}, distributed=False)
    assert not is_shared(clone) and other.data_ptr() != clone.data_ptr()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_an_optimizer_is_copied_in_the_middle(copied: Callable[[DALS], DALS], either_walk: str, seed: int) -> None:
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    p.grad = torch.ones_like(p)
    optimizer = DALS([("p", p)], fused=True)
    for _ in range(3):
        optimizer.step(loss=1.0)
    steady = optimizer._runtime.steady
    assert steady is not None
    assert isinstance(steady.fingerprint, CompiledFingerprint if either_walk == "compiled walk" else Fingerprint)
    other = copied(optimizer)
    (q,) = other.param_groups[0]["params"]
    q.grad = torch.ones_like(q)
    for either in (optimizer, other):
        either.step(loss=1.0)
    assert torch.equal(p, q)
