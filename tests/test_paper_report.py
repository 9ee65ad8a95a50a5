"""The report of the paper's benchmark: ranks, intervals, the document, the figures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench import published
from bench.paper import cli
from bench.paper.ablation import ablation_table
from bench.paper.figures import STYLE, ranks
from bench.paper.paired import differences, half_width, last
from bench.paper.report import filled, found, title_of
from bench.paper.results import Experiment
from bench.paper.strategies import CORRECTED, PUBLISHED
from bench.paper.tables import chaos_table
from bench.paper.tasks import TASKS
from bench.paper.training import Curves, RunResult

SEEDS = (published.SEED, published.SEED + 100)


def add(experiment: Experiment, strategy: str, seed: int, hits: list[int]) -> None:
    """A run of 100 test rows; the even and the odd ones do equally well."""
    curves = Curves(hits, hits, [1.0] * len(hits), [0.5] * len(hits))
    experiment.add(strategy, {"strategy": strategy}, RunResult(seed, 100, curves, {}), {})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Task A with every strategy, task B over two epochs with DALS and a variant."""
    for place, strategy in enumerate([*PUBLISHED, *CORRECTED]):
        for seed in SEEDS:
            add(Experiment(tmp_path / "synthetic-a"), strategy, seed, [10 + place, 20 + place, 15 + place])
    for seed, shift in zip(SEEDS, (0, 4), strict=True):
        add(Experiment(tmp_path / "synthetic-b-2-epochs"), "DALS", seed, [30, 40 + shift])
        add(Experiment(tmp_path / "synthetic-b-2-epochs"), "DALS, no filter", seed, [30, 41 + 2 * shift])
    return tmp_path


def test_ranks_share_the_mean_place_of_equals(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path)
    for strategy, hits in (("DALS", 40), ("Adam", 30), ("SAM", 30), ("Lion", 20)):
        add(experiment, strategy, 42, [hits])
    add(experiment, "SGDR (corrected)", 42, [35])
    expected = {"DALS": 1, "Adam": 2.5, "SAM": 2.5, "Lion": 4, "SGDR (corrected)": 2}
    assert ranks(experiment, last) == expected, "what the paper lacks takes nobody's place"


def test_every_strategy_has_a_line_of_its_own() -> None:
    assert set(STYLE) == {*PUBLISHED, *CORRECTED}
    assert len(set(STYLE.values())) == len(STYLE)


def test_differences_are_taken_seed_by_seed(results: Path) -> None:
    experiment = Experiment(results / "synthetic-b-2-epochs")
    add(experiment, "DALS, no clamp", 1042, [1, 2])
    assert differences(experiment, "DALS, no filter", "DALS", last) == [2, 10]
    assert differences(experiment, "DALS, no clamp", "DALS", last) == [], "DALS lacks that seed"
    table = ablation_table([("B", experiment)]).splitlines()
    assert table[2].split() == ["DALS", "itself,", "%", "84.00", "(2)", "84.00", "(2)"]
    width = 12.7062 * math.sqrt(32) / math.sqrt(2)
    assert table[7].split() == [
        "DALS,",
        "no",
        "filter",
        "+6.00",
        "±",
        f"{width:.2f}",
        "(2)",
        "+6.00",
        "±",
        f"{width:.2f}",
        "(2)",
    ]
    assert table[3].split() == ["DALS,", "phase", "0", "only", "-", "-"]
    assert ablation_table([("A", Experiment(results / "synthetic-a"))]) == "no results"


def test_chaos_table_has_a_column_for_every_nudge(results: Path) -> None:
    plain, nudged = Experiment(results / "synthetic-a"), Experiment(results / "synthetic-a-nudge-1")
    add(nudged, "DALS", published.SEED, [49, 48])
    lines = chaos_table(plain, [nudged], TASKS["synthetic-a"]).splitlines()
    assert lines[2:] == ["DALS           98.0    70.00           98.00"]
    assert chaos_table(plain, [], TASKS["synthetic-a"]) == "no results"


def test_half_width_is_students() -> None:
    assert half_width([1, 3]) == pytest.approx(12.7062 * math.sqrt(2) / math.sqrt(2), rel=1e-4)
    assert half_width([1, 2, 3]) == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)


def test_experiments_are_found_and_named(results: Path) -> None:
    (results / "empty").mkdir()
    assert [folder.name for folder in found(results)] == ["synthetic-a", "synthetic-b-2-epochs"]
    assert title_of(results / "cifar10-3-epochs") == "CIFAR-10, 3 epochs"
    assert title_of(results / "trec6") == "TREC-6"
    with pytest.raises(SystemExit, match="does not begin with that of a task"):
        title_of(results / "other")


def test_document_keeps_what_is_not_generated() -> None:
    document = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n<!-- begin y -->\n<!-- end y -->\n"
    once = filled(document, {"x": "one\n\ntwo", "y": "three"}, "doc.md")
    x, y = "\n\n    one\n\n    two\n\n", "\n\n    three\n\n"
    assert once == f"a\n<!-- begin x -->{x}<!-- end x -->\nb\n<!-- begin y -->{y}<!-- end y -->\n"
    assert filled(once, {"x": "one\n\ntwo", "y": "three"}, "doc.md") == once
    assert "not run yet" in filled("<!-- begin mnist -->\n<!-- end mnist -->", {}, "doc.md")
    with pytest.raises(SystemExit, match=r"doc\.md has a place for 'y'"):
        filled(document, {"x": "one"}, "doc.md")


def test_command_line_writes_document_and_figures(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = results.parent / "docs" / "paper.md"
    docs.parent.mkdir(exist_ok=True)
    docs.write_text("# Title\n<!-- begin synthetic-a -->\n<!-- end synthetic-a -->\nend\n")
    assert cli.main(["report", "--results", str(results), "--docs", str(docs)]) == 0
    text = docs.read_text()
    assert text.startswith("# Title\n") and text.endswith("-->\nend\n")
    out = capsys.readouterr().out
    assert "DALS-Acc" in text and "DALS-Acc" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["synthetic-b-2-epochs", "2", "1", "variants", "of", "DALS", "2", "2", "0.0"] in rows
    compared = next(row for row in rows if row and row[0] == "AdaBound")
    assert compared[12:16] == ["+10.00", "±", "0.00", "(2)"], "five places after Fixed SGD, two rows of 100 each"
    assert f"{docs} has no place for synthetic-b-2-epochs" in out
    apart = results.parent / "figures"
    assert cli.main(["report", "--results", str(results), "--figures", str(apart)]) == 0
    for folder in (docs.parent, apart):
        for name in ("paper-accuracy.png", "paper-time.png", "paper-ranks.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_few_strategies_have_tables_and_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(Experiment(tmp_path / "results" / "synthetic-a"), "DALS", published.SEED, [49, 48])
    assert cli.main(["report", "--results", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")]) == 0
    assert "no figures: no experiment has 5" in capsys.readouterr().out and not list((tmp_path / "figures").iterdir())


def test_no_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no results in"):
        cli.main(["report", "--results", str(tmp_path)])
