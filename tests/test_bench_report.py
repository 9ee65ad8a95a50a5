"""The report: README.md and docs/ say what the committed files say; tables and plots of a file as a GPU makes them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import record, report
from bench.__main__ import main
from bench.cache_model import plan_in_use
from bench.contenders import ADAMW, BASELINE, FOREACH, FUSED
from bench.report.results import DEMO, CounterFile, Results, load
from bench.report.text import HOW_TO_READ, NO_GPU, has_picture, readme_speed, speed_page, traffic_block
from bench.step_table import row_from
from bench.timing import Spread, StepRow


def test_every_text_is_what_the_committed_files_say() -> None:
    for path, text in report.texts(load(report.RESULTS), report.ROOT).items():
        assert path.read_text() == text, f"{path.name} is not up to date: run python -m bench report"


def test_every_step_file_has_its_picture() -> None:
    for found in load(report.RESULTS).steps:
        path = report.ROOT / "docs" / f"{Path(found.name).stem}.png"
        assert path.stat().st_size > 10_000 if has_picture(found) else not path.exists()


def test_all_committed_results_are_read() -> None:
    """Every file is of a kind that the report knows."""
    results = load(report.RESULTS)
    names = {step.name for step in results.steps} | {host.name for host in results.hosts}
    names |= {name for name, _ in results.training}
    names |= {counted.name for counted in results.counters}
    others = {path.name for path in report.RESULTS.glob("*.json")} - names
    assert results.traffic is not None and results.demo and others == {"traffic.json", DEMO}
    assert all(row.error or row.device_s for found in results.steps for row in found.rows)


# -- made-up results -------------------------------------------------------------------------------------------------


def row(model: str, contender: str, milliseconds: float | None, dtypes: str = "fp32") -> StepRow:
    """A step of a made-up GPU; None is a contender that failed."""
    found = StepRow(model, dtypes, contender, 161, 25_557_032, 28, True)
    if milliseconds is None:
        found.error = "ModuleNotFoundError: No module named 'x': pip install x"
        return found
    found.device_samples_s = [1e-3 * milliseconds * factor for factor in (0.9, 1.0, 1.1)]
    found.device_s, found.host_s = Spread.of(found.device_samples_s), Spread(1e-4, 1e-4, 1e-4)
    found.bytes_per_s = 28 * found.parameters / found.device_s.median
    found.peak_extra_bytes, found.launches = 0, 2
    return found


GPU = {
    "device": "Some GPU", "driver": "1.2", "multiprocessors": 132, "l2_bytes": 50 << 20, "torch": "2.13",
    "triton": "3.7", "date": "2030-01-02T03:04:05", "threads": 1,
}  # fmt: skip


def copy_results_of_cpus(folder: Path) -> None:
    """The committed files but those of GPUs."""
    for path in report.RESULTS.glob("*.json"):
        if "multiprocessors" not in json.loads(path.read_text()).get("environment", {}):
            (folder / path.name).write_text(path.read_text())


@pytest.fixture
def gpu_results(tmp_path: Path) -> Results:
    """The committed files of CPUs with one of a made-up GPU beside them."""
    rows = [
        row(model, contender, factor * (1 + 10 * i))
        for i, model in enumerate(("resnet50", "vit_b_16"))
        for contender, factor in ((BASELINE, 2.0), (ADAMW, 1.0), (FUSED, 0.5))
    ]
    rows.append(row("resnet50", "peer", None))
    saved = {
        "environment": GPU,
        "settings": {"plan": plan_in_use()},
        "copy_bytes_per_s": {"samples": [3e12, 4e12]},
        "steps": [asdict(some) for some in rows],
    }
    record.save(tmp_path / "some-gpu.json", saved)
    copy_results_of_cpus(tmp_path)
    return load(tmp_path)


def test_a_gpu_comes_first_and_ends_the_excuse(gpu_results: Results, tmp_path: Path) -> None:
    (tmp_path / "cpus").mkdir()
    copy_results_of_cpus(tmp_path / "cpus")
    assert NO_GPU in readme_speed(load(tmp_path / "cpus"))
    text = readme_speed(gpu_results)
    assert NO_GPU not in text and text.index("Some GPU, driver 1.2, torch 2.13, triton 3.7, 2030-01-02") < text.index(
        "threads"
    )
    assert f"| {FUSED} | 0.5 (0.50) | 5.5 (0.50) |" in text and f"| {BASELINE} | 2 (2.00) | 22 (2.00) |" in text
    assert f"| {ADAMW} | 1 | 11 |" in text, "against which a GPU's are held"
    assert "| peer |" not in text and "No figures of peer: [docs/speed.md](docs/speed.md) says why." in text


def test_a_later_file_shows_whom_an_earlier_one_has_not(gpu_results: Results) -> None:
    first = gpu_results.steps[0]
    rows = [row("resnet50", name, 3.0) for name in (ADAMW, FUSED, FOREACH)]
    later = replace(first, name="later.json", rows=rows)
    blocks = readme_speed(Results(steps=[first, later])).split("\n\n")
    of_later = blocks[1 + next(i for i, block in enumerate(blocks) if "later.json" in block)]
    assert [line.split("|")[1].strip() for line in of_later.splitlines()[2:]] == [ADAMW, FOREACH]
    assert "later.json" not in readme_speed(Results(steps=[first, replace(later, rows=rows[:2])]))


def test_many_lists_are_a_table_for_each_set_of_dtypes(gpu_results: Results) -> None:
    found = gpu_results.steps[0]
    for count, headers in ((3, ["resnet50 fp32"]), (4, ["resnet50 fp32", "resnet50 bf16"])):
        models = ("resnet50", "vit_b_16", "vit_l_16", "gpt2")[:count]
        rows = [row(model, ADAMW, 1.0, dtypes) for dtypes in ("fp32", "bf16") for model in models]
        text = readme_speed(Results(steps=[replace(found, rows=rows)]))
        first_cells = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("|  |")]
        assert first_cells == headers and text.count(HOW_TO_READ) == 1


def test_the_page_has_spread_failures_and_predictions(gpu_results: Results) -> None:
    page = speed_page(gpu_results)
    assert "- peer: ModuleNotFoundError: No module named 'x': pip install x" in page
    assert "read plus written: 4000.0 GB/s, the best of 2 samples (median 3500.0)" in page
    line = next(line for line in page.splitlines() if line.startswith("| resnet50 fp32 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # 28 bytes of 25.6 million parameters at 4 TB/s take 0.179 ms; mixed reads and writes and latencies make it more.
    most, least = (float(time) for time in cells[2].split(" to "))
    assert cells[1] == "28.7 to 28.0" and 0.179 / 0.86 <= least < most < 0.23 and cells[3] == "0.500"
    assert page.count("PREDICTED") == 2


def test_predictions_beside_a_measurement_of_another_plan(gpu_results: Results) -> None:
    """Windows of older files cannot be replayed: the plan in use now is, and the page says so."""
    found = gpu_results.steps[0]
    older = replace(found, plan={"chunk": 8192, "window_share": 0.75})
    pages = [speed_page(Results(steps=[file])) for file in (found, older)]
    tables = [[line for line in page.splitlines() if line.startswith("| resnet50 fp32 |")] for page in pages]
    assert tables[0] == tables[1] != []
    other = "of the plan in use now, which is another than the measured one"
    assert "predicts of that plan" in pages[0] and [other in page for page in pages] == [False, True]


def test_counters_and_targets_are_tables(gpu_results: Results) -> None:
    counted = [{"model": "resnet50", "dtypes": "fp32", "bytes_per_parameter": 28.328}]
    targets = [
        {"label": f"step {i}", "bound": "<= 1.15", "value": f"1.{i}", "passed": passed}
        for i, passed in enumerate((True, False, None))
    ]
    page = speed_page(
        Results(
            steps=[replace(gpu_results.steps[0], targets=targets)],
            counters=[CounterFile("tries-x.json", GPU, "What was counted.", counted)],
        )
    )
    assert "| resnet50 fp32 | 28.7 to 28.0 | 28.3 |" in page and "What was counted." in page
    for row in (
        "| step 0 | <= 1.15 | 1.0 | yes |",
        "| step 1 | <= 1.15 | 1.1 | NO |",
        "| step 2 | <= 1.15 | 1.2 | - |",
    ):
        assert row in page


def test_training_is_a_table() -> None:
    model = {"model": "gpt2", "size": "small", "contender": FUSED}
    spreads = {
        "step_s": {"median": 0.2, "p10": 0.1, "p90": 0.3},
        "optimizer_s": {"median": 0.02, "p10": 0.0, "p90": 0.0},
    }
    nothing = {"step_s": None, "optimizer_s": None, "peak_bytes": None, "parameters": 0}
    steps = [
        {**model, **spreads, "mode": "eager", "peak_bytes": 3 << 20, "parameters": 4_000_000, "error": None},
        {**model, **nothing, "mode": "graph", "error": "RuntimeError: a CPU has no CUDA graphs"},
    ]
    saved = {"environment": GPU, "settings": {"peak_of_steps": 2}, "training_steps": steps}
    page = speed_page(Results(training=[("train-x.json", saved)]))
    assert f"| gpt2 small, 4.0 million parameters | {FUSED} | eager | 200.00 | 10 % | 3 |" in page
    of_before = speed_page(Results(training=[("train-x.json", {**saved, "settings": {}})]))
    assert f"{FUSED} | eager | 200.00 | 10 % | - |" in of_before, "the peak of a first step, without state"
    assert f"- gpt2 small, {FUSED}, graph: RuntimeError: a CPU has no CUDA graphs" in page


def test_pictures(gpu_results: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.report.plots import draw, figure_of

    found = gpu_results.steps[0]
    (of_the_cpu,) = gpu_results.hosts
    of_the_gpu = replace(of_the_cpu, environment=GPU)
    figure = figure_of(found, [of_the_cpu, of_the_gpu])
    time, bandwidth, host = figure.axes
    assert figure.get_suptitle() == "Some GPU, fp32"
    lines = {line.get_label(): line for line in time.get_lines()}
    assert list(lines) == [FUSED, ADAMW, BASELINE]
    assert list(lines[FUSED].get_ydata()) == pytest.approx([0.5, 5.5])
    assert [label for line in bandwidth.get_lines() if "roofline" in (label := str(line.get_label()))]
    assert len(host.get_lines()) == len(lines) + 1, "another device's host times are in its own picture"
    assert len(host.get_legend().get_texts()) == 1, "the others are in the figure's legend"
    paths = list(draw(gpu_results, tmp_path))
    names = [path.name for path in paths]
    assert names[0] == "some-gpu.png" and "micro-cpu.png" in names, "of files with more than one list"
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_nothing_predicted_yet() -> None:
    assert "Nothing was predicted yet" in traffic_block(Results())


def test_a_row_of_before_is_still_read() -> None:
    """Fields that a later version adds have defaults."""
    saved: dict[str, Any] = json.loads(json.dumps(asdict(row("resnet50", FOREACH, 1.0))))
    del saved["launches"]
    assert row_from(saved).launches is None


# -- the command -----------------------------------------------------------------------------------------------------


def test_blocks_between_markers() -> None:
    begin, end = report.BEGIN.format("x"), report.END.format("x")
    assert report.replaced(f"a\n{begin}\nold\n{end}\nb", "x", "new\n") == f"a\n{begin}\n\nnew\n\n{end}\nb"
    for wrong in ("", begin, f"{end} {begin}", f"{begin}{end}{begin}{end}"):
        with pytest.raises(ValueError, match="one pair of markers"):
            report.replaced(wrong, "x", "new")


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu_results: Results
) -> None:
    assert main(["report", "--check"]) == 0
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/design.md", "docs/speed.md"):
        (tmp_path / name).write_text((report.ROOT / name).read_text())
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert main(["report", "--check"]) == 1
    assert "not up to date: README.md; run python -m bench report" in capsys.readouterr().err
    assert main(["report", "--no-plots"]) == 0
    assert "Some GPU" in (tmp_path / "README.md").read_text()
    assert main(["report", "--check"]) == 0
