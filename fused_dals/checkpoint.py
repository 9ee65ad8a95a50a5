"""Loading a checkpoint: everything is checked first, then copied in place, so that a bad one changes nothing.

torch.optim.Optimizer.load_state_dict would cast the float32 state of bfloat16 parameters to bfloat16 and replace the
state tensors by new ones; here state keeps its precision and its memory, which captured graphs point to.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_dals.depth_rule import shown
from fused_dals.gather import (
    COMPENSATION_KEY,
    STATE_KEYS,
    SUPPORTED_DTYPES,
    empty_state,
    has_state,
    parameter_label,
    state_dtypes,
)
from fused_dals.hyperparameters import COUNTERS, check_counters, check_hyperparameters, plain
from fused_dals.sharding import like, local, split_alike

#: Keys that the checkpoints of the first days did not have: the optimizer's own values stand in.
ADDED_LATER = ("skipped_steps", "max_grad_norm", "skip_nonfinite", "state_dtype", "compensated", "capturable")


#: Hyperparameters that are several numbers.
TUPLES = ("trust_clip", "ema_decay", "phase_thresholds")

#: Dtypes of state by their names in checkpoints, as repr() has them.
_DTYPES = {repr("float32"): torch.float32, repr("bfloat16"): torch.bfloat16}


@torch.no_grad()  # a saved tensor may require gradients, state must not
def load_checkpoint(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, float]:
    """Put ``state_dict`` into ``optimizer``'s groups and state; returns the counters (step, loss_ema, loss_drop).

    Raises:
        ValueError: groups, sizes, entries or shapes do not fit; TypeError: a value has the wrong type. The message
        names the entry, and the optimizer is as it was.
    """
    groups = optimizer.param_groups
    saved_groups = _checked_groups(groups, state_dict)
    dtypes: dict[Tensor, dict[str, torch.dtype]] = {}
    others: dict[Any, Any] = {}
    loaded = _checked_state(groups, saved_groups, state_dict["state"], dtypes, others)
    # What somebody else keeps beside it comes along, as with torch's optimizers.
    foreign = {
        param: {key: _own(value, param) for key, value in saved.items() if key not in dtypes[param]}
        for param, saved in loaded.items()
    }
    _keep_swapped(optimizer, loaded)

    for param in [param for param in optimizer.state if param not in loaded]:
        del optimizer.state[param]
    for param, saved in loaded.items():
        current = optimizer.state[param]
        for key, dtype in dtypes[param].items():
            have = current.get(key)
            if have is None or not _fits(have, param, dtype):
                current[key] = empty_state(param, dtype)
            if key in saved:
                local(current[key]).copy_(local(saved[key]))
            else:  # a compensation that the checkpoint's weights did not have
                local(current[key]).zero_()
        for key in [key for key in current if key not in dtypes[param]]:
            del current[key]
        current.update(foreign[param])
    for name, foreign in others.items():
        optimizer.state[name] = foreign
    for group, saved_group in zip(groups, saved_groups, strict=True):
        # The parameters are this optimizer's, and so are their names where it has any; all else is the checkpoint's.
        own = ("params", "param_names") if "param_names" in group else ("params",)
        for key in [key for key in group if key not in (*own, *optimizer.defaults, *saved_group)]:
            del group[key]  # such as a depth that was set since
        group.update({key: value for key, value in saved_group.items() if key not in own})
    return {key: saved_groups[0][key] for key in COUNTERS}


def _fits(have: Tensor, param: Tensor, dtype: torch.dtype) -> bool:
    """Whether a state tensor is what this parameter needs, split over the ranks as it is."""
    if have.is_inference() or (have.shape, have.device, have.dtype) != (param.shape, param.device, dtype):
        return False
    return split_alike(have, param)


def _converts(have: torch.dtype, wanted: torch.dtype) -> bool:
    """A float may come in another float's dtype; a compensation is bits."""
    return have.is_floating_point and wanted.is_floating_point


def _checked_groups(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    _check_kind(state_dict, Mapping, "a dict", "checkpoint")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"checkpoint: {key!r} is missing; expected what state_dict() returned")
    saved_groups = state_dict["param_groups"]
    _check_kind(saved_groups, list | tuple, "a list", "checkpoint: 'param_groups'")
    _check_kind(state_dict["state"], Mapping, "a dict", "checkpoint: 'state'")
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, not {len(groups)}"
        )
    complete = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        where = f"checkpoint, group {index}"
        _check_kind(saved, Mapping, "a dict", where)
        saved = {**{key: group[key] for key in ADDED_LATER if key in group}, **saved}
        saved["state_dtype"] = _DTYPES.get(shown(saved.get("state_dtype")), saved.get("state_dtype"))
        if "params" not in saved:
            raise ValueError(f"{where}: 'params' is missing")
        _check_kind(saved["params"], list | tuple, "a list", f"{where}: 'params'")
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"{where}: loaded state dict contains a parameter group that doesn't match the size of optimizer's "
                f"group: {len(saved['params'])} parameters, not {len(group['params'])}"
            )
        check_counters(saved, where)
        check_hyperparameters(saved, where)
        complete.append(saved)
        for key in COUNTERS:
            if saved[key] != complete[0][key]:
                raise ValueError(f"{where}: {key!r} is {saved[key]}, in group 0 it is {complete[0][key]}")
    return [_copied(saved, f"checkpoint, group {index}") for index, saved in enumerate(complete)]


def _copied(group: Mapping[str, Any], where: str) -> dict[str, Any]:
    fresh = {}
    for key, value in group.items():
        try:
            fresh[key] = copy.deepcopy(value)
        except Exception as error:
            raise TypeError(f"{where}: {key!r} cannot be copied: {error}") from error
    return fresh


def _check_kind(value: object, kind: Any, expected: str, what: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be {expected}, got {type(value).__name__}")


def _checked_state(
    groups: list[dict[str, Any]],
    saved_groups: list[dict[str, Any]],
    saved_state: Mapping[Any, Any],
    dtypes: dict[Tensor, dict[str, torch.dtype]],
    others: dict[Any, Any],
) -> dict[Tensor, Mapping[str, Tensor]]:
    """The saved state by parameter; ``dtypes`` receives what each is to be stored in, by the checkpoint's groups, and
    ``others`` what somebody keeps there under a key that is no parameter's."""
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group["params"]))]
    saved_ids = list(chain.from_iterable(group["params"] for group in saved_groups))
    place_of: dict[Any, tuple[int, int]] = {}
    for saved_id, place in zip(saved_ids, places, strict=True):
        try:
            twice = saved_id in place_of
        except TypeError:
            raise TypeError(f"checkpoint, group {place[0]}: 'params' has {shown(saved_id)}, not a number") from None
        if twice:
            raise ValueError(f"checkpoint, group {place[0]}: 'params' has {shown(saved_id)} a second time")
        place_of[saved_id] = place
    loaded: dict[Tensor, Mapping[str, Tensor]] = {}
    by_name = any(isinstance(saved_id, str) for saved_id in place_of)
    for saved_id, entry in saved_state.items():
        if saved_id not in place_of and not isinstance(saved_id, int) and not _is_of_a_parameter(entry, by_name):
            others[saved_id] = entry
            continue
        if saved_id not in place_of:
            raise ValueError(f"checkpoint: state entry {shown(saved_id)} belongs to no parameter of its groups")
        group_index, position = place_of[saved_id]
        param = groups[group_index]["params"][position]
        label = parameter_label(groups[group_index], group_index, position)
        _check_kind(entry, Mapping, "a dict", f"checkpoint: state of parameter {label!r}")
        if not entry:
            continue
        if not param.requires_grad and not has_state(entry) and COMPENSATION_KEY not in entry:
            dtypes[param], loaded[param] = {}, dict(entry)  # somebody else's alone
            continue
        dtypes[param] = state_dtypes(param, saved_groups[group_index])
        needless = COMPENSATION_KEY in entry and COMPENSATION_KEY not in dtypes[param]
        if needless or any(key not in entry for key in STATE_KEYS):
            raise ValueError(
                f"checkpoint: state of parameter {label!r} has entries {sorted(map(str, entry))}, expected "
                f"{sorted(dtypes[param])}; was it written by another optimizer, or for parameters of another dtype?"
            )
        for key, dtype in dtypes[param].items():
            if key not in entry:
                continue
            value = entry[key]
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            if not isinstance(value, Tensor) or (value.dtype != dtype and not _converts(value.dtype, dtype)):
                wanted = "floating" if dtype.is_floating_point else str(dtype)
                raise TypeError(f"checkpoint: {key} of parameter {label!r} must be a {wanted} tensor, got {kind}")
            known = value.dtype == dtype or value.dtype in SUPPORTED_DTYPES
            if value.layout != torch.strided or value.device.type == "meta" or not known:
                raise TypeError(
                    f"checkpoint: {key} of parameter {label!r} must be a dense tensor with values of 16 to 64 bits, "
                    f"got {value.dtype}, {value.layout}, on {value.device}"
                )
            if value.shape != param.shape:
                raise ValueError(
                    f"checkpoint: {key} of parameter {label!r} has shape {tuple(value.shape)}, "
                    f"the parameter {tuple(param.shape)}"
                )
            if not split_alike(value, param):
                raise ValueError(
                    f"checkpoint: {key} of parameter {label!r} is not split over the ranks as the parameter is; "
                    "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict loads it in any layout"
                )
        loaded[param] = dict(entry)  # torch's state_dict() hands out live dicts, which loading writes into
    return loaded


def _is_of_a_parameter(entry: Any, by_name: bool) -> bool:
    """Whether a state entry is that of a parameter, of this optimizer or another one.

    ``by_name``: whether parameters have names in the checkpoint, and one that is not known may be misspelt.
    """
    if not isinstance(entry, Mapping):
        return False
    tensors = any(isinstance(value, Tensor) for value in entry.values())
    return has_state(entry) or (by_name and (tensors or not entry))


def _own(value: Any, param: Tensor) -> Any:
    """What somebody else keeps in a parameter's state, in containers of our own, its tensors on the parameter's
    device; anything else as it is.
    """
    if isinstance(value, Tensor):
        return value.detach().to(param.device, copy=True)
    if type(value) is dict:
        return {key: _own(item, param) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_own(item, param) for item in value)
    return value


def _keep_swapped(optimizer: Optimizer, loaded: dict[Tensor, Mapping[str, Tensor]]) -> None:
    """Copy what is the optimizer's own state, saved for another place: loading would write over it before reading."""
    own = {
        id(value)
        for entry in optimizer.state.values()
        if isinstance(entry, Mapping)
        for value in entry.values()
        if isinstance(value, Tensor)
    }
    for param, entry in loaded.items():
        current = optimizer.state.get(param, {})
        loaded[param] = {
            key: value.clone() if id(value) in own and value is not current.get(key) else value
            for key, value in entry.items()
        }


def pack_plain(packed: Mapping[str, Any]) -> None:
    """Put names in the place of the groups' dtypes, and Python's numbers in that of NumPy's, which a scheduler may have
    written: full and flattened checkpoints of shards, and ``torch.load``, take nothing but plain values."""
    for group in packed.get("param_groups", ()):
        if not isinstance(group, dict):
            continue
        group.update({key: plain(value) for key, value in group.items() if isinstance(value, Real)})
        group.update({key: plain(group[key]) for key in TUPLES if key in group})
        if isinstance(group.get("state_dtype"), torch.dtype):
            group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")


def own_memory(value: Any) -> Any:
    """A tensor, or a copy where it is a view of a bucket, which a checkpoint of some tensors would drag along."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return value
    shard = local(value)
    shares = shard.untyped_storage().nbytes() > shard.numel() * shard.element_size()
    return like(value, shard.clone()) if shares else value
