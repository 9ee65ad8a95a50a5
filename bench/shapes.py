"""Parameter lists of well-known models, as names and shapes; no model library needed."""

from collections.abc import Callable, Iterator

NamedShape = tuple[str, tuple[int, ...]]


def resnet50() -> Iterator[NamedShape]:
    """ResNet-50 for ImageNet, in registration order: 161 tensors, 25,557,032 parameters."""

    def batch_norm(name: str, width: int) -> Iterator[NamedShape]:
        yield f"{name}.weight", (width,)
        yield f"{name}.bias", (width,)

    yield "conv1.weight", (64, 3, 7, 7)
    yield from batch_norm("bn1", 64)
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        width = 64 * 2 ** (stage - 1)
        outputs = 4 * width
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            yield f"{prefix}.conv1.weight", (width, inputs, 1, 1)
            yield from batch_norm(f"{prefix}.bn1", width)
            yield f"{prefix}.conv2.weight", (width, width, 3, 3)
            yield from batch_norm(f"{prefix}.bn2", width)
            yield f"{prefix}.conv3.weight", (outputs, width, 1, 1)
            yield from batch_norm(f"{prefix}.bn3", outputs)
            if block == 0:
                yield f"{prefix}.downsample.0.weight", (outputs, inputs, 1, 1)
                yield from batch_norm(f"{prefix}.downsample.1", outputs)
            inputs = outputs
    yield "fc.weight", (1000, inputs)
    yield "fc.bias", (1000,)


def gpt2() -> Iterator[NamedShape]:
    """GPT-2 small, output layer tied to the embedding: 148 tensors, 124,439,808 parameters."""
    width = 768

    def dense(name: str, inputs: int, outputs: int) -> Iterator[NamedShape]:
        yield f"{name}.weight", (inputs, outputs)
        yield f"{name}.bias", (outputs,)

    def layer_norm(name: str) -> Iterator[NamedShape]:
        yield f"{name}.weight", (width,)
        yield f"{name}.bias", (width,)

    yield "wte.weight", (50257, width)
    yield "wpe.weight", (1024, width)
    for layer in range(12):
        yield from layer_norm(f"h.{layer}.ln_1")
        yield from dense(f"h.{layer}.attn.c_attn", width, 3 * width)
        yield from dense(f"h.{layer}.attn.c_proj", width, width)
        yield from layer_norm(f"h.{layer}.ln_2")
        yield from dense(f"h.{layer}.mlp.c_fc", width, 4 * width)
        yield from dense(f"h.{layer}.mlp.c_proj", 4 * width, width)
    yield from layer_norm("ln_f")


SHAPES: dict[str, Callable[[], Iterator[NamedShape]]] = {"resnet50": resnet50, "gpt2": gpt2}
