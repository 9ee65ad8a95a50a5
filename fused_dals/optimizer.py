"""DALS, the torch.optim.Optimizer: groups, the step, and what a user calls."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from fused_dals.checkpoint import load_checkpoint, own_memory, pack_plain
from fused_dals.depth_rule import DepthMap, DepthRule, check_depth_keys, check_rule, repeated_name_warning
from fused_dals.gather import create_missing_state, depth_keys, group_labels, parameter_names, unique_labels
from fused_dals.hyperparameters import (
    check_flag,
    check_group_keys,
    check_hyperparameters,
    check_names,
    check_params,
    plain,
)
from fused_dals.kernels import layout
from fused_dals.loss_average import LossAverage, LossGroup, check_process_group
from fused_dals.loss_signal import LossSignal, watch
from fused_dals.outside_inference import outside_inference, outside_inference_mode
from fused_dals.phase import select_by_phase
from fused_dals.runtime import Runtime
from fused_dals.scalars import scheduled_lr
from fused_dals.sharding import Partitions
from fused_dals.stats import trust_ratios_by_label
from fused_dals.stepper import Stepper

Params: TypeAlias = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


#: What a group with names of another may be besides a mistake.
OF_MODELS = (
    ' For models of their own, as in a GAN, give each group its own: {"params": ..., "depth": infer_depths(its_model)}.'
)


_NO_MODE: AbstractContextManager[None] = nullcontext()


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
            (default) for no schedule of our own. A step beyond T has lr 0, with a warning once, which on a GPU goes by
            the calls of ``step``: too early by dropped steps, too late by those that a captured graph replays.
        warmup_fraction: share of total_steps in [0, 1] (0.05).
        restart_steps: length of the first cycle of cosine restarts instead (None), which takes one step less.
        restart_mult: each cycle is this much longer, >= 1 (2).
        depth: "auto" (default); a number; a dict of names or regular expressions to depths; or f(name, param) ->
            depth. Values in [0, 1], 0 at the input. ``group["depth"]`` wins over all of them.
        maximize: ascend instead (False).
        max_grad_norm: a step's gradients are multiplied by min(1, max_grad_norm / (norm + 1e-6)), where the norm is
            that over all gradients of this optimizer, as by ``clip_grad_norm_`` before the step, but ``.grad`` keeps
            its values (None). Groups without it are not clipped.
        skip_nonfinite: True in any group: a step for which any gradient holds inf or NaN changes nothing but
            ``skipped_steps``, without waiting for the device (False).
        state_dtype: torch.float32 (default, also for bfloat16 and float16 parameters) or torch.bfloat16, which is
            rounded stochastically by a hash of step, parameter and element. State of float64 parameters is float64.
        compensated: True: a bfloat16 parameter gets an int16 ``compensation``, and both together are a float32 weight,
            which is what is trained (False). Wider parameters need none. Weights that are loaded into the model keep
            the old compensation, less than half a step of bfloat16, until the optimizer's state is loaded, too.
        foreach: False for the per-tensor reference path, True for torch._foreach; None for the best there is.
        fused: True for the Triton kernels (CUDA or ROCm; float32, bfloat16 and float16 parameters); ``step`` raises an
            error where they cannot serve a parameter. None (default, with foreach=None): the kernels on a GPU where
            they work and serve the parameter, else torch._foreach. False: never.
        capturable: True lets ``step`` be captured into a CUDA graph, after at least one step outside of it (False).
        amp_fused: True: ``GradScaler.step`` leaves unscaling and dropping to this optimizer, which does both on the
            device, without waiting (False; for the optimizer as a whole). Trainers that unscale by themselves, to clip,
            may refuse it.
        loss_group: where torch.distributed is initialised, the losses are averaged over the ranks of this process
            group in every step, whether a rank has one or not; None: all ranks (every rank must then step), False:
            this rank's own losses only. Replicas whose losses differ would part, phase by phase.
        partition_group: the process group of ranks whose optimizers hold the other parameters of the model, as
            pipeline stages do; clipping and dropping then look at the gradients of all of them (None).

    Parameters may be DTensors: fully_shard (FSDP2, HSDP), parallelize_module (tensor parallelism), or both. Norms are
    those of whole tensors, by one collective per process group that any parameter is split over.

    Every hyperparameter may be given per group, is read live from ``param_groups`` at each step and checked when it
    changed. State per parameter is ``grad_ema`` and ``momentum_buffer`` of its shape, made at the first step for every
    parameter that trains.

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
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        state_dtype: torch.dtype = torch.float32,
        compensated: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        amp_fused: bool = False,
        loss_group: LossGroup = None,
        partition_group: Any = None,
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
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "state_dtype": state_dtype,
            "compensated": compensated,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
        }
        where = type(self).__name__
        _check_not_in_plain_zero(where)
        check_hyperparameters(defaults, where)
        check_flag(amp_fused, f"{where}: amp_fused")
        if loss_group is not None and loss_group is not False:
            check_process_group(loss_group, f"{where}: loss_group")
        if partition_group is not None:
            check_process_group(partition_group, f"{where}: partition_group")
        defaults = {key: plain(value) for key, value in defaults.items()}
        names: list[str] = []
        if isinstance(params, nn.Module):
            params = list(params.named_parameters())
            names = [name for name, _ in params]
        elif not isinstance(params, Iterable):
            raise TypeError(f"{where}: params must be a module or an iterable of tensors, got {type(params).__name__}")
        loss = LossSignal(LossAverage(loss_group))
        self._runtime = Runtime(DepthMap(depth, where, names), amp_fused, Partitions(partition_group), loss=loss)
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
        check_names(param_group.get("param_names"), where)
        depths = self._runtime.depths
        rule = check_rule(param_group.get("depth", depths.rule), where)
        param_group["params"] = check_params(param_group["params"], where)
        if "depth" in param_group and (isinstance(rule, str | Mapping) or callable(rule)):
            param_group = dict(param_group)  # such a rule is taken now, and stays in the caller's dict for another use
        hyperparameters = {**self.defaults, **param_group, "depth": None}
        check_hyperparameters(hyperparameters, where)

        super().add_param_group(param_group)
        try:
            _drop_duplicates(param_group)
            names = parameter_names(param_group)
            number = len(self._runtime.shapes)
            labelled = list(zip(group_labels(param_group, index), param_group["params"], strict=True))
            keys = depth_keys(param_group)
            if isinstance(rule, Mapping) and names is None:
                raise ValueError(
                    f"{where}: depth is a dict of names, but the parameters have none: pass the model itself, "
                    'model.named_parameters(), or groups like {"params": [(name, parameter), ...]}'
                )
            if rule is not depths.rule:
                check_depth_keys(rule, names or (), where)
            depths.learn_rule(rule, number, labelled, keys, where)
            count = Counter(names or ())
            known = [name for name in names or () if name in depths.names or count[name] > 1]
            depths.learn_names(names or ())
            params = param_group["params"]
            shapes = None if any(map(is_lazy, params)) else [tuple(param.shape) for param in params]
            self._runtime.shapes.append(shapes)
            self._runtime.number(param_group, number)
        except Exception:
            del self.param_groups[index]
            raise
        # Groups hold plain numbers (and a dtype), as any checkpoint format that pickles can store them.
        param_group.update({key: plain(param_group[key]) for key in self.defaults})
        param_group.pop("depth", None)
        if not isinstance(rule, str | Mapping) and not callable(rule):
            param_group["depth"] = float(rule)
        self._stepper().write_counters()
        self._warn_of_repeated_names(index, known, rule)
        if names is None and depths.ranks_positions(number, keys, param_group.get("depth")):
            self._runtime.warn_once(
                "names",
                f"{type(self).__name__} got parameters without names: their depth is their rank within the group. "
                "Pass the model itself or model.named_parameters(), or set depth.",
            )

    def _warn_of_repeated_names(self, index: int, known: Sequence[str], rule: DepthRule) -> None:
        """Once, where a name among ``known`` is that of another parameter, of this or an earlier group, and both go by
        it."""
        depths = self._runtime.depths
        if not known:  # as a rule; the look at all groups would take long where there are thousands
            return
        # A number for a whole group is no name.
        by_name = [
            name
            for place, group in enumerate(self.param_groups[: index + 1])
            if "depth" not in group
            for name in (known if place == index else parameter_names(group) or ())
            if depths.goes_by_name(
                self._runtime.number_of(self.param_groups, place), name, rule if place == index else depths.rule
            )
        ]
        count = Counter(by_name)
        repeated = [] if "depth" in self.param_groups[index] else [name for name in known if count[name] > 1]
        if repeated:
            self._runtime.warn_once("repeated names", repeated_name_warning(f"group {index}", repeated[0]) + OF_MODELS)

    # -- the loss -----------------------------------------------------------------------------------------------

    def observe_loss(self, loss: Tensor | float) -> None:
        """Hand over the loss of the coming step, a number or a scalar tensor on any device, without waiting for it.

        Several before one step (gradient accumulation) are averaged; a mean that is not finite is ignored.
        """
        self._runtime.loss.observe(loss)

    def watch_loss(self, module: nn.Module) -> RemovableHandle:
        """Observe the loss that ``module`` returns at each forward pass in training mode with gradients on.

        ``module`` is the criterion, or a model whose output is the loss, has it as ``.loss``, or is a dict with "loss".
        Returns a handle whose ``remove()`` ends it. A copy of the module is not watched, and a pass that only looks
        (torch.export, torch.jit.trace) or has a loss for each sample (torch.func.vmap) hands over none.
        """
        return watch(module, self._runtime.loss)

    # -- the step -----------------------------------------------------------------------------------------------

    @_disable_dynamo  # a compiled training step calls it as it is: nothing here gains by being traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None) -> Any:
        """One step. ``loss``, or what ``closure`` (called with gradients on) returns, moves the phase first.

        Returns what the closure returned, None without one.
        """
        returned = None
        if closure is not None and not callable(closure):
            raise TypeError(
                f"step's first argument is a closure, got {type(closure).__name__}; pass the loss as step(loss=loss)"
            )
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        # What torch.amp.GradScaler hands over to an optimizer that says _step_supports_amp_scaling; a plain 0 where no
        # parameter has a gradient.
        handed = [getattr(self, name, None) for name in ("found_inf", "grad_scale")]
        found_inf, grad_scale = (value if isinstance(value, Tensor) else None for value in handed)
        if handed[0] is not None and found_inf is None:  # other ranks may have gradients, and wait for our word
            found_inf = torch.tensor(float(handed[0]), dtype=torch.float64, device="cpu")
        with self._inside_inference_mode() if torch.is_inference_mode_enabled() else _NO_MODE:
            self._stepper().step((returned, loss), found_inf, grad_scale)
        return returned

    def _inside_inference_mode(self) -> AbstractContextManager[object]:
        """State that a step makes is to be written later, too; but parameters of inference mode only inside it."""
        stepped = (param for group in self.param_groups for param in group["params"] if param.grad is not None)
        return _NO_MODE if any(map(Tensor.is_inference, stepped)) else outside_inference()

    @outside_inference_mode
    def refresh_hyperparameters(self) -> None:
        """Check param_groups and put them where captured graphs read them, for the replays that follow.

        A replay does not run this class: numbers that were changed in param_groups since the last step, such as a
        learning rate that is no tensor, reach it by this call. Nothing waits for the device.

        Raises:
            RuntimeError: the captured step went through torch operations, which hold all numbers but a tensor lr; or
                max_grad_norm or skip_nonfinite was turned on or off, for which the step is to be captured again.
        """
        runtime = self._runtime
        runtime.live_groups.check(self.param_groups)
        captured = runtime.captured
        if captured is not None and not captured.by_kernels:
            raise RuntimeError("the captured step holds its numbers, as torch operations do: capture it again")
        if captured is not None and (captured.clips, captured.skips) != (
            runtime.live_groups.clips,
            runtime.live_groups.skips,
        ):
            raise RuntimeError("max_grad_norm or skip_nonfinite was turned on or off: capture the step again")
        for fused in runtime.fused.values():
            fused.group_table.refresh(self.param_groups, runtime.live_groups.version)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks before it unscales by itself."""
        return self._runtime.amp_fused

    def _stepper(self) -> Stepper:
        return Stepper(self.param_groups, self.state, self._runtime, type(self).__name__)

    # -- what a person looks at ---------------------------------------------------------------------------------

    def depths(self) -> dict[str, float]:
        """Depth of every parameter by its name (or its place in param_groups where it has none)."""
        groups = self.param_groups
        places = [(index, i) for index, group in enumerate(groups) for i in range(len(group["params"]))]
        depths = [depth for index in range(len(groups)) for depth in self._runtime.depths_of(groups, index)]
        return dict(zip(unique_labels(groups, places), depths, strict=True))

    def current_lr(self) -> list[float]:
        """lr s(t) of each group, as the next step will use it."""
        completed_steps = self._runtime.state.values[layout.STEP].cpu()
        return [float(scheduled_lr(group, completed_steps)) for group in self.param_groups]

    def phases(self) -> list[int]:
        """The phase of each group, as the last step used it: 0 exploration, 1 exploitation, 2 refinement."""
        values = self._runtime.state.values
        loss_ema, loss_drop = values[layout.LOSS_EMA], values[layout.LOSS_DROP]
        return [
            int(select_by_phase(loss_ema, loss_drop, group["phase_thresholds"], (0, 1, 2)))
            for group in self.param_groups
        ]

    @property
    def skipped_steps(self) -> int:
        """How many steps changed nothing, because of skip_nonfinite or a GradScaler (with amp_fused)."""
        return int(self._runtime.state.numbers()["skipped_steps"])

    def trust_ratios(self) -> dict[str, float]:
        """The trust ratio r of every parameter that the last step updated, by its name.

        After a step that was dropped, those of the last one that was not; none, where kernels met other tensors in it.
        """
        return trust_ratios_by_label(self.param_groups, self._runtime.trust_ratios)

    # -- checkpoints --------------------------------------------------------------------------------------------

    @outside_inference_mode
    def state_dict(self) -> dict[str, Any]:
        """As of torch.optim.Optimizer; groups also carry the run state: step, loss_ema, loss_drop, skipped_steps.

        As in torch, state tensors may be the live ones: copy.deepcopy keeps what they are now.
        """
        if self.state:
            # A parameter that was unfrozen since the last step, say: all ranks are to hold the same keys.
            create_missing_state(self.param_groups, self.state, flat=lambda group, param: False)
        self._stepper().write_counters()
        packed: dict[str, Any] = super().state_dict()
        pack_plain(packed)
        if "state" in packed:  # a hook may have put anything in the dict's place, or into the state
            packed["state"] = {
                key: {name: own_memory(value) for name, value in entry.items()} if isinstance(entry, dict) else entry
                for key, entry in packed["state"].items()
            }
        return packed

    @outside_inference_mode
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, bit for bit: state in its own precision, schedule and phase included.

        Existing state tensors keep their memory; parameters and their names stay, and names that only the checkpoint
        has are taken over. A checkpoint that does not fit raises a ValueError or TypeError that names the entry, and
        changes nothing.
        """
        if isinstance(state_dict, Mapping):  # load_checkpoint says what is wrong with anything else
            state_dict = copy.copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = self.param_groups
        numbers = [self._runtime.number_of(groups, index) for index in range(len(groups))]
        keys = list(map(depth_keys, groups))
        self._runtime.state.restore(load_checkpoint(self, state_dict))
        for group, number, before in zip(groups, numbers, keys, strict=True):
            self._runtime.depths.relabel(number, before, depth_keys(group))
        self._runtime.loss.forget()
        self._runtime.trust_ratios = []
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        numbers = [self._runtime.number_of(self.param_groups, index) for index in range(len(self.param_groups))]
        return {**super().__getstate__(), "_runtime": self._runtime, "_numbers": numbers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        numbers = state.pop("_numbers", ())
        super().__setstate__(state)
        self._runtime.__dict__.setdefault("numbers", {})  # which pickles of the first days do not have
        for group, number in zip(self.param_groups, numbers, strict=False):
            self._runtime.number(group, number)


def _check_not_in_plain_zero(where: str) -> None:
    """Raise TypeError inside a ZeroRedundancyOptimizer that is not ours: depths and counters would be wrong, unsaid."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
            if not hasattr(type(frame.f_locals.get("self")), "watch_loss"):
                raise TypeError(
                    f"{where} inside ZeroRedundancyOptimizer would see this rank's parameters only, sorted by size: "
                    "their depths would be wrong, and checkpoints would lose the phase. Use "
                    "fused_dals.zero.ZeroDALS(model, ...), a ZeroRedundancyOptimizer that knows the whole model"
                )
            return


def _drop_duplicates(param_group: dict[str, Any]) -> None:
    """Keep the first of each parameter, so that tied weights listed twice are stepped once (torch has warned)."""
    params, names = param_group["params"], param_group.get("param_names")
    first = {param: position for position, param in reversed(list(enumerate(params)))}
    kept = sorted(first.values())
    param_group["params"] = [params[position] for position in kept]
    if names is not None:
        param_group["param_names"] = [names[position] for position in kept]
