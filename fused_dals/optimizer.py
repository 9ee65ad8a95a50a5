"""DALS, the torch.optim.Optimizer: groups, the step, and what a user calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fused_dals.checkpoint import load_checkpoint
from fused_dals.depth_rule import DepthMap, DepthRule, check_depth_keys, check_rule
from fused_dals.fingerprint import take_fingerprint
from fused_dals.foreach import dals_foreach_
from fused_dals.fused import FusedPass, why_not_fused
from fused_dals.gather import TensorBatch, create_missing_state, gather, parameter_label, parameter_names, unique_labels
from fused_dals.hyperparameters import check_group_keys, check_hyperparameters, plain
from fused_dals.loss_signal import NO_LOSS_WARNING, watch
from fused_dals.reference import dals_reference_, raw_blend
from fused_dals.runtime import Runtime, Steady
from fused_dals.schedule import schedule_factor
from fused_dals.stats import TrustRatios, trust_ratios_by_label

Params: TypeAlias = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class DALS(torch.optim.Optimizer):
    r"""Dynamic adaptive layered scaling (arXiv:2604.27295, section 3; SPEC, "One step").

    For every parameter tensor p with gradient g, depth d and raw blend b = 0.3 + 0.4 d:

    .. code-block:: text

        h <- alpha h + (1 - alpha) g                 grad_ema; alpha = ema_decay[phase]
        u <- b g + (1 - b) h
        u <- u + weight_decay p
        r <- clamp(trust_coefficient ||p|| / ||u||, *trust_clip), 1 where a norm is 0
        m <- momentum m + u                          momentum_buffer
        p <- p - lr s(t) r m

    The phase (0 exploration, 1 exploitation, 2 refinement) is read off the loss: pass it by ``step(loss=loss)``,
    ``observe_loss``, ``step(closure)`` or ``watch_loss``. Without a loss the phase stays 1, with a warning.

    Args:
        params: an ``nn.Module``, ``model.named_parameters()``, an iterable of tensors, or group dicts. Give the module
            or the names: depths are read off them; without names a depth is the rank within its group. With named
            groups of your own pass ``depth=infer_depths(model)`` too: names split over groups do not always tell.
        lr: learning rate, a number >= 0 or a one-element tensor (default 0.03). Never written by the optimizer.
        momentum: mu in [0, 1) (0.9).
        weight_decay: lambda >= 0, coupled, added after the filter (1e-4).
        trust_coefficient: gamma > 0 (0.02).
        trust_clip: (low, high) bounds of the trust ratio ((0.2, 5.0)).
        ema_decay: alpha in phase 0, 1, 2, each in [0, 1] ((0.3, 0.6, 0.7)). 1 bypasses the filter in that phase:
            the EMA is frozen and u = g.
        phase_thresholds: (t1, t2), t1 >= t2: relative drop of the loss EMA above which the phase is 0, or 1
            ((0.01, 0.002)).
        total_steps: length T of the built-in schedule: warm-up over ``warmup_fraction`` of T, then cosine to 0. None
            (default) for no schedule of our own.
        warmup_fraction: share of total_steps in [0, 1] (0.05).
        restart_steps: length of the first cycle of cosine restarts instead (None), which takes one step less.
        restart_mult: each cycle is this much longer, >= 1 (2).
        depth: "auto" (default); a number; a dict of names or regular expressions to depths; or f(name, param) ->
            depth. Values in [0, 1], 0 at the input. ``group["depth"]`` wins over all of them.
        maximize: ascend instead (False).
        foreach: False for the per-tensor reference path; None or True for torch._foreach.
        fused: True for the Triton kernels (CUDA or ROCm; float32, bfloat16 and float16 parameters); ``step`` raises an
            error where they cannot serve a parameter. None and False do without them in this version.

    Every hyperparameter may be given per group, is read live from ``param_groups`` at each step and checked when it
    changed. State per parameter is ``grad_ema`` and ``momentum_buffer`` of its shape, in float32 for bfloat16 and
    float16 parameters, made at the first step for every parameter that trains.

    Raises:
        TypeError, ValueError: an argument of wrong type or out of range, naming argument and group.
        RuntimeError: foreach and fused both True; at ``step``: a sparse or complex gradient, or fused where the kernels
            cannot run, naming the parameter. All before any weight or state is changed.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.03,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        trust_coefficient: float = 0.02,
        trust_clip: tuple[float, float] = (0.2, 5.0),
        ema_decay: tuple[float, float, float] = (0.3, 0.6, 0.7),
        phase_thresholds: tuple[float, float] = (0.01, 0.002),
        total_steps: int | None = None,
        warmup_fraction: float = 0.05,
        restart_steps: int | None = None,
        restart_mult: float = 2,
        depth: DepthRule = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "trust_clip": trust_clip,
            "ema_decay": ema_decay,
            "phase_thresholds": phase_thresholds,
            "total_steps": total_steps,
            "warmup_fraction": warmup_fraction,
            "restart_steps": restart_steps,
            "restart_mult": restart_mult,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        where = type(self).__name__
        check_hyperparameters(defaults, where)
        defaults = {key: plain(value) for key, value in defaults.items()}
        names: list[str] = []
        if isinstance(params, nn.Module):
            params = list(params.named_parameters())
            names = [name for name, _ in params]
        self._runtime = Runtime(DepthMap(depth, where, names))
        super().__init__(params, defaults)
        check_depth_keys(depth, self._runtime.depths.names, where)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at any time; names, depths and hyperparameters are checked before it joins.

        Depths of named parameters are ranks over all names known, so those of earlier groups may shift.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        index = len(self.param_groups)
        where = f"group {index}"
        if "params" not in param_group:
            raise ValueError(f"{where}: 'params' is missing")
        if isinstance(param_group["params"], nn.Module):
            raise TypeError(f"{where}: 'params' is a module; pass its named_parameters()")
        check_group_keys(param_group, where)
        depths = self._runtime.depths
        rule = check_rule(param_group.get("depth", depths.rule), where)
        hyperparameters = {**self.defaults, **param_group, "depth": None}
        check_hyperparameters(hyperparameters, where)

        super().add_param_group(param_group)
        try:
            _drop_duplicates(param_group)
            names = parameter_names(param_group)
            labelled = list(zip(self._labels(index), param_group["params"], strict=True))
            if isinstance(rule, Mapping) and names is None:
                raise ValueError(
                    f"{where}: depth is a dict of names, but the parameters have none: pass the model itself or "
                    "model.named_parameters()"
                )
            if rule is not depths.rule:
                check_depth_keys(rule, names or (), where)
            depths.learn_rule(rule, index, labelled, where)
            depths.learn_names(names or ())
        except Exception:
            del self.param_groups[index]
            raise
        # Groups hold plain numbers only, so that any checkpoint format can store them.
        param_group.update({key: plain(param_group[key]) for key in self.defaults})
        param_group.pop("depth", None)
        if not isinstance(rule, str | Mapping) and not callable(rule):
            param_group["depth"] = float(rule)
        self._write_counters(wait=True)
        if names is None and depths.ranks_positions(index, self._labels(index), param_group.get("depth")):
            self._runtime.warn_once(
                "names",
                f"{type(self).__name__} got parameters without names: their depth is their rank within the group. "
                "Pass the model itself or model.named_parameters(), or set depth.",
            )

    # -- the loss -----------------------------------------------------------------------------------------------

    def observe_loss(self, loss: Tensor | float) -> None:
        """Hand over the loss of the coming step, a number or a scalar tensor on any device, without waiting for it.

        Several before one step (gradient accumulation) are averaged; a mean that is not finite is ignored.
        """
        self._runtime.loss.observe(loss)

    def watch_loss(self, module: nn.Module) -> RemovableHandle:
        """Observe the loss that ``module`` returns at each forward pass in training mode with gradients on.

        ``module`` is the criterion, or a model whose output is the loss, has it as ``.loss``, or is a dict with "loss".
        Returns a handle whose ``remove()`` ends it. A copy of the module is not watched.
        """
        return watch(module, self._runtime.loss)

    # -- the step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None) -> Any:
        """One step. ``loss``, or what ``closure`` (called with gradients on) returns, moves the phase first.

        Returns what the closure returned, None without one.
        """
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        self._check_live_groups()
        steady = self._resume_fused()
        batches = [] if steady else gather(self.param_groups, self.state)
        fused: list[TensorBatch] = []
        others: list[TensorBatch] = []
        for batch in batches:
            (fused if self._runs_fused(batch) else others).append(batch)
        for observed in (returned, loss):
            if observed is not None:
                self.observe_loss(observed)

        only_creates_state = self._only_creates_state(batches)
        if not steady:
            self._create_missing_state()
            if only_creates_state:
                return returned
        runtime = self._runtime
        if not runtime.loss.observed:
            runtime.warn_once("loss", NO_LOSS_WARNING.format(optimizer=type(self).__name__))
        if steady:
            runtime.trust_ratios = steady.run(self.param_groups, runtime.step, runtime.loss)
        else:
            runtime.trust_ratios = self._step_fused(fused)
            runtime.loss.commit(batches[0].params[0].device if batches else runtime.loss.loss_ema.device)
            runtime.trust_ratios += [
                TrustRatios(batch.group_index, batch.positions, self._step_batch(batch)) for batch in others
            ]
            self._remember_fused(fused, others)
        runtime.step += 1
        self._write_counters(wait=False)
        return returned

    def _runs_fused(self, batch: TensorBatch) -> bool:
        """Whether the kernels take this batch; an error where its group demands it and they cannot."""
        group = self.param_groups[batch.group_index]
        if not group["fused"]:
            return False
        for param, grad, position in zip(batch.params, batch.grads, batch.positions, strict=True):
            reason = why_not_fused(param, grad)
            if reason:
                label = parameter_label(group, batch.group_index, position)
                raise RuntimeError(f"group {batch.group_index}: fused=True cannot step parameter {label!r}: {reason}")
        return True

    def _step_fused(self, batches: list[TensorBatch]) -> list[TrustRatios]:
        """Run these batches through the kernels, device by device."""
        measured = []
        for device in dict.fromkeys(batch.params[0].device for batch in batches):
            fused = self._runtime.fused.setdefault(device, FusedPass(device))
            measured += fused.step(
                [batch for batch in batches if batch.params[0].device == device],
                self.param_groups,
                self.state,
                [self._raw_blends(index) for index in range(len(self.param_groups))],
                self._runtime.step,
                self._runtime.loss,
            )
        return measured

    def _remember_fused(self, fused: list[TensorBatch], others: list[TensorBatch]) -> None:
        """Let the next step go on with the tables of this one, if one fused pass did all of it."""
        devices = {batch.params[0].device for batch in fused}
        fingerprint = take_fingerprint(self.param_groups, self.state) if len(devices) == 1 and not others else None
        if fingerprint is not None:
            self._runtime.steady = Steady(self._runtime.fused[devices.pop()], fingerprint)

    def _resume_fused(self) -> FusedPass | None:
        """The pass that did the last step, if nothing has changed since but the gradients' addresses."""
        steady, self._runtime.steady = self._runtime.steady, None
        if steady is None:
            return None
        now = take_fingerprint(self.param_groups, self.state)
        if now is None or not now.same_but_for_addresses_of_gradients(steady.fingerprint):
            return None
        if not steady.fused.follow_grads(now.grad_addresses):
            return None
        self._runtime.steady = steady
        return steady.fused

    def _create_missing_state(self) -> None:
        create_missing_state(self.param_groups, self.state, flat=lambda group: bool(group["fused"]))

    def _step_batch(self, batch: TensorBatch) -> Tensor:
        """Run one batch on the path its group asks for; returns the trust ratios, shape [n]."""
        group = self.param_groups[batch.group_index]
        device = batch.params[0].device
        ema_decay, bypass = self._ema_decay(group, device)
        blends = self._raw_blends(batch.group_index)
        tensors = (
            batch.params,
            batch.grads,
            [self.state[param]["grad_ema"] for param in batch.params],
            [self.state[param]["momentum_buffer"] for param in batch.params],
            [blends[position] for position in batch.positions],
        )
        scalars = {
            "ema_decay": ema_decay,
            "bypass": bypass,
            "weight_decay": group["weight_decay"],
            "trust_coefficient": group["trust_coefficient"],
            "trust_clip": group["trust_clip"],
            "momentum": group["momentum"],
            "lr": self._scheduled_lr(group, device),
            "maximize": group["maximize"],
        }
        if group["foreach"] is False:
            return torch.stack([dals_reference_(*one, **scalars) for one in zip(*tensors, strict=True)])
        return dals_foreach_(*tensors, **scalars)

    def _ema_decay(self, group: dict[str, Any], device: torch.device) -> tuple[float | Tensor, bool | Tensor]:
        """alpha of the present phase, and whether it bypasses the filter: plain values for the CPU, else tensors."""
        alpha = self._runtime.loss.select(group["phase_thresholds"], group["ema_decay"])
        if device.type == "cpu":
            value = alpha.item()
            return value, value == 1
        alpha = alpha.to(device, non_blocking=True)
        return alpha, alpha == 1 if 1 in group["ema_decay"] else False

    def _scheduled_lr(self, group: dict[str, Any], device: torch.device) -> float | Tensor:
        """eta = lr s(t)."""
        factor = schedule_factor(
            self._runtime.step,
            total_steps=group["total_steps"],
            warmup_fraction=group["warmup_fraction"],
            restart_steps=group["restart_steps"],
            restart_mult=group["restart_mult"],
        )
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            return float(lr) * factor
        if lr.device.type == "cpu":
            return lr.item() * factor
        return lr.detach().reshape(()).to(device, non_blocking=device.type != "cpu") * factor

    def _check_live_groups(self) -> None:
        """Check again what somebody changed in param_groups since the last step."""
        for index, group in enumerate(self.param_groups):
            values = tuple(
                tuple(value) if isinstance(value, list) else value
                for key, value in group.items()
                if key in self.defaults and key != "lr"
            )
            lr = group["lr"]
            if isinstance(lr, Tensor):
                lr = lr.item() if lr.device.type == "cpu" and lr.numel() == 1 else id(lr)
            values += (group.get("depth"), tuple(group.get("param_names") or ()), lr)  # names may change in place
            before = self._runtime.checked.get(index, ())
            try:
                unchanged = bool(before == values)
                unchanged_but_lr = bool(before[:-1] == values[:-1])
            except (RuntimeError, ValueError):  # an array or tensor in a number's place
                unchanged = unchanged_but_lr = False
            if not unchanged:
                check_hyperparameters(group, f"group {index}")
                self._runtime.checked[index] = values
            if not unchanged_but_lr:
                self._runtime.steady = None

    def _only_creates_state(self, batches: list[TensorBatch]) -> bool:
        """Whether this is the call by which distributed checkpointing makes an optimizer create its state.

        It calls step() once with lr 0 and zero gradients, without a loss; such a call must leave weights, counters
        and phase alone. The look at the gradients waits for the device, but only a first step with lr 0 gets there.
        """
        if self.state or self._runtime.step or self._runtime.loss.observed or not batches:
            return False
        lrs = [group["lr"] for group in self.param_groups]
        if any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in lrs) or any(float(lr) != 0 for lr in lrs):
            return False
        return not any(bool(grad.any()) for batch in batches for grad in batch.grads)

    # -- what a person looks at ---------------------------------------------------------------------------------

    def depths(self) -> dict[str, float]:
        """Depth of every parameter by its name (or its place in param_groups where it has none)."""
        places = [(index, i) for index, group in enumerate(self.param_groups) for i in range(len(group["params"]))]
        depths = [depth for index in range(len(self.param_groups)) for depth in self._depths(index)]
        return dict(zip(unique_labels(self.param_groups, places), depths, strict=True))

    def current_lr(self) -> list[float]:
        """lr s(t) of each group, as the next step will use it."""
        return [float(self._scheduled_lr(group, torch.device("cpu"))) for group in self.param_groups]

    def phases(self) -> list[int]:
        """The phase of each group, as the last step used it: 0 exploration, 1 exploitation, 2 refinement."""
        return [
            int(self._runtime.loss.select(group["phase_thresholds"], (0, 1, 2)).item()) for group in self.param_groups
        ]

    def trust_ratios(self) -> dict[str, float]:
        """The trust ratio r of every parameter that the last step updated, by its name."""
        return trust_ratios_by_label(self.param_groups, self._runtime.trust_ratios)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As of torch.optim.Optimizer; every group also carries step, loss_ema and loss_drop as plain numbers."""
        self._write_counters(wait=True)
        packed: dict[str, Any] = super().state_dict()
        packed["state"] = {
            key: {name: _own_memory(value) for name, value in entry.items()} for key, entry in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, bit for bit: state in its own precision, schedule and phase included.

        Existing state tensors keep their memory; parameters and their names stay. A checkpoint that does not fit
        raises a ValueError or TypeError that names the entry, and changes nothing.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        counters = load_checkpoint(self, state_dict)
        self._runtime.step = int(counters["step"])
        self._runtime.loss.restore(float(counters["loss_ema"]), float(counters["loss_drop"]))
        self._runtime.trust_ratios = []
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_runtime": self._runtime}

    # -- helpers ------------------------------------------------------------------------------------------------

    def _write_counters(self, *, wait: bool) -> None:
        """Put the run state into the groups as plain numbers; without ``wait`` only what is on the host already."""
        loss = self._runtime.loss
        counters: dict[str, float] = {"step": self._runtime.step}
        if wait or loss.loss_ema.device.type == "cpu":
            counters |= {"loss_ema": loss.loss_ema.item(), "loss_drop": loss.loss_drop.item()}
        for group in self.param_groups:
            group.update(counters)

    def _labels(self, index: int) -> list[str]:
        group = self.param_groups[index]
        names = parameter_names(group)
        if names is not None:
            return list(names)
        return [parameter_label(group, index, position) for position in range(len(group["params"]))]

    def _raw_blends(self, index: int) -> list[float]:
        return [raw_blend(depth) for depth in self._depths(index)]

    def _depths(self, index: int) -> list[float]:
        group = self.param_groups[index]
        names = parameter_names(group)
        if names is None and "param_names" in group:
            self._runtime.warn_once(
                "param_names",
                f"group {index}: param_names has {len(group['param_names'])} entries for {len(group['params'])} "
                "parameters; depths are ranks within the group until both fit",
            )
        return self._runtime.depths.of_group(index, self._labels(index), names, group.get("depth"))


def _own_memory(value: Any) -> Any:
    """The tensor, or a copy where it is a view of a bucket, which a checkpoint of some tensors would drag along."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return value
    return value.clone() if value.untyped_storage().nbytes() > value.numel() * value.element_size() else value


def _drop_duplicates(param_group: dict[str, Any]) -> None:
    """Keep the first of each parameter, so that tied weights listed twice are stepped once (torch has warned)."""
    params, names = param_group["params"], param_group.get("param_names")
    first = {param: position for position, param in reversed(list(enumerate(params)))}
    kept = sorted(first.values())
    param_group["params"] = [params[position] for position in kept]
    if names is not None:
        param_group["param_names"] = [names[position] for position in kept]
