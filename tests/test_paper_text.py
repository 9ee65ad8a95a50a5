"""TREC-6, RTE and IMDb: their files, from small ones made here; tokens; depth groups; a run from scratch."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench.paper import cli
from bench.paper.problem import Options
from bench.paper.tasks import TASKS, experiment_name, with_model
from bench.paper.text import encode, layer_groups, logits, tokenized, train_tokenizer
from bench.paper.text_files import TREC_LABELS, Texts, read_imdb, read_rte, read_trec6

TREC_TRAIN = "DESC:manner How did serfdom develop ?\nHUM:ind Who was The Prince ?\nNUM:date When was \xf0 born ?\n" * 4
RTE_HEADER = "index\tsentence1\tsentence2\tlabel\n"


def write_trec6(folder: Path) -> None:
    (folder / "train_5500.label").write_bytes(TREC_TRAIN.encode("latin-1"))
    (folder / "TREC_10.label").write_text("LOC:city What city is the capital ?\nABBR:exp What is NASA ?\n" * 3)


def test_trec6(tmp_path: Path) -> None:
    write_trec6(tmp_path)
    train, test = read_trec6(tmp_path)
    assert train.rows[:2] == [("How did serfdom develop ?",), ("Who was The Prince ?",)]
    assert train.rows[2] == ("When was \xf0 born ?",), "the files are latin-1"
    assert [TREC_LABELS[i] for i in train.labels[:3]] == ["DESC", "HUM", "NUM"]
    assert [TREC_LABELS[i] for i in test.labels[:2]] == ["LOC", "ABBR"]
    (tmp_path / "TREC_10.label").write_text("HUM:ind Who ?\nWho was that\n")
    with pytest.raises(SystemExit, match=r"TREC_10\.label, line 2"):
        read_trec6(tmp_path)


def test_rte(tmp_path: Path) -> None:
    """Quotation marks are characters like others: as CSV the first two rows would be one."""
    rows = '0\t"No weapons\tNone.\tnot_entailment\n1\tA "word\tA word.\tentailment\n'
    (tmp_path / "train.tsv").write_text(RTE_HEADER + rows)
    (tmp_path / "dev.tsv").write_text(RTE_HEADER + rows)
    train, dev = read_rte(tmp_path)
    assert train == dev == Texts([('"No weapons', "None."), ('A "word', "A word.")], [1, 0])
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "RTE.zip", "w") as zipped:
        for name in ("train.tsv", "dev.tsv"):
            zipped.write(tmp_path / name, f"RTE/{name}")
    assert read_rte(tmp_path / "zipped") == (train, dev)
    (tmp_path / "dev.tsv").write_text(RTE_HEADER + "0\tonly two cells\n")
    with pytest.raises(SystemExit, match=r"dev\.tsv, line 2"):
        read_rte(tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_imdb(packed: bool, tmp_path: Path) -> None:
    folders = [f"{part}/{label}" for part in ("train", "test") for label in ("neg", "pos")]
    reviews = {f"{folder}/{i}_7.txt": f"{folder} {i}" for folder in folders for i in range(4)}
    reviews["train/unsup/0_0.txt"] = "not labelled"
    with tarfile.open(tmp_path / "aclImdb_v1.tar.gz", "w:gz") as tar:
        for name, text in reviews.items():
            member = tarfile.TarInfo(f"aclImdb/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    if not packed:
        with tarfile.open(tmp_path / "aclImdb_v1.tar.gz") as tar:
            tar.extractall(tmp_path, filter="data")
        (tmp_path / "aclImdb_v1.tar.gz").unlink()
    train, test = read_imdb(tmp_path)
    assert train.labels == test.labels == [0, 0, 1, 1, 0, 0, 1, 1]
    assert test.rows[:3] == [("test/neg 0",), ("test/neg 1",), ("test/pos 0",)]


def test_vocabulary_is_of_the_training_set_and_the_same_every_time(tmp_path: Path) -> None:
    write_trec6(tmp_path)
    train, _ = read_trec6(tmp_path)
    tokenizer, again = train_tokenizer(train), train_tokenizer(train)
    assert tokenizer.get_vocab() == again.get_vocab()
    assert {"serfdom", "how", "?"} <= set(tokenizer.get_vocab())
    assert not {"capital", "nasa", "How"} & set(tokenizer.get_vocab())
    inputs = tokenizer.model_input_names
    x = encode(tokenizer, train, inputs, length=6)
    assert x.shape == (12, 2, 6)
    words = tokenizer.convert_ids_to_tokens
    assert words(x[0, 0]) == ["[CLS]", "how", "did", "serfdom", "develop", "[SEP]"], "cut to six"
    pair = encode(tokenizer, Texts([("how ?", "who ?")], [0]), inputs, length=9)
    assert words(pair[0, 0]) == ["[CLS]", "how", "?", "[SEP]", "who", "?", "[SEP]", "[PAD]", "[PAD]"]
    assert pair[0, 1].tolist() == [1] * 7 + [0] * 2


def scratch(folder: Path, seed: int) -> Any:
    write_trec6(folder)
    return TASKS["trec6"].prepare(seed, Options(data_dir=folder, model="scratch"))


def test_padding_that_is_left_out_changes_nothing(tmp_path: Path, seed: int) -> None:
    problem = scratch(tmp_path, seed)
    model = problem.model.eval()
    x = problem.data.x_test
    short = problem.logits(model, x)
    whole = model(input_ids=x[:, 0].long(), attention_mask=x[:, 1].long()).logits
    assert x.shape == (6, 2, 128) and short.shape == (6, 6)
    torch.testing.assert_close(short, whole, atol=1e-5, rtol=1e-4)


def test_depth_groups_are_the_papers(tmp_path: Path, seed: int) -> None:
    from transformers import BertConfig, BertForSequenceClassification, DistilBertConfig
    from transformers import DistilBertForSequenceClassification as DistilBert

    sizes = {"vocab_size": 20, "dim": 8, "hidden_dim": 8, "n_heads": 2}
    groups = layer_groups(DistilBert(DistilBertConfig(n_layers=6, **sizes)))
    assert [names[0].split(".weight")[0] for names in groups] == [
        "distilbert.embeddings.word_embeddings",
        "distilbert.transformer.layer.0.attention.q_lin",
        "distilbert.transformer.layer.2.attention.q_lin",
        "distilbert.transformer.layer.4.attention.q_lin",
        "pre_classifier",
        "classifier",
    ]
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(config)
    groups = layer_groups(model)
    assert [len(names) for names in groups] == [5, 32, 16, 2, 2], "embeddings, layers 0-1, layer 2, pooler, classifier"
    assert sorted(name for names in groups for name in names) == sorted(name for name, _ in model.named_parameters())


def test_a_saved_model_is_loaded_from_its_folder(tmp_path: Path, seed: int) -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    write_trec6(tmp_path)
    folder = tmp_path / "model"
    tokenizer = train_tokenizer(read_trec6(tmp_path)[0])
    tokenizer.save_pretrained(folder)
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=8, hidden_dim=8, n_heads=2, n_layers=2)
    saved = DistilBertForSequenceClassification(config)
    saved.half().save_pretrained(folder)
    problem = TASKS["trec6"].prepare(seed, Options(data_dir=tmp_path, model=str(folder)))
    body = "distilbert.embeddings.word_embeddings.weight"
    assert torch.equal(problem.model.get_parameter(body), saved.get_parameter(body).float()), "float32 from float16"
    assert problem.model.get_parameter("classifier.weight").shape == (6, 8)


def test_a_tokenizer_without_padding_is_named(tmp_path: Path) -> None:
    write_trec6(tmp_path)
    texts, _ = read_trec6(tmp_path)
    tokenizer = train_tokenizer(texts)
    tokenizer.pad_token = None
    with pytest.raises(SystemExit, match="has no token for padding"):
        encode(tokenizer, texts, ("input_ids",), 8)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    write_trec6(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"--model .*empty: transformers cannot load it"):
        TASKS["trec6"].prepare(0, Options(data_dir=tmp_path, model=str(tmp_path / "empty")))


def test_learning_rates_fit_the_model_unless_told_otherwise() -> None:
    task = TASKS["trec6"]
    pretrained, new = Options(), Options(model="scratch")
    assert with_model(task, pretrained, None) == with_model(task, pretrained, "fine-tuning") == task
    assert (task.settings.adam, task.settings.dals, task.published) == (3e-5, 3e-4, "trec6")
    from_scratch = with_model(task, new, None)
    assert (from_scratch.settings.adam, from_scratch.settings.dals, from_scratch.published) == (3e-4, 0.03, None)
    crossed = with_model(task, new, "fine-tuning")
    assert (crossed.settings, crossed.published) == (task.settings, None)
    assert experiment_name("trec6", TASKS["trec6"], pretrained, None, 10) == "trec6"
    assert experiment_name("trec6", TASKS["trec6"], new, None, 10) == "trec6-scratch"
    assert experiment_name("trec6", TASKS["trec6"], new, "fine-tuning", 3) == "trec6-scratch-fine-tuning-rates-3-epochs"
    assert experiment_name("synthetic-a", TASKS["synthetic-a"], new, "scratch", 80) == "synthetic-a"


def test_command_line_trains_from_scratch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trec6(tmp_path)
    options = ["--model", "scratch", "--data-dir", str(tmp_path), "--epochs", "2", "--results", str(tmp_path / "out")]
    assert cli.main(["trec6", *options, "--strategies", "DALS", "SAM+Discriminative"]) == 0
    assert "TREC-6 from scratch, 2 epochs" in capsys.readouterr().out
    assert (tmp_path / "out" / "trec6-scratch-2-epochs" / "sam-discriminative.json").exists()


def test_inputs_are_handed_over_by_name(seed: int) -> None:
    class Net(torch.nn.Module):
        def forward(self, **named: torch.Tensor) -> Any:
            assert set(named) == {"attention_mask", "input_ids"}
            return type("Output", (), {"logits": named["input_ids"] * named["attention_mask"]})

    x = torch.tensor([[[1, 1, 0, 0], [5, 6, 9, 9]], [[1, 1, 1, 0], [7, 8, 4, 9]]], dtype=torch.int32)
    out = logits(["attention_mask", "input_ids"], 9, Net(), x)
    assert out.tolist() == [[5, 6, 0], [7, 8, 4]]
    tokenized.cache_clear()
