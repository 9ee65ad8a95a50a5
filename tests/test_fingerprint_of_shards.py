"""What a plan of DTensors survives, and how their gradients are settled, by either walk."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_dals import DALS
from fused_dals.buckets import grad_address
from fused_dals.fingerprint import CompiledFingerprint, Fingerprint, take_fingerprint
from fused_dals.host_walk import HOST_WALK
from fused_dals.sharding import local, settle_gradients
from tests.helpers import needs_walk

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """A process alone; nothing here communicates."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def mesh(*names: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)


def dtensor(shard: Tensor, spec: Any) -> Tensor:
    """As FSDP2 makes gradients: of the very spec of their parameters."""
    from torch.distributed.tensor import DTensor

    return DTensor(shard, spec, requires_grad=False)


class Case:
    """Groups and state of DTensors and a plain parameter; ``others`` are so many DTensors more."""

    def __init__(self, others: int = 0) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        self.mesh = mesh("ranks")

        def parameter(*shape: int) -> Any:
            return nn.Parameter(distribute_tensor(torch.randn(shape), self.mesh, [Shard(0)]))

        self.params: list[Any] = [parameter(4, 3), parameter(5), parameter(0, 2), parameter(3)]
        self.plain = nn.Parameter(torch.randn(6))
        more = [parameter(2) for _ in range(others)]
        self.renew_grads([*self.params[:3], *more[::2]])
        self.plain.grad = torch.randn(6)
        self.groups: list[dict[str, Any]] = [{"params": [*self.params, self.plain]}, {"params": more}]
        everything = [*self.params, self.plain, *more]
        self.state: dict[Any, Any] = {
            p: {"grad_ema": self.like(p), "momentum_buffer": self.like(p)} for p in everything
        }

    def like(self, p: Any) -> Tensor:
        return torch.zeros_like(p) if p is self.plain else dtensor(torch.zeros_like(local(p)).detach(), p._spec)

    def renew_grads(self, params: list[Any]) -> None:
        for p in params:
            p.grad = dtensor(torch.randn_like(local(p)).detach(), p._spec)

    def addresses(self) -> list[int]:
        grads = [p.grad for group in self.groups for p in group["params"]]
        return [grad_address(local(grad)) for grad in grads if grad is not None]


def nothing(case: Case) -> None:
    pass


def other_grads(case: Case) -> None:
    case.renew_grads(case.params[:3])
    case.plain.grad = torch.randn(6)


def grad_of_an_equal_spec(case: Case) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    case.params[0].grad = distribute_tensor(torch.randn(4, 3), case.mesh, [Shard(0)])
    assert case.params[0].grad._spec is not case.params[0]._spec


def same_shard_in_another_tensor(case: Case) -> None:
    case.params[1]._local_tensor = case.params[1]._local_tensor.detach()


def state_written(case: Case) -> None:
    local(case.state[case.params[0]]["grad_ema"]).fill_(2)


def shard_elsewhere(case: Case) -> None:
    case.params[0]._local_tensor = case.params[0]._local_tensor.clone()


def shard_of_another_size(case: Case) -> None:
    case.params[1]._local_tensor = case.params[1]._local_tensor[:4]


def shard_of_another_kind(case: Case) -> None:
    case.params[0]._local_tensor = case.params[0]._local_tensor.view(torch.int32)


def shard_gone(case: Case) -> None:
    case.kept = case.params[0]._local_tensor  # type: ignore[attr-defined]
    del case.params[0]._local_tensor


def grad_gone(case: Case) -> None:
    case.params[1].grad = None


def grad_come(case: Case) -> None:
    case.renew_grads([case.params[3]])


def grad_misaligned(case: Case) -> None:
    case.params[1].grad = dtensor(torch.randn(6)[1:], case.params[1]._spec)


def grad_transposed(case: Case) -> None:
    case.params[0].grad = dtensor(torch.randn(3, 4).t(), case.params[0]._spec)


def frozen(case: Case) -> None:
    case.params[3].requires_grad_(False)


def plain_frozen(case: Case) -> None:
    """Its gradient is there, but ranks without one would add up other rows."""
    case.plain.requires_grad_(False)


def param_replaced(case: Case) -> None:
    case.groups[0]["params"][1] = nn.Parameter(case.params[1].detach())


def spec_replaced(case: Case) -> None:
    """Another way of being split leaves the same shard where it was, on one rank."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    p = case.params[0]
    p._spec = distribute_tensor(torch.zeros(4, 3), case.mesh, [Replicate()])._spec
    case.renew_grads([p])


def state_shard_elsewhere(case: Case) -> None:
    value = case.state[case.params[0]]["grad_ema"]
    value._local_tensor = value._local_tensor.clone()


def state_shard_is_something_else(case: Case) -> None:
    case.state[case.params[0]]["grad_ema"]._local_tensor = "mine"


def state_replaced(case: Case) -> None:
    case.state[case.params[0]]["grad_ema"] = case.like(case.params[0])


def state_swapped(case: Case) -> None:
    entry = case.state[case.params[0]]
    entry["grad_ema"], entry["momentum_buffer"] = entry["momentum_buffer"], entry["grad_ema"]


UNCHANGED = [nothing, other_grads, grad_of_an_equal_spec, same_shard_in_another_tensor, state_written]
CHANGED = [
    shard_elsewhere, shard_of_another_size, shard_of_another_kind, shard_gone, grad_gone, grad_come, grad_misaligned,
    grad_transposed, spec_replaced, frozen, plain_frozen, param_replaced, state_shard_elsewhere,
    state_shard_is_something_else, state_replaced, state_swapped,
]  # fmt: skip

FEW_OR_MANY = pytest.mark.parametrize("others", [0, 1200], ids=["few", "many"])


def print_of(case: Case, walk: str) -> Fingerprint | CompiledFingerprint:
    if walk == "walk in Python":
        return Fingerprint(case.groups, case.state, distributed=True)
    return CompiledFingerprint(HOST_WALK.compiled, case.groups, case.state, distributed=True)


@FEW_OR_MANY
@pytest.mark.parametrize("change", UNCHANGED)
def test_what_a_plan_survives(change: Callable[[Case], None], others: int, either_walk: str, seed: int) -> None:
    case = Case(others)
    known = print_of(case, either_walk)
    change(case)
    for _ in range(2):
        found = known.follow(case.groups, case.state)
        assert found is not None and found.tolist() == case.addresses()


@FEW_OR_MANY
@pytest.mark.parametrize("change", CHANGED)
def test_what_a_plan_does_not_survive(change: Callable[[Case], None], others: int, either_walk: str, seed: int) -> None:
    case = Case(others)
    known = print_of(case, either_walk)
    change(case)
    for _ in range(2):
        assert known.follow(case.groups, case.state) is None


@needs_walk
def test_the_walk_serves_dtensors_and_leaves_to_python_what_they_hold_instead_of_tensors(seed: int) -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    case = Case()
    assert isinstance(take_fingerprint(case.groups, case.state, distributed=True), CompiledFingerprint)
    on_its_way = AsyncCollectiveTensor(torch.randn(5))
    case.params[1].grad = dtensor(on_its_way, case.params[1]._spec)
    taken = take_fingerprint(case.groups, case.state, distributed=True)
    assert type(taken) is Fingerprint
    found = taken.follow(case.groups, case.state)
    assert found is not None and found.tolist() == case.addresses()


class InADict:
    """A class of DTensors might keep its shard in another way."""

    def __init__(self) -> None:
        self._local_tensor = self._spec = None


class OfTheClass:
    _local_tensor = _spec = None


class Slots:
    __slots__ = ("_local_tensor", "_spec")


class OfAnother:
    _local_tensor, _spec = vars(Slots)["_local_tensor"], vars(Slots)["_spec"]


@needs_walk
@pytest.mark.parametrize("kind", [InADict, OfTheClass, OfAnother, int])
def test_dtensors_of_another_make_are_left_to_python(kind: type, seed: int) -> None:
    from torch.distributed.tensor import DTensor

    walk = HOST_WALK.compiled
    assert not walk.know_dtensors(kind) and walk.know_dtensors(DTensor)
    with pytest.raises(RuntimeError, match="expected a class"):
        walk.know_dtensors("DTensor")


@needs_walk
def test_nothing_is_kept_alive_and_no_count_moves(seed: int) -> None:
    case, walk = Case(), HOST_WALK.compiled
    known = print_of(case, "compiled walk")
    state = [value for entry in case.state.values() for value in entry.values()]
    grads = [p.grad for p in case.params[:3]]
    objects = [*case.params, *state, *grads, *map(local, [*case.params, *state, *grads]), case.params[0]._spec]
    counts = list(map(sys.getrefcount, objects))
    for _ in range(100):
        assert known.follow(case.groups, case.state) is not None and walk.are_settled(case.groups)
        walk.increment_version(case.params)
    assert list(map(sys.getrefcount, objects)) == counts
    shard = weakref.ref(local(case.params[0].grad))
    case.params[0].grad = None
    del grads, objects
    gc.collect()
    assert shard() is None


# -- gradients are settled ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [nothing, other_grads, grad_of_an_equal_spec, grad_gone])
def test_settled_gradients_stay_as_they_are(change: Callable[[Case], None], either_walk: str, seed: int) -> None:
    case = Case()
    print_of(case, either_walk)
    change(case)
    grads = [p.grad for p in case.params]
    assert settle_gradients(case.groups)
    assert all(p.grad is grad for p, grad in zip(case.params, grads, strict=True))


def test_gradients_get_the_placements_of_their_parameters(either_walk: str, seed: int) -> None:
    from torch.distributed.tensor import DTensor, Partial

    case = Case()
    known = print_of(case, either_walk)
    partial = DTensor.from_local(torch.randn(4, 3), case.mesh, [Partial()])
    case.params[0].grad = partial
    assert settle_gradients(case.groups)
    assert case.params[0].grad.placements == case.params[0].placements
    assert torch.equal(local(case.params[0].grad), local(partial))
    assert known.follow(case.groups, case.state) is not None


@pytest.mark.parametrize("of_plain", [False, True])
def test_gradients_of_another_distribution_are_not_settled(of_plain: bool, either_walk: str, seed: int) -> None:
    """The step then is prepared anew, and says what is wrong."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    class Misplaced(nn.Parameter):
        """torch itself lets nobody give a plain parameter such a gradient, nor a DTensor a plain one."""

        wrong: Any = None

        @property
        def grad(self) -> Any:  # type: ignore[override]
            return self.wrong

    case = Case()
    print_of(case, either_walk)
    if of_plain:
        p: Any = Misplaced(torch.randn(4, 3))
        p.wrong = distribute_tensor(torch.randn(4, 3), case.mesh, [Replicate()])
        case.groups[0]["params"].append(p)
    else:
        two = mesh("one", "other")
        case.params[0].grad = distribute_tensor(torch.randn(4, 3), two, [Shard(0), Replicate()])
    assert not settle_gradients(case.groups)


def test_a_gradient_on_another_mesh_in_the_midst_of_a_run_is_an_error(either_walk: str, seed: int) -> None:
    """Its shard looks like those of the steps before."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    case = Case()
    (p, *_) = case.params
    optimizer = DALS([("p", p)], depth=0.5, fused=True)
    for _ in range(3):
        case.renew_grads([p])
        optimizer.step(loss=1.0)
    before = local(p).clone()
    kind = CompiledFingerprint if either_walk == "compiled walk" else Fingerprint
    assert isinstance(optimizer._runtime.steady.fingerprint, kind)
    p.grad = distribute_tensor(torch.randn(4, 3), mesh("one", "other"), [Shard(0), Replicate()])
    with pytest.raises(RuntimeError, match="parameter 'p' of group 0: it is distributed over"):
        optimizer.step(loss=1.0)
    assert torch.equal(local(p), before) and optimizer.state_dict()["param_groups"][0]["step"] == 3
    case.renew_grads([p])
    optimizer.step(loss=1.0)
    assert not torch.equal(local(p), before)


def test_state_that_is_split_otherwise_is_refused() -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    case = Case()
    (p, *_) = case.params
    optimizer = DALS([("p", p)], depth=0.5, fused=True)
    case.renew_grads([p])
    optimizer.step(loss=1.0)
    optimizer.state[p]["grad_ema"] = distribute_tensor(torch.zeros(4, 3), case.mesh, [Replicate()])
    with pytest.raises(RuntimeError, match="parameter 'p' of group 0: its grad_ema is not split over the ranks"):
        optimizer.step(loss=1.0)


def test_an_optimizer_of_dtensors_is_copied_with_its_state() -> None:
    case = Case()
    optimizer = DALS([(f"{i}.p", p) for i, p in enumerate(case.params)], depth=0.5, fused=True)
    for _ in range(2):
        case.renew_grads(case.params)
        optimizer.step(loss=1.0)
    copied = copy.deepcopy(optimizer)
    for p, q in zip(case.params, copied.param_groups[0]["params"], strict=True):
        q.grad = dtensor(local(p.grad).clone(), q._spec)
    for either in (optimizer, copied):
        either.step(loss=1.0)
    assert all(map(torch.equal, map(local, case.params), map(local, copied.param_groups[0]["params"])))


def test_frozen_dtensors_beside_plain_parameters_count(seed: int) -> None:
    """A rank has to notice when they train again, gradient or not: others wait for its sums."""
    case = Case()
    (p, *_) = case.params
    p.requires_grad_(False)
    p.grad = None
    optimizer = DALS([("p", p), ("plain", case.plain)], depth=0.5, fused=True)
    for _ in range(2):
        case.plain.grad = torch.randn(6)
        optimizer.step(loss=1.0)
    assert optimizer._runtime.distributed and optimizer._runtime.steady is not None
    p.requires_grad_(True)
    case.plain.grad = torch.randn(6)
    optimizer.step(loss=1.0)
    (fused,) = optimizer._runtime.fused.values()
    assert fused.preparations == 2


def test_steps_of_settled_gradients_prepare_once(either_walk: str, seed: int) -> None:
    """And are those of plain tensors, to the bit: on one rank nothing is split."""
    case = Case()
    (p, *_) = case.params
    plain = nn.Parameter(local(p).detach().clone())
    sharded, whole = (DALS([("p", q)], depth=0.5, fused=True) for q in (p, plain))
    for step in range(6):
        case.renew_grads([p])
        if step == 3:
            grad_of_an_equal_spec(case)
        plain.grad = local(p.grad).clone()
        sharded.step(loss=1.0 + step)
        whole.step(loss=1.0 + step)
    assert torch.equal(local(p), plain)
    (fused,) = sharded._runtime.fused.values()
    assert fused.preparations == 1
