"""One step of an optimizer: what is checked, which path serves which tensors, and how the run state moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_dals import host
from fused_dals.awaited import awaited_batches, note_grads, stand_in
from fused_dals.batch_update import BatchUpdate
from fused_dals.capture import check_capturable, check_losses_capturable, is_capturing
from fused_dals.fingerprint import CompiledFingerprint, Fingerprint, take_fingerprint
from fused_dals.fused import FusedPass, why_not_fused
from fused_dals.gather import STATE_KEYS, TensorBatch, create_missing_state, gather, has_state, parameter_label
from fused_dals.host_walk import HOST_WALK
from fused_dals.loss_signal import NO_LOSS_WARNING, StepLoss, as_scalar
from fused_dals.memory_order import is_plain
from fused_dals.overlap import find_overlap
from fused_dals.run_state import StepInputs
from fused_dals.runtime import Captured, Runtime
from fused_dals.scalars import StepScalars
from fused_dals.scan import own_gradients, scan_gradients
from fused_dals.self_check import serves_by_default
from fused_dals.sharding import Shards, is_distributed_tensor, like, local, settle_gradients
from fused_dals.stats import TrustRatios
from fused_dals.steady import Steady

SCHEDULE_IS_OVER = (
    "group {index}: more than total_steps={end} steps: the built-in schedule is over, and the learning rate stays 0. "
    'Set group["total_steps"] in optimizer.param_groups to the length of the whole run, or to None for no schedule. A '
    "checkpoint brings the total_steps that it was saved with, whatever the constructor was given: set it after "
    "loading."
)

State = dict[Tensor, dict[str, Tensor]]


class Stepper:
    """Steps the parameters of ``groups``. Holds nothing of its own: all that lasts is in ``state`` and ``runtime``."""

    def __init__(self, groups: list[dict[str, Any]], state: State, runtime: Runtime, name: str) -> None:
        self.groups = groups
        self.state = state
        self.runtime = runtime
        self.name = name  # of the optimizer's class, for messages

    def step(self, losses: Iterable[Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """One step; ``losses`` that are not None are observed once the checks have passed.

        ``found_inf`` and ``grad_scale`` are what GradScaler hands over: drop the step unless 0, divide gradients by it.
        """
        runtime = self.runtime
        runtime.live_groups.check(self.groups)
        steady = self._resume(writes_grads=grad_scale is not None)
        batches = [] if steady else self._gather(writes_grads=grad_scale is not None)
        # Nothing else moves the run state to another device than the step that did it last.
        home = runtime.state.values.device if steady else self._home(batches)
        losses = [loss for loss in losses if loss is not None]
        capturing = is_capturing(home)
        if capturing:
            check_capturable(self.groups, has_state=bool(self.state))
            check_losses_capturable(losses, runtime.loss.seen_outside_capture)
        fused: list[TensorBatch] = []
        if steady:
            others = steady.batches_of_now()
        else:
            fused, others = self._part(batches)
        if capturing:
            self._check_plan_capturable(steady, fused, others)
            runtime.captured = Captured(runtime.live_groups.clips, runtime.live_groups.skips, by_kernels=not others)
        else:
            self._warn_after_schedule()
        read_in_place = steady and steady.is_one_pass and len(losses) == 1 and not runtime.live_groups.capturable
        read_on = home if read_in_place else None
        if len(losses) > 1:  # one that is none must not leave another behind for the next step
            list(map(as_scalar, losses))
        for loss in losses:
            runtime.loss.observe(loss, read_on=read_on)
        passes = steady.passes_of_now() if steady else self._prepare(batches, fused, others, home)
        if passes is None:
            return
        self._run(passes, others, home, found_inf, grad_scale)
        runtime.state.calls += not capturing
        if not steady:
            self._remember(passes, others, grads_are_own=grad_scale is not None)
        if not passes and host.knows(runtime.state.values):
            self.write_counters()

    def write_counters(self) -> None:
        """Put the run state into the groups as plain numbers, for any checkpoint format; waits for the device."""
        numbers = self.runtime.state.numbers()
        for group in self.groups:
            group.update(numbers)

    def _gather(self, writes_grads: bool) -> list[TensorBatch]:
        """Everything that is to be stepped, checked."""
        settle_gradients(self.groups)
        if writes_grads:
            own_gradients(self.groups)
        batches = gather(self.groups, self.state, self.runtime.joined(self.groups))
        self._check_memory(batches)
        self.runtime.distributed = any(is_distributed_tensor(p) for group in self.groups for p in group["params"])
        self.runtime.shards = Shards.of(self.groups, self.runtime.shards)
        return batches

    def _check_memory(self, batches: Sequence[TensorBatch]) -> None:
        """Raise RuntimeError where parameters share memory: both would be stepped, in an order that nobody chose.

        So it is with state, which is looked at where kernels write to it, all tensors at once.
        """
        params = [param for batch in batches for param in batch.params]
        state = [value for batch in batches for _, _, value in self._state_for_kernels(batch)]
        tensors = params + state
        places = [(tensor.data_ptr(), tensor.numel(), tensor.stride()) for tensor in tensors]
        if places == self.runtime.memory:
            return
        overlap = find_overlap(tensors)
        if overlap is not None:
            labels = [f"parameter {label!r}" for batch in batches for label in self._labels_of(batch)]
            for batch in batches:
                own = self._labels_of(batch)
                labels += [f"{key} of parameter {own[i]!r}" for i, key, _ in self._state_for_kernels(batch)]
            first, second = (labels[i] for i in overlap)
            is_state = overlap[1] >= len(params)
            own_memory = "give it memory of its own: state[key] = state[key].clone()"
            if overlap[0] == overlap[1]:
                raise RuntimeError(
                    f"DALS cannot step {first}: several of its elements share memory, as in an expanded tensor; "
                    + (own_memory if is_state else "give it memory of its own, p.data = p.data.clone()")
                )
            raise RuntimeError(
                f"DALS cannot step {first} and {second}: they share memory and would be stepped twice; "
                + (own_memory if is_state else "tie weights by one nn.Parameter that both modules hold")
            )
        self.runtime.memory = places

    def _state_for_kernels(self, batch: TensorBatch) -> list[tuple[int, str, Tensor]]:
        """Which of the batch, which state, and the tensor: all that is there and kernels are to write to."""
        entries = [(i, self.state[owner]) for i, owner in enumerate(batch.owners) if has_state(self.state.get(owner))]
        # In this order: what kernels serve may be tried out when first asked for, which no captured step can do.
        if not entries or not self._flat(self.groups[batch.group_index], batch.params[0]):
            return []
        found = [(i, key, local(entry[key])) for i, entry in entries for key in STATE_KEYS]
        return [(i, key, value) for i, key, value in found if is_plain(value)]  # all else is copied before that

    def _labels_of(self, batch: TensorBatch) -> list[str]:
        group = self.groups[batch.group_index]
        return [parameter_label(group, batch.group_index, position) for position in batch.positions]

    def _check_plan_capturable(
        self, steady: Steady | None, fused: Sequence[TensorBatch], others: Sequence[TensorBatch]
    ) -> None:
        """Raise RuntimeError where a step that is being captured would have to prepare something first."""
        devices = {one.device for one in steady.passes} if steady else {batch.device for batch in fused}
        if devices and (others or len(devices) > 1):
            raise RuntimeError(
                "this step is being captured into a graph, and it spans devices, or kernels and torch operations: "
                "capture one optimizer per device, with fused=False where the kernels do not serve every parameter"
            )
        if fused:
            raise RuntimeError(
                "this step is being captured into a graph, and its parameters or their layout differ from the last "
                "step's, or one has its first gradient: take one more step like this one before capture"
            )
        for batch in others:
            if not isinstance(self.groups[batch.group_index]["lr"], Tensor):
                raise RuntimeError(
                    f"group {batch.group_index}: this step is being captured into a graph, and lr is a number, which "
                    "replays of torch operations would keep: make it a tensor on the parameters' device"
                )
            for param, position in zip(batch.params, batch.positions, strict=True):
                if not has_state(self.state.get(param)):
                    label = parameter_label(self.groups[batch.group_index], batch.group_index, position)
                    raise RuntimeError(
                        f"this step is being captured into a graph, and parameter {label!r} has no state yet: take one "
                        "more step before capture"
                    )

    # -- which path -----------------------------------------------------------------------------------------------

    def _home(self, batches: Sequence[TensorBatch]) -> torch.device:
        """Where the run state lives: with parameters that are stepped, on a GPU if there is one, and where it was."""
        devices = list(dict.fromkeys(batch.device for batch in batches))
        if not devices and self.runtime.loss.average.active():
            # Nothing to step here, but sums to take part in, where the other ranks have theirs.
            devices = list(dict.fromkeys(param.device for group in self.groups for param in group["params"]))
            if not devices and torch.cuda.is_available():
                devices = [torch.device("cuda", torch.cuda.current_device())]
        have = self.runtime.state.values.device
        off_host = [device for device in devices if device.type != "cpu"] or devices
        return have if have in off_host or not off_host else off_host[0]

    def _part(self, batches: Sequence[TensorBatch]) -> tuple[list[TensorBatch], list[TensorBatch]]:
        """What the kernels take, and all else; an error where a group demands what they cannot do."""
        fused: list[TensorBatch] = []
        others: list[TensorBatch] = []
        for batch in batches:
            group, index = self.groups[batch.group_index], batch.group_index
            _resolve_negation(batch)
            if batch.absent or not self._flat(group, batch.params[0]):
                others.append(batch)
                continue
            reasons = list(map(why_not_fused, batch.params, batch.grads))
            for position, reason in zip(batch.positions, reasons, strict=True):
                if reason and group["fused"]:
                    label = parameter_label(group, index, position)
                    raise RuntimeError(f"group {index}: fused=True cannot step parameter {label!r}: {reason}")
            for served, part in ((True, fused), (False, others)):
                chosen = batch.only([(reason == "") == served for reason in reasons])
                part += [chosen] if chosen.params else []
        return fused, others

    def _flat(self, group: dict[str, Any], param: Tensor) -> bool:
        """Whether the kernels are to serve this parameter, if nothing about its layout forbids it."""
        if group["fused"] is None and group["foreach"] is None:
            return serves_by_default(param)
        return bool(group["fused"])

    # -- the fused path -------------------------------------------------------------------------------------------

    def _prepare(
        self,
        batches: Sequence[TensorBatch],
        fused: Sequence[TensorBatch],
        others: Sequence[TensorBatch],
        home: torch.device,
    ) -> list[FusedPass] | None:
        """State for all batches, and the passes that serve ``fused``; None where the call is to create state alone."""
        only_creates_state = self._only_creates_state(batches, home)
        if not is_capturing(home):
            create_missing_state(self.groups, self.state, flat=self._flat)
        if only_creates_state:
            return None
        if self.runtime.shards is not None:
            present = [place for batch in batches if not batch.absent for place in batch.places]
            self.runtime.shards.set_present(present)
        return self._prepare_passes([*fused, *self._awaited(fused, others)])

    def _awaited(self, fused: Sequence[TensorBatch], others: Sequence[TensorBatch]) -> list[TensorBatch]:
        """Who is to be in the kernels' tables without a gradient, where kernels do the whole step."""
        if not fused or others or self.runtime.distributed:
            return []

        def served(group: dict[str, Any], param: Tensor) -> bool:
            return self._flat(group, param) and not why_not_fused(param, param)

        last = self.runtime.last_grads
        note_grads(last, fused)
        if len(last) == sum(len(batch.positions) for batch in fused):
            return []
        return awaited_batches(self.groups, self.state, last, fused, self.runtime.joined(self.groups), served)

    def _prepare_passes(self, batches: Sequence[TensorBatch]) -> list[FusedPass]:
        """The passes that serve these batches, device by device, with their tables written."""
        passes = []
        blends = [self.runtime.raw_blends(self.groups, index) for index in range(len(self.groups))] if batches else []
        for device in dict.fromkeys(batch.device for batch in batches):
            fused = self.runtime.fused.get(device)
            if fused is None:
                fused = self.runtime.fused[device] = FusedPass(device)
            own = [batch for batch in batches if batch.device == device]
            fused.prepare(own, self.state, blends, self.runtime.shards)
            passes.append(fused)
        return passes

    def _remember(self, passes: list[FusedPass], others: Sequence[TensorBatch], grads_are_own: bool) -> None:
        """Let the next step go on with the batches and tables of this one, where it can be told what they depend on."""
        if not (passes or others) or any(batch.absent for batch in others):
            return
        devices = [*(fused.device for fused in passes), *(batch.device for batch in others)]
        if any(device.type != "cpu" for device in devices):
            HOST_WALK.want()
        fingerprint = self._fingerprint(passes, others)
        if fingerprint is not None:
            batches = [batch.emptied() for batch in others]
            self.runtime.steady = Steady(passes, batches, fingerprint, self.runtime.plans, grads_are_own)

    def _resume(self, writes_grads: bool) -> Steady | None:
        """What did the last step, if nothing has changed since but the gradients."""
        steady, self.runtime.steady = self.runtime.steady, None
        if steady is None or steady.plans != self.runtime.plans:
            return None
        if writes_grads and not steady.grads_are_own:
            return None
        if self.runtime.distributed and not settle_gradients(self.groups):
            return None
        fits = steady.still_fits(self.groups, self.state)
        # Expanded gradients do not match, because those that were recorded had memory of their own.
        if writes_grads and (not fits or steady.any_grad_twice()):
            own_gradients(self.groups)
            fits = steady.still_fits(self.groups, self.state)
        if not fits:
            return None
        if steady.fingerprint.is_outdated():
            steady.fingerprint = self._fingerprint(steady.passes, steady.batches) or steady.fingerprint
        self.runtime.steady = steady
        return steady

    def _fingerprint(
        self, passes: Sequence[FusedPass], others: Sequence[TensorBatch]
    ) -> Fingerprint | CompiledFingerprint | None:
        """Of everything that these depend on."""
        awaited: list[tuple[Tensor, Tensor]] | None = None
        if not others and not self.runtime.distributed:
            awaited = []
            for place in sorted(place for fused in passes for place in fused.places):
                param = self.groups[place[0]]["params"][place[1]]
                if param.grad is None:
                    grad = stand_in(param, place, self.runtime.last_grads)
                    assert grad is not None  # it is in the tables
                    awaited.append((param, grad))
        return take_fingerprint(self.groups, self.state, self.runtime.distributed, awaited)

    # -- the step -------------------------------------------------------------------------------------------------

    def _run(
        self,
        passes: Sequence[FusedPass],
        others: Sequence[TensorBatch],
        home: torch.device,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        """Update everything, and move the run state, which lives at ``home``, once."""
        runtime = self.runtime
        alone = not runtime.loss.average.active()
        if alone:
            self._warn_without_loss()
        runtime.state.move_to(home)
        loss = runtime.loss.take(home)
        inputs = StepInputs(
            runtime.state.values,
            loss,
            None if found_inf is None else host.scalar_on(home, found_inf),
            None if grad_scale is None else host.scalar_on(home, grad_scale),
            skip_nonfinite=runtime.live_groups.skips,
        )
        inputs = self._scanned(inputs, passes, others)
        # The pass at home moves the run state; everybody else works from a copy of what it was.
        before = replace(inputs, values=inputs.values.clone()) if len(passes) > 1 or (passes and others) else inputs
        scalars = {device: StepScalars(before.on(device)) for device in dict.fromkeys(batch.device for batch in others)}
        if runtime.shards is not None:
            runtime.shards.begin()
        for fused in passes:
            own = inputs if fused.device == home else before.on(fused.device)
            fused.begin(own, self.groups, runtime.live_groups.version)
        measured = self._step_batches(passes, others, scalars)
        if not any(fused.device == home for fused in passes):
            inputs.values.copy_(scalars[home].next_values if home in scalars else before.next_values())
        if measured or not others:  # a dropped step leaves what there was
            runtime.trust_ratios = measured
        if not alone:
            self._warn_without_loss(loss)

    def _step_batches(
        self, passes: Sequence[FusedPass], others: Sequence[TensorBatch], scalars: Mapping[torch.device, StepScalars]
    ) -> list[TrustRatios]:
        """Everything from the norms on; those of shards are added up over the ranks once for all of them."""
        shards = self.runtime.shards
        measured: list[TrustRatios] = []
        waiting: list[BatchUpdate] = []
        for batch in others:
            if scalars[batch.device].dropped is True:
                continue
            blends = self.runtime.raw_blends(self.groups, batch.group_index)
            group = self.groups[batch.group_index]
            update = BatchUpdate(batch, group, self.state, blends, scalars[batch.device], shards)
            if batch.split_over:
                waiting.append(update)
            else:
                measured.append(update.finish())
        if shards is not None:
            shards.norms.sum_over_ranks()
        for fused in passes:
            measured += fused.finish()
        return measured + [update.finish() for update in waiting]

    def _scanned(self, inputs: StepInputs, passes: Sequence[FusedPass], others: Sequence[TensorBatch]) -> StepInputs:
        """With what clipping and skipping need to know of all gradients, those of other ranks too."""
        runtime, home = self.runtime, inputs.values.device
        shards = runtime.shards
        partitions = runtime.partitions if runtime.partitions.group is not None else None
        wanted = runtime.live_groups.clips or runtime.live_groups.skips
        if not wanted and ((shards is None and partitions is None) or inputs.found_inf is None):
            return inputs
        rows: dict[tuple[Any, ...], list[Tensor]] = {}
        if wanted:
            for fused in passes:
                for way, some in fused.scan().items():
                    rows.setdefault(way, []).append(some)
            for batch in others:
                if not batch.absent:
                    rows.setdefault(batch.split_over, []).append(scan_gradients(batch.grads))
        found_inf = inputs.found_inf
        if shards is not None:
            added, found_inf = shards.scan_over_ranks(rows, found_inf)
            rows = {(): [added]}
        flat = [some for found in rows.values() for some in found]
        scan: Tensor | None = None
        if len(flat) == 1 and flat[0].device == home:
            scan = flat[0]
        elif flat:
            scan = torch.cat([host.scalars_on(home, some) for some in flat])
        if partitions is not None:
            scan, found_anywhere = partitions.sum(scan, found_inf, home)
            found_inf = None if found_inf is None else found_anywhere
        if found_inf is not None:
            found_inf = host.scalars_on(home, found_inf)
        return replace(inputs, scan=scan if wanted else None, found_inf=found_inf)

    def _warn_without_loss(self, taken: StepLoss | None = None) -> None:
        """Once; ``taken`` is what all ranks had, where there are several: one of them may have a loss for all."""
        loss = self.runtime.loss
        if loss.observed or "loss" in self.runtime.warned:
            return
        if taken is not None and taken.total is not None and float(taken.total[1]) > 0:  # waits, in the first step
            loss.observed = True
            return
        self.runtime.warn_once("loss", NO_LOSS_WARNING.format(optimizer=self.name))

    def _warn_after_schedule(self) -> None:
        """Once for each total_steps, where a built-in schedule was over before this step.

        It waits for no device: where only the device knows how many steps were taken, it goes by those that were asked
        for, and comes too early by the number of dropped ones, or too late by those that a graph replayed.
        """
        state = self.runtime.state
        for end in self.runtime.live_groups.ends:
            if state.calls < end or f"total_steps={end}" in self.runtime.warned:
                continue
            if host.knows(state.values) and state.numbers()["step"] < end:
                continue
            index = next(i for i, group in enumerate(self.groups) if group["total_steps"] == end)
            self.runtime.warn_once(f"total_steps={end}", SCHEDULE_IS_OVER.format(index=index, end=end))

    def _only_creates_state(self, batches: Sequence[TensorBatch], home: torch.device) -> bool:
        """Whether this is the call by which distributed checkpointing makes an optimizer create its state.

        It calls step() once with lr 0 and zero gradients, without a loss; such a call must leave weights, counters
        and phase alone. The look at the gradients waits for the device, but only a first step with lr 0 gets there.
        All ranks must agree on it, or one would wait for the others' norms and losses.
        """
        runtime = self.runtime
        alone = runtime.shards is None and runtime.partitions.group is None and not runtime.loss.average.active()
        if self.state or (alone and not batches):
            return False
        if not host.knows(self.runtime.state.values) or self.runtime.state.numbers()["step"]:
            return False
        lrs = [group["lr"] for group in self.groups]
        if any(isinstance(lr, Tensor) and not host.knows(lr) for lr in lrs) or any(float(lr) != 0 for lr in lrs):
            return False
        steps = runtime.loss.observed or any(bool(grad.any()) for batch in batches for grad in batch.grads)
        if runtime.loss.average.active():
            steps = runtime.loss.average.any_rank(steps, home)
        if runtime.shards is not None:
            steps = runtime.shards.any_rank(steps)
        if runtime.partitions.group is not None:
            steps = runtime.partitions.any_rank(steps, home)
        return not steps


def _resolve_negation(batch: TensorBatch) -> None:
    """Give gradients that negate what they read, as autograd makes them of complex numbers, numbers of their own."""
    for i, grad in enumerate(batch.grads):
        if grad.is_neg():
            batch.grads[i] = grad.resolve_neg()
            batch.owners[i].grad = like(batch.owners[i], batch.grads[i])
