"""Hyperparameters are read live at every step: what somebody changed in param_groups since the last one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import is_, is_not
from typing import Any

import torch
from torch import Tensor

from fused_dals import host
from fused_dals.host_walk import HOST_WALK
from fused_dals.hyperparameters import COUNTERS, PLAN_KEYS, TABLE_KEYS, check_hyperparameters, check_lr, check_names

_FREE = {"lr", *COUNTERS}

#: In the place of what is still to be found sound; None would be a value that somebody wrote.
_UNSOUND = object()

#: What the compiled walk says of the groups: something but a learning rate changed, perhaps a learning rate, nothing.
CHANGED, SAME_BUT_LR, UNTOUCHED = range(3)

#: What is said of learning rates: they are to be looked at one by one; sound plain numbers, as before or new ones.
NOT_PLAIN, SAME_NUMBERS, NEW_NUMBERS = range(3)


@dataclass
class _Seen:
    """A group as it was last found sound, but for its learning rate."""

    keys: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()  # in the order of the keys, None for lr
    names: Any = None


@dataclass(slots=True)
class GroupsVersion:
    """Equal as long as no hyperparameter changed; ``tables`` also while nothing but learning rates did.

    ``plain_lrs``: float64 on the host, the learning rates where all are plain numbers; the next check writes it anew.
    """

    tables: int
    lrs: int
    plain_lrs: Tensor | None = field(default=None, compare=False)


@dataclass
class LiveGroups:
    """Checks every group again when one of its values is another object than at the last step.

    Identity tells False from 0, compares no arrays or tensors, and is quick; what may change in place is looked at: a
    list never is the tuple that was kept of it, names and learning rates on the CPU are compared. Learning rates go
    their own way, because schedulers change them at every step.
    """

    seen: list[_Seen] = field(default_factory=list)
    #: Go up whenever a group changed what plans depend on (path, state, depth, names), anything but lr, an lr.
    plans: int = 0
    tables: int = 0
    lrs: int = 0
    #: Whether any group clips, drops non-finite steps, or may be captured into a graph; as of ``tables``.
    clips: bool = False
    skips: bool = False
    capturable: bool = False
    ends: tuple[int, ...] = ()  # total_steps of the built-in schedules
    _flags_of: int = 0
    _lrs_are_sound: bool = False  # all of them
    _was_cut_short: bool = False  # the last check: the walk may have noted what nobody came to look at
    _are_plain: bool = False  # and all are numbers, which _numbers has
    _numbers: Tensor = field(default_factory=lambda: _no_numbers(0))
    _lrs: list[Any] = field(default_factory=list)  # as they were last found sound, where not all are plain
    _on_host: dict[int, float] = field(default_factory=dict)  # the numbers in those that are tensors on the CPU
    _settled: _Settled | None = None

    @property
    def version(self) -> GroupsVersion:
        return GroupsVersion(self.tables, self.lrs, self._numbers if self._are_plain else None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_settled": None}  # a compiled module cannot be copied, and identities are others'

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise TypeError or ValueError where a group changed and is not sound; else remember it."""
        if len(groups) != len(self.seen):
            self.seen = [_Seen() for _ in groups]
            self._lrs, self._on_host, self._lrs_are_sound = [_UNSOUND] * len(groups), {}, False
            self._are_plain, self._numbers = False, _no_numbers(len(groups))
        was_cut_short, self._was_cut_short = self._was_cut_short, True
        self.lrs += was_cut_short  # they may have been read, and nobody told
        same = CHANGED if self._settled is None else self._settled.look_at(groups)
        if same == CHANGED:
            self._settled = None  # it has taken note of dicts that nobody may come to look at, where one is not sound
            for index, (group, seen) in enumerate(zip(groups, self.seen, strict=True)):
                if not _same(group, seen):
                    self._check(group, index)
                elif HOST_WALK.compiled is not None:
                    seen.values = _values(group)  # the walk compares all of them
            self._settled = None if HOST_WALK.compiled is None else _Settled(HOST_WALK.compiled, self.seen)
        if same != UNTOUCHED or self._on_host or not self._lrs_are_sound or was_cut_short:
            self._check_lrs(groups)
        self._was_cut_short = False
        if self._flags_of != self.tables:  # also of a call before that found a later group unsound
            self.clips = any(group["max_grad_norm"] is not None for group in groups)
            self.skips = any(group["skip_nonfinite"] for group in groups)
            self.capturable = any(group["capturable"] for group in groups)
            self.ends = tuple(dict.fromkeys(n for group in groups if (n := group["total_steps"]) is not None))
            self._flags_of = self.tables

    def _check(self, group: Mapping[str, Any], index: int) -> None:
        seen, where = self.seen[index], f"group {index}"
        self.seen[index] = _Seen()
        if "params" not in group:
            raise ValueError(f"{where}: 'params' is missing")
        names = _frozen(group.get("param_names"))
        check_names(names, where)
        known = dict(zip(seen.keys, seen.values, strict=True))

        def unchanged(keys: Iterable[str]) -> bool:
            return all(key in group and known.get(key, _UNSOUND) is group[key] for key in keys)

        same_plan = unchanged(PLAN_KEYS) and known.get("depth") is group.get("depth") and names == seen.names
        if not (same_plan and unchanged(TABLE_KEYS) and "lr" in group):
            check_hyperparameters(group, where)
            self.tables += 1
            self.plans += not same_plan
        self.seen[index] = _Seen(tuple(group), _values(group), names)

    def _check_lrs(self, groups: Sequence[Mapping[str, Any]]) -> None:
        walk = HOST_WALK.compiled
        found = (_read_plain_lrs if walk is None else walk.read_plain_lrs)(groups, self._numbers)
        if found != NOT_PLAIN:
            self.lrs += found == NEW_NUMBERS or not self._are_plain
            self._are_plain, self._lrs_are_sound, self._on_host, self._lrs = True, True, {}, []
            return
        lrs = [group["lr"] for group in groups]
        if self._are_plain:
            self._lrs, self._are_plain = [_UNSOUND] * len(groups), False
        elif self._lrs_are_sound and not self._on_host and all(map(is_, lrs, self._lrs)):
            return
        self._lrs_are_sound = False
        for index, lr in enumerate(lrs):
            if lr is self._lrs[index] and self._on_host.get(index) == _number_on_host(lr):
                continue
            self._lrs[index] = _UNSOUND
            check_lr(groups[index], f"group {index}")
            self._lrs[index], number = lr, _number_on_host(lr)
            if number is None:
                self._on_host.pop(index, None)
            else:
                self._on_host[index] = number
            self.lrs += 1
        self._lrs_are_sound = True


class _Settled:
    """Asks the compiled walk what changed since all groups were found sound."""

    def __init__(self, walk: Any, seen: Sequence[_Seen]) -> None:
        self._walk = walk
        self._known = [(some.keys, some.values, some.names) for some in seen]
        self._versions = bytearray(8 * len(seen))  # of the dicts, filled in and used by the walk

    def look_at(self, groups: Sequence[Mapping[str, Any]]) -> int:
        """CHANGED also where it cannot tell, as for names that are equal and other objects."""
        found: int = self._walk.same_groups(groups, self._known, self._versions)
        return found


def _values(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a group's values are compared with, None in the place of lr."""
    # The list of parameters is the fingerprint's business, and that of names is compared.
    as_they_are = ("params", "param_names")
    return tuple(None if k == "lr" else v if k in as_they_are else _frozen(v) for k, v in group.items())


def _same(group: Mapping[str, Any], seen: _Seen) -> bool:
    """Whether nothing is new but the learning rate and what steps of torch operations write."""
    if tuple(group) != seen.keys or group["lr"] is None:
        return False
    if not _FREE.issuperset(compress(seen.keys, map(is_not, group.values(), seen.values))):
        return False
    names = group.get("param_names")
    return names is None or _frozen(names) == seen.names  # they may have changed in place


def _no_numbers(count: int) -> Tensor:
    """Where there are none yet: NaN is like no number."""
    return torch.full((count,), math.nan, dtype=torch.float64, device="cpu")


def _read_plain_lrs(groups: Sequence[Mapping[str, Any]], numbers: Tensor) -> int:
    """Write learning rates that all are floats, as schedulers write them, and sound, to ``numbers``; as in the walk.

    40 ns for each, where check_lr takes 1 us, which decides about all others.
    """
    lrs = [group["lr"] for group in groups]
    # What is not finite makes the sum so.
    if set(map(type, lrs)) != {float} or min(lrs) < 0 or not math.isfinite(sum(lrs)):
        return NOT_PLAIN
    now = host.doubles(lrs)
    if torch.equal(now, numbers):
        return SAME_NUMBERS
    numbers.copy_(now)
    return NEW_NUMBERS


def _number_on_host(lr: Any) -> float | None:
    """What may change in place without a wait to see it: the number in a tensor on the CPU."""
    return float(lr) if isinstance(lr, Tensor) and host.knows(lr) and lr.numel() == 1 else None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
