"""The host-time benchmark: launches replaced and put back, cases, table, JSON."""

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.host import CASES, HostCost, cost_table, measure, without_launches
from bench.timing import Spread
from fused_dals import DALS

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


def test_a_case_is_measured() -> None:
    with without_launches():
        cost = measure(7, 3, repeats=4)
    assert (cost.tensors, cost.groups) == (7, 3)
    assert 0 < cost.step_s.p10 <= cost.step_s.median <= cost.step_s.p90 and cost.addresses_s.median > 0


def test_the_table_tells_what_one_more_costs() -> None:
    def cost(tensors: int, groups: int, us: float, addresses: float) -> HostCost:
        return HostCost(tensors, groups, *(Spread(1e-6 * value, 0.0, 0.0) for value in (us, addresses)))

    costs = [cost(10, 1, 100, 1), cost(300, 1, 200, 30), cost(300, 300, 499, 30), cost(10_010, 1, 5100, 1001)]
    assert "per tensor 500 ns, of which reading its address 100; per group 1.0 us" in cost_table(costs)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.host.CASES", ((2, 1), (4, 1), (4, 4), (9, 1)))
    assert main(["host", "--repeats", "2", "--json", str(tmp_path / "host.json")]) == 0
    assert "per tensor" in capsys.readouterr().out
    record = json.loads((tmp_path / "host.json").read_text())
    assert [row["tensors"] for row in record["results"]] == [2, 4, 4, 9] and record["environment"]
    assert CASES[0] == (10, 1) and max(CASES) == (10_000, 1)
