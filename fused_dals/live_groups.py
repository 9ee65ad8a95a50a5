"""Hyperparameters are read live at every step: what somebody changed in param_groups since the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from torch import Tensor

from fused_dals.hyperparameters import HYPERPARAMETERS, check_hyperparameters

_values = itemgetter(*HYPERPARAMETERS)


@dataclass
class LiveGroups:
    """The hyperparameters of every group as they were last found sound."""

    seen: list[tuple[Any, ...]] = field(default_factory=list)
    lrs: list[Any] = field(default_factory=list)
    #: Goes up whenever anything but a learning rate changed, and whenever anything did: plans and tables follow these.
    plans: int = 0
    tables: int = 0

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise as check_hyperparameters does where a group changed and is not sound; else remember it."""
        if len(groups) != len(self.seen):
            self.seen, self.lrs = [()] * len(groups), [None] * len(groups)
        for index, group in enumerate(groups):
            try:
                values = _values(group), group.get("depth"), tuple(group.get("param_names", ()))
                lr = _comparable_lr(group["lr"])
                same_plan, same_lr = bool(values == self.seen[index]), bool(lr == self.lrs[index])
            except (KeyError, TypeError, RuntimeError, ValueError):  # missing, or an array in a number's place
                self.seen[index] = ()
                check_hyperparameters(group, f"group {index}")
                raise
            if same_plan and same_lr:
                continue
            check_hyperparameters(group, f"group {index}")
            # A list that the user keeps and changes in place never equals what was seen: it is checked at every step.
            frozen = tuple(tuple(value) if isinstance(value, list) else value for value in values[0])
            self.seen[index], self.lrs[index] = (frozen, *values[1:]), lr
            self.tables += 1
            self.plans += not same_plan


def _comparable_lr(lr: Any) -> Any:
    """Something that is equal as long as the learning rate is as sound and in the same place as before."""
    if not isinstance(lr, Tensor):
        return lr
    return lr.item() if lr.device.type == "cpu" and lr.numel() == 1 else id(lr)
