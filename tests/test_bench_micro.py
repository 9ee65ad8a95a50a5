"""The step benchmark: shapes, interleaving, failures, statistics; and the command line."""

import json
import math
from pathlib import Path

import pytest
import torch

from bench import extras, micro
from bench.__main__ import main
from bench.contenders import BASELINE, CONTENDERS, NamedParameter, Step
from bench.shapes import SHAPES
from bench.timing import WARMUP_ROUNDS, Timing, measure, summarize

TINY = [("a.weight", (3, 2)), ("a.bias", (3,)), ("b.weight", (4, 3))]


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"), [("resnet50", 161, 25_557_032), ("gpt2", 148, 124_439_808)]
)
def test_shapes_have_the_known_size(model: str, tensors: int, parameters: int) -> None:
    shapes = list(SHAPES[model]())
    assert len(shapes) == len(dict(shapes)) == tensors
    assert sum(math.prod(shape) for _, shape in shapes) == parameters


def test_measure_times_all_contenders_and_none_fails() -> None:
    timings = measure(TINY, CONTENDERS, repeats=2, on_step=lambda: None)
    assert [timing.contender for timing in timings] == list(CONTENDERS)
    assert all(timing.error is None and len(timing.seconds) == 2 for timing in timings)


def test_measure_takes_turns() -> None:
    calls = []

    def contender(name: str) -> Step:
        return lambda: calls.append(name)

    measure(TINY, {"x": lambda _: contender("x"), "y": lambda _: contender("y")}, 2, lambda: None)
    assert calls == ["x", "y"] * (WARMUP_ROUNDS + 2)


def test_measure_gives_equal_starts_and_own_parameters() -> None:
    seen: list[list[torch.nn.Parameter]] = []

    def contender(named: list[NamedParameter]) -> Step:
        seen.append([parameter for _, parameter in named])
        return lambda: None

    measure(TINY, {"x": contender, "y": contender}, 1, lambda: None)  # type: ignore[dict-item]
    for one, other in zip(*seen, strict=True):
        assert one is not other and torch.equal(one, other)
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_a_failing_contender_is_a_row_that_says_why() -> None:
    def refuses(named: object) -> Step:
        raise RuntimeError("not\n built")

    def breaks(named: object) -> Step:
        return lambda: 1 / 0

    contenders = {BASELINE: CONTENDERS[BASELINE], "refuses": refuses, "breaks": breaks}
    rows = summarize(measure(TINY, contenders, 2, lambda: None), BASELINE)
    assert [row.error for row in rows] == [None, "RuntimeError: not built", "ZeroDivisionError: division by zero"]
    assert rows[1].time_s is None and rows[1].ratio is None
    assert "refuses failed: RuntimeError: not built" in micro.timing_table(rows)


def test_ratios_are_taken_round_by_round() -> None:
    base, own = Timing("base", [1.0, 2.0, 4.0]), Timing("own", [2.0, 4.0, 4.0])
    rows = summarize([base, own], "base")
    assert rows[1].ratio is not None and rows[1].time_s is not None
    assert rows[1].ratio.median == 2
    assert rows[1].time_s.median == 4
    assert rows[1].time_s.p10 == pytest.approx(2.4)
    assert summarize([own], "base")[0].ratio is None


def test_command_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setitem(SHAPES, "gpt2", lambda: iter(TINY))
    out = tmp_path / "deeper" / "micro.json"
    threads = torch.get_num_threads()
    assert main(["micro", "--shapes", "gpt2", "--repeats", "2", "--threads", str(threads), "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["environment"].keys() >= {"device", "threads", "python", "torch", "fused_dals", "date"}
    rows = record["results"][0]["contenders"]
    assert [row["contender"] for row in rows] == list(CONTENDERS)
    assert all(len(row["samples_s"]) == 2 and row["ratio"]["median"] > 0 for row in rows)
    assert "median ms" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "micro"])
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m bench {command}" in capsys.readouterr().out


def test_impossible_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["demo", "--epochs", "81"], ["demo", "--jobs", "0"], ["micro", "--repeats", "0"]):
        with pytest.raises(SystemExit) as stop:
            main(options)
        assert stop.value.code == 2
    assert "--epochs must be from 1 to 80" in capsys.readouterr().err


def test_a_missing_extra_is_one_clear_line() -> None:
    with pytest.raises(SystemExit, match=r"no_such_module missing: pip install '\.\[demo\]'"):
        extras.require("json", "no_such_module")
