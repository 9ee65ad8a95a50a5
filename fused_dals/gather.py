"""What a step is going to touch, collected and checked before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fused_dals.memory_order import is_dense, is_plain, same_strides
from fused_dals.rounding import place_key
from fused_dals.sharding import (
    Place,
    is_distributed_tensor,
    like,
    local,
    shard_number,
    split_alike,
    split_over,
    why_apart,
    why_flattened,
    why_not_sharded,
)

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Every tensor's segment of a flat buffer starts at a multiple of this many bytes; a buffer ends where it has so many.
FLAT_ALIGNMENT, FLAT_BYTES = 128, 1 << 24

STATE_KEYS = ("grad_ema", "momentum_buffer")
COMPENSATION_KEY = "compensation"


@dataclass
class TensorBatch:
    """The tensors of one group that are stepped alike, in the group's order: of one device, of the same dtypes.

    What is stepped of a DTensor is this rank's shard.
    """

    group_index: int
    positions: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    owners: list[Tensor] = field(default_factory=list)  # as groups and state hold them: DTensors, or params itself
    split_over: tuple[Any, ...] = ()  # the process groups that hold the rest of each tensor
    #: No gradient on this rank. Shards are stepped with zeros if another rank has one; others are left as they are, in
    #: tables that await one (awaited.py).
    absent: bool = False

    def __post_init__(self) -> None:
        self.owners = self.owners or list(self.params)

    def rounding_keys(self) -> list[int]:
        """Of each, for stochastic rounding."""
        shard = shard_number(self.split_over)
        return [place_key(self.group_index, position, shard) for position in self.positions]

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def places(self) -> list[Place]:
        return [(self.group_index, position) for position in self.positions]

    def only(self, chosen: Sequence[bool]) -> TensorBatch:
        """The tensors for which ``chosen`` is true."""
        positions = list(compress(self.positions, chosen))
        params, grads, owners = (list(compress(some, chosen)) for some in (self.params, self.grads, self.owners))
        return TensorBatch(self.group_index, positions, params, grads, owners, self.split_over, self.absent)

    def emptied(self) -> TensorBatch:
        """Without what the next step may find replaced, none of which is to be kept alive."""
        return replace(self, params=[], grads=[])

    def refilled(self) -> TensorBatch:
        """With the shards and gradients that its parameters have now."""
        return replace(self, params=list(map(local, self.owners)), grads=[local(p.grad) for p in self.owners])  # type: ignore[arg-type]

    def state_of(self, state: Mapping[Tensor, Mapping[str, Tensor]], key: str) -> list[Tensor]:
        """One state tensor of each, as it is stepped; empty where there is none."""
        return [local(entry[key]) for entry in map(state.__getitem__, self.owners) if key in entry]


def parameter_label(group: Mapping[str, Any], group_index: int, position: int) -> str:
    """The name of a parameter, or its place where it has none."""
    names = parameter_names(group)
    return f"param_groups[{group_index}].params[{position}]" if names is None else names[position]


def parameter_names(group: Mapping[str, Any]) -> Sequence[str] | None:
    """The names of a group's parameters where they have names (and nobody replaced the list by a longer one)."""
    names = group.get("param_names")
    return names if isinstance(names, list | tuple) and len(names) == len(group["params"]) else None


def group_labels(group: Mapping[str, Any], group_index: int) -> list[str]:
    """The labels of all parameters of a group."""
    names = parameter_names(group)
    if names is not None:
        return list(names)
    return [parameter_label(group, group_index, position) for position in range(len(group["params"]))]


def depth_keys(group: Mapping[str, Any]) -> list[str]:
    """By what a group's parameters are told apart where depths are kept: names, or places in it."""
    names = parameter_names(group)
    return [f"params[{i}]" for i in range(len(group["params"]))] if names is None else list(names)


def unique_labels(groups: Sequence[Mapping[str, Any]], places: Sequence[tuple[int, int]]) -> list[str]:
    """Labels of the parameters at these (group, position); names that occur twice, as in a GAN, are told apart."""
    labels = [parameter_label(groups[g], g, i) for g, i in places]
    count = Counter(labels)
    return [
        label if count[label] == 1 else f"{label} (param_groups[{g}].params[{i}])"
        for label, (g, i) in zip(labels, places, strict=True)
    ]


class Joined:
    """The shapes of each group's parameters when it joined, None where they were not known; and of all groups ever."""

    def __init__(
        self,
        shapes: Sequence[Sequence[tuple[int, ...]] | None],
        ever: Sequence[Sequence[tuple[int, ...]] | None],
    ) -> None:
        self._shapes = shapes
        self._all = {shape for some in ever if some is not None for shape in some}

    def why_flattened(self, param: Tensor, place: Place, count: int) -> str:
        """As of sharding.py; ``count``: of the parameters in its group now."""
        group_index, position = place
        # Groups may have been taken out, or have changed places: their shapes are known in any order.
        if group_index >= len(self._shapes) or tuple(param.shape) in self._all:
            return ""
        return why_flattened(param, position, count, self._shapes[group_index])


def gather(
    groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Mapping[str, Tensor]], joined: Joined
) -> list[TensorBatch]:
    """Batches of everything that has a gradient, and of shards whose gradient only other ranks may have.

    Raises:
        RuntimeError: a gradient is sparse, a parameter or gradient has a dtype or device that DALS cannot serve, or
            its shape is not that of the gradient or of the state; the message names the parameter.
    """
    batches: dict[tuple[Any, ...], TensorBatch] = {}
    for group_index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            grad, over = param.grad, split_over(param)
            absent = grad is None and over != () and param.requires_grad
            if absent:
                grad = like(param, torch.zeros((), dtype=param.dtype, device=param.device).expand(local(param).shape))
            if grad is None:
                continue
            problem = joined.why_flattened(param, (group_index, position), len(group["params"])) or problem_of(
                param, grad, group, state.get(param)
            )
            if problem:
                label = parameter_label(group, group_index, position)
                raise RuntimeError(f"DALS cannot step parameter {label!r} of group {group_index}: {problem}")
            # Everything else that decides how a batch is stepped is the same within a group.
            key = (group_index, param.device, param.dtype, grad.dtype, over, absent)
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = TensorBatch(group_index, split_over=over, absent=absent)
            batch.positions.append(position)
            batch.params.append(local(param))
            batch.grads.append(local(grad))
            batch.owners.append(param)
    return list(batches.values())


def problem_of(param: Tensor, grad: Tensor, group: Mapping[str, Any], state: Mapping[str, Tensor] | None) -> str:
    """What is wrong with a parameter and what to do about it; empty if nothing is."""
    if problem := why_not_sharded(param):
        return problem
    if is_distributed_tensor(param) != is_distributed_tensor(grad):
        kinds = ("a plain tensor", "a DTensor")
        return f"it is {kinds[is_distributed_tensor(param)]} and its gradient {kinds[is_distributed_tensor(grad)]}"
    if problem := why_apart(param, grad):
        return problem
    if grad.layout != torch.strided:
        return f"its gradient is sparse ({grad.layout}); make it dense, e.g. nn.Embedding(..., sparse=False)"
    for what, dtype in (("it", param.dtype), ("its gradient", grad.dtype)):
        if dtype not in SUPPORTED_DTYPES:
            hint = "; keep real and imaginary parts as a real tensor, torch.view_as_real" if dtype.is_complex else ""
            return f"{what} is {dtype}, and only float32, bfloat16, float16 and float64 are supported{hint}"
    if param.layout != torch.strided:
        return f"it is sparse ({param.layout}), and only dense parameters are supported"
    if param.device.type == "meta":
        return "it is on the meta device; give the model real memory first, e.g. model.to_empty(device=...)"
    if grad.shape != param.shape:
        return f"it has shape {tuple(param.shape)} and its gradient {tuple(grad.shape)}"
    if group["compensated"] and param.dtype == torch.float16:
        return "it is float16, and compensated=True serves bfloat16 (wider parameters need no compensation)"
    return _problem_of_state(param, group, state) if has_state(state) else ""


def has_state(entry: Mapping[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Whether a parameter's entry has state of this optimizer; others may keep things of theirs there, too."""
    return entry is not None and any(key in entry for key in STATE_KEYS)


def _problem_of_state(param: Tensor, group: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    anew = "delete optimizer.state[param] if its history is to start anew"
    for key, dtype in state_dtypes(param, group).items():
        have = state.get(key)
        if have is None and key == COMPENSATION_KEY:
            continue  # it comes with the group's flag
        if not isinstance(have, Tensor):
            return f"its state has {type(have).__name__} for {key}, not a tensor; {anew}"
        if have.is_inference():
            return f"its {key} was made in torch.inference_mode(), and cannot be written outside of it; {anew}"
        if have.shape != param.shape:
            return f"it has shape {tuple(param.shape)} and its {key} {tuple(have.shape)}; {anew}"
        if not split_alike(have, param):
            return f"its {key} is not split over the ranks as it is; {anew}"
        if have.device != param.device or have.dtype != dtype:
            return (
                f"it is now {param.dtype} on {param.device}, and its {key} {have.dtype} on {have.device} "
                f"(state_dtype={group['state_dtype']}, compensated={group['compensated']}); "
                "optimizer.load_state_dict(optimizer.state_dict()) moves the state after it"
            )
    return ""


def state_dtypes(param: Tensor, group: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """The state of a parameter: name and dtype of its tensors, each of the parameter's shape.

    grad_ema and momentum_buffer are of the group's state_dtype (float64 for float64 parameters); bfloat16 parameters of
    a compensated group have a compensation.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else group["state_dtype"]
    dtypes = dict.fromkeys(STATE_KEYS, dtype)
    if group["compensated"] and param.dtype == torch.bfloat16:
        dtypes[COMPENSATION_KEY] = torch.int16
    return dtypes


def create_missing_state(
    groups: Sequence[dict[str, Any]],
    state: dict[Tensor, dict[str, Tensor]],
    flat: Callable[[dict[str, Any], Tensor], bool],
) -> None:
    """Zero state for every parameter that trains, with or without a gradient, so that all ranks hold the same keys.

    Those for which ``flat(group, param)`` get theirs as views of flat buffers, by device, dtype and kind of state, and
    what somebody put there instead is laid out anew where kernels could not follow it: dense, and all alike. A
    compensation comes and goes with the group's flag: zeros are what a weight without one has.
    """
    flattened: dict[tuple[torch.device, str, torch.dtype], list[Tensor]] = {}
    made: list[tuple[Tensor, str, Tensor]] = []  # put in its place when all is there: memory may run out before
    for group in groups:
        for param in group["params"]:
            trains = param.requires_grad or param.grad is not None
            usable = param.dtype in SUPPORTED_DTYPES and param.device.type != "meta"
            if not trains or not usable or is_lazy(param):
                continue
            dtypes, is_flat = state_dtypes(param, group), flat(group, param)
            if has_state(state.get(param)):
                if COMPENSATION_KEY not in dtypes:
                    state[param].pop(COMPENSATION_KEY, None)
                if is_flat and param.grad is not None:  # that of others has not been checked, and is not stepped
                    lay_out_alike(param, state[param], [key for key in dtypes if key in state[param]])
                dtypes = {key: dtype for key, dtype in dtypes.items() if key not in (*state[param], *STATE_KEYS)}
            for key, dtype in dtypes.items():
                if is_flat and not is_distributed_tensor(param):  # a DTensor of a view cannot be copied by deepcopy
                    flattened.setdefault((param.device, key, dtype), []).append(param)
                else:
                    zeros = torch.zeros_like(_layout_of(param, state.get(param)), dtype=dtype, requires_grad=False)
                    made.append((param, key, like(param, zeros)))
    for (_, key, dtype), params in flattened.items():
        zeros_of_all = flat_zeros([_layout_of(param, state.get(param)) for param in params], dtype)
        made += [(param, key, value) for param, value in zip(params, zeros_of_all, strict=True)]
    for param, key, value in made:
        state[param][key] = value


def _layout_of(param: Tensor, state: Mapping[str, Any] | None) -> Tensor:
    """What further state is to lie in memory like: state that is there already, or else the parameter."""
    first = (state or {}).get("grad_ema")
    return local(first if isinstance(first, Tensor) and first.shape == param.shape else param).detach()


def lay_out_alike(param: Tensor, state: dict[str, Tensor], keys: Sequence[str]) -> None:
    """One order of memory, without gaps, for these state tensors: kernels go through them as they lie."""
    first = local(state["grad_ema"])
    if not (is_plain(first) and is_dense(first)):
        dense = empty_state(param, first.dtype)
        local(dense).copy_(first)
        state["grad_ema"], first = dense, local(dense)
    for key in keys:
        value = local(state[key])
        if not (is_plain(value) and same_strides(value, first)):
            state[key] = like(param, torch.empty_like(first, dtype=value.dtype).copy_(value))


def flat_zeros(params: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Zero tensors with the shapes and strides of ``params`` (of one device), as views of padded buffers.

    A buffer ends with the tensor that fills it: a large tensor has its memory to itself, so that a checkpoint need not
    copy it, and memory that is given up comes back in pieces.
    """
    zeros: list[Tensor] = []
    shapes = [torch.empty_like(p, dtype=dtype, device="meta") for p in params]
    step = FLAT_ALIGNMENT // dtype.itemsize
    starts: list[int] = []
    end = 0
    for i, shape in enumerate(shapes):
        starts.append(-(-end // step) * step)
        end = starts[-1] + shape.numel()
        if end * dtype.itemsize < FLAT_BYTES and i + 1 < len(shapes) and not _is_large(shapes[i + 1], dtype):
            continue
        flat = torch.zeros(end, dtype=dtype, device=params[0].device)
        some = shapes[len(zeros) : i + 1]
        zeros += [flat.as_strided(s.shape, s.stride(), start) for s, start in zip(some, starts, strict=True)]
        starts, end = [], 0
    return zeros


def _is_large(shape: Tensor, dtype: torch.dtype) -> bool:
    return shape.numel() * dtype.itemsize >= FLAT_BYTES


def empty_state(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for one state tensor: the parameter's shape, strides and device, distributed as it is."""
    shard = local(param)
    return like(param, torch.empty_like(shard, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False))
