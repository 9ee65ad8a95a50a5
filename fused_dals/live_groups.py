"""Hyperparameters are read live at every step: what somebody changed in param_groups since the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_, itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from fused_dals import host
from fused_dals.host_walk import HOST_WALK
from fused_dals.hyperparameters import PLAN_KEYS, TABLE_KEYS, check_hyperparameters, check_lr, check_names

_plan_values, _table_values = itemgetter(*PLAN_KEYS), itemgetter(*TABLE_KEYS)


@dataclass
class _Seen:
    """A group's hyperparameters as they were last found sound."""

    keys: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()  # in the order of the keys
    plan: tuple[Any, ...] = ()
    table: tuple[Any, ...] = ()
    names: Any = None
    lr: Any = None


class GroupsVersion(NamedTuple):
    """The same as long as no hyperparameter changed; ``numbers`` also while nothing but learning rates did."""

    numbers: int
    lrs: int


@dataclass
class LiveGroups:
    """Checks every group again when one of its values is another object than at the last step.

    Identity tells False from 0, compares no arrays or tensors, and is quick (0.7 us a group); what may change in place
    is looked at: a list never is the tuple that was kept of it, names and learning rates on the CPU are compared.
    """

    seen: list[_Seen] = field(default_factory=list)
    #: Go up whenever a group changed what plans depend on (path, state, depth, names), anything, its lr alone.
    plans: int = 0
    tables: int = 0
    lrs: int = 0
    #: Whether any group clips, and whether any drops non-finite steps; as of ``tables``.
    clips: bool = False
    skips: bool = False
    _flags_of: int = 0
    _settled: _Settled | None = None

    @property
    def version(self) -> GroupsVersion:
        return GroupsVersion(self.tables, self.lrs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_settled": None}  # a compiled module cannot be copied, and identities are others'

    def check(self, groups: list[dict[str, Any]]) -> None:
        """Raise TypeError or ValueError where a group changed and is not sound; else remember it."""
        if len(groups) != len(self.seen):
            self.seen = [_Seen() for _ in groups]
        if self._settled is None or not self._settled.holds(groups):
            for index, (group, seen) in enumerate(zip(groups, self.seen, strict=True)):
                same = tuple(group) == seen.keys and all(map(is_, group.values(), seen.values))
                if not (same and not _in_place(group, seen)) and not self._take_lr(group, seen, index):
                    self._check(groups, index)
            self._settled = None if HOST_WALK.compiled is None else _Settled(HOST_WALK.compiled, self.seen)
        if self._flags_of != self.tables:  # also of a call before that found a later group unsound
            self.clips = any(group["max_grad_norm"] is not None for group in groups)
            self.skips = any(group["skip_nonfinite"] for group in groups)
            self._flags_of = self.tables

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
        self.seen[index] = _Seen(tuple(group), values, plan, tuple(map(_frozen, table)), names, known_lr)

    def _take_lr(self, group: Mapping[str, Any], seen: _Seen, index: int) -> bool:
        """Whether nothing but the learning rate is new, as after a scheduler's step; it is checked and remembered then.

        Looking at everything takes five times as long.
        """
        if tuple(group) != seen.keys:
            return False
        values, at = tuple(group.values()), seen.keys.index("lr")
        same = all(map(is_, values[:at], seen.values[:at])) and all(map(is_, values[at + 1 :], seen.values[at + 1 :]))
        if not same or _frozen(group.get("param_names")) != seen.names:  # names may have changed in place
            return False
        self.seen[index] = _Seen()  # until it is found sound
        check_lr(group, f"group {index}")
        seen.values, seen.lr = values, _known_lr(values[at])
        self.seen[index] = seen
        self.lrs += 1
        return True


class _Settled:
    """Tells by the compiled walk that nothing changed since all groups were found sound."""

    def __init__(self, walk: Any, seen: Sequence[_Seen]) -> None:
        self._walk = walk
        self._known = [(some.keys, some.values, some.names) for some in seen]
        self._versions = bytearray(8 * len(seen))  # of the dicts, filled in and used by the walk
        #: Learning rates on the CPU, whose numbers may have changed in place.
        self._watched = [(index, some) for index, some in enumerate(seen) if type(some.lr) is tuple]

    def holds(self, groups: list[dict[str, Any]]) -> bool:
        """False also where it cannot tell, as for names that are equal and other objects."""
        same: bool = self._walk.same_groups(groups, self._known, self._versions)
        return same and not any(_in_place(groups[index], seen) for index, seen in self._watched)


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
