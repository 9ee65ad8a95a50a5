"""DALS under ZeroRedundancyOptimizer: every rank steps some whole parameters, and sends them to the others."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.hooks import RemovableHandle

from fused_dals.depth import Depths, depths_from_names
from fused_dals.depth_rule import check_depth, check_live_depth, repeated_name_warning
from fused_dals.gather import group_labels
from fused_dals.optimizer import DALS


class ZeroDALS(ZeroRedundancyOptimizer):
    """ZeroRedundancyOptimizer with DALS (or a preset) inside: the state is spread over the ranks of DDP.

    What a rank holds are whole parameters, so trust ratios need no other rank. What they do need is here: depths over
    the whole model, the norm of all gradients for clipping, one phase, and the run's counters in checkpoints.

    Args:
        params: the model or ``model.named_parameters()``; or groups, dicts whose "params" are (name, parameter) pairs.
        optimizer_class: DALS (default), DALSFast or DALSAcc.
        process_group: the ranks that share the state; None: all.
        parameters_as_bucket_view: as of ZeroRedundancyOptimizer (False).
        depth: a dict of all names to depths, as infer_depths returns it; None: by the names.
        options: the other arguments of ``optimizer_class``.

    ``step(closure, loss=loss)``, ``observe_loss`` and ``watch_loss`` as of DALS. ``consolidate_state_dict(to=rank)``
    before ``state_dict()``, as of ZeroRedundancyOptimizer; ``load_state_dict`` resumes bit for bit. ``phases``,
    ``current_lr``, ``skipped_steps`` and ``depths`` say the same on all ranks, ``trust_ratios`` has those of this
    rank's own parameters. The optimizer that steps these is ``local``; it calls them by their places.

    Raises:
        TypeError: parameters have no names, or optimizer_class is none of ours. ValueError: a name has no depth.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        optimizer_class: type[DALS] = DALS,
        *,
        process_group: Any = None,
        parameters_as_bucket_view: bool = False,
        depth: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, DALS)):
            raise TypeError(f"ZeroDALS: optimizer_class must be DALS or a preset of it, got {optimizer_class!r}")
        if depth is not None and not isinstance(depth, Mapping):
            raise TypeError(f"ZeroDALS: depth must be a dict of names to depths, got {type(depth).__name__}")
        groups, name_of = _without_names(params)
        depths = depths_from_names([list(name_of.values())]) if depth is None else depth
        depths = depths.of(name_of.values()) if isinstance(depths, Depths) else depths
        for index, group in enumerate(groups):
            if "depth" in group:
                check_live_depth(group["depth"], f"ZeroDALS: group {index}")
        by_name = [name_of[param] for group in groups if "depth" not in group for param in group["params"]]
        repeated = [name for name, count in Counter(by_name).items() if count > 1]
        if repeated:
            warnings.warn(repeated_name_warning("ZeroDALS", repeated[0]), stacklevel=2)
        without = [name for name in name_of.values() if name not in depths]
        if without:
            raise ValueError(f"ZeroDALS: depth has no entry for parameter {without[0]!r}")

        def build(own: list[dict[str, Any]], **defaults: Any) -> DALS:
            rule = lambda label, param: depths[name_of[param]]  # noqa: E731
            ranks = {"loss_group": process_group, "partition_group": world}
            return optimizer_class(own, depth=rule, **{**ranks, **options, **defaults})

        self._name_of, self._depths = name_of, depths
        world = torch.distributed.group.WORLD if process_group is None else process_group
        super().__init__(groups, build, process_group=world, parameters_as_bucket_view=parameters_as_bucket_view)  # type: ignore[arg-type]

    @property
    def local(self) -> DALS:
        """The optimizer of this rank's own parameters."""
        optimizer: DALS = self.optim
        return optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is being built: depths are ranks in the whole model, which later parameters would shift.

        Raises RuntimeError afterwards, on all ranks alike.
        """
        if hasattr(self, "optim"):
            raise RuntimeError(
                "ZeroDALS cannot take parameters later: build one over all that will train, and load the state"
            )
        super().add_param_group(param_group)

    def observe_loss(self, loss: Tensor | float) -> None:
        """As of DALS."""
        self.local.observe_loss(loss)

    def watch_loss(self, module: nn.Module) -> RemovableHandle:
        """As of DALS."""
        return self.local.watch_loss(module)

    def phases(self) -> list[int]:
        """As of DALS."""
        return self.local.phases()

    def current_lr(self) -> list[float]:
        """As of DALS."""
        # Schedulers write to the former.
        self._sync_param_groups(self.param_groups, self.local.param_groups)  # type: ignore[attr-defined]
        return self.local.current_lr()

    @property
    def skipped_steps(self) -> int:
        """As of DALS."""
        return self.local.skipped_steps

    def depths(self) -> dict[str, float]:
        """Depth of every parameter of the model by its name."""
        return {
            name: check_depth(group.get("depth", self._depths[name]), f"depth of {name!r}")
            for group in self.param_groups
            for name in (self._name_of[param] for param in group["params"])
        }

    def trust_ratios(self) -> dict[str, float]:
        """The trust ratio of every parameter that the last step updated on this rank, by its name."""
        name_of_place = {
            place: self._name_of[param]
            for index, group in enumerate(self.local.param_groups)
            for place, param in zip(group_labels(group, index), group["params"], strict=True)
        }
        return {name_of_place[place]: ratio for place, ratio in self.local.trust_ratios().items()}

    def state_dict(self) -> dict[str, Any]:
        """As of ZeroRedundancyOptimizer, with the run state (step, loss_ema, loss_drop, ...) in the groups."""
        packed: dict[str, Any] = super().state_dict()
        local = self.local.state_dict()
        for group, own in zip(packed["param_groups"], local["param_groups"], strict=True):
            group.update({key: value for key, value in own.items() if key != "params"})
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned on any rank: this rank takes what is its own, checked as by DALS.

        Raises ValueError or TypeError, on all ranks alike, where groups or their sizes are not this optimizer's.
        """
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
            raise TypeError("checkpoint must be a dict with 'state' and 'param_groups', as state_dict() returns it")
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group.get("params", ())) for group in state_dict["param_groups"]]
        if sizes != saved_sizes:
            raise ValueError(f"checkpoint: its groups have {saved_sizes} parameters, and this optimizer's {sizes}")
        missing = {*range(sum(sizes))}.difference(state_dict["state"])
        if missing and state_dict["state"]:
            raise ValueError(f"checkpoint: state of parameter {min(missing)} is missing; consolidate it on all ranks")
        own = self.local.state_dict()
        index_of = {param: index for index, param in enumerate(_params(self.local.param_groups))}
        state = {
            index_of[param]: state_dict["state"][index]
            for index, param in enumerate(_params(self.param_groups))
            if param in index_of and index in state_dict["state"]
        }
        groups = [
            {**saved, "params": mine["params"]}
            for saved, mine in zip(state_dict["param_groups"], own["param_groups"], strict=True)
        ]
        self.local.load_state_dict({"state": state, "param_groups": groups})
        for group, mine in zip(self.param_groups, self.local.param_groups, strict=True):
            for key in [key for key in group if key not in mine]:
                del group[key]
            group.update({key: value for key, value in mine.items() if key != "params"})


def _params(groups: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]


def _without_names(
    params: nn.Module | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
) -> tuple[list[dict[str, Any]], dict[Tensor, str]]:
    """Groups of plain parameters, which is all that ZeroRedundancyOptimizer takes, and the parameters' names."""
    listed: list[Any] = list(params.named_parameters() if isinstance(params, nn.Module) else params)
    groups = listed if listed and isinstance(listed[0], Mapping) else [{"params": listed}]
    name_of: dict[Tensor, str] = {}
    plain = []
    for group in groups:
        pairs = list(group["params"])
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise TypeError(
                "ZeroDALS: parameters need names, from which their depths are read: pass the model itself, "
                "model.named_parameters(), or groups of (name, parameter) pairs"
            )
        name_of |= {param: name for name, param in pairs}
        plain.append({**group, "params": [param for _, param in pairs]})
    return plain, name_of
