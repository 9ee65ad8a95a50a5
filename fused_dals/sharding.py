"""Parameters that are split over ranks: their local shards, and sums that are the whole tensor's.

A DTensor is stepped as the shard that this rank holds. What a shard cannot know is the norm of the whole tensor, which
the trust ratio asks for: a norm of the shard instead is wrong by percents, silently. So every step leaves a row of sums
of squares per parameter in one small buffer, and adds them up over the process groups over which the parameter is
really split: one collective per process group, whatever the number of parameters. Nothing here computes on DTensors.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_dals.host_walk import HOST_WALK

#: Their optimizers put buffers in the place of parameters.
JOINING_LIBRARIES = ("deepspeed", "megatron")

#: (param group, position in it)
Place = tuple[int, int]


def is_distributed_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; nothing is imported to find out."""
    return hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, any other tensor itself.

    ``to_local()`` would make a new Parameter at every call, whose identity says nothing.
    """
    shard: Any = getattr(tensor, "_local_tensor", tensor)
    return shard.wait() if hasattr(shard, "wait") else shard  # type: ignore[no-any-return]  # still on its way


def split_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape lie on the ranks in the same parts."""
    same_placements = getattr(one, "placements", None) == getattr(other, "placements", None)
    return same_placements and local(one).shape == local(other).shape


def like(param: Tensor, shard: Tensor) -> Tensor:
    """``shard`` as this rank's part of a tensor that is distributed as ``param`` is; itself for a plain parameter."""
    if not is_distributed_tensor(param):
        return shard
    from torch.distributed.tensor import DTensor

    spec: Any = param
    return DTensor.from_local(
        shard, spec.device_mesh, spec.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def split_over(param: Any) -> tuple[Any, ...]:
    """The process groups over which the elements of a parameter are split, in the order of its mesh.

    Every placement splits but Replicate and Partial: that of tensor parallelism under FSDP is no subclass of Shard.
    """
    if not is_distributed_tensor(param):
        return ()
    mesh = param.device_mesh
    dims = [dim for dim, placement in enumerate(param.placements) if not _whole(placement)]
    return tuple(mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1)


def _whole(placement: Any) -> bool:
    return bool(placement.is_replicate() or placement.is_partial())


def why_not_sharded(param: Tensor) -> str:
    """Why norms of this parameter cannot be had, and what to use instead; empty where they can."""
    if getattr(param, "_fsdp_flattened", False):
        return (
            "it is (a view into) a flat parameter of FullyShardedDataParallel (FSDP1), which joins the tensors whose "
            "norms the trust ratio needs; use fully_shard (FSDP2), which keeps them apart"
        )
    if hasattr(param, "ds_id") or hasattr(param, "ds_tensor"):
        return (
            "DeepSpeed's ZeRO-3 has partitioned it, and its norm is out of reach; use fully_shard (FSDP2) for the same "
            "sharding, or DeepSpeed's stage 0"
        )
    if getattr(param, "tensor_model_parallel", False) and _megatron_ranks() != 1:
        return (
            "it is a Megatron tensor-parallel shard, a plain tensor that does not tell over which ranks it is split; "
            "use parallelize_module (DTensor) for tensor parallelism"
        )
    if is_distributed_tensor(param) and any(placement.is_partial() for placement in param.placements):  # type: ignore[attr-defined]
        return "it is a DTensor whose value is Partial, pending a reduction; redistribute it to Replicate or Shard"
    return ""


def why_flattened(param: Tensor, position: int, count: int, known: Sequence[tuple[int, ...]] | None) -> str:
    """Why a parameter is no tensor of the model: it has a single dimension where one of several was, or is larger
    where there were more. Where none is missing, only a library that joins tensors makes that suspicious.

    ``count``: of the parameters in its group now; ``known``: the shapes of those that joined, None where not known.
    """
    if known is None or position >= len(known) or param.dim() != 1:
        return ""
    if len(known[position]) == 1 and not (count < len(known) and param.numel() > known[position][0]):
        return ""
    if count >= len(known) and not any(name in sys.modules for name in JOINING_LIBRARIES):
        return ""  # as many as there were: somebody put a layer in another's place
    return (
        f"it is a buffer of {param.numel()} elements where a parameter of shape {known[position]} was. DeepSpeed's "
        "ZeRO and Megatron's distributed optimizer join and cut tensors whose norms the trust ratio needs; use "
        "fully_shard (FSDP2), or fused_dals.zero.ZeroDALS with DistributedDataParallel"
    )


def why_apart(param: Any, grad: Any) -> str:
    """Why a gradient is not that of this rank's shard; empty where it is."""
    if not is_distributed_tensor(param):
        return ""
    if param.device_mesh != grad.device_mesh:
        return f"it is distributed over {param.device_mesh}, and its gradient over {grad.device_mesh}"
    if param.placements != grad.placements or local(param).shape != local(grad).shape:
        return f"it is placed as {param.placements}, and its gradient as {grad.placements}"
    return ""


def shard_number(over: tuple[Any, ...]) -> int:
    """Which of the shards this rank holds, of a tensor that is split over these process groups; 0 for a whole one."""
    number = 0
    for group in over:
        number = number * torch.distributed.get_world_size(group) + torch.distributed.get_rank(group)
    return number


def _megatron_ranks() -> int:
    """Ranks of Megatron's tensor parallel group; 0 where Megatron cannot be asked."""
    parallel_state: Any = sys.modules.get("megatron.core.parallel_state")
    try:
        return int(parallel_state.get_tensor_model_parallel_world_size())
    except (AttributeError, AssertionError, RuntimeError):
        return 0


def settle_gradients(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Give every gradient of a DTensor the placements of its parameter; whether all are distributed as those then.

    Tensor parallelism leaves Partial gradients of replicated weights (norms, biases): a collective each, because nobody
    else has added them up. FSDP2's gradients have the very spec of their parameters, which the compiled walk sees.
    """
    if HOST_WALK.compiled is not None and HOST_WALK.compiled.are_settled(groups):
        return True
    settled = True
    for group in groups:
        for param in group["params"]:
            grad = param.grad
            if grad is None or getattr(grad, "_spec", None) is getattr(param, "_spec", None):
                continue
            both = is_distributed_tensor(param) and is_distributed_tensor(grad)
            if not both or grad.device_mesh != param.device_mesh:
                settled = False
            elif grad.placements != param.placements:
                param.grad = grad.redistribute(placements=param.placements)
    return settled


class RowsOverRanks:
    """float64 [n, columns], whose rows are to be summed over process groups, each row over those of its own.

    All ranks of a group must make the same rows in the same order.
    """

    def __init__(self, groups_of_rows: Sequence[tuple[Any, ...]], columns: int, device: torch.device) -> None:
        self.groups_of_rows = list(groups_of_rows)
        self.process_groups = list(dict.fromkeys(group for groups in groups_of_rows for group in groups))
        # Rows of one process group lie together where that can be, so that they are one run of memory: for two groups
        # (FSDP and tensor parallelism) it always can.
        order = sorted(range(len(groups_of_rows)), key=lambda i: self._place(groups_of_rows[i]))
        self.row = [0] * len(order)
        for row, i in enumerate(order):
            self.row[i] = row
        self.values = torch.zeros(len(order), columns, dtype=torch.float64, device=device)
        self._chosen = [
            as_index([row for row, i in enumerate(order) if group in groups_of_rows[i]], device)
            for group in self.process_groups
        ]

    def _place(self, groups: tuple[Any, ...]) -> tuple[int, ...]:
        first, *others = (group in groups for group in self.process_groups)
        return (-first, *(other if first else -other for other in others))

    def sum_over_ranks(self) -> None:
        """One collective per process group."""
        for group, chosen in zip(self.process_groups, self._chosen, strict=True):
            some = self.values[chosen]
            torch.distributed.all_reduce(some, group=group)
            if not isinstance(chosen, slice):
                self.values[chosen] = some


def as_index(rows: list[int], device: torch.device) -> slice | Tensor:
    """Rows in ascending order as a slice where they are one run, else as a tensor."""
    if rows and rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, dtype=torch.int64, device=device)


class Shards:
    """What the parameters of an optimizer need of other ranks, if any of them is split.

    ``norms`` has a row per parameter, in the order of the groups, whether it has a gradient or not: sum of squares of p
    and of u, and how many ranks have a gradient for their shard. ``scan`` has a row per way of being split: sum of
    squares of the gradients, and number of non-finite ones.
    """

    def __init__(self, splits: Mapping[Place, tuple[Any, ...]], device: torch.device) -> None:
        self.splits = dict(splits)
        self.device = device
        self.norms = RowsOverRanks(list(splits.values()), 3, device)
        self.row = dict(zip(splits, self.norms.row, strict=True))
        ways = [*dict.fromkeys(splits.values()), tuple(self.norms.process_groups)]  # the last one is for found_inf
        self.scan = RowsOverRanks(ways, 2, device)
        self.way = {way: self.scan.row[i] for i, way in enumerate(ways[:-1])}
        self.found_inf_row = self.scan.row[-1]
        self._blank = torch.zeros_like(self.norms.values)
        self._present: list[Place] = []

    @staticmethod
    def of(groups: Sequence[Mapping[str, Any]], known: Shards | None) -> Shards | None:
        """For all parameters that train; None where no parameter is split. ``known`` where nothing has changed.

        Raises RuntimeError where split parameters lie on several devices.
        """
        splits: dict[Place, tuple[Any, ...]] = {}
        devices = set()
        for index, group in enumerate(groups):
            for position, param in enumerate(group["params"]):
                if param.requires_grad or param.grad is not None:
                    splits[index, position] = over = split_over(param)
                    devices |= {local(param).device} if over else set()
        if not devices:
            return None
        if len(devices) > 1:
            raise RuntimeError(
                f"DALS cannot step sharded parameters on several devices ({', '.join(sorted(map(str, devices)))}) in "
                "one optimizer: their norms are added up together; use one optimizer per device"
            )
        (device,) = devices
        if known is not None and (known.splits, known.device) == (splits, device):
            return known
        return Shards(splits, device)

    def set_present(self, places: Sequence[Place]) -> None:
        """This rank has gradients for these, until told otherwise."""
        if list(places) != self._present:
            self._present = list(places)
            self._blank.zero_()
            self._blank[[self.row[place] for place in places], 2] = 1.0

    def begin(self) -> None:
        """Rows without norms, with a mark where this rank has a gradient."""
        self.norms.values.copy_(self._blank)

    def put(self, rows: slice | Tensor, p_norms: Tensor, u_norms: Tensor, dtype: torch.dtype) -> None:
        """Norms of this rank's shards; ``dtype``: what the update is computed in."""
        squares = torch.stack([p_norms, u_norms], dim=1).to(torch.float64).square()
        self.norms.values[rows, :2] = squares if dtype == torch.float64 else short(squares)

    def take(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Norms of the whole tensors, float64, once they are summed over the ranks."""
        return tuple(self.norms.values[rows, :2].sqrt().unbind(1))  # type: ignore[return-value]

    def present(self, rows: slice | Tensor) -> Tensor:
        """Whether any rank has a gradient for these, once summed over the ranks."""
        return self.norms.values[rows, 2] > 0

    def scan_over_ranks(
        self, rows: Mapping[tuple[Any, ...], Sequence[Tensor]], found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What all ranks have found in their gradients, [n, 2], from rows by the way that tensors are split.

        A GradScaler looks at this rank's shards alone: what it found is added up, too.
        """
        values = self.scan.values.zero_()
        for way, found in rows.items():
            values[self.way[way]] = torch.cat([some.to(self.device) for some in found]).sum(0)
        if found_inf is not None:
            values[self.found_inf_row, 1] = found_inf.reshape(()).to(self.device, torch.float64)
        self.scan.sum_over_ranks()
        found_anywhere = values[self.found_inf_row, 1].clone()
        values[self.found_inf_row] = 0.0
        return values, None if found_inf is None else found_anywhere

    def any_rank(self, flag: bool) -> bool:
        """Whether it is true on any of the ranks that share parameters with this one; waits for them."""
        _, found = self.scan_over_ranks({}, torch.tensor(float(flag), dtype=torch.float64, device=self.device))
        return bool(found)


class Partitions:
    """Other ranks whose optimizers hold other parameters of the model: pipeline stages, partitions of ZeRO.

    Nothing about a step is theirs to say but the norm and finiteness of all gradients.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Partitions:
        return self  # process groups cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError(
                "an optimizer with partition_group= cannot be pickled, because process groups cannot: save its "
                "state_dict()"
            )
        return self.__dict__

    def sum(self, scan: Tensor | None, found_inf: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows of sums of squares and counts, and a GradScaler's flag, of all partitions; one collective."""
        values = torch.zeros(3, dtype=torch.float64, device=device)
        if scan is not None:
            values[:2] = scan.sum(0)
        if found_inf is not None:
            values[2] = found_inf.reshape(())
        torch.distributed.all_reduce(values, group=self.group)
        return values[:2].reshape(1, 2), values[2]

    def any_rank(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true for any partition; waits for them."""
        return bool(self.sum(None, torch.tensor(float(flag), dtype=torch.float64, device=device), device)[1])


def short(squares: Tensor) -> Tensor:
    """float64 numbers rounded to the 24 bits of a float32, but not to its range.

    The sum of 1024 of them is then exact in float64 unless they are more than 2^19 apart: replicas add them up to the
    same bits, in whatever order their networks do it. It costs 3e-8 of a square.
    """
    mantissa, exponent = torch.frexp(squares)
    return torch.ldexp((mantissa * 2.0**24).round(), exponent - 24)
