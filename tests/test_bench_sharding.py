"""The arithmetic of what sharding adds to a step."""

import re
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.sharding import Links, Ranks, report

LINKS = Links(node=8, node_latency=1.0, node_bandwidth=10.0, net_latency=100.0, net_bandwidth=1.0)


def test_a_sum_by_hand() -> None:
    assert Ranks(1, 1).all_reduce_seconds(5.0, LINKS) == 0.0
    assert Ranks(1, 8).all_reduce_seconds(40.0, LINKS) == pytest.approx(2 * 3 * 1.0 + 2 * 7 / 8 * 40 / 10)
    assert Ranks(4, 8).all_reduce_seconds(32.0, LINKS) == pytest.approx(6.0 + 2 * 2 * 100.0 + 2 * 31 / 32 * 32 / 1)
    assert Ranks(4, 1).all_reduce_seconds(0.0, LINKS) == pytest.approx(400.0)


def test_rows() -> None:
    """Sums a step as the tests of the real thing count them; shares of the model; what needs no link is free."""
    rows = [re.split(r"\s{2,}", line) for line in report([8, 64], 1e9, 100, Links()).splitlines()[2:]]
    assert [(row[0], row[1].split()[0], row[2]) for row in rows] == [
        ("8", "DDP", "0"), ("8", "FSDP2", "1"),
        ("64", "DDP", "0"), ("64", "FSDP2", "1"), ("64", "HSDP", "1"), ("64", "TP", "2"),
    ]  # fmt: skip
    update = [float(row[6]) for row in rows]
    shards, whole = [1, 8, 1, 64, 8, 64], 1e9 * 36 / 4e12 * 1e6
    assert [n * us for n, us in zip(shards, update, strict=True)] == pytest.approx([whole] * 6, rel=0.01)
    assert rows[0][3:5] == ["0.0", "0"] and rows[0][7] == "-"


def test_the_page_holds_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sharding"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Predicted")
    page = (Path(__file__).parents[1] / "docs" / "sharding.md").read_text()
    block = re.search(r"<!-- python -m bench sharding -->\n```\n(.*?)\n```", page, re.S)
    assert block is not None and block.group(1) == printed.split("\n\n", 1)[1].rstrip("\n")


def test_a_reader_s_own_links(capsys: pytest.CaptureFixture[str]) -> None:
    main(["sharding", "--gpus", "16", "--net-latency", "0", "--node-latency", "0", "--tensors", "1", "--node", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"\s{2,}", line)[4] for line in lines[4:]] == ["0"] * 4
