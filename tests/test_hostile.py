"""Random hostile input: the right error, which names the entry, and weights, state and counters as before.

Arguments, groups, live changes and checkpoints all draw from one table, KEYWORDS.
"""

from __future__ import annotations

import copy
import io
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeAlias

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from torch import Tensor, nn

from fused_dals import DALS
from fused_dals.checkpoint import ADDED_LATER
from fused_dals.gather import STATE_KEYS
from tests.exact import same
from tests.helpers import PRESETS, mlp

np = pytest.importorskip("numpy")

Values: TypeAlias = st.SearchStrategy[Any]

NAN, INF = math.nan, math.inf
HUGE = 10**400  # no float holds it

ODD = ["0.1", "", b"1", [], (), {0.5}, object(), 1j, Decimal("0.5"), NAN, INF, -INF, HUGE]
FINE_FOR_DEPTH = [{}, float, Fraction(1, 2)]
ARRAYS = [np.array(0.5), np.array([0.5, 0.5]), np.bool_(True), np.float64(NAN), np.complex64(1)]
TENSORS = [torch.ones(2), torch.tensor(True), torch.tensor(1), torch.tensor(1j), torch.ones(1, device="meta")]


def one_of(*values: Any) -> Values:
    return st.sampled_from(values)


def not_numbers(*more: Any) -> Values:
    return one_of(*ODD, *FINE_FOR_DEPTH, *ARRAYS, *TENSORS, (0.5,), True, False, -HUGE, *more)


def not_flags(*more: Any) -> Values:
    return one_of(*ODD, *FINE_FOR_DEPTH, *ARRAYS, *TENSORS, 0, 1, 1.0, "yes", *more)


def not_tuples(length: int, *more: Any) -> Values:
    """Wrong types and lengths, and tuples of the right length with one wrong number."""
    wrong = one_of(*ODD[2:], *FINE_FOR_DEPTH, *ARRAYS, *TENSORS[2:], None, True, 0.5, "abc"[:length])
    longer = st.lists(st.floats(0, 1), max_size=5).filter(lambda values: len(values) != length)
    item = one_of(None, "0", True, NAN, -INF, HUGE, 1j, torch.tensor(0.5), [0.5], Fraction(1, 2))
    spoilt = st.tuples(st.integers(0, length - 1), item).map(
        lambda at: [at[1] if i == at[0] else 0.5 for i in range(length)]
    )
    return wrong | longer | longer.map(tuple) | spoilt | spoilt.map(tuple) | one_of(*more)


NUMPY_HALF = (np.float16(0.5), np.float32(0.5), np.float64(0.5))
OUTSIDE_UNIT = st.floats(max_value=0, exclude_max=True) | st.floats(min_value=1, exclude_min=True)
NEGATIVE = st.floats(max_value=0, exclude_max=True)
STEPS = st.integers(1, 2**63 - 1) | one_of(np.int64(5), 1, 2)
NO_STEPS = not_flags(True, False, 0, -1, 0.5, 10.0, 2**63, np.float32(3)).filter(
    lambda value: type(value) is not int or value < 1 or value >= 2**63
)

#: keyword -> (valid values, invalid values)
KEYWORDS: dict[str, tuple[Values, Values]] = {
    "lr": (
        st.floats(0, 1) | one_of(0, 1, *NUMPY_HALF, torch.tensor(0.1), torch.ones(1, 1), torch.tensor(0.1).double()),
        not_numbers(None, torch.tensor(NAN), torch.tensor(-1.0), torch.tensor([0.1, 0.2])) | NEGATIVE,
    ),
    "momentum": (st.floats(0, 1, exclude_max=True) | one_of(0, *NUMPY_HALF), not_numbers(None, 1) | OUTSIDE_UNIT),
    "weight_decay": (
        st.floats(0, 10) | one_of(0, 5, 10**30, 3e38, 5e-324, *NUMPY_HALF),
        not_numbers(None, 1e39, 2**200) | NEGATIVE,
    ),
    "trust_coefficient": (
        st.floats(0, 10, exclude_min=True) | one_of(1, 2**200, 1e300, *NUMPY_HALF),
        not_numbers(None, 0, 0.0, -1) | NEGATIVE,
    ),
    "trust_clip": (
        st.lists(st.floats(0, 10), min_size=2, max_size=2).map(sorted) | one_of((0, 2**200), (1, INF), NUMPY_HALF[:2]),
        not_tuples(2, (5.0, 0.2), (-1, 1), (INF, INF)),
    ),
    "ema_decay": (
        st.tuples(*[st.floats(0, 1)] * 3) | one_of((0, 1, 1), [0.3, 0.6, 0.7], NUMPY_HALF),
        not_tuples(3, (0.3, 0.6, 1.1), (-0.1, 0.5, 0.5)),
    ),
    "phase_thresholds": (
        st.lists(st.floats(-1, 1), min_size=2, max_size=2).map(lambda ts: sorted(ts)[::-1]) | one_of((2**200, -1e300)),
        not_tuples(2, (0.002, 0.01), (INF, 0.0)),
    ),
    "total_steps": (STEPS | one_of(None), NO_STEPS),
    "warmup_fraction": (st.floats(0, 1) | one_of(0, 1, *NUMPY_HALF), not_numbers(None, 2) | OUTSIDE_UNIT),
    "restart_steps": (STEPS | one_of(None), NO_STEPS),
    "restart_mult": (
        st.floats(1, 1e308) | one_of(1, 2**1000, np.float32(2)),
        not_numbers(None, 0, *NUMPY_HALF) | st.floats(max_value=1, exclude_max=True),
    ),
    "depth": (
        st.floats(0, 1) | one_of(0, 1, *NUMPY_HALF),
        one_of(
            *(*ODD, *ARRAYS, *TENSORS),
            *({"no.such": 0.5}, {"0.weight": 2}, {5: 0.5}, {b"0.weight": 0.5}, {"[": 0.5}, {"a{99999999999}": 0.5}),
            *(lambda name, p: 2, lambda name, p: "deep", True, -0.1, 1.1, "deep"),
        ),
    ),
    "maximize": (st.booleans(), not_flags(None)),
    "foreach": (one_of(None, True, False), not_flags()),
    "fused": (one_of(None, False), not_flags()),
    "max_grad_norm": (
        st.floats(1e-3, 1e3) | one_of(None, 1, 2**200, *NUMPY_HALF),
        not_numbers(0, 0.0, -1) | NEGATIVE,
    ),
    "skip_nonfinite": (st.booleans(), not_flags(None)),
    "state_dtype": (
        one_of(torch.float32, torch.bfloat16),
        one_of(*ODD, *ARRAYS, *TENSORS, None, 0, True, "float64", torch.float16, torch.float64, torch.int8, float),
    ),
    "compensated": (st.booleans(), not_flags(None)),
    "capturable": (st.booleans(), not_flags(None)),
}

#: Values that wrong ones may be mistaken for: 0 for False, 1 for True, 10 for 10.0.
BASES: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0, "momentum": 0, "restart_mult": 1, "foreach": False, "trust_clip": (0, 1)},
    {"total_steps": 10, "restart_steps": None, "warmup_fraction": 0, "fused": False, "lr": torch.tensor(0.05)},
]

RIGHT = (TypeError, ValueError, RuntimeError)


@pytest.fixture(autouse=True)
def nothing_on_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    set_hypothesis_home_dir(tmp_path_factory.getbasetemp() / "hypothesis")
    yield
    set_hypothesis_home_dir(None)


def hunt(seed: int, examples: int, cases: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Run ``check`` on ``examples`` cases, drawn anew for every seed."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def one(case: Any) -> None:
        check(case)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one()


def refused(act: Callable[[], object], *words: str) -> str:
    """The message of the error that ``act`` must raise, which has one of RIGHT for a type and all the words."""
    with pytest.raises(RIGHT) as caught:
        act()
    assert caught.type in RIGHT, caught.type
    message = str(caught.value)
    assert all(word in message for word in words), message
    return message


def wrong_value(*without: str) -> st.SearchStrategy[tuple[str, Any]]:
    """(keyword, invalid value)."""
    keys = [key for key in KEYWORDS if key not in without]
    return st.sampled_from(keys).flatmap(lambda key: st.tuples(st.just(key), KEYWORDS[key][1]))


def right_values() -> st.SearchStrategy[dict[str, Any]]:
    """Some keywords with valid values that go together."""

    def together(options: dict[str, Any]) -> dict[str, Any]:
        if options.get("total_steps") is not None:
            options.pop("restart_steps", None)
        return options

    return st.fixed_dictionaries({}, optional={key: valid for key, (valid, _) in KEYWORDS.items()}).map(together)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(3, 4, 2)


def advance(model: nn.Module, optimizer: DALS, steps: int) -> None:
    """Steps whose gradients and losses depend on the step alone."""
    for _ in range(steps):
        t = optimizer.state_dict()["param_groups"][0]["step"]
        for i, p in enumerate(model.parameters()):
            p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape) * math.cos(i + t)
        optimizer.step(loss=1.0 / (1 + t))


def grouped(model: nn.Module, **options: Any) -> DALS:
    named = list(model.named_parameters())
    return DALS([{"params": named[:2]}, {"params": named[2:]}], **copy.deepcopy(options))


def everything(model: nn.Module, optimizer: DALS) -> Any:
    """Weights, state, groups and counters, as copies."""
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()])


# -- constructor -------------------------------------------------------------------------------------------------


def test_table_is_complete() -> None:
    assert {*DALS(net()).defaults, "depth"} == set(KEYWORDS)


def test_wrong_arguments(seed: int) -> None:
    def check(case: Any) -> None:
        (key, value), cls, base = case
        refused(lambda: cls(net(), **{**base, key: value}), key)

    hunt(seed, 250, st.tuples(wrong_value(), st.sampled_from(list(PRESETS.values())), st.sampled_from(BASES)), check)


def test_right_arguments(seed: int) -> None:
    def check(options: dict[str, Any]) -> None:
        model = net()
        optimizer = DALS(model, **options)
        advance(model, optimizer, 2)
        saved = optimizer.state_dict()
        assert saved["param_groups"][0]["step"] == 2
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        assert same(torch.load(file, weights_only=True), saved)

    hunt(seed, 100, right_values(), check)


@pytest.mark.parametrize("key", KEYWORDS)
def test_integers_too_long_to_print(key: str) -> None:
    if key.endswith("_steps"):
        assert "digits" not in refused(lambda: DALS(net(), **{key: 10**5000}), f"DALS: {key} must be")
    for value in (-(10**5000), [10**5000] * 3):
        assert "digits" not in refused(lambda value=value: DALS(net(), **{key: value}), f"DALS: {key} must be")


# -- groups and live changes -------------------------------------------------------------------------------------


def test_wrong_values_in_groups(seed: int) -> None:
    """In a group of the constructor, and in one that joins while training."""
    undisturbed = net()
    twin = grouped(undisturbed)
    advance(undisturbed, twin, 4)
    truth = everything(undisturbed, twin)

    def check(case: Any) -> None:
        key, value = case
        model = net()
        named = list(model.named_parameters())
        refused(lambda: DALS([{"params": named[:2]}, {"params": named[2:], key: value}]), "group 1: ", key)
        optimizer = grouped(model)
        advance(model, optimizer, 2)
        before = everything(model, optimizer)
        late = nn.Parameter(torch.ones(3))
        refused(lambda: optimizer.add_param_group({"params": [("late", late)], key: value}), "group 2: ", key)
        assert same(before, everything(model, optimizer)) and late not in optimizer.state
        advance(model, optimizer, 2)
        assert same(truth, everything(model, optimizer))

    hunt(seed, 100, wrong_value(), check)


DELETE: Any = "DELETE"


@pytest.mark.parametrize("base", range(len(BASES)))
def test_wrong_live_changes(base: int, seed: int) -> None:
    """Before a step; when they are mended training goes on as if nothing had been."""
    undisturbed = net()
    twin = grouped(undisturbed, **BASES[base])
    advance(undisturbed, twin, 4)
    truth = everything(undisturbed, twin)

    def check(case: Any) -> None:
        changes, index = case
        model = net()
        optimizer = grouped(model, **BASES[base])
        advance(model, optimizer, 2)
        before = everything(model, optimizer)
        group = optimizer.param_groups[index]
        good = dict(group)
        for key, value in changes.items():
            group[key] = value
            if value is DELETE:
                del group[key]
        with pytest.raises(RIGHT) as caught:
            optimizer.step(loss=0.1)
        assert caught.type in RIGHT and f"group {index}: " in str(caught.value)
        assert any(key in str(caught.value) for key in changes)
        group.clear()
        group.update(good)
        assert same(before, everything(model, optimizer))
        advance(model, optimizer, 2)
        assert same(truth, everything(model, optimizer))

    missing = st.sampled_from([*DALS(net()).defaults, "params"]).map(lambda key: (key, DELETE))
    names = one_of(5, "ab", ["a", 5], {"a"}, np.array(["a", "b"])).map(lambda value: ("param_names", value))
    changes = st.lists(wrong_value() | missing | names, min_size=1, max_size=2).map(dict)
    hunt(seed, 80, st.tuples(changes, st.integers(0, 1)), check)


@pytest.mark.parametrize(
    "loss",
    ["low", None, 1j, HUGE, [1.0], np.ones(2), torch.ones(2), torch.tensor(1j), torch.ones((), device="meta")],
    ids=lambda loss: str(loss)[:20],
)
def test_wrong_losses(loss: Any) -> None:
    model = net()
    optimizer = grouped(model)
    advance(model, optimizer, 2)
    before = everything(model, optimizer)
    if loss is not None:
        refused(lambda: optimizer.step(loss=loss), "loss")
    refused(lambda: optimizer.observe_loss(loss), "loss")
    assert same(before, everything(model, optimizer))
    undisturbed = net()
    twin = grouped(undisturbed)
    advance(undisturbed, twin, 4)
    advance(model, optimizer, 2)
    assert same(everything(undisturbed, twin), everything(model, optimizer))


# -- checkpoints -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """The entry at ``path`` becomes ``change(entry)``; what the error must say, None if the dict stays as valid."""

    path: tuple[Any, ...]
    change: Callable[[Any], Any]
    words: tuple[str, ...] | None

    def apply(self, saved: Any) -> None:
        for key in self.path[:-1]:
            saved = saved[key]
        value = self.change(saved.get(self.path[-1]) if isinstance(saved, dict) else saved[self.path[-1]])
        if value is DELETE:
            del saved[self.path[-1]]
        else:
            saved[self.path[-1]] = value

    @property
    def subject(self) -> tuple[Any, ...]:
        """Changes of one subject may mend each other: both tensors deleted, the same new step in both groups."""
        if self.path[0] == "state":
            return self.path[:2]
        return self.path[-1:] if self.path[-1] in WRONG_COUNTER else self.path

    def overlaps(self, other: Mutation) -> bool:
        return self.subject == other.subject or all(a == b for a, b in zip(self.path, other.path, strict=False))


def to(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


NAMES = [name for name, _ in net().named_parameters()]

SPOIL_TENSOR: list[Callable[[Tensor], Any]] = [
    *map(to, (DELETE, None, "x", 0.5, [0.5], {}, np.ones(3), torch.ones(()), torch.ones(0))),
    lambda x: x.reshape(-1, 1, 1),
    lambda x: torch.cat([x, x]),
    lambda x: x[:-1],
    lambda x: x.int(),
    lambda x: x > 0,
    lambda x: x.to(torch.complex64),
    lambda x: x.to(torch.float8_e5m2),
    lambda x: x.to_sparse(),
    lambda x: x.to("meta"),
    lambda x: x.numpy(),
]
KEEP_TENSOR: list[Callable[[Tensor], Any]] = [
    lambda x: x.double(),
    lambda x: x.bfloat16(),
    lambda x: x.clone().requires_grad_(),
    lambda x: nn.Parameter(x.clone()) * 2,
    lambda x: x.t().clone().t() if x.dim() == 2 else x,
    lambda x: torch.zeros(()).expand(x.shape),
]
LOCK = threading.Lock()  # cannot be copied
SPOIL_ENTRY: list[Any] = [None, 0, 5, "", "ab", [], [1], torch.ones(2), torch.zeros(1), {"grad_ema": None}, {1: 2}]
SPOIL_COUNTER: list[Any] = [
    DELETE,
    "3",
    None,
    NAN,
    True,
    1j,
    HUGE,
    -HUGE,
    [1],
    torch.tensor(2),
    np.array(1),
    np.bool_(True),
]
WRONG_COUNTER: dict[str, list[Any]] = {"step": [-1, 1.5, 2**63, INF, 99], "loss_ema": [99.0], "loss_drop": [99.0]}
SPOIL_PARAMS: list[Callable[[Any], Any]] = [
    *map(to, (DELETE, None, 5, "ab", [], {0: 1, 1: 2}, {0, 1}, torch.arange(2), [[0], [1]], [({},), 1])),
    lambda ids: [*ids, 99],
    lambda ids: ids[:-1],
    lambda ids: [ids[0]] * len(ids),
]
SPOIL_GROUP: list[Any] = [None, 5, "params", [], ["params"], {}, torch.ones(2), DELETE]
SPOIL_WHOLE: list[Any] = [DELETE, None, 5, "ab", [1, 2], torch.ones(2), {"a", "b"}]


def mutations() -> st.SearchStrategy[Mutation]:
    def build(make: Callable[..., Mutation], *drawn: Values) -> st.SearchStrategy[Mutation]:
        return st.builds(make, *drawn)

    index, group = st.integers(0, len(NAMES) - 1), st.integers(0, 1)
    key = one_of("grad_ema", "momentum_buffer")
    tensor = [
        build(lambda i, k, c: Mutation(("state", i, k), c, (NAMES[i], k)), index, key, one_of(*SPOIL_TENSOR)),
        build(lambda i, k, c: Mutation(("state", i, k), c, None), index, key, one_of(*KEEP_TENSOR)),
        # Somebody else's, who keeps it there.
        build(lambda i, k: Mutation(("state", i, k), to(0), None), index, one_of("exp_avg", 5, None)),
    ]
    entry = [
        build(lambda i, v: Mutation(("state", i), to(v), (NAMES[i],)), index, one_of(*SPOIL_ENTRY)),
        build(lambda i, v: Mutation(("state", i), to(v), None), index, one_of(DELETE, {})),
        build(
            lambda k: Mutation(("state", k), to({"grad_ema": 1}), (repr(k),)), one_of(99, -1, "x", None, (0, 1), 0.5)
        ),
    ]
    hyperparameter = [
        build(
            lambda g, kv: Mutation(("param_groups", g, kv[0]), to(kv[1]), (f"group {g}", kv[0])), group, wrong_value()
        ),
        build(
            lambda g, k: Mutation(("param_groups", g, k), to(DELETE), None if k in ADDED_LATER else (f"group {g}", k)),
            group,
            one_of(*DALS(net()).defaults),
        ),
        build(
            lambda g, kv: Mutation(("param_groups", g, kv[0]), to(kv[1]), None),
            group,
            one_of(*(k for k in KEYWORDS if k != "total_steps")).flatmap(
                lambda k: st.tuples(st.just(k), KEYWORDS[k][0])
            ),
        ),
        build(lambda g, v: Mutation(("param_groups", g, "mine"), to(v), None), group, one_of(None, {"x": [1]}, NAN)),
        build(lambda g: Mutation(("param_groups", g, "mine"), to(LOCK), (f"group {g}", "mine")), group),
        build(lambda g, v: Mutation(("param_groups", g, "param_names"), to(v), None), group, one_of(DELETE, 5, ["x"])),
    ]
    counter = [
        build(
            lambda g, kv: Mutation(("param_groups", g, kv[0]), to(kv[1]), ("group", kv[0])),
            group,
            st.sampled_from(list(WRONG_COUNTER)).flatmap(
                lambda k: st.tuples(st.just(k), one_of(*SPOIL_COUNTER, *WRONG_COUNTER[k]))
            ),
        )
    ]
    whole = [
        build(
            lambda g, c: Mutation(("param_groups", g, "params"), c, (f"group {g}", "param")),
            group,
            one_of(*SPOIL_PARAMS),
        ),
        build(lambda g, v: Mutation(("param_groups", g), to(v), ("group",)), group, one_of(*SPOIL_GROUP)),
        build(
            lambda k, v: Mutation((k,), to(v), (k.removeprefix("param_").rstrip("s"),)),
            one_of("state", "param_groups"),
            one_of(*SPOIL_WHOLE),
        ),
    ]
    return st.one_of(*tensor, *entry, *hyperparameter, *counter, *whole)


def test_hostile_state_dicts(seed: int) -> None:
    """One to three mutations of a good one: refused with the name of one of them, or loaded where all are harmless."""
    start = net()
    origin = grouped(start)
    advance(start, origin, 3)
    weights, good = everything(start, origin)
    advance(start, origin, 2)
    truth = everything(start, origin)
    accepted = 0

    def check(chosen: list[Mutation]) -> None:
        nonlocal accepted
        apart: list[Mutation] = []
        for mutation in chosen:
            if not any(mutation.overlaps(other) for other in apart):
                apart.append(mutation)
        model = net()
        optimizer = grouped(model)
        advance(model, optimizer, 4)
        saved = copy.deepcopy(good)
        # Deleting a group moves the next one.
        for mutation in sorted(apart, key=lambda m: -m.path[1] if m.path[0] == "param_groups" and m.path[1:] else 0):
            mutation.apply(saved)
        before = everything(model, optimizer)
        memory = [value for p in model.parameters() for value in optimizer.state[p].values()]
        harmful = [mutation.words for mutation in apart if mutation.words is not None]
        if harmful:
            message = refused(lambda: optimizer.load_state_dict(saved))
            assert any(all(word in message for word in words) for words in harmful), message
            assert same(before, everything(model, optimizer))
            now = [value for p in model.parameters() for value in optimizer.state[p].values()]
            assert all(a is b for a, b in zip(memory, now, strict=True))
        else:
            accepted += 1
            optimizer.load_state_dict(saved)
            check_loaded(optimizer, saved)
            advance(model, optimizer, 1)
            optimizer = grouped(model)  # groups as they were; state is loaded next
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(good))
        advance(model, optimizer, 2)
        assert same(truth, everything(model, optimizer))

    hunt(seed, 250, st.lists(mutations(), min_size=1, max_size=3), check)
    assert accepted > 20, "both outcomes must occur"


def check_loaded(optimizer: DALS, saved: Any) -> None:
    """That the optimizer holds what the dict says, in its own precision, and no graph."""
    owners = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    for i, (group, p) in enumerate(owners):
        entry, dtype = saved["state"].get(i), group["state_dtype"]
        assert bool(entry) == (p in optimizer.state)
        for key, value in (entry or {}).items():
            have = optimizer.state[p][key]
            if key not in STATE_KEYS:
                assert have == value
                continue
            assert have.dtype == dtype and not have.requires_grad and same(have, value.detach().to(dtype))
    for group, wanted in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        if "state_dtype" in wanted:
            wanted["state_dtype"] = getattr(torch, str(wanted["state_dtype"]).removeprefix("torch."))
        assert all(same(group[key], wanted[key]) for key in wanted if key not in ("params", "param_names"))
    assert optimizer.state_dict()["param_groups"][0]["step"] == saved["param_groups"][0]["step"]


@pytest.mark.parametrize("thing", [None, 5, "state", [], ["state"], torch.ones(2), {"state"}, iter(())])
def test_what_is_no_state_dict(thing: Any) -> None:
    model = net()
    optimizer = grouped(model)
    advance(model, optimizer, 2)
    before = everything(model, optimizer)
    refused(lambda: optimizer.load_state_dict(thing), "checkpoint")
    assert same(before, everything(model, optimizer))


def test_own_state_in_other_places(seed: int) -> None:
    """state_dict() hands out the state itself: swapped within one dict it must not be read after it was written."""
    model = net()
    optimizer = grouped(model)
    advance(model, optimizer, 3)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry["grad_ema"], entry["momentum_buffer"] = entry["momentum_buffer"], entry["grad_ema"]
    wanted = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    assert same(optimizer.state_dict()["state"], wanted["state"])


# -- parameters --------------------------------------------------------------------------------------------------


def fresh() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, 2))


def returning(thing: Any) -> Callable[[], Any]:
    return lambda: thing


NAMED: list[Callable[[], Any]] = [lambda: ("a.weight", fresh()), lambda: ("b", fresh()), lambda: ("", fresh())]
UNNAMED: list[Callable[[], Any]] = [fresh, lambda: torch.ones(3, requires_grad=True)]
NO_PARAMETER: list[Callable[[], Any]] = [
    *map(returning, (5, "weight", None, (), ("a",), [], {}, 0.5, np.ones(2), nn.ReLU())),
    lambda: ("a", fresh(), 1),
    lambda: (5, fresh()),
    lambda: (None, fresh()),
    lambda: (b"a", fresh()),
    lambda: (fresh(), "a"),
    lambda: ("a", 5),
    lambda: ["a", fresh()],
    lambda: fresh() * 2,
    lambda: ("a", fresh() * 2),
]


def test_hostile_params(seed: int) -> None:
    """Lists of parameters, with or without names, and of what is none; alone, and as a group with foreign keys."""

    def check(case: Any) -> None:
        good, bad, at, keys = case
        entries = [make() for make in good]
        named = {isinstance(entry, tuple) for entry in entries}
        sound = bad is None and len(named) == 1
        if bad is not None:
            entries.insert(at, bad())
        for params in (list(entries), iter(entries), [{"params": list(entries), **keys}]):
            if not sound and not (not entries and isinstance(params, list) and params):  # torch takes empty groups
                message = refused(lambda params=params: DALS(params))
                assert "param" in message or "Tensor" in message or "argument must be" in message, message
                continue
            optimizer = DALS(params)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            optimizer.step(loss=1.0)
            assert len(optimizer.depths()) == len(optimizer.trust_ratios()) == len(entries)

    good = (
        st.lists(one_of(*NAMED), max_size=4)
        | st.lists(one_of(*UNNAMED), max_size=4)
        | st.lists(one_of(*NAMED, *UNNAMED))
    )
    foreign = st.dictionaries(one_of("name", "initial_lr", 5, None, "lr_scale"), one_of(0.1, "x", None), max_size=2)
    hunt(seed, 200, st.tuples(good, st.none() | one_of(*NO_PARAMETER), st.integers(0, 3), foreign), check)


@pytest.mark.parametrize(
    "thing", [5, None, 0.5, torch.ones(2), fresh(), np.float32(1), object(), "w", b"w", {"a": fresh()}]
)
def test_what_is_no_iterable_of_parameters(thing: Any) -> None:
    for params in (thing, [{"params": thing}]):
        if isinstance(thing, Tensor) and params is not thing:
            DALS(params, depth=0.5)
        else:
            message = refused(lambda params=params: DALS(params))
            assert "param" in message or "Tensor" in message, message


@pytest.mark.parametrize("names", [5, "ab", ["a", 5], {"a": 1}, [None, None]])
def test_names_that_are_none(names: Any) -> None:
    refused(lambda: DALS([{"params": [fresh(), fresh()], "param_names": names}]), "group 0: param_names")
