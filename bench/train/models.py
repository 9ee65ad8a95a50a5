"""Models of the sizes of GPT-2 and ViT in plain torch, each with the loss of random tokens or images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and around a shortcut."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.ln_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


@dataclass(frozen=True)
class Size:
    """``length``: tokens, or pixels of an image's side; ``classes``: tokens or kinds of images."""

    layers: int
    width: int
    heads: int
    length: int
    classes: int
    batch: int
    patch: int = 1


class Gpt(nn.Module):
    """Predicts the next token; the output layer is the embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(size.classes, size.width), nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads, causal=True) for _ in range(size.layers)))
        self.ln_f = nn.LayerNorm(size.width)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss: int64 [batch, length] twice."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        logits = self.ln_f(self.blocks(x)) @ self.wte.weight.T
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Vit(nn.Module):
    """Tells kinds of images apart, by a class token."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        patches = (size.length // size.patch) ** 2
        self.patch = nn.Conv2d(3, size.width, size.patch, stride=size.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.position = nn.Parameter(0.02 * torch.randn(1, patches + 1, size.width))
        self.blocks = nn.Sequential(*(Block(size.width, size.heads, causal=False) for _ in range(size.layers)))
        self.ln, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.classes)

    def forward(self, images: Tensor, kinds: Tensor) -> Tensor:
        """The loss: float32 [batch, 3, length, length], int64 [batch]."""
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1) + self.position
        return F.cross_entropy(self.head(self.ln(self.blocks(x))[:, 0]).float(), kinds)


def random_tokens(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (size.batch, size.length)
    return tuple(torch.randint(size.classes, shape, device=device) for _ in range(2))  # type: ignore[return-value]


def random_images(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.randn(size.batch, 3, size.length, size.length, device=device)
    return images, torch.randint(size.classes, (size.batch,), device=device)


@dataclass(frozen=True)
class Task:
    """A model, its inputs, and its sizes by name: `full` is the published one."""

    build: Callable[[Size], nn.Module]
    inputs: Callable[[Size, torch.device], tuple[Tensor, Tensor]]
    sizes: dict[str, Size]


TASKS = {
    "gpt2": Task(
        Gpt,
        random_tokens,
        {
            "full": Size(12, 768, 12, 1024, 50257, batch=8),
            "small": Size(4, 256, 4, 128, 4096, batch=4),
            "tiny": Size(1, 16, 2, 8, 32, batch=2),
        },
    ),
    "vit": Task(
        Vit,
        random_images,
        {
            "full": Size(12, 768, 12, 224, 1000, batch=64, patch=16),
            "small": Size(4, 192, 3, 64, 100, batch=8, patch=8),
            "tiny": Size(1, 16, 2, 8, 5, batch=2, patch=4),
        },
    ),
}
