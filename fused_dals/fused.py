"""DALS through the Triton kernels: a prologue and one pass per bucket, whatever the number of tensors and groups."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import compress
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fused_dals import host
from fused_dals.buckets import Bucket, grad_address, joined_dims, tensors_of
from fused_dals.capture import BakedTable, check_nothing_to_prepare, is_capturing
from fused_dals.gather import COMPENSATION_KEY, TensorBatch
from fused_dals.group_table import GroupTable
from fused_dals.host_walk import increment_version
from fused_dals.kernels import layout
from fused_dals.launch_plan import IN_USE, LaunchPlan
from fused_dals.launcher import Launched, Launcher
from fused_dals.live_groups import GroupsVersion
from fused_dals.memory_order import is_plain
from fused_dals.run_state import StepInputs
from fused_dals.sharding import Place, Shards
from fused_dals.stats import TrustRatios

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def triton_is_installed() -> bool:
    """Looked up once: a missing module takes 90 us to miss."""
    return importlib.util.find_spec("triton") is not None


def why_not_fused(param: Tensor, grad: Tensor) -> str:
    """What the kernels lack for this parameter and its gradient; empty where they can serve them."""
    if not triton_is_installed():
        return "Triton is not installed (pip install triton; it exists for Linux with a GPU)"
    if param.device.type != "cuda" and not (interpreted() and param.device.type == "cpu"):
        return f"it is on {param.device}, and the kernels run on CUDA and ROCm devices"
    for what, tensor in (("it", param), ("its gradient", grad)):
        if tensor.dtype not in FUSED_DTYPES:
            return f"{what} is {tensor.dtype}, and the kernels serve float32, bfloat16 and float16"
        if not is_plain(tensor):
            return (
                f"{what} is a {type(tensor).__name__} whose numbers do not simply lie at its address (a wrapper around "
                "other tensors, or a view that negates), where the kernels would read them"
            )
    if param.dim() > layout.MAX_DIMS:
        left = len(joined_dims(param, grad, torch.empty_like(param, device="meta")))
        if left > layout.MAX_DIMS:
            return (
                f"its strides and those of its gradient leave {left} of its {param.dim()} dimensions, and the kernels "
                f"follow at most {layout.MAX_DIMS}; use foreach=True for its group"
            )
    return ""


#: What parts parameters into launches: dtypes of parameter, gradient and state, and whether there is a compensation.
BucketKey = tuple[torch.dtype, torch.dtype, torch.dtype, bool]


@dataclass
class Again:
    """A launch that can be made as it is, as long as everything that it was given still is what it was."""

    launched: Launched
    kernel: Any
    given: tuple[object, ...]  # by identity, held so that nothing else can take it over; all else stays

    def fits(self, kernel: Any, given: tuple[object, ...]) -> bool:
        return self.kernel is kernel and len(self.given) == len(given) and all(map(is_, self.given, given))


@dataclass
class Launch:
    """One launch of the pass: a bucket, what its tensors have in common, and where they stand in the groups."""

    bucket: Bucket
    key: BucketKey
    owners: list[Tensor]  # the parameters as the groups hold them
    measured: list[TrustRatios]  # by group, views of what the launch leaves on the device and the next writes anew
    stepped: list[Tensor]  # the owners that have a gradient now
    baked: BakedTable | None = None  # the gradients' addresses in the graph that is being captured, or was last
    #: By work list, and whether gradients are unscaled.
    again: dict[tuple[int, bool], Again] = field(default_factory=dict)


class FusedPass:
    """The buckets and scalar tables of an optimizer on one device; built at the first step, never copied or saved."""

    def __init__(self, device: torch.device, plan: LaunchPlan = IN_USE) -> None:
        self.device = device
        self.plan = plan
        self.programs = plan.programs(device)
        self.window = plan.window_on(device)
        self.stage_a_writes = plan.a_writes()
        self.group_table = GroupTable(device)
        self.launcher = Launcher()
        self.buckets: dict[BucketKey, Bucket] = {}
        self.launches: list[Launch] = []
        self.shards: Shards | None = None
        self._unscale = False  # in the step that has begun
        self.preparations = 0  # how often the tables were written in full
        #: A graph holds addresses alone. What it reads must outlive the next prepare(), or replays read other memory.
        self._held_for_graphs: list[object] = []
        self._grad_addresses = host.integers(())
        self._seed = torch.zeros(1, dtype=torch.int32, device=device)
        self._zero = torch.zeros(1, dtype=torch.float32, device=device)
        self._one = torch.ones(1, dtype=torch.float32, device=device)
        self._no_scan = torch.zeros(1, 2, dtype=torch.float64, device=device)
        self._prologue_again: Again | None = None

    def prepare(
        self,
        batches: Sequence[TensorBatch],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        blends: Sequence[Sequence[float]],
        shards: Shards | None = None,
    ) -> None:
        """Write the tables for these batches of this device; ``blends[g]`` has b per parameter of group g.

        ``shards`` where any of the batches is split over ranks: ``begin`` then leaves norms there, and ``finish`` finds
        them added up. The tables hold addresses: the caller keeps parameters, gradients and state alive until the step
        has run.
        """
        by_key: dict[BucketKey, list[TensorBatch]] = {}
        for batch in batches:
            param, entry = batch.params[0], state[batch.owners[0]]
            key = param.dtype, batch.grads[0].dtype, entry["grad_ema"].dtype, COMPENSATION_KEY in entry
            by_key.setdefault(key, []).append(batch)
        self.launches = []
        self.preparations += 1
        self.shards = shards if any(batch.split_over for batch in batches) else None
        for key, members in by_key.items():
            if key not in self.buckets:
                self.buckets[key] = Bucket(self.device, self.plan.chunk_of(*key[:3]), self.window)
            tensors = tensors_of(members, state, blends, {} if self.shards is None else self.shards.row)
            self.buckets[key].refresh(tensors, sharded=self.shards is not None)
            ratios = self.buckets[key].ratios.split([len(batch.positions) for batch in members])
            measured = [TrustRatios(b.group_index, b.positions, r) for b, r in zip(members, ratios, strict=True)]
            owners = [owner for batch in members for owner in batch.owners]
            self.launches.append(Launch(self.buckets[key], key, owners, measured, owners))
        counts = [launch.bucket.sync_count for launch in self.launches]
        self.sync = torch.empty(sum(counts), dtype=torch.int32, device=self.device)
        for launch, sync in zip(self.launches, self.sync.split(counts), strict=True):
            launch.bucket.use_sync(sync)
        self._scan_rows: dict[tuple[Any, ...], Tensor] = {}
        in_order = sorted(
            (batch.group_index, position, grad_address(grad))
            for batch in batches
            for position, grad in zip(batch.positions, batch.grads, strict=True)
        )
        addresses = self._grad_addresses = host.integers(address for _, _, address in in_order)
        #: Of all tensors, in the order of the groups.
        self.places: list[Place] = [(group_index, position) for group_index, position, _ in in_order]
        rank = {place: i for i, place in enumerate(self.places)}
        places = [
            [rank[some.group_index, position] for some in launch.measured for position in some.positions]
            for launch in self.launches
        ]
        #: Of each launch, None where its order is that of the groups.
        self._grad_places = [None if own == [*range(len(rank))] else host.integers(own) for own in places]
        self._is_missing = torch.zeros(len(rank), dtype=torch.bool, device="cpu")
        self._note_missing(addresses)

    def follow_grads(self, addresses: Tensor) -> None:
        """Point the tables to gradients at new addresses, int64 in the order of the groups, aligned as those before, 0
        where one is missing.

        A step that is being captured gets tables of its own, so that neither its replays nor other steps disturb each
        other.
        """
        self._note_missing(addresses)
        if is_capturing(self.device):
            self._follow_in_graph(addresses)
            return
        if torch.equal(addresses, self._grad_addresses):
            return
        for launch, own in zip(self.launches, self._by_launch(addresses), strict=True):
            launch.bucket.refresh_grads(own)
        self._grad_addresses = addresses

    def _by_launch(self, addresses: Tensor) -> list[Tensor]:
        return [addresses if places is None else addresses[places] for places in self._grad_places]

    def _note_missing(self, addresses: Tensor) -> None:
        """Whose version is to move, and that of whose gradients."""
        is_missing = addresses == 0
        if torch.equal(is_missing, self._is_missing):
            return
        self._is_missing = is_missing
        for launch, own in zip(self.launches, self._by_launch(addresses), strict=True):
            launch.stepped = list(compress(launch.owners, own.tolist()))

    def _follow_in_graph(self, addresses: Tensor) -> None:
        """The same for a step that is being captured, into tables that the graph itself writes."""
        groups = self.group_table
        self._held_for_graphs += [self.sync, *groups.memory(), *self._scan_rows.values()]
        self._held_for_graphs += [] if self.shards is None else [self.shards]
        for launch, own in zip(self.launches, self._by_launch(addresses), strict=True):
            launch.baked = BakedTable(len(own), self.device)
            launch.baked.write(own.tolist())
            self._held_for_graphs += [launch.baked, *launch.bucket.memory()]

    def scan(self) -> dict[tuple[Any, ...], Tensor]:
        """Sums of squares and counts of non-finite elements of all gradients, float64 [rows, 2]; one launch a bucket.

        By the process groups that tensors are split over, with a launch for each. The rows are memory that the next
        scan writes again.
        """
        from fused_dals.kernels.grad_scan import grad_scan

        programs = self.programs
        if not self._scan_rows:
            check_nothing_to_prepare(self.device)
            ways = Counter(way for launch in self.launches for way in launch.bucket.scan_lists())
            self._scan_rows = {
                way: torch.empty(count * programs, 2, dtype=torch.float64, device=self.device)
                for way, count in ways.items()
            }
        free = {way: iter(rows.split(programs)) for way, rows in self._scan_rows.items()}
        with self._current_device():
            for launch in self.launches:
                bucket = launch.bucket
                for way, items in bucket.scan_lists().items():
                    grads, rows = self._grads_of(launch), next(free[way])
                    self.launcher.launch(
                        grad_scan,
                        programs,
                        (bucket.tensors, grads, bucket.dims, items, rows, items.numel()),
                        num_warps=layout.NUM_WARPS,
                        GRAD_TYPE=_triton_dtype(launch.key[1]),
                        CHUNK=bucket.chunk,
                        TILE=layout.SCAN_TILE,
                    )
        return self._scan_rows

    def begin(self, inputs: StepInputs, groups: Sequence[Mapping[str, Any]], groups_version: GroupsVersion) -> None:
        """Move ``inputs.values``, which are on this device, and launch what was prepared: all of it, or stage A.

        ``groups_version`` is the same as long as nothing in ``groups`` changed.
        """
        self._unscale = inputs.grad_scale is not None
        with self._current_device():
            self._launch_prologue(inputs, groups, groups_version)
            for launch in self.launches:
                self._launch_pass(launch, 0)

    def finish(self) -> list[TrustRatios]:
        """Launch stage B, where shards have had to wait for norms from other ranks."""
        measured = []
        # Whole tensors are done; entering a device takes as long as a launch.
        with nullcontext() if self.shards is None else self._current_device():
            for launch in self.launches:
                if self.shards is not None:
                    self._launch_ratios(launch, self.shards)
                    self._launch_pass(launch, 1)
                # Autograd must notice the writes that it cannot see.
                increment_version(launch.stepped)
                if self._unscale:
                    increment_version([owner.grad for owner in launch.stepped if owner.grad is not None])
                measured += launch.measured
        return measured

    def run(
        self, inputs: StepInputs, groups: Sequence[Mapping[str, Any]], groups_version: GroupsVersion
    ) -> list[TrustRatios]:
        """The whole step of tensors that are no shards."""
        self.begin(inputs, groups, groups_version)
        return self.finish()

    def _current_device(self) -> Any:
        # Triton launches on the current device, whatever device its arguments are on.
        is_current = self.device.type != "cuda" or self.device.index == torch.cuda.current_device()
        return nullcontext() if is_current else torch.cuda.device(self.device)

    def _launch_prologue(
        self, inputs: StepInputs, groups: Sequence[Mapping[str, Any]], groups_version: GroupsVersion
    ) -> None:
        from fused_dals.kernels.prologue import prologue

        self.group_table.refresh(groups, groups_version)
        tables, total, count = self.group_table.tables(), inputs.loss.total, inputs.loss.count
        given: tuple[object, ...] = ()
        if total is not None and count == 1 and inputs.nothing_but_a_loss():
            # Only the loss lies elsewhere from step to step.
            given = *tables, inputs.values, self.sync, total.dtype
            again = self._prologue_again
            if again is not None and again.fits(prologue, given):
                place = prologue.arg_names.index("loss_sum")
                if again.launched.again_with(place, total.data_ptr()):
                    return
        scan = self._no_scan if inputs.scan is None else inputs.scan
        arguments = (
            *tables,
            self._seed,
            inputs.values,
            inputs.values if total is None else total,
            -1.0 if count is None else float(count),
            self._zero if inputs.found_inf is None else inputs.found_inf.to(torch.float32),
            self._one if inputs.grad_scale is None else inputs.grad_scale.to(torch.float32),
            scan,
            0 if inputs.scan is None else scan.shape[0],
            float(inputs.skip_nonfinite),
            len(groups),
            self.sync,
            self.sync.numel(),
        )
        launched = self.launcher.launch(prologue, 1, arguments, num_warps=4)
        if launched is not None and given:
            self._prologue_again = Again(launched, prologue, given)

    def _launch_ratios(self, launch: Launch, shards: Shards) -> None:
        from fused_dals.kernels.fused_pass import ratios_of_norms

        bucket, count = launch.bucket, len(launch.owners)
        arguments = (
            bucket.tensors,
            shards.norms.values,
            self.group_table.scalars,
            bucket.ratios,
            bucket.ready,
            bucket.counters[1],
            count,
        )
        programs = -(-count // layout.RATIOS_BLOCK)
        self.launcher.launch(ratios_of_norms, programs, arguments, num_warps=4, BLOCK=layout.RATIOS_BLOCK)

    def _launch_pass(self, launch: Launch, which: int) -> None:
        from fused_dals.kernels.fused_pass import fused_pass

        # A step that is being captured has a table of its own for the gradients' addresses.
        again = None if is_capturing(self.device) else launch.again.get((which, self._unscale))
        given = (self.group_table.scalars,)  # all else belongs to the bucket
        if again is not None and again.fits(fused_pass, given):
            again.launched.again()
            return
        bucket, (param, grad, state, compensated) = launch.bucket, launch.key
        work = bucket.lists[which]
        arguments = (
            bucket.tensors,
            self._grads_of(launch),
            bucket.dims,
            bucket.blends,
            self.group_table.scalars,
            work.items,
            bucket.partials,
            self._no_scan if self.shards is None else self.shards.norms.values,
            bucket.ratios,
            bucket.arrivals,
            bucket.ready,
            bucket.counters[which],
            self._seed,
            work.count,
        )
        launched = self.launcher.launch(
            fused_pass,
            self.programs,
            arguments,
            num_warps=self.plan.num_warps,
            max_registers=self.plan.max_registers,
            PARAM_TYPE=_triton_dtype(param),
            GRAD_TYPE=_triton_dtype(grad),
            STATE_TYPE=_triton_dtype(state),
            COMPENSATED=compensated,
            UNSCALE=self._unscale,
            SHARDED=self.shards is not None,
            CHUNK=bucket.chunk,
            TILE=min(self.plan.tile, bucket.chunk),
            MOST_IN_B=self.plan.most_in_b,
            PAIRS=self.plan.in_pairs,
            A_WRITES=self.stage_a_writes,
            EVICT_FIRST=self.plan.evict_first,
            SAME_RUNS=self.plan.same_runs,
        )
        if launched is not None and self.shards is None and not is_capturing(self.device):
            launch.again[which, self._unscale] = Again(launched, fused_pass, given)

    def _grads_of(self, launch: Launch) -> Tensor:
        return launch.baked.values if launch.baked and is_capturing(self.device) else launch.bucket.grads


@functools.cache
def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
