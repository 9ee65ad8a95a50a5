"""Parameter lists as names and shapes: known models, two extremes, tensors of one size. No model library needed."""

from collections.abc import Callable, Iterator

NamedShape = tuple[str, tuple[int, ...]]


def resnet50() -> Iterator[NamedShape]:
    """ResNet-50 for ImageNet, in registration order: 161 tensors, 25,557,032 parameters."""
    yield "conv1.weight", (64, 3, 7, 7)
    yield from _norm("bn1", 64)
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        width = 64 * 2 ** (stage - 1)
        outputs = 4 * width
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            yield f"{prefix}.conv1.weight", (width, inputs, 1, 1)
            yield from _norm(f"{prefix}.bn1", width)
            yield f"{prefix}.conv2.weight", (width, width, 3, 3)
            yield from _norm(f"{prefix}.bn2", width)
            yield f"{prefix}.conv3.weight", (outputs, width, 1, 1)
            yield from _norm(f"{prefix}.bn3", outputs)
            if block == 0:
                yield f"{prefix}.downsample.0.weight", (outputs, inputs, 1, 1)
                yield from _norm(f"{prefix}.downsample.1", outputs)
            inputs = outputs
    yield "fc.weight", (1000, inputs)
    yield "fc.bias", (1000,)


def _vit(width: int, layers: int) -> Iterator[NamedShape]:
    """A vision transformer as torchvision registers it: patches of 16 x 16, 224 x 224 images, 1000 classes."""
    yield "class_token", (1, 1, width)
    yield from _dense("conv_proj", (width, 3, 16, 16))
    yield "encoder.pos_embedding", (1, 197, width)
    for layer in range(layers):
        prefix = f"encoder.layers.encoder_layer_{layer}"
        yield from _norm(f"{prefix}.ln_1", width)
        yield f"{prefix}.self_attention.in_proj_weight", (3 * width, width)
        yield f"{prefix}.self_attention.in_proj_bias", (3 * width,)
        yield from _dense(f"{prefix}.self_attention.out_proj", (width, width))
        yield from _norm(f"{prefix}.ln_2", width)
        yield from _dense(f"{prefix}.mlp.0", (4 * width, width))
        yield from _dense(f"{prefix}.mlp.3", (width, 4 * width))
    yield from _norm("encoder.ln", width)
    yield from _dense("heads.head", (1000, width))


def vit_b_16() -> Iterator[NamedShape]:
    """ViT-B/16: 152 tensors, 86,567,656 parameters."""
    return _vit(768, 12)


def vit_l_16() -> Iterator[NamedShape]:
    """ViT-L/16: 296 tensors, 304,326,632 parameters."""
    return _vit(1024, 24)


def bert_large() -> Iterator[NamedShape]:
    """BERT-large uncased, encoder with pooler: 391 tensors, 335,141,888 parameters."""
    width = 1024
    for table, rows in (("word", 30522), ("position", 512), ("token_type", 2)):
        yield f"embeddings.{table}_embeddings.weight", (rows, width)
    yield from _norm("embeddings.LayerNorm", width)
    for layer in range(24):
        prefix = f"encoder.layer.{layer}"
        for projection in ("query", "key", "value"):
            yield from _dense(f"{prefix}.attention.self.{projection}", (width, width))
        yield from _dense(f"{prefix}.attention.output.dense", (width, width))
        yield from _norm(f"{prefix}.attention.output.LayerNorm", width)
        yield from _dense(f"{prefix}.intermediate.dense", (4 * width, width))
        yield from _dense(f"{prefix}.output.dense", (width, 4 * width))
        yield from _norm(f"{prefix}.output.LayerNorm", width)
    yield from _dense("pooler.dense", (width, width))


def _gpt2(width: int, layers: int) -> Iterator[NamedShape]:
    """GPT-2 of this width, output layer tied to the embedding; dense weights are stored inputs first."""
    yield "wte.weight", (50257, width)
    yield "wpe.weight", (1024, width)
    for layer in range(layers):
        yield from _norm(f"h.{layer}.ln_1", width)
        yield from _dense(f"h.{layer}.attn.c_attn", (width, 3 * width), 3 * width)
        yield from _dense(f"h.{layer}.attn.c_proj", (width, width))
        yield from _norm(f"h.{layer}.ln_2", width)
        yield from _dense(f"h.{layer}.mlp.c_fc", (width, 4 * width), 4 * width)
        yield from _dense(f"h.{layer}.mlp.c_proj", (4 * width, width), width)
    yield from _norm("ln_f", width)


def gpt2() -> Iterator[NamedShape]:
    """GPT-2 small: 148 tensors, 124,439,808 parameters."""
    return _gpt2(768, 12)


def gpt2_xl() -> Iterator[NamedShape]:
    """GPT-2 XL: 580 tensors, 1,557,611,200 parameters."""
    return _gpt2(1600, 48)


def _llama(width: int, hidden: int, layers: int, key_value_width: int) -> Iterator[NamedShape]:
    """A Llama with 32,000 tokens, output layer not tied."""
    yield "model.embed_tokens.weight", (32000, width)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for projection, outputs in (("q", width), ("k", key_value_width), ("v", key_value_width), ("o", width)):
            yield f"{prefix}.self_attn.{projection}_proj.weight", (outputs, width)
        yield f"{prefix}.mlp.gate_proj.weight", (hidden, width)
        yield f"{prefix}.mlp.up_proj.weight", (hidden, width)
        yield f"{prefix}.mlp.down_proj.weight", (width, hidden)
        yield f"{prefix}.input_layernorm.weight", (width,)
        yield f"{prefix}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (32000, width)


def llama_1b() -> Iterator[NamedShape]:
    """TinyLlama 1.1B: 201 tensors, 1,100,048,384 parameters."""
    return _llama(2048, 5632, 22, 256)


def llama_7b() -> Iterator[NamedShape]:
    """Llama-2-7B: 291 tensors, 6,738,415,616 parameters."""
    return _llama(4096, 11008, 32, 4096)


def one_huge() -> Iterator[NamedShape]:
    """One tensor of 1e9 elements."""
    yield "weight", (1_000_000_000,)


def many_tiny() -> Iterator[NamedShape]:
    """Ten thousand tensors of 64 elements."""
    yield from ((f"layer{i}.weight", (64,)) for i in range(10_000))


def _even(elements: int) -> Callable[[], Iterator[NamedShape]]:
    """2^24 parameters in tensors of so many elements: more than any L2 cache holds."""

    def shapes() -> Iterator[NamedShape]:
        yield from ((f"layer{i}.weight", (elements,)) for i in range((1 << 24) // elements))

    return shapes


def _dense(name: str, weight: tuple[int, ...], outputs: int | None = None) -> Iterator[NamedShape]:
    """Weight and bias; a weight has its outputs first unless they are given."""
    yield f"{name}.weight", weight
    yield f"{name}.bias", (weight[0] if outputs is None else outputs,)


def _norm(name: str, width: int) -> Iterator[NamedShape]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


#: Parameter lists of models; the others in SHAPES are of equal tensors.
MODELS = ("resnet50", "vit_b_16", "vit_l_16", "bert_large", "gpt2", "gpt2_xl", "llama_1b", "llama_7b")

SHAPES: dict[str, Callable[[], Iterator[NamedShape]]] = {
    "resnet50": resnet50,
    "vit_b_16": vit_b_16,
    "vit_l_16": vit_l_16,
    "bert_large": bert_large,
    "gpt2": gpt2,
    "gpt2_xl": gpt2_xl,
    "llama_1b": llama_1b,
    "llama_7b": llama_7b,
    "one_huge": one_huge,
    "many_tiny": many_tiny,
    "of_4ki": _even(1 << 12),
    "of_64ki": _even(1 << 16),
    "of_1mi": _even(1 << 20),
    "of_16mi": _even(1 << 24),
}
