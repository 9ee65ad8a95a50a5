"""Text classification with transformers: fine-tuning of a pretrained encoder, or a small one from scratch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.paper.files import need_folder
from bench.paper.problem import SCRATCH, Options, Problem
from bench.paper.text_files import IMDB_LABELS, RTE_LABELS, TREC_LABELS, Texts, read_imdb, read_rte, read_trec6
from bench.tasks import Data

LAYERS_PER_GROUP = 2

#: Of the encoder that is trained from scratch.
SCRATCH_LAYERS = 4
SCRATCH_WIDTH = 64
SCRATCH_HEADS = 4
SCRATCH_VOCABULARY = 20_000
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class TextTask:
    """A text data set: how to read it, its labels, the length in tokens that texts are cut to."""

    read: Callable[[Path], tuple[Texts, Texts]]
    labels: Sequence[str]
    length: int
    files: str


TEXT_TASKS = {
    "trec6": TextTask(read_trec6, TREC_LABELS, 128, "train_5500.label and TREC_10.label"),
    "rte": TextTask(read_rte, RTE_LABELS, 128, "train.tsv and dev.tsv of GLUE's RTE"),
    "imdb": TextTask(read_imdb, IMDB_LABELS, 256, "aclImdb or aclImdb_v1.tar.gz"),
}


def prepare_text(name: str, seed: int, options: Options) -> Problem:
    """The task's tokenized texts and a net for them, drawn with torch's global generator from `seed`."""
    task = TEXT_TASKS[name]
    folder = need_folder(options.data_dir, task.files)
    data, inputs, tokenizer = tokenized(name, folder, options.model)
    torch.manual_seed(seed)
    model = build_model(options.model, tokenizer, len(task.labels), task.length)
    return Problem(data, model, layer_groups(model), partial(logits, inputs, tokenizer.pad_token_id))


@lru_cache(maxsize=1)
def tokenized(name: str, folder: Path, model: str) -> tuple[Data, tuple[str, ...], Any]:
    """Data whose x is int32 [rows, inputs, length], the names of those inputs for the net, and the tokenizer."""
    task = TEXT_TASKS[name]
    train, test = task.read(folder)
    tokenizer = train_tokenizer(train) if model == SCRATCH else load_tokenizer(model)
    inputs = tuple(tokenizer.model_input_names)
    x_train, x_test = (encode(tokenizer, texts, inputs, task.length) for texts in (train, test))
    data = Data(x_train, torch.tensor(train.labels), x_test, torch.tensor(test.labels))
    return data, inputs, tokenizer


def load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer.from_pretrained, model)


def train_tokenizer(texts: Texts) -> Any:
    """Words in lower case and punctuation marks; the vocabulary are those found at least twice in the training set."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad, unknown, first, separator = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.WordLevel(unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=SCRATCH_VOCABULARY, min_frequency=2, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator((text for row in texts.rows for text in row), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {separator}",
        pair=f"{first} $A {separator} $B {separator}",
        special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in (first, separator)],
    )
    wrap: Callable[..., Any] = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unknown,
        cls_token=first,
        sep_token=separator,
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(tokenizer: Any, texts: Texts, inputs: Sequence[str], length: int) -> Tensor:
    """Token ids and whatever else the net takes, int32 [rows, inputs, length], padded at the end."""
    if tokenizer.pad_token_id is None:
        raise SystemExit(
            "error: --model: its tokenizer has no token for padding; give its folder one, or another model"
        )
    tokenizer.padding_side = "right"
    columns = [list(column) for column in zip(*texts.rows, strict=True)]
    encoded = tokenizer(*columns, truncation=True, padding="max_length", max_length=length, return_tensors="pt")
    return torch.stack([encoded[name] for name in inputs], dim=1).int()


def build_model(model: str, tokenizer: Any, classes: int, length: int) -> nn.Module:
    """The pretrained net with a new head of `classes` outputs, or the small one with every weight drawn anew."""
    from transformers import AutoModelForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

    if model == SCRATCH:
        config = DistilBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=length,
            n_layers=SCRATCH_LAYERS,
            n_heads=SCRATCH_HEADS,
            dim=SCRATCH_WIDTH,
            hidden_dim=4 * SCRATCH_WIDTH,
            pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(map(str, range(classes)))),
        )
        net: nn.Module = DistilBertForSequenceClassification(config)
        return net
    # A head for another number of classes is replaced by a new one. Weights saved in 16 bits are trained in 32.
    load = partial(
        AutoModelForSequenceClassification.from_pretrained, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    loaded: nn.Module = _loaded(load, model, num_labels=classes)
    return loaded


def _loaded(load: Callable[..., Any], model: str, **options: Any) -> Any:
    try:
        return load(model, **options)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"error: --model {model}: transformers cannot load it ({str(error).splitlines()[0]}). Give a folder that "
            f"holds it, a name that the Hugging Face hub knows, or {SCRATCH!r}."
        ) from None


def logits(inputs: Sequence[str], pad: int, model: nn.Module, x: Tensor) -> Tensor:
    """Scores [rows, classes]. Columns that are padding in every row of the batch are left out."""
    longest = int((x[:, inputs.index("input_ids")] != pad).sum(dim=1).max())
    named = dict(zip(inputs, x[:, :, :longest].long().unbind(dim=1), strict=True))
    out: Tensor = model(**named).logits
    return out


def layer_groups(model: nn.Module) -> list[list[str]]:
    """The paper's depth groups: embeddings, the encoder's layers in pairs, then each module of the head by itself.

    The layers are the longest nn.ModuleList; what is registered before it counts as embeddings.
    """
    lists = [(len(module), name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise SystemExit("error: the model has no list of layers, so its depth groups are unknown")
    stack = max(lists, key=lambda entry: entry[0])[1]
    embeddings: list[str] = []
    layers: dict[int, list[str]] = {}
    head: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        layer = re.match(re.escape(stack) + r"\.(\d+)\.", name)
        if layer:
            layers.setdefault(int(layer[1]) // LAYERS_PER_GROUP, []).append(name)
        elif not layers:
            embeddings.append(name)
        else:
            head.setdefault(name.rpartition(".")[0], []).append(name)
    groups = [embeddings, *(layers[pair] for pair in sorted(layers)), *head.values()]
    return [group for group in groups if group]
