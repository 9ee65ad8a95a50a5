"""The host-time benchmark: launches replaced and put back, cases, table, JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.host import (
    CASES,
    COMPILED_WALK,
    DTENSORS,
    IN_PYTHON,
    MISSING,
    PLAIN,
    UNSCALED,
    HostCost,
    cost_table,
    measure,
    using,
    without_launches,
)
from bench.timing import Spread
from fused_dals import DALS
from fused_dals.host_walk import HOST_WALK
from tests.helpers import needs_walk

pytest.importorskip("triton")


def test_without_launches_nothing_is_computed_and_afterwards_it_is() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = DALS([("w", p)], fused=True)
    p.grad = torch.ones_like(p)
    with without_launches():
        optimizer.step(loss=1.0)
    assert torch.equal(p, torch.ones(3))
    optimizer.step(loss=1.0)
    assert not torch.equal(p, torch.ones(3))


@needs_walk
@pytest.mark.parametrize("kind", [PLAIN, DTENSORS, UNSCALED, MISSING])
def test_a_case_is_measured(kind: str) -> None:
    walks = [COMPILED_WALK, IN_PYTHON]
    with without_launches():
        costs = measure(7, 3, kind, walks, repeats=4)
    assert [(c.walk, c.tensors, c.groups, c.kind) for c in costs] == [(walk, 7, 3, kind) for walk in walks]
    for cost in costs:
        assert 0 < cost.step_s.p10 <= cost.step_s.median <= cost.step_s.p90
        assert cost.scheduled_s.median > 0 and cost.addresses_s.median > 0


@needs_walk
def test_a_walk_is_used_for_a_while_only() -> None:
    there = HOST_WALK.compiled
    with using(IN_PYTHON):
        assert HOST_WALK.compiled is None
    with using(COMPILED_WALK):
        assert HOST_WALK.compiled is there is not None
    assert HOST_WALK.compiled is there


def test_the_table_tells_what_one_more_costs() -> None:
    def cost(walk: str, tensors: int, groups: int, us: float) -> HostCost:
        return HostCost(walk, tensors, groups, PLAIN, *(Spread(1e-6 * value, 0.0, 0.0) for value in (us, us + 11, 1)))

    costs = [cost(COMPILED_WALK, 10, 1, 100), cost(COMPILED_WALK, 310, 1, 220), cost(COMPILED_WALK, 310, 310, 529)]
    costs.append(cost(COMPILED_WALK, 10_010, 1, 5100))
    costs += [cost(IN_PYTHON, tensors, groups, tensors + groups) for tensors, groups, kind in CASES if kind == PLAIN]
    costs += [replace(cost(walk, 300, 1, 7000), kind=UNSCALED) for walk in (COMPILED_WALK, IN_PYTHON)]
    lines = cost_table(costs).splitlines()
    assert lines[2].split() == ["compiled", "10", "plain", "1", "100", "0", "0", "111", "1"]
    per_tensor = "compiled: per tensor 400 ns up to 310, 500 ns up to 10,010 (at most 200: NOT kept); per group 1.00 us"
    assert per_tensor in lines
    fast = [replace(cost, step_s=Spread(cost.step_s.median / 4, 0.0, 0.0)) for cost in costs]
    assert "125 ns up to 10,010 (at most 200: kept)" in cost_table(fast)
    assert "in Python: per tensor 1000 ns up to 300, 1000 ns up to 10,000; per group 1.00 us" in lines


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.host.CASES", tuple((n, g, PLAIN) for n, g in ((2, 1), (4, 1), (4, 4), (9, 1))))
    assert main(["host", "--repeats", "2", "--json", str(tmp_path / "host.json")]) == 0
    assert "per tensor" in capsys.readouterr().out
    record = json.loads((tmp_path / "host.json").read_text())
    walks = 1 if HOST_WALK.compiled is None else 2
    assert [row["tensors"] for row in record["results"][::walks]] == [2, 4, 4, 9] and record["environment"]
    assert len(record["results"]) == 4 * walks
    assert CASES[0] == (10, 1, PLAIN) and max(CASES) == (10_000, 1, PLAIN)
