"""Training steps: models, modes, rows that say why they have no figures; and the command line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.compiled import CompileBudget
from bench.contenders import ADAMW, FOREACH, FUSED
from bench.machine import HostMachine
from bench.train import train_table
from bench.train.models import TASKS
from bench.train.steps import OPTIMIZERS, OptimizerStep, TrainingStep, TrainRow, time_training

NO_BUDGET = CompileBudget(0, 0)


class Recorder(HostMachine):
    """A machine whose graphs are the steps themselves, and that counts memory."""

    def capture(self, warm_up, work):  # type: ignore[no-untyped-def]
        warm_up()
        return work

    def peak_bytes(self, work):  # type: ignore[no-untyped-def]
        work()
        return 5 << 20


def test_the_full_models_have_the_published_size() -> None:
    """GPT-2 small and ViT-B/16, but for what torchvision counts otherwise: nothing."""
    found = {}
    for name, task in TASKS.items():
        with torch.device("meta"):
            found[name] = sum(p.numel() for p in task.build(task.sizes["full"]).parameters())
    assert found == {"gpt2": 124_439_808, "vit": 86_567_656}


@pytest.mark.parametrize("name", TASKS)
def test_a_model_starts_at_the_loss_of_a_guess_and_learns(name: str, seed: int) -> None:
    task = TASKS[name]
    size = task.sizes["tiny"]
    model, inputs = task.build(size), task.inputs(size, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(*inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(size.classes)) < 1.5
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


def test_a_token_does_not_see_the_future(seed: int) -> None:
    size = TASKS["gpt2"].sizes["tiny"]
    model = TASKS["gpt2"].build(size)
    tokens, targets = TASKS["gpt2"].inputs(size, torch.device("cpu"))
    first = torch.full_like(targets, -100)
    first[:, 0] = targets[:, 0]
    changed = tokens.clone()
    changed[:, 1:] = (changed[:, 1:] + 1) % size.classes
    assert torch.equal(model(tokens, first), model(changed, first))
    assert not torch.equal(model(tokens, targets), model(changed, targets))


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_every_optimizer_is_timed(mode: str) -> None:
    """But for the kernels, which are slow here; AdamW is capturable on GPUs only."""
    names = [name for name in OPTIMIZERS if name != FUSED and (mode == "eager" or not name.startswith("AdamW"))]
    rows = time_training(Recorder(), "gpt2", "tiny", mode, names, 2, NO_BUDGET)
    assert [row.contender for row in rows] == names
    for row in rows:
        assert row.error is None and len(row.step_samples_s) == 2 and row.step_s is not None and row.step_s.median > 0
        assert row.optimizer_s is not None and row.optimizer_s.median > 0 and row.peak_bytes == 5 << 20
        assert row.tensors == 16 and row.parameters == sum(
            p.numel() for p in TASKS["gpt2"].build(TASKS["gpt2"].sizes["tiny"]).parameters()
        )


def test_the_peak_is_that_of_a_step_with_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """State comes in the first step, when the activations have gone."""
    calls: list[str] = []

    class Counting(Recorder):
        def peak_bytes(self, work):  # type: ignore[no-untyped-def]
            calls.clear()
            work()
            assert calls == ["step", "step"]
            return 7 << 20

    monkeypatch.setitem(OPTIMIZERS, "counts", lambda model, capturable: lambda loss: calls.append("step"))
    (row,) = time_training(Counting(), "vit", "tiny", "eager", ["counts"], 2, NO_BUDGET)
    assert row.error is None and row.peak_bytes == 7 << 20


@pytest.mark.parametrize("fails", [False, True])
def test_the_share_of_a_captured_step_is_a_graph_of_the_optimizer_alone(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along the same gradients. One that cannot be captured costs the share, not the step's time."""
    captured: list[list[str]] = []

    class Capturing(Recorder):
        def capture(self, warm_up, work):  # type: ignore[no-untyped-def]
            warm_up()
            calls.clear()
            work()
            captured.append(list(calls))
            if len(captured) == 3 and fails:
                raise RuntimeError("not in a graph")
            return work

    calls: list[str] = []
    monkeypatch.setitem(OPTIMIZERS, "counts", lambda model, capturable: lambda loss: calls.append("step"))
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: calls.append("backward"))
    (row,) = time_training(Capturing(), "vit", "tiny", "graph", ["counts"], 2, NO_BUDGET)
    assert captured == [["backward", "step"], ["backward", "step"], ["step"]], "the first is of the tiny model"
    assert row.step_s is not None and row.error == ("RuntimeError: not in a graph" if fails else None)
    assert (row.optimizer_s is None) == fails
    text = train_table([row])
    assert "\ncounts " in text and ("counts failed: RuntimeError: not in a graph" in text) == fails


def test_what_libraries_allocate_once_is_allocated_by_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails is forgotten: what is wrong comes again."""
    sizes: list[int] = []

    def optimizer(model: torch.nn.Module, capturable: bool) -> OptimizerStep:
        sizes.append(sum(p.numel() for p in model.parameters()))
        if len(sizes) == 1:
            raise RuntimeError("of the tiny one")
        return lambda loss: None

    monkeypatch.setitem(OPTIMIZERS, "counts", optimizer)
    (row,) = time_training(Recorder(), "vit", "small", "eager", ["counts"], 1, NO_BUDGET)
    assert row.error is None and sizes[0] < 10_000 < row.parameters == sizes[1] and len(sizes) == 2


def test_a_whole_step_moves_the_weights_and_all_start_alike() -> None:
    def build(name: str) -> TrainingStep:
        return TrainingStep(TASKS["vit"], "tiny", HostMachine(), name, "eager", NO_BUDGET)

    one, other = build(ADAMW), build(FOREACH)
    before = [p.detach().clone() for p in one.model.parameters()]
    assert all(map(torch.equal, before, other.model.parameters()))
    assert all(map(torch.equal, one.inputs, other.inputs))
    one.whole()
    assert not any(torch.equal(a, b) for a, b in zip(before, one.model.parameters(), strict=True) if b.std() > 0)
    kept = [p.grad for p in one.model.parameters()]
    one.optimizer_alone()
    assert all(a is p.grad for a, p in zip(kept, one.model.parameters(), strict=True))


def test_a_whole_step_with_the_kernels() -> None:
    pytest.importorskip("triton")
    training = TrainingStep(TASKS["vit"], "tiny", HostMachine(), FUSED, "eager", NO_BUDGET)
    weight = training.model.get_parameter("head.weight")
    before = weight.detach().clone()
    training.whole()
    assert not torch.equal(before, weight)


def test_why_there_are_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    (graph,) = time_training(HostMachine(), "vit", "tiny", "graph", [FOREACH], 2, NO_BUDGET)
    assert graph.error == "RuntimeError: a CPU has no CUDA graphs" and graph.step_s is None
    (spent,) = time_training(HostMachine(), "vit", "tiny", "compile", [FOREACH], 2, NO_BUDGET)
    assert spent.error == "RuntimeError: left out: the time for torch.compile in this run is spent"
    monkeypatch.setattr(torch, "compile", lambda model: lambda *inputs: time.sleep(5))
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # it takes seconds to load
    (slow,) = time_training(HostMachine(), "vit", "tiny", "compile", [FOREACH], 2, CompileBudget(9, 0.2))
    assert slow.error is not None and "was not done with it after 0 s" in slow.error
    text = train_table([graph, TrainRow("vit", "tiny", "x", "eager", error="E: y")])
    assert text == f"{FOREACH} failed: {graph.error}\nx failed: E: y"


def test_compiled_models_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that does nothing."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    budget = CompileBudget(60, 60)
    (row,) = time_training(HostMachine(), "vit", "tiny", "compile", [FOREACH], 2, budget)
    assert row.error is None and row.optimizer_s is not None and budget.left_s < 60


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deeper" / "train.json"
    options = ["--size", "tiny", "--repeats", "2", "--optimizers", ADAMW, FOREACH, "--json", str(out)]
    threads = ["--threads", str(torch.get_num_threads())]
    assert main(["train", *options, *threads]) == 0
    saved = json.loads(out.read_text())
    assert [(row["model"], row["contender"]) for row in saved["training_steps"]] == [
        (model, name) for model in TASKS for name in (ADAMW, FOREACH)
    ]
    assert saved["environment"]["torch"] == torch.__version__ and saved["settings"]["size"] == "tiny"
    assert all(row["step_s"]["median"] > 0 and row["error"] is None for row in saved["training_steps"])
    printed = capsys.readouterr().out
    assert "gpt2 tiny, eager: 16 tensors" in printed and "share" in printed
    with pytest.raises(SystemExit):
        main(["train", "--repeats", "0"])
