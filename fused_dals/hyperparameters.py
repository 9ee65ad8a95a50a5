"""What a hyperparameter may be: one check for constructor arguments, groups, live changes and checkpoints."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypedDict

import torch
from torch import Tensor

from fused_dals import host
from fused_dals.depth_rule import DepthRule, check_live_depth, shown
from fused_dals.loss_average import LossGroup


class DALSOptions(TypedDict, total=False):
    """The keyword arguments of DALS, for the presets that pass them on."""

    momentum: float
    weight_decay: float
    trust_coefficient: float
    trust_clip: tuple[float, float]
    ema_decay: tuple[float, float, float]
    phase_thresholds: tuple[float, float]
    total_steps: int | None
    warmup_fraction: float
    restart_steps: int | None
    restart_mult: float
    depth: DepthRule
    maximize: bool
    max_grad_norm: float | None
    skip_nonfinite: bool
    state_dtype: torch.dtype
    compensated: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    amp_fused: bool
    loss_group: LossGroup
    partition_group: Any


#: Of the optimizer as a whole, not of a group.
OPTIMIZER_KEYS = ("amp_fused", "loss_group", "partition_group")

#: Run state that every group carries as plain numbers, so that any checkpoint format takes it along; in the order of
#: RunState.values.
COUNTERS = ("step", "loss_ema", "loss_drop", "skipped_steps")

#: Hyperparameters that decide which path serves a parameter and what state it has; all others are numbers in tables.
PLAN_KEYS = ("foreach", "fused", "state_dtype", "compensated", "capturable")
TABLE_KEYS = tuple(key for key in DALSOptions.__annotations__ if key not in (*PLAN_KEYS, *OPTIMIZER_KEYS, "depth"))

#: The largest float32: torch refuses a larger scalar for the state's arithmetic.
FLOAT32_MAX = (2 - 2**-23) * 2.0**127

_KNOWN_KEYS = {"params", "lr", *DALSOptions.__annotations__, *COUNTERS}


def check_group_keys(group: Mapping[str, Any], where: str) -> None:
    """Refuse what is of the whole optimizer, and misspelt hyperparameters; other keys are the user's, as in torch."""
    for key in group:
        if key in OPTIMIZER_KEYS:
            raise TypeError(
                f"{where}: {key} is of the optimizer as a whole, not of a group: give it to the constructor"
            )
        if key in _KNOWN_KEYS:
            continue
        close = difflib.get_close_matches(str(key), _KNOWN_KEYS, n=1, cutoff=0.85)
        if close:
            raise TypeError(f"{where}: unknown key {key!r}; did you mean {close[0]!r}?")


def check_params(params: Any, where: str) -> Any:
    """``params`` of a group, listed, or an error that names the entry which is no tensor and no (name, tensor) pair."""
    if isinstance(params, Tensor | set):  # torch wraps the one and refuses the other
        return params
    if not isinstance(params, Iterable):
        raise TypeError(f"{where}: 'params' must be a tensor or an iterable of tensors, got {type(params).__name__}")
    params = list(params)
    for position, entry in enumerate(params):
        if isinstance(entry, tuple) and not (len(entry) == 2 and isinstance(entry[0], str)):
            raise TypeError(f"{where}: 'params' entry {position} must be a tensor or a pair (name, tensor)")
    return params


def check_names(names: Any, where: str) -> None:
    """Raise TypeError unless ``names`` is what a group may have as param_names: strings, or None."""
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise TypeError(f"{where}: param_names must be a list of strings, got {shown(names)}")


def check_hyperparameters(group: Mapping[str, Any], where: str) -> None:
    """Raise TypeError or ValueError, naming ``where`` and the argument, unless every hyperparameter is sound.

    The value of a tensor lr is looked at only where that costs no wait, on the CPU.
    """

    check = functools.partial(_check, group, where)
    check_lr(group, where)
    check("momentum", lambda x: 0 <= _number(x) < 1, "a number in [0, 1)")
    check("weight_decay", lambda x: 0 <= _number(x) <= FLOAT32_MAX, "a finite number >= 0, in single precision too")
    check("trust_coefficient", lambda x: 0 < _number(x) < math.inf, "a finite number > 0")
    check("trust_clip", _is_clip, "a pair (low, high) with 0 <= low <= high and low finite")
    check(
        "ema_decay",
        lambda x: len(_numbers(x)) == 3 and all(0 <= a <= 1 for a in x),
        "three numbers in [0, 1], one per phase (1 bypasses the filter)",
    )
    check("phase_thresholds", _is_thresholds, "a pair (t1, t2) of finite numbers with t1 >= t2")
    check("total_steps", _is_steps, _what_steps_are(group.get("total_steps")))
    check("warmup_fraction", lambda x: 0 <= _number(x) <= 1, "a number in [0, 1]")
    check("restart_steps", _is_steps, _what_steps_are(group.get("restart_steps")))
    check("restart_mult", lambda x: 1 <= _number(x) < math.inf, "a finite number >= 1")
    check("max_grad_norm", lambda x: x is None or 0 < _number(x) < math.inf, "None or a finite number > 0")
    check("state_dtype", _is_state_dtype, "torch.float32 or torch.bfloat16")
    for name in ("maximize", "skip_nonfinite", "compensated", "capturable"):
        check(name, _is_bool, "True or False")
    check("foreach", lambda x: x is None or _is_bool(x), "None, True or False")
    check("fused", lambda x: x is None or _is_bool(x), "None, True or False")
    if group.get("depth") is not None:
        check_live_depth(group["depth"], where)
    if group["total_steps"] is not None and group["restart_steps"] is not None:
        raise ValueError(
            f"{where}: total_steps={group['total_steps']} and restart_steps={group['restart_steps']} ask for two "
            "schedules; set one of them to None (DALSAcc has restart_steps=1000 unless told otherwise)"
        )
    if group["foreach"] and group["fused"]:
        raise RuntimeError(f"{where}: foreach and fused cannot both be True")


def check_lr(group: Mapping[str, Any], where: str) -> None:
    """The same for the learning rate alone, which schedulers change at every step."""
    _check(group, where, "lr", _is_lr, "a finite number >= 0 or a tensor with one such element")


def _check(group: Mapping[str, Any], where: str, name: str, valid: Callable[[Any], bool], expected: str) -> None:
    if name not in group:
        raise ValueError(f"{where}: {name} is missing")
    try:
        fine = valid(group[name])
    except (TypeError, ValueError):
        raise TypeError(f"{where}: {name} must be {expected}, got {shown(group[name])}") from None
    except OverflowError:  # an integer that no float can hold
        fine = False
    if not fine:
        raise ValueError(f"{where}: {name} must be {expected}, got {shown(group[name])}")


def check_flag(value: Any, where: str) -> None:
    """True or False, and nothing that merely looks like it."""
    if not isinstance(value, bool):
        raise TypeError(f"{where} must be True or False, got {value!r}")


def plain(value: Any) -> Any:
    """NumPy scalars as Python's, lists as tuples: what any checkpoint can hold, and nobody changes in place."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    if isinstance(value, Real) and hasattr(value, "item"):
        return value.item()
    return value


def check_counters(group: Mapping[str, Any], where: str) -> None:
    """The same for the run state that a checkpoint's group carries."""
    for name in COUNTERS:
        if name not in group:
            raise ValueError(f"{where}: {name!r} is missing; was this checkpoint written by another optimizer?")
        value = group[name]
        try:
            fine = not math.isnan(_number(value))
        except (TypeError, OverflowError):
            fine = False
        if not fine:
            raise TypeError(f"{where}: {name!r} must be a number, got {shown(value)}")
    for name in ("step", "skipped_steps"):
        if not isinstance(group[name], Integral) or not 0 <= int(group[name]) < 2**53:
            raise ValueError(f"{where}: {name!r} must be an integer >= 0 of 53 bits, got {shown(group[name])}")


def _number(value: Any) -> float:
    """An int, a float or one of NumPy's as a float; no other Real, which torch cannot multiply with."""
    if type(value) is float:  # at once: asking an abstract class takes 1 us
        return value
    if isinstance(value, Real) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, Sequence):
        raise TypeError
    return [_number(value) for value in values]


def _is_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return True


def _is_state_dtype(dtype: Any) -> bool:
    if not isinstance(dtype, torch.dtype):
        raise TypeError
    return dtype in (torch.float32, torch.bfloat16)


def _is_lr(lr: Any) -> bool:
    if not isinstance(lr, Tensor):
        return 0 <= _number(lr) < math.inf
    if lr.numel() != 1 or not lr.is_floating_point() or lr.device.type == "meta":
        return False
    return not host.knows(lr) or 0 <= lr.item() < math.inf


def _is_clip(clip: Any) -> bool:
    return len(_numbers(clip)) == 2 and 0 <= clip[0] < math.inf and clip[0] <= clip[1]


def _is_thresholds(thresholds: Any) -> bool:
    return len(_numbers(thresholds)) == 2 and all(map(math.isfinite, thresholds)) and thresholds[0] >= thresholds[1]


def _what_steps_are(given: Any) -> str:
    """With what is wrong with those that are given, where one may not see it."""
    if isinstance(given, float):
        return "None or an integer >= 1 (make it one: int(...))"
    return "None or an integer >= 1" + (" of 63 bits" if isinstance(given, Integral) and int(given) >= 2**63 else "")


def _is_steps(steps: Any) -> bool:
    if steps is None:
        return True
    if isinstance(steps, bool) or not isinstance(steps, Integral):
        raise TypeError
    return 1 <= int(steps) < 2**63
