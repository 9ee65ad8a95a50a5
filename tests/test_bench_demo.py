"""The demonstration's pure parts: data, batches, first epochs, published numbers, table."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bench import published
from bench.strategies import STRATEGIES
from bench.table import format_epochs, format_table, reading_notes, results_table
from bench.tasks import TASKS, SyntheticMLP, load_synthetic_a
from bench.training import Run, first_epochs, shuffled_batches
from fused_dals import DALS, infer_depths


def test_synthetic_a_follows_the_protocol() -> None:
    data = load_synthetic_a(42)
    assert data.x_train.shape == (20_000, 20)
    assert data.x_test.shape == (2_000, 20)
    first = data.x_train[:10_000]
    second = data.x_train[10_000:]
    assert torch.equal(data.y_train[:10_000], (first[:, :5].sum(1) > 0).long())
    product_rule = second[:, 0] * second[:, 1] + second[:, 2] * second[:, 3] > 0
    assert torch.equal(data.y_train[10_000:], product_rule.long())
    assert torch.equal(data.y_test, (data.x_test[:, :5].sum(1) > 0).long())
    assert first.std().item() == pytest.approx(1, abs=0.01)
    assert second.std().item() == pytest.approx(0.5, abs=0.01)


def test_synthetic_a_draws_from_two_seeds() -> None:
    data = load_synthetic_a(7)
    torch.manual_seed(7)
    assert torch.equal(data.x_train[:10_000], torch.randn(10_000, 20))
    assert torch.equal(data.x_test, torch.randn(2_000, 20))
    torch.manual_seed(8)
    assert torch.equal(data.x_train[10_000:], 0.5 * torch.randn(10_000, 20))


def test_seed_fixes_the_model_too() -> None:
    weights = []
    for _ in range(2):
        load_synthetic_a(42)
        weights.append(SyntheticMLP().fc4.weight.detach())
    assert torch.equal(*weights)


def test_synthetic_model_has_the_published_depths() -> None:
    depths = infer_depths(SyntheticMLP(), granularity="children")
    expected = {"fc1": 0, "fc2": 1 / 3, "fc3": 2 / 3, "fc4": 1}
    assert depths == pytest.approx(
        {f"{layer}.{kind}": depth for layer, depth in expected.items() for kind in ("weight", "bias")}
    )


@pytest.mark.parametrize("name", TASKS)
def test_task_sizes(name: str) -> None:
    task = TASKS[name]
    for module in task.modules:
        pytest.importorskip(module)
    data = task.load(0)
    assert len(data.y_test) == task.test_rows
    assert task.build()(data.x_test[:3]).shape == (3, 10)
    assert data.y_train.dtype == torch.int64


def test_batches_are_those_of_a_shuffling_loader() -> None:
    data = load_synthetic_a(0)
    batches = shuffled_batches(data, 128)
    loader = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=128, shuffle=True)
    torch.manual_seed(3)
    own = list(batches)
    torch.manual_seed(3)
    expected = list(loader)
    assert len(batches) == len(own) == len(expected) == 157
    assert len(own[-1][0]) == 32
    for (x, y), (x_expected, y_expected) in zip(own, expected, strict=True):
        assert torch.equal(x, x_expected) and torch.equal(y, y_expected)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_takes_a_step(name: str) -> None:
    model = SyntheticMLP()
    optimizer = STRATEGIES[name](model, 157, 157 * 80)
    model(torch.randn(4, 20)).sum().backward()
    if isinstance(optimizer, DALS):
        optimizer.step(loss=torch.tensor(1.0))
    else:
        optimizer.step()


def test_first_epochs_count_from_one_and_may_be_missing() -> None:
    assert first_epochs([55, 72, 60, 80], (50, 60, 70, 80, 90)) == [1, 2, 2, 4, None]
    assert first_epochs([], (60,)) == [None]


def test_published_numbers() -> None:
    assert len(published.BEST_SYNTHETIC) == 18
    assert set(STRATEGIES) <= set(published.BEST_SYNTHETIC)
    best = {name: published.BEST_SYNTHETIC[name] for name in STRATEGIES}
    assert best == {"DALS": 98.0, "DALS-Fast": 97.8, "DALS-Acc": 97.8, "Fixed SGD": 97.9, "AdamW": 96.2}
    assert published.FIRST_EPOCHS["DALS"] == (2, 2, 3, 3)
    assert published.FIRST_EPOCHS["DALS-Fast"] == (1, 1, 2, 3)
    assert published.FIRST_EPOCHS["DALS-Acc"] == (1, 1, 1, 2)


def test_format_table_aligns() -> None:
    table = format_table(["name", "n"], [["a", "1"], ["longer", "23"]])
    assert table == "name     n\n------  --\na        1\nlonger  23"


def test_format_epochs() -> None:
    assert format_epochs([1, 2, None]) == "1/2/-"
    assert format_epochs([]) == "-"


def test_results_table_sets_measured_beside_published() -> None:
    runs = [Run("DALS", accuracy=[61.0, 97.956, 95.0], seconds=1.25), Run("Fixed SGD", accuracy=[50.0])]
    lines = [line.split() for line in results_table(runs, with_published=True).splitlines()[2:]]
    assert lines[0] == ["DALS", "97.96", "98.0", "95.00", "1/2/2/2", "2/2/3/3", "1.2"]
    assert lines[1] == ["Fixed", "SGD", "50.00", "97.9", "50.00", "-/-/-/-", "-", "0.0"]
    assert "published" not in results_table(runs, with_published=False)


def test_notes_say_how_much_was_trained_and_how_uncertain_it_is() -> None:
    notes = "\n".join(reading_notes(30, 80, 2000, with_published=True))
    assert "best of 80 epochs" in notes
    assert "30 of 80 epochs" in notes
    assert "0.32 points" in notes
    assert "on the test set" in notes
