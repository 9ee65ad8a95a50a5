"""Hyperparameters are checked when they changed, and only then, with the compiled walk and without it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fused_dals import DALS
from fused_dals.group_table import GroupTable
from fused_dals.live_groups import LiveGroups

pytest.importorskip("triton")


def test_groups_are_checked_once_and_what_changes_is_noticed(either_walk: str, seed: int) -> None:
    params = [(f"p{i}", nn.Parameter(torch.ones(2))) for i in range(3)]
    optimizer = DALS([{"params": params[:2]}, {"params": params[2:], "lr": torch.tensor(0.1)}], depth=0.5)
    groups, live = optimizer.param_groups, LiveGroups()

    def moved() -> tuple[int, int, int]:
        before = live.plans, live.tables, live.lrs
        live.check(groups)
        return live.plans - before[0], live.tables - before[1], live.lrs - before[2]

    live.check(groups)
    assert moved() == moved() == (0, 0, 0)
    groups[0]["lr"] = 0.02
    assert moved() == (0, 0, 1) and moved() == (0, 0, 0)
    groups[1]["lr"].fill_(0.3)
    assert moved() == (0, 0, 1) and moved() == (0, 0, 0)
    groups[0]["momentum"] = 0.5
    assert moved() == (0, 1, 0) and moved() == (0, 0, 0)
    groups[0]["depth"] = 0.7
    assert moved() == (1, 1, 0)
    groups[0]["mine"] = object()
    assert moved() == moved() == (0, 0, 0)
    groups[0]["param_names"][0] = "q0"
    assert moved() == (1, 1, 0) and moved() == (0, 0, 0)
    groups[0]["param_names"] = ["".join(["q", "0"]), "p1"]  # equal names, other objects
    assert moved() == moved() == (0, 0, 0)
    groups[0]["trust_clip"] = [0.1, 5.0]  # may change in place: looked at in every step
    assert moved() == (0, 1, 0)
    groups[0]["trust_clip"][0] = 7.0
    with pytest.raises(ValueError, match="group 0: trust_clip"):
        live.check(groups)
    groups[0]["trust_clip"] = (0.2, 5.0)
    assert moved()[1] == 1
    for wrong in (-1.0, float("nan"), "0.1", None):
        groups[0]["lr"] = wrong
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match="group 0: lr must be"):
                live.check(groups)
    groups[0]["lr"] = 0.1
    del groups[1]["momentum"]
    with pytest.raises(ValueError, match="group 1: momentum is missing"):
        live.check(groups)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_wrong_learning_rate_among_numbers_is_found(place: int, either_walk: str, seed: int) -> None:
    """Numbers are looked at all together: what is not sound must not hide among them, and nothing sound is refused."""
    groups = DALS([{"params": [(f"p{i}", nn.Parameter(torch.ones(2)))]} for i in range(3)], depth=0.5).param_groups
    live = LiveGroups()
    for group in groups:
        group["lr"] = random.random()
    live.check(groups)
    for wrong in (-1e-300, float("nan"), float("inf"), -float("inf"), True, 10**400, "0.1"):
        groups[place]["lr"] = wrong
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=f"group {place}: lr must be"):
                live.check(groups)
    version = live.version
    for sound in (0.0, 1.7e308, -0.0, 5e-324, 1, np.float64(0.1)):
        for group in groups:
            group["lr"] = sound  # the largest add up to infinity
        live.check(groups)
        assert live.version.lrs > version.lrs and live.version.tables == version.tables
        version = live.version


def test_groups_in_a_tuple_step_as_those_in_a_list(either_walk: str, seed: int) -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones_like(p)
    optimizer = DALS([("p", p)])
    optimizer.param_groups = tuple(optimizer.param_groups)  # type: ignore[assignment]
    for _ in range(3):
        optimizer.step(loss=1.0)
    assert optimizer._runtime.state.numbers()["step"] == 3


def test_keys_that_change_places_are_noticed(either_walk: str, seed: int) -> None:
    """The same values in the same order, of other keys."""
    optimizer, live = DALS([("p", nn.Parameter(torch.ones(2)))], skip_nonfinite=True), LiveGroups()
    live.check(optimizer.param_groups)
    exchanged = {"maximize": "skip_nonfinite", "skip_nonfinite": "maximize"}
    (group,) = optimizer.param_groups
    optimizer.param_groups[0] = {exchanged.get(key, key): value for key, value in group.items()}
    assert live.skips
    live.check(optimizer.param_groups)
    assert not live.skips


def test_what_one_group_turns_on_survives_an_error_in_another(either_walk: str, seed: int) -> None:
    """The step that is refused has looked at the first group already."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [(f"p{i}", p)]} for i, p in enumerate(params)]
    optimizer = DALS(groups, depth=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    first, second = optimizer.param_groups
    for lr in (second["lr"], 0.01):  # as before, or new again
        first["max_grad_norm"], first["skip_nonfinite"], second["lr"] = 1.0, True, -1.0
        with pytest.raises(ValueError, match="group 1: lr"):
            optimizer.step(loss=1.0)
        second["lr"] = lr
        before, skipped = [p.detach().clone() for p in params], optimizer.skipped_steps
        params[0].grad = torch.full((2,), float("inf"))
        optimizer.step(loss=1.0)
        assert optimizer.skipped_steps == skipped + 1
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        params[0].grad = torch.ones(2)
        first["max_grad_norm"], first["skip_nonfinite"] = None, False
        optimizer.step(loss=1.0)


#: Values that groups are given at random; the last of each is not sound.
SOUND: dict[str, list[Any]] = {
    "lr": [0.1, 0.2, 1, np.float64(0.1), torch.tensor(0.3), torch.tensor(0.4, dtype=torch.float64), -1.0],
    "max_grad_norm": [None, 1.0, 2.0, -1.0],
    "skip_nonfinite": [False, True, 1],
    "momentum": [0.9, 0.5, 1.0],
    "trust_clip": [(0.2, 5.0), (0.1, 5.0), [0.1, 4.0], (5.0, 0.2)],
    "depth": [0.5, 0.25, 2.0],
}
NO_NAME = 3


def change_at_random(chance: random.Random, group: dict[str, Any]) -> None:
    key = chance.choice([*SOUND, "param_names"])
    if key == "param_names":
        group["param_names"][0] = chance.choice(["a", "b", NO_NAME])
    elif key == "lr" and isinstance(group["lr"], torch.Tensor) and chance.random() < 0.5:
        group["lr"].fill_(chance.choice([0.5, 0.6]))
    elif key == "trust_clip" and isinstance(group["trust_clip"], list) and chance.random() < 0.5:
        group["trust_clip"][1] = chance.choice([4.0, 6.0])
    else:
        group[key] = chance.choice(SOUND[key][: None if chance.random() < 0.2 else -1])


def test_whatever_changes_tables_and_flags_follow(either_walk: str, seed: int) -> None:
    """Hundreds of changes, sound ones and others; errors, and what comes after them."""
    chance = random.Random(seed)
    refused = 0
    for _ in range(40):
        params = [(f"p{i}", nn.Parameter(torch.ones(2))) for i in range(3)]
        groups = DALS([{"params": [named]} for named in params], depth=0.5).param_groups
        live, table = LiveGroups(), GroupTable(torch.device("cpu"))
        for _ in range(25):
            for _ in range(chance.randrange(3)):
                change_at_random(chance, chance.choice(groups))
            unsound = [(g, key) for g in groups for key, values in SOUND.items() if is_last(g.get(key), values)]
            nameless = [group for group in groups if group["param_names"] == [NO_NAME]]
            if unsound or nameless:
                with pytest.raises((TypeError, ValueError)):
                    live.check(groups)
                refused += 1
                for group, key in unsound[:: chance.choice([1, 2])]:
                    group[key] = SOUND[key][0]
                for group in nameless:  # in place, so that the dict tells nobody
                    group["param_names"][0] = "a"
                continue
            live.check(groups)
            table.refresh(groups, live.version)
            fresh = GroupTable(torch.device("cpu"))
            fresh.refresh(groups, live.version)
            assert all(map(torch.equal, table.memory()[:-1], fresh.memory()[:-1]))  # the last is the prologue's
            assert live.clips == any(group["max_grad_norm"] is not None for group in groups)
            assert live.skips == any(group["skip_nonfinite"] for group in groups)
    assert refused > 20


def is_last(value: Any, values: list[Any]) -> bool:
    return type(value) is type(values[-1]) and not isinstance(value, torch.Tensor) and bool(value == values[-1])


def test_an_error_in_another_group_hides_no_learning_rate(either_walk: str, seed: int) -> None:
    """Even where it is mended in place, without a write to any dict."""
    params = [(f"p{i}", nn.Parameter(torch.ones(2))) for i in range(2)]
    groups = DALS([{"params": [named]} for named in params], depth=0.5).param_groups
    live = LiveGroups()
    for _ in range(3):
        live.check(groups)
    before, names = live.lrs, groups[1]["param_names"]
    groups[0]["lr"], name, names[0] = 10.0, names[0], NO_NAME
    with pytest.raises(TypeError, match="group 1: param_names"):
        live.check(groups)
    names[0] = name
    live.check(groups)
    assert live.lrs > before


def test_a_check_that_is_interrupted_hides_no_learning_rate(
    either_walk: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    groups = DALS([("p", nn.Parameter(torch.ones(2)))], lr=0.03).param_groups
    live = LiveGroups()
    for _ in range(3):
        live.check(groups)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    table = GroupTable(torch.device("cpu"))
    table.refresh(groups, live.version)
    check_lrs = LiveGroups._check_lrs

    def interrupted_when_they_are_read(self: LiveGroups, groups: Any) -> None:
        lrs = self.lrs
        check_lrs(self, groups)
        self.lrs = lrs
        raise KeyboardInterrupt

    for lr, way in ((0.5, interrupted), (0.25, interrupted_when_they_are_read)):
        groups[0]["lr"] = lr
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(LiveGroups, "_check_lrs", way)
            live.check(groups)
        live.check(groups)
        table.refresh(groups, live.version)
        assert table.lrs.tolist() == [lr]


def test_a_table_that_could_not_be_written_is_written_later(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = DALS([("p", nn.Parameter(torch.ones(2)))], lr=0.03).param_groups
    live, table = LiveGroups(), GroupTable(torch.device("cpu"))

    def refresh() -> float:
        live.check(groups)
        table.refresh(groups, live.version)
        return float(table.lrs)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    assert refresh() == 0.03
    with monkeypatch.context() as patch:  # for one group more, and then there is one again
        groups.append(dict(groups[0]))
        patch.setattr("fused_dals.group_table.table_on", fail)
        with pytest.raises(torch.OutOfMemoryError):
            refresh()
        groups.pop()
    assert refresh() == 0.03 and len(table.rows) == 1 and float(table.rows[0, 1]) == groups[0]["momentum"]
    groups[0]["lr"] = 0.5
    with monkeypatch.context() as patch:
        patch.setattr("fused_dals.group_table.table_on", fail)
        with pytest.raises(torch.OutOfMemoryError):
            refresh()
    assert refresh() == 0.5
