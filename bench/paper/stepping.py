"""How a strategy takes a step: optimizer, schedule and what else belongs to it, in one object that can be resumed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fused_dals import DALS

#: Computes the loss of the present batch anew, with its graph.
LossOfBatch = Callable[[], Tensor]


class Stepper:
    """An optimizer and at most one schedule, which moves on after every batch or after every epoch."""

    def __init__(
        self, optimizer: Optimizer, *, per_batch: LRScheduler | None = None, per_epoch: LRScheduler | None = None
    ) -> None:
        self.optimizer = optimizer
        self.per_batch = per_batch
        self.per_epoch = per_epoch

    def step(self, loss_of_batch: LossOfBatch) -> Tensor:
        """One training step; returns the loss before it, without its graph."""
        loss = self._backward(loss_of_batch)
        self._update(loss, loss_of_batch)
        if self.per_batch is not None:
            self.per_batch.step()
        return loss.detach()

    def end_epoch(self) -> None:
        if self.per_epoch is not None:
            self.per_epoch.step()

    def record(self) -> dict[str, Any]:
        """What the strategy has to say about its run besides accuracy and loss; JSON-ready."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        state = {"optimizer": self.optimizer.state_dict()}
        for name, schedule in self._schedules().items():
            state[name] = schedule.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        for name, schedule in self._schedules().items():
            schedule.load_state_dict(state[name])

    def _schedules(self) -> dict[str, LRScheduler]:
        both = {"per_batch": self.per_batch, "per_epoch": self.per_epoch}
        return {name: schedule for name, schedule in both.items() if schedule is not None}

    def _backward(self, loss_of_batch: LossOfBatch) -> Tensor:
        loss = loss_of_batch()
        self.optimizer.zero_grad()
        loss.backward()
        return loss

    def _update(self, loss: Tensor, loss_of_batch: LossOfBatch) -> None:
        self.optimizer.step()


class SharpnessAware(Stepper):
    """SAM: the gradient is taken a second time, at the perturbed weights."""

    def _update(self, loss: Tensor, loss_of_batch: LossOfBatch) -> None:
        self.optimizer.step(lambda: self._backward(loss_of_batch).item())


class Grokfast(Stepper):
    """The gradient plus `amplify` times its moving average, which starts at 0, before the optimizer sees it.

    Where the average starts at the first gradient, as it does by default in gradfilter_ema, B with seed 42 comes to
    86.38 instead of 85.88, both the same with other bits of one weight; the drafts have 85.9.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, decay: float, amplify: float) -> None:
        super().__init__(optimizer)
        self.model = model
        self.decay = decay
        self.amplify = amplify
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        self.averages: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in trained}

    def _update(self, loss: Tensor, loss_of_batch: LossOfBatch) -> None:
        from pytorch_optimizer.optimizer.grokfast import gradfilter_ema

        self.averages = gradfilter_ema(self.model, self.averages, self.decay, self.amplify)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.averages = state["averages"]


class LossAware(Stepper):
    """DALS: it sees the loss, and counts the phases that it reads off it."""

    optimizer: DALS

    def __init__(self, optimizer: DALS) -> None:
        super().__init__(optimizer)
        self.phase_counts = [0, 0, 0]

    def _update(self, loss: Tensor, loss_of_batch: LossOfBatch) -> None:
        self.optimizer.step(loss=loss)
        self.phase_counts[self.optimizer.phases()[0]] += 1

    def record(self) -> dict[str, Any]:
        return {"phase_counts": self.phase_counts}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "phase_counts": self.phase_counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.phase_counts = list(state["phase_counts"])


class RandomPhases(LossAware):
    """DALS whose filter follows phases drawn at random from those that the loss has given in the last `window` steps.

    The frequencies follow those of the loss, which change while training; the order within a window says nothing.
    """

    def __init__(self, optimizer: DALS, ema_decay: tuple[float, float, float], window: int, seed: int) -> None:
        super().__init__(optimizer)
        self.ema_decay = ema_decay
        self.recent: deque[int] = deque(maxlen=window)
        self.drawn_counts = [0, 0, 0]
        self.draws = torch.Generator().manual_seed(seed)

    def _update(self, loss: Tensor, loss_of_batch: LossOfBatch) -> None:
        phase = self.draw()
        self.drawn_counts[phase] += 1
        for group in self.optimizer.param_groups:
            group["ema_decay"] = (self.ema_decay[phase],) * 3
        super()._update(loss, loss_of_batch)
        self.recent.append(self.optimizer.phases()[0])

    def draw(self) -> int:
        """The phase of some recent step; 0 before the first."""
        if not self.recent:
            return 0
        return self.recent[int(torch.randint(len(self.recent), (), generator=self.draws))]

    def record(self) -> dict[str, Any]:
        return {**super().record(), "drawn_counts": self.drawn_counts}

    def state_dict(self) -> dict[str, Any]:
        own = {"recent": list(self.recent), "drawn_counts": self.drawn_counts, "draws": self.draws.get_state()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.recent.extend(state["recent"])
        self.drawn_counts = list(state["drawn_counts"])
        self.draws.set_state(state["draws"].cpu())
