"""Runs of the paper's benchmark: what is recorded, that killed ones go on to the same bits, the table."""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import published
from bench.paper import cli
from bench.paper.problem import Options, Problem, layers_by_child, nudge
from bench.paper.results import Experiment, Record
from bench.paper.runner import Plan, run_all
from bench.paper.slug import slug
from bench.paper.strategies import STRATEGIES
from bench.paper.synthetic import DraftMLP, load_synthetic_b, load_synthetic_t
from bench.paper.tables import mean_and_deviation, results_table
from bench.paper.tasks import TASKS
from bench.paper.training import Curves, RunResult, batches, count_hits
from tests import paper_run
from tests.exact import same


def plan(strategies: list[str], seeds: list[int], epochs: int = 3) -> Plan:
    return Plan(
        task_name="small",
        task=paper_run.TASK,
        strategies=strategies,
        seeds=seeds,
        epochs=epochs,
        options=Options(),
        device=torch.device("cpu"),
        threads=1,
    )


def without_time(checkpoint: Path) -> Any:
    state = torch.load(checkpoint, weights_only=True)
    del state["curves"]["seconds"]
    return state


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and replacing of open files")
def test_a_killed_run_goes_on_to_the_same_bits(seed: int, tmp_path: Path) -> None:
    """Weights, optimizer, random numbers and curves; epochs take milliseconds, so kills fall anywhere."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.paper_run"])
    draw = random.Random(seed)
    epochs = 80
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    unbroken = context.Process(target=paper_run.run, args=("DALS", seed, whole, epochs))
    unbroken.start()
    reached = []
    for _ in range(3):
        process = context.Process(target=paper_run.run, args=("DALS", seed, broken, epochs))
        before = broken.stat().st_mtime_ns if broken.exists() else None
        process.start()
        while process.is_alive() and (not broken.exists() or broken.stat().st_mtime_ns == before):
            time.sleep(0.001)
        process.join(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode in (0, -9), "an error of the run itself"
        reached.append(len(without_time(broken)["curves"]["loss"]))
    assert reached == sorted(reached) and 0 < reached[0] < epochs
    paper_run.run("DALS", seed, broken, epochs)
    unbroken.join()
    assert unbroken.exitcode == 0
    assert same(without_time(whole), without_time(broken))


def test_other_random_numbers_would_end_in_other_bits(seed: int, tmp_path: Path) -> None:
    """Negative control: the comparison sees a run resumed with the wrong random state."""
    paper_run.run("DALS", seed, tmp_path / "whole")
    for name in ("right", "wrong"):
        with pytest.raises(paper_run.Killed):
            paper_run.run("DALS", seed, tmp_path / name, kill_after=5)
    state = torch.load(tmp_path / "wrong", weights_only=True)
    state["random"]["cpu"] = torch.manual_seed(seed + 1).get_state()
    torch.save(state, tmp_path / "wrong")
    for name in ("right", "wrong"):
        paper_run.run("DALS", seed, tmp_path / name)
    whole, right, wrong = (without_time(tmp_path / name)["model"] for name in ("whole", "right", "wrong"))
    assert same(whole, right) and not same(whole, wrong)


def test_a_checkpoint_of_other_settings_is_refused(seed: int, tmp_path: Path) -> None:
    with pytest.raises(paper_run.Killed):
        paper_run.run("DALS", seed, tmp_path / "run", kill_after=2)
    with pytest.raises(SystemExit, match="of a run with other settings; delete it"):
        paper_run.run("DALS", seed, tmp_path / "run", epochs=5)


def test_runs_of_other_settings_are_kept_apart(seed: int, tmp_path: Path) -> None:
    experiment = Experiment(tmp_path / "small")
    run_all(plan(["DALS"], [seed]), experiment)
    with pytest.raises(SystemExit, match=r"dals\.json holds runs with epochs 3, not 4"):
        run_all(replace(plan(["DALS"], [seed + 1]), epochs=4), experiment)
    assert experiment.seeds("DALS") == [seed] and not list(experiment.folder.glob("*.checkpoint"))


def test_runs_with_other_test_rows_are_kept_apart(seed: int, tmp_path: Path) -> None:
    """As of CIFAR-10's whole test file and of its first 1000 images."""
    experiment = Experiment(tmp_path / "small")
    run_all(plan(["DALS"], [seed]), experiment)
    task, settings = paper_run.TASK, plan(["DALS"], [seed + 1])

    def fewer(seed: int, options: Options) -> Problem:
        problem = task.prepare(seed, options)
        data = problem.data
        return replace(problem, data=replace(data, x_test=data.x_test[:-2], y_test=data.y_test[:-2]))

    with pytest.raises(SystemExit, match=r"dals\.json holds runs with \d+ test rows, not \d+"):
        run_all(replace(settings, task=replace(task, prepare=fewer)), experiment)
    assert experiment.seeds("DALS") == [seed]


def test_a_run_that_another_process_has_finished_is_kept(seed: int, tmp_path: Path) -> None:
    experiment = Experiment(tmp_path / "small")
    run_all(plan(["DALS"], [seed]), experiment)
    before = experiment.file("DALS").read_text()
    result = paper_run.run("DALS", seed, experiment.checkpoint("DALS", seed), 3)
    experiment.add("DALS", plan(["DALS"], [seed]).about("DALS"), result, {})
    assert experiment.file("DALS").read_text() == before and not list(experiment.folder.glob("*.checkpoint"))


def test_processes_that_finish_at_once_lose_nothing(seed: int, tmp_path: Path) -> None:
    experiment = Experiment(tmp_path / "small")
    result = paper_run.run("DALS", seed, tmp_path / "one", 1)
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=experiment.add, args=("DALS", {"strategy": "DALS"}, replace(result, seed=number), {}))
        for number in range(8)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert experiment.seeds("DALS") == list(range(8))


def test_finished_runs_are_kept_and_not_done_again(tmp_path: Path, seed: int) -> None:
    experiment = Experiment(tmp_path / "small")
    run_all(plan(["DALS", "Fixed SGD"], [seed]), experiment)
    before = (experiment.file("DALS")).read_text()
    run_all(plan(["DALS", "Fixed SGD"], [seed, seed + 1]), experiment)
    assert experiment.seeds("DALS") == experiment.seeds("Fixed SGD") == [seed, seed + 1]
    content, earlier = json.loads(experiment.file("DALS").read_text()), json.loads(before)
    assert content["runs"][0] == earlier["runs"][0]
    assert (content["strategy"], content["task"], content["epochs"]) == ("DALS", "small", 3)
    assert {"date", "device", "torch", "pytorch_optimizer", "threads"} <= set(content["runs"][0]["environment"])
    assert sum(content["runs"][0]["extra"]["phase_counts"]) == 3 * 7
    assert not list(experiment.folder.glob("*.checkpoint")) and not list(experiment.folder.glob("*.tmp"))


def test_a_run_equals_itself_and_depends_on_its_seed(tmp_path: Path, seed: int) -> None:
    runs = [paper_run.run("AdamW", seed + shift, tmp_path / str(i), 3) for i, shift in enumerate((0, 0, 1))]
    assert runs[0].curves.loss == runs[1].curves.loss != runs[2].curves.loss


def test_a_nudge_changes_one_bit_of_one_weight(seed: int) -> None:
    plain, nudged = (paper_run.prepare(seed, Options()).model for _ in range(2))
    nudge(nudged, 7)
    pairs = list(zip(plain.parameters(), nudged.parameters(), strict=True))
    differences = [(a.view(torch.int32) - b.view(torch.int32)).abs() for a, b in pairs]
    assert sum(int(d.sum()) for d in differences) == 1
    assert differences[0].view(-1)[7] == 1
    weights = next(plain.parameters())
    weights.data[0] = 0  # as the row of a padding token
    before = weights.detach().clone()
    nudge(plain, 0)
    assert weights.detach()[0].count_nonzero() == 0 and (weights.detach() != before).sum() == 1


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path)
    experiment.file("DALS").write_text('{"strategy": "DALS", "runs": [{"seed": 1}]}')
    for read in (experiment.records, lambda strategy: experiment.check(strategy, {})):
        with pytest.raises(SystemExit, match=r"dals\.json is not a results file"):
            read("DALS")
    experiment.file("DALS").write_text("{torn")
    with pytest.raises(SystemExit, match=r"dals\.json is not a results file"):
        experiment.check("DALS", {})


def record(hits_even: list[int], hits_odd: list[int], test_rows: int, **other: Any) -> Record:
    values = {"strategy": "DALS", "seed": 42, "seconds": [1.0], "loss": [0.1], "extra": {}, "environment": {}} | other
    return Record(hits_even=hits_even, hits_odd=hits_odd, test_rows=test_rows, **values)


def test_best_last_and_cross_picked_accuracy() -> None:
    run = record([50, 80, 70], [60, 40, 90], 201)  # 101 even rows, 100 odd ones
    assert run.accuracy == pytest.approx([110 / 2.01, 120 / 2.01, 160 / 2.01])
    assert run.best == run.last == pytest.approx(160 / 2.01)
    # The even rows pick the second epoch, the odd ones the third.
    assert run.cross_picked == pytest.approx((40 / 100 + 70 / 101) * 50)
    assert run.first_epochs((55, 70, 90)) == [2, 3, None]


def test_hits_are_those_of_even_and_odd_rows(seed: int) -> None:
    problem = paper_run.prepare(seed, Options())
    x, y = problem.data.x_test, problem.data.y_test
    right = problem.model.eval()(x).argmax(dim=1) == y
    even, odd = count_hits(problem, torch.device("cpu"))
    assert (even, odd) == (int(right[::2].sum()), int(right[1::2].sum()))


def test_batches_of_one_permutation(seed: int) -> None:
    data = paper_run.prepare(seed, Options()).data
    task = replace(paper_run.TASK, whole_permutation=True)
    torch.manual_seed(seed)
    order = torch.randperm(200)
    torch.manual_seed(seed)
    own = list(batches(task, data, torch.device("cpu")))
    assert [len(y) for _, y in own] == [32] * 6 + [8]
    assert torch.equal(torch.cat([x for x, _ in own]), data.x_train[order])


def test_synthetic_b_and_t_follow_the_protocol(seed: int) -> None:
    data = load_synthetic_b(seed)
    torch.manual_seed(seed)
    clean = torch.randn(8000, 64)
    x, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    assert torch.equal(y, clean[:, :10].argmax(dim=1))
    assert (x - clean).std().item() == pytest.approx(0.1, abs=0.001)
    assert data.x_train.shape == (6400, 64) and data.x_test.shape == (1600, 64)

    data = load_synthetic_t(seed)
    assert torch.equal(data.y_train, data.x_train[:, :10].argmax(dim=1))
    assert data.x_train[:, :10].std().item() == pytest.approx(3, rel=0.02)
    assert data.x_train[:, 10:].std().item() == pytest.approx(0.1, rel=0.01)
    assert [len(names) for names in layers_by_child(DraftMLP())] == [2, 2, 2, 2]


def test_table_sets_measured_beside_published(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path)
    for seed, last in ((published.SEED, 99), (published.SEED + 100, 95)):
        curves = Curves([30, 48], [32, last - 48], [2.0, 1.0], [0.5, 0.5])
        experiment.add("DALS", {"strategy": "DALS"}, RunResult(seed, 100, curves, {}), {})
    line = results_table(experiment, TASKS["synthetic-a"], 80).splitlines()[2].replace(" ± ", "±").split()
    assert line == ["DALS", "98.0", "99.00", *["97.00±2.83"] * 3, "-", "1/2/2/2", "2/2/3/3", "2", "1"]
    shorter = results_table(experiment, TASKS["synthetic-a"], 40).splitlines()[2].split()
    assert shorter[1] == "-", "nothing is published for another number of epochs"


def test_mean_and_deviation() -> None:
    assert mean_and_deviation([1, 2, 3]) == "2.00 ± 1.00"
    assert mean_and_deviation([2.5]) == "2.50"


def test_files_of_strategies_differ() -> None:
    assert len({slug(name) for name in STRATEGIES}) == len(STRATEGIES)
    assert slug("STLR+Discriminative (corrected)") == "stlr-discriminative-corrected"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synthetic-b", "--strategies", "Sgd"], "neither a group"),
        (["synthetic-b", "--epochs", "0"], "--epochs must be at least 1"),
        (["synthetic-b", "--seeds", "0"], "--seeds must be at least 1"),
        (["synthetic-b", "--nudge", "-1"], "--nudge must be at least 0"),
        (["synthetic-b", "--device", "nowhere"], "--device: 'nowhere' cannot be used"),
        (["synthetic-b", "--rates", "fine-tuning"], "--model and --rates are for texts, and synthetic-b is none"),
        (["mnist", "--model", "scratch"], "--model and --rates are for texts, and mnist is none"),
        (["synthetic-c"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_command_line_trains_and_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "TASKS", {"small": paper_run.TASK})
    options = ["--epochs", "2", "--results", str(tmp_path), "--strategies", "DALS", "corrected", "DALS"]
    assert cli.main(["small", *options]) == 0
    out = capsys.readouterr().out
    names = [line.split("  ")[0] for line in out.splitlines()[5:9]]
    assert names == ["DALS", "SGDR (corrected)", "STLR+Discriminative (corrected)", "DALS-Acc (corrected)"]
    assert len(list((tmp_path / "small-2-epochs").glob("*.json"))) == 4
