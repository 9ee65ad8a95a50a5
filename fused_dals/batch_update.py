"""One batch of tensors through torch operations: begun and finished apart, where norms come from all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_dals.foreach import foreach_update
from fused_dals.gather import COMPENSATION_KEY, STATE_KEYS, TensorBatch
from fused_dals.reference import compute_dtype, reference_update
from fused_dals.rounding import Rounding
from fused_dals.scalars import StepScalars
from fused_dals.sharding import Shards, as_index, is_distributed_tensor
from fused_dals.stats import TrustRatios
from fused_dals.update import Update, finish, run_whole

#: Elements that a CPU steps together: 16 MiB of float32 for each temporary list, instead of all parameters. With
#: bfloat16 parameters, which take four such lists, a step of ViT-B's tensors takes 297 ms instead of 623, as memory is
#: used again; with float32 ones the same, to a few percent either way.
MOST_TOGETHER = 1 << 22


def parts_of(sizes: Sequence[int]) -> Iterator[slice]:
    """Consecutive tensors of these sizes, as many in a part as MOST_TOGETHER allows, one at least."""
    start = elements = 0
    for end, size in enumerate(sizes):
        if end > start and elements + size > MOST_TOGETHER:
            yield slice(start, end)
            start, elements = end, 0
        elements += size
    yield slice(start, len(sizes))


class BatchUpdate:
    """Of shards, from the gradients to the norms when it is made, the rest by ``finish``; by it all of whole tensors,
    so that tensors that are stepped one after the other need memory one after the other.
    """

    def __init__(
        self,
        batch: TensorBatch,
        group: Mapping[str, Any],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        raw_blends: Sequence[float],
        scalars: StepScalars,
        shards: Shards | None,
    ) -> None:
        """``raw_blends``: b of every parameter of the group. ``shards`` where any parameter is split over ranks."""
        self.batch = batch
        self.scalars = scalars
        self.shards = shards if batch.split_over else None
        grad_emas, momentum_buffers = (batch.state_of(state, key) for key in STATE_KEYS)
        compensations = batch.state_of(state, COMPENSATION_KEY)
        rounding: list[Rounding] = []
        if grad_emas[0].dtype == torch.bfloat16:
            rounding = [Rounding(key, scalars.seed) for key in batch.rounding_keys()]
        blends = [raw_blends[position] for position in batch.positions]
        tensors: tuple[Any, ...] = (batch.params, batch.grads, grad_emas, momentum_buffers, blends)
        arguments = scalars.of_group(group)

        written = batch.params + grad_emas + momentum_buffers + compensations
        # Foreach calls refuse to write to tensors that negate lazily, after they have written to others.
        self._together = group["foreach"] is not False and not any(map(Tensor.is_neg, written))
        if self._unscales():
            written += batch.grads
        # The device alone knows whether the step is dropped, and other ranks whether there is a gradient at all.
        undoable = isinstance(scalars.dropped, Tensor) or batch.absent
        self._saved = [(tensor, tensor.clone()) for tensor in written] if undoable else []
        if self._together:
            whole = self.shards is not None or batch.device.type != "cpu"
            parts = [slice(None)] if whole else list(parts_of([param.numel() for param in batch.params]))
            self._updates: list[Update] = [
                foreach_update(
                    *(some[part] for some in tensors),
                    **arguments,
                    compensations=compensations[part] or None,
                    rounding=rounding[part] or None,
                )
                for part in parts
            ]
        else:
            nothing = [None] * len(blends)
            extras_of_each = zip(compensations or nothing, rounding or nothing, strict=True)
            self._updates = [
                reference_update(*one, **arguments, compensation=compensation, rounding=drawn)
                for one, (compensation, drawn) in zip(zip(*tensors, strict=True), extras_of_each, strict=True)
            ]
        if self.shards is not None:
            norms = list(map(next, self._updates))
            if self._together:
                p_norms, u_norms = norms[0]
            else:
                p_norms, u_norms = (torch.stack(some) for some in zip(*norms, strict=True))
            self._rows = as_index([self.shards.row[place] for place in batch.places], self.shards.device)
            self.shards.put(self._rows, p_norms, u_norms, compute_dtype(batch.params[0].dtype))

    def finish(self) -> TrustRatios:
        """Write what depends on the norms, once those of shards have been added up."""
        if self.shards is None:
            found = list(map(run_whole, self._updates))
        else:
            p_norms, u_norms = self.shards.take(self._rows)
            norms = [(p_norms, u_norms)] if self._together else zip(p_norms, u_norms, strict=True)
            found = list(map(finish, self._updates, norms))
        ratios = found[0] if self._together and len(found) == 1 else self._joined(found)
        if self._unscales():
            self.scalars.unscale_(self.batch.grads)
        stepped = self.shards.present(self._rows) if self.batch.absent and self.shards is not None else None
        self._take_back(stepped)
        distributed = [owner for owner in self.batch.owners if is_distributed_tensor(owner)]
        if distributed:
            torch.autograd.graph.increment_version(distributed)  # only the shards' own versions have moved
        return TrustRatios(self.batch.group_index, self.batch.positions, ratios, stepped)

    def _joined(self, ratios: list[Tensor]) -> Tensor:
        """Those of parts, or of single tensors, in one."""
        return torch.cat(ratios) if self._together else torch.stack(ratios)

    def _unscales(self) -> bool:
        return self.scalars.inputs.grad_scale is not None and not self.batch.absent

    def _take_back(self, stepped: Tensor | None) -> None:
        """Restore what was not to be stepped, where it is, without waiting."""
        count, dropped = len(self.batch.params), self.scalars.dropped
        undo: list[Any] = [dropped] * count
        if stepped is not None:
            undo = list((~stepped | dropped if isinstance(dropped, Tensor) else ~stepped).unbind())
        for i, (tensor, old) in enumerate(self._saved):
            tensor.copy_(torch.where(undo[i % count], old, tensor))
