"""The five optimizers of the demonstration: the paper's, as the paper's benchmark makes them."""

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from bench.paper import strategies as paper
from bench.paper.problem import layers_by_child
from bench.paper.settings import from_scratch

WEIGHT_DECAY = 5e-4

# (model, steps per epoch, steps of the whole schedule) -> optimizer
Builder = Callable[[nn.Module, int, int], Optimizer]


def _builder(name: str) -> Builder:
    def build(model: nn.Module, steps_per_epoch: int, total_steps: int) -> Optimizer:
        setup = paper.Setup(
            model=model,
            layers=layers_by_child(model),
            steps_per_epoch=steps_per_epoch,
            epochs=total_steps // steps_per_epoch,
            settings=from_scratch(WEIGHT_DECAY),
            seed=0,
        )
        return paper.PUBLISHED[name](setup).optimizer

    return build


STRATEGIES: dict[str, Builder] = {
    name: _builder(name) for name in ("DALS", "DALS-Fast", "DALS-Acc", "Fixed SGD", "AdamW")
}
