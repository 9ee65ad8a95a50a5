"""Loading a checkpoint: everything is checked first, then copied in place, so that a bad one changes nothing.

torch.optim.Optimizer.load_state_dict would cast the float32 state of bfloat16 parameters to bfloat16 and replace the
state tensors by new ones; here state keeps its precision and its memory, which captured graphs point to.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fused_dals.gather import STATE_KEYS, empty_state, parameter_label
from fused_dals.hyperparameters import COUNTERS, check_counters, check_hyperparameters


def load_checkpoint(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, float]:
    """Put ``state_dict`` into ``optimizer``'s groups and state; returns the counters (step, loss_ema, loss_drop).

    Raises:
        ValueError: groups, sizes, entries or shapes do not fit; TypeError: a value has the wrong type. The message
        names the entry, and the optimizer is as it was.
    """
    groups = optimizer.param_groups
    saved_groups = _checked_groups(groups, state_dict)
    loaded = _checked_state(groups, saved_groups, state_dict["state"])

    for param in [param for param in optimizer.state if param not in loaded]:
        del optimizer.state[param]
    for param, saved in loaded.items():
        current = optimizer.state[param]
        for key in STATE_KEYS:
            fresh = empty_state(param)
            have = current.get(key)
            if have is None or (have.shape, have.device, have.dtype) != (fresh.shape, fresh.device, fresh.dtype):
                current[key] = fresh
            current[key].copy_(saved[key])
    for group, saved_group in zip(groups, saved_groups, strict=True):
        # The parameters and their names are this optimizer's; all other values are the checkpoint's.
        group.update({key: value for key, value in saved_group.items() if key not in ("params", "param_names")})
    return {key: saved_groups[0][key] for key in COUNTERS}


def _checked_groups(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"checkpoint: {key!r} is missing; expected what state_dict() returned")
    saved_groups = state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, not {len(groups)}"
        )
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        where = f"checkpoint, group {index}"
        if "params" not in saved:
            raise ValueError(f"{where}: 'params' is missing")
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"{where}: loaded state dict contains a parameter group that doesn't match the size of optimizer's "
                f"group: {len(saved['params'])} parameters, not {len(group['params'])}"
            )
        check_counters(saved, where)
        check_hyperparameters(saved, where)
        for key in COUNTERS:
            if saved[key] != saved_groups[0][key]:
                raise ValueError(f"{where}: {key!r} is {saved[key]}, in group 0 it is {saved_groups[0][key]}")
    return copy.deepcopy(list(saved_groups))


def _checked_state(
    groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]], saved_state: Mapping[Any, Any]
) -> dict[Tensor, Mapping[str, Tensor]]:
    """The saved state by parameter."""
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group["params"]))]
    saved_ids = list(chain.from_iterable(group["params"] for group in saved_groups))
    place_of = dict(zip(saved_ids, places, strict=True))
    loaded: dict[Tensor, Mapping[str, Tensor]] = {}
    for saved_id, entry in saved_state.items():
        if saved_id not in place_of:
            raise ValueError(f"checkpoint: state entry {saved_id!r} belongs to no parameter of its groups")
        group_index, position = place_of[saved_id]
        param = groups[group_index]["params"][position]
        label = parameter_label(groups[group_index], group_index, position)
        if not entry:
            continue
        if set(entry) != set(STATE_KEYS):
            raise ValueError(
                f"checkpoint: state of parameter {label!r} has entries {sorted(map(str, entry))}, expected "
                f"{sorted(STATE_KEYS)}; was it written by another optimizer?"
            )
        for key in STATE_KEYS:
            value = entry[key]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"checkpoint: {key} of parameter {label!r} must be a floating tensor, got {kind}")
            if value.shape != param.shape:
                raise ValueError(
                    f"checkpoint: {key} of parameter {label!r} has shape {tuple(value.shape)}, "
                    f"the parameter {tuple(param.shape)}"
                )
        loaded[param] = dict(entry)  # torch's state_dict() hands out live dicts, which loading writes into
    return loaded
