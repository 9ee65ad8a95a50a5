"""What changes while training and is no hyperparameter: one object for a whole optimizer."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_dals.awaited import LastGrads
from fused_dals.depth_rule import DepthMap, check_live_depth
from fused_dals.fused import FusedPass
from fused_dals.gather import Joined, depth_keys, parameter_names
from fused_dals.live_groups import LiveGroups
from fused_dals.loss_signal import LossSignal
from fused_dals.reference import raw_blend
from fused_dals.run_state import RunState
from fused_dals.sharding import Partitions, Shards
from fused_dals.stats import TrustRatios
from fused_dals.steady import Steady


@dataclass
class Captured:
    """What the step that was captured last holds once and for all."""

    clips: bool
    skips: bool
    by_kernels: bool  # which read every number from device memory


@dataclass
class Runtime:
    """One object, because wrappers copy an optimizer's attributes: they then share it, and no counter runs apart."""

    depths: DepthMap
    amp_fused: bool = False
    partitions: Partitions = field(default_factory=Partitions)
    state: RunState = field(default_factory=RunState)
    loss: LossSignal = field(default_factory=LossSignal)
    live_groups: LiveGroups = field(default_factory=LiveGroups)
    #: Of who had a gradient when kernels did the whole step; as long as a step goes on with its tables, those of the
    #: tables. Places may go to somebody else, who is then awaited, or not, as ever.
    last_grads: LastGrads = field(default_factory=dict)
    trust_ratios: list[TrustRatios] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    fused: dict[torch.device, FusedPass] = field(default_factory=dict)
    steady: Steady | None = None
    captured: Captured | None = None
    #: Shapes of every group's parameters when it joined, by the order of joining; None where a lazy one had none.
    shapes: list[list[tuple[int, ...]] | None] = field(default_factory=list)
    #: The how-manieth each group joined, and its parameters then, by the identity of its dict: who holds neither keeps
    #: no parameters alive. Another dict that comes to lie in its place has others.
    numbers: dict[int, tuple[int, list[weakref.ref[Tensor]]]] = field(default_factory=dict)
    #: Whether parameters are DTensors, and what their shards need of other ranks.
    distributed: bool = False
    shards: Shards | None = None
    #: Address, size and strides of the parameters, and of state that kernels write, last seen to share no memory.
    memory: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        # Tables of addresses are of no use to a copy: it builds its own at its first step.
        anew: dict[str, Any] = {"fused": {}, "steady": None, "captured": None, "memory": [], "shards": None}
        return {**self.__dict__, **anew, "numbers": {}}  # whose dicts are others, too

    @property
    def plans(self) -> tuple[int, int]:
        """Equal as long as neither groups nor depths changed what plans depend on, but for the tensors themselves."""
        return self.live_groups.plans, self.depths.version

    def depths_of(self, groups: Sequence[Mapping[str, Any]], index: int) -> list[float]:
        """Depth of every parameter of a group."""
        group, number = groups[index], self.number_of(groups, index)
        names = parameter_names(group)
        if names is None and "param_names" in group:
            self.warn_once(
                "param_names",
                f"group {index}: param_names has {len(group['param_names'])} entries for {len(group['params'])} "
                "parameters; depths are ranks within the group until both fit",
            )
        fixed = group.get("depth")
        if fixed is not None:
            fixed = check_live_depth(fixed, f"group {index}")
        return self.depths.of_group(number, depth_keys(group), names, fixed)

    def number_of(self, groups: Sequence[Mapping[str, Any]], index: int) -> int:
        """The how-manieth a group joined, by which depths were said; its place, where somebody has put another dict."""
        number, params = self.numbers.get(id(groups[index]), (index, []))
        of_now = set(map(id, groups[index]["params"]))
        return number if any(id(param()) in of_now for param in params) else index

    def number(self, group: Mapping[str, Any], number: int) -> None:
        """Know the group by this number from now on, wherever it goes."""
        self.numbers[id(group)] = number, list(map(weakref.ref, group["params"]))

    def joined(self, groups: Sequence[Mapping[str, Any]]) -> Joined:
        """The shapes of the parameters of these groups, as they joined."""
        numbers = [self.number_of(groups, index) for index in range(len(groups))]
        own = [self.shapes[number] if number < len(self.shapes) else None for number in numbers]
        return Joined(own, self.shapes)

    def raw_blends(self, groups: Sequence[Mapping[str, Any]], index: int) -> list[float]:
        """b of every parameter of a group."""
        return [raw_blend(depth) for depth in self.depths_of(groups, index)]

    def warn_once(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(message, stacklevel=_stacklevel_of_caller())


def _stacklevel_of_caller() -> int:
    """The stacklevel at which a warning points to the line outside this package and torch that led here."""
    inside = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level
