"""The mean of the observed losses over all ranks, so that their phases never part: 16 bytes from each in every step."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fused_dals import host

#: A process group, None for all ranks, False for a mean of this rank's own losses.
LossGroup: TypeAlias = Any | Literal[False] | None


def check_process_group(group: Any, what: str) -> None:
    """Raise TypeError or ValueError unless this is a process group that this rank belongs to."""
    if torch.distributed.is_available():
        if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{what}: this rank does not belong to the process group; pass the one that it is in")
        if isinstance(group, torch.distributed.ProcessGroup):
            return
    raise TypeError(f"{what} must be a torch.distributed.ProcessGroup, got {type(group).__name__}")


class LossAverage:
    """Adds (sum, count) of the losses over the ranks, exactly once in every step, loss or no loss.

    For all ranks it opens a process group of its own at the first step: its collective may then be on its way while
    backward runs, and takes no place in the order of anybody else's collectives. (Ranks without a loss, as pipeline
    stages are, come to it later than the others.)
    """

    def __init__(self, group: LossGroup = None) -> None:
        self.setting = group
        self._group: Any = None
        self._world: Any = None  # the default group for which it was opened

    def __deepcopy__(self, memo: dict[int, Any]) -> LossAverage:
        return LossAverage(self.setting)  # process groups cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        if self.setting:
            raise TypeError(
                "an optimizer with loss_group= cannot be pickled, because process groups cannot: save its state_dict()"
            )
        return {**self.__dict__, "_group": None, "_world": None}

    def active(self) -> bool:
        """Whether there are other ranks to agree with."""
        if self.setting is False or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return False
        return torch.distributed.get_world_size(self.setting) > 1

    def open(self) -> None:
        """Make the process group, once; all ranks are here, because all take a step."""
        world = torch.distributed.group.WORLD
        if self._world is not world:
            self._group = torch.distributed.new_group() if self.setting is None else self.setting
            self._world = world

    def is_open(self) -> bool:
        """Whether a sum may be started before all ranks are known to be at their step."""
        return self.active() and self.is_of_this_world(self._world)

    def is_of_this_world(self, world: Any) -> bool:
        """Whether this was the default group when something began, and still is."""
        return world is not None and torch.distributed.is_initialized() and world is torch.distributed.group.WORLD

    def start(self, total: Tensor | None, count: int, device: torch.device) -> OnItsWay:
        """Begin to add up; ``total`` may be anywhere, the sum will be on ``device``."""
        values = torch.zeros(2, dtype=host.widest(device), device=device)
        if total is not None:
            values[0].copy_(host.scalars_on(device, total))
            values[1].fill_(count)
        work = torch.distributed.all_reduce(values, group=self._group, async_op=True)
        return OnItsWay(values, work, total, count, self._world)

    def any_rank(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true on any rank; waits for all of them."""
        self.open()
        mine = torch.tensor(float(flag), dtype=host.widest(device), device=device)
        return bool(self.start(mine, 1, device).wait()[0])


class OnItsWay:
    """A sum over ranks that has been started, and what this rank has put in."""

    def __init__(self, values: Tensor, work: Any, total: Tensor | None, count: int, world: Any) -> None:
        self._values = values
        self._work = work
        self.total, self.count, self.world = total, count, world

    def wait(self) -> Tensor:
        """(sum, count) of the losses of all ranks; makes the device wait, not the host, where the backend can."""
        self._work.wait()
        return self._values
