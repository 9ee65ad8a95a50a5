"""Hyperparameters are read live at every step: what somebody changed in param_groups since the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from fused_dals.hyperparameters import PLAN_KEYS, TABLE_KEYS, check_hyperparameters, check_names

_plan_values, _table_values = itemgetter(*PLAN_KEYS), itemgetter(*TABLE_KEYS)


@dataclass
class _Seen:
    """A group's hyperparameters as they were last found sound."""

    plan: tuple[Any, ...] = ()
    table: tuple[Any, ...] = ()
    names: Any = None
    lr: Any = None


@dataclass
class LiveGroups:
    """Checks every group again when one of its values is another object than at the last step.

    Identity tells False from 0, compares no arrays or tensors, and is quick; a list never is the tuple that was kept of
    it, so that one changed in place is noticed.
    """

    seen: list[_Seen] = field(default_factory=list)
    #: Go up whenever a group changed what plans depend on (path, state, depth, names), and whenever anything changed.
    plans: int = 0
    tables: int = 0

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise TypeError or ValueError where a group changed and is not sound; else remember it."""
        if len(groups) != len(self.seen):
            self.seen = [_Seen() for _ in groups]
        for index, (group, seen) in enumerate(zip(groups, self.seen, strict=True)):
            try:
                plan, table, lr = (*_plan_values(group), group.get("depth")), _table_values(group), group["lr"]
            except KeyError:
                check_hyperparameters(group, f"group {index}")
                raise
            names = group.get("param_names")
            names = tuple(names) if isinstance(names, list) else names
            same_plan = len(plan) == len(seen.plan) and all(map(is_, plan, seen.plan)) and _equal(names, seen.names)
            same_table = len(table) == len(seen.table) and all(map(is_, table, seen.table))
            known_lr = _known_lr(lr)
            same_lr = type(known_lr) is type(seen.lr) and known_lr == seen.lr
            if same_plan and same_table and same_lr and "params" in group:
                continue
            self.seen[index] = _Seen()
            if "params" not in group:
                raise ValueError(f"group {index}: 'params' is missing")
            check_hyperparameters(group, f"group {index}")
            check_names(names, f"group {index}")
            frozen = tuple(tuple(value) if isinstance(value, list) else value for value in table)
            self.seen[index] = _Seen(plan, frozen, names, known_lr)
            self.tables += 1
            self.plans += not same_plan


def _known_lr(lr: Any) -> Any:
    """Something that stays equal as long as the learning rate is as sound, and in the same place, as before."""
    if not isinstance(lr, Tensor):
        return lr if isinstance(lr, int | float) else object()
    return (lr.item(),) if lr.device.type == "cpu" and lr.numel() == 1 else (id(lr), None)


def _equal(names: Any, seen: Any) -> bool:
    return isinstance(names, tuple | None) and bool(names == seen)
