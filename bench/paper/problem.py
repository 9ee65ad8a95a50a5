"""What a task hands to a run: data, a net, its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.tasks import Data

SCRATCH = "scratch"


@dataclass(frozen=True)
class Options:
    """What a user says of a task.

    `data_dir`: the folder with the data set's files. `model`: for texts, a name or folder that transformers knows, or
    "scratch" for a small net that is not pretrained. `nudge`: 0, or which initial weight is changed in its last bit.
    """

    data_dir: Path | None = None
    model: str = "distilbert-base-uncased"
    nudge: int = 0


def apply_model(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits


@dataclass(frozen=True)
class Problem:
    """One seed's data and freshly initialised net.

    `layers`: names of the parameters, layer by layer from the input to the output. `logits` applies the net to a batch,
    shape [rows, classes].
    """

    data: Data
    model: nn.Module
    layers: list[list[str]]
    logits: Callable[[nn.Module, Tensor], Tensor] = apply_model


def layers_by_child(model: nn.Module) -> list[list[str]]:
    """Names of parameters by direct child of the model, in registration order."""
    return [[f"{child}.{name}" for name, _ in module.named_parameters()] for child, module in model.named_children()]


@torch.no_grad()
def nudge(model: nn.Module, index: int) -> None:
    """Move one weight of the first layer to the next larger float: what differs afterwards is chaos.

    Not one that is 0, such as those of a padding token, which may belong to no input.
    """
    weights = next(model.parameters()).view(-1)
    places = weights.nonzero().flatten()
    place = places[index % len(places)]
    weights[place] = torch.nextafter(weights[place], torch.tensor(float("inf")).to(weights))
