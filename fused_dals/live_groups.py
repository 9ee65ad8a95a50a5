"""Hyperparameters are read live at every step: what somebody changed in param_groups since the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from fused_dals import host
from fused_dals.hyperparameters import PLAN_KEYS, TABLE_KEYS, check_hyperparameters, check_names

_plan_values, _table_values = itemgetter(*PLAN_KEYS), itemgetter(*TABLE_KEYS)


@dataclass
class _Seen:
    """A group's hyperparameters as they were last found sound."""

    group: tuple[Any, ...] = ()  # all values, in the order of the dict
    plan: tuple[Any, ...] = ()
    table: tuple[Any, ...] = ()
    names: Any = None
    lr: Any = None


@dataclass
class LiveGroups:
    """Checks every group again when one of its values is another object than at the last step.

    Identity tells False from 0, compares no arrays or tensors, and is quick (0.7 us a group); what may change in place
    is looked at: a list never is the tuple that was kept of it, names and learning rates on the CPU are compared.
    """

    seen: list[_Seen] = field(default_factory=list)
    #: Go up whenever a group changed what plans depend on (path, state, depth, names), and whenever anything changed.
    plans: int = 0
    tables: int = 0
    #: Whether any group clips, and whether any drops non-finite steps.
    clips: bool = False
    skips: bool = False

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise TypeError or ValueError where a group changed and is not sound; else remember it."""
        if len(groups) != len(self.seen):
            self.seen = [_Seen() for _ in groups]
        before = self.tables
        for index, (group, seen) in enumerate(zip(groups, self.seen, strict=True)):
            known = seen.group
            if len(group) != len(known) or not all(map(is_, group.values(), known)) or _in_place(group, seen):
                self._check(groups, index)
        if self.tables != before:
            self.clips = any(group["max_grad_norm"] is not None for group in groups)
            self.skips = any(group["skip_nonfinite"] for group in groups)

    def _check(self, groups: Sequence[Mapping[str, Any]], index: int) -> None:
        group, seen, where = groups[index], self.seen[index], f"group {index}"
        self.seen[index] = _Seen()
        if "params" not in group:
            raise ValueError(f"{where}: 'params' is missing")
        try:
            plan, table, lr = (*_plan_values(group), group.get("depth")), _table_values(group), group["lr"]
        except KeyError:
            check_hyperparameters(group, where)
            raise
        names = _frozen(group.get("param_names"))
        check_names(names, where)
        known_lr = _known_lr(lr)
        same_plan = len(seen.plan) == len(plan) and all(map(is_, plan, seen.plan)) and names == seen.names
        same_table = len(seen.table) == len(table) and all(map(is_, table, seen.table))
        if not (same_plan and same_table and type(known_lr) is type(seen.lr) and known_lr == seen.lr):
            check_hyperparameters(group, where)
            self.tables += 1
            self.plans += not same_plan
        # The list of parameters is the fingerprint's business, and that of names is compared.
        values = tuple(v if key in ("params", "param_names") else _frozen(v) for key, v in group.items())
        self.seen[index] = _Seen(values, plan, tuple(map(_frozen, table)), names, known_lr)


def _in_place(group: Mapping[str, Any], seen: _Seen) -> bool:
    """Whether something changed that is still the same object."""
    names = group.get("param_names")
    if names is not None and _frozen(names) != seen.names:
        return True
    return type(seen.lr) is tuple and _known_lr(group["lr"]) != seen.lr


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _known_lr(lr: Any) -> Any:
    """Something that stays equal as long as the learning rate is as sound, and in the same place, as before."""
    if not isinstance(lr, Tensor):
        return lr if isinstance(lr, int | float) else object()
    return (lr.item(),) if host.knows(lr) and lr.numel() == 1 else (id(lr), None)
