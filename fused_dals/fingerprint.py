"""Whether a step may go on with what the last one prepared: everything that a plan depends on, compared in bulk.

In Python the lists are built by C loops over the tensors, 20 to 150 ns per tensor and attribute; nothing is hashed, and
no tensor is compared by value. State is not held, so that memory which somebody takes away between two steps comes
back; another tensor of the same identity, place, shape, strides and dtype is as good. The compiled walk asks the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fused_dals import host
from fused_dals.buckets import NO_ELEMENTS, WIDE_BYTES, grad_address
from fused_dals.host_walk import HOST_WALK
from fused_dals.memory_order import is_plain
from fused_dals.sharding import local

Groups: TypeAlias = Sequence[Mapping[str, Any]]
State: TypeAlias = Mapping[Tensor, dict[str, Tensor]]
#: Parameters in the order of the groups, each with a stand-in on the meta device for the gradient that it awaits.
Awaited: TypeAlias = Sequence[tuple[Tensor, Tensor]]

PLAIN_TYPES = {Tensor, torch.nn.Parameter}

_grad, _dtype, _shape = attrgetter("grad"), attrgetter("dtype"), attrgetter("shape")
_requires_grad = attrgetter("requires_grad")


class Fingerprint:
    """Identity, place, size, layout and dtype of all parameters, gradients and state tensors of an optimizer.

    Gradients usually are new tensors at every step; their addresses are kept apart, as all that changes then. How far
    they are aligned is not: it decides how the kernel may read them.
    """

    def __init__(self, groups: Groups, state: State, distributed: bool, awaited: Awaited | None = None) -> None:
        """``distributed``: parameters are DTensors, of which this rank's shards are stepped. Their gradients have to be
        settled (sharding.py), now and whenever it is followed.

        ``awaited``: parameters without a gradient for which one is planned all the same, like the stand-in beside each
        and as well aligned as can be; from step to step any planned gradient that has elements may then be missing.
        None where all have to be there.

        Raises RuntimeError or TypeError where a tensor has no memory or state holds something else: none fits.
        """
        self._distributed = distributed
        self._may_miss = awaited is not None
        self._without_walk = HOST_WALK.compiled is None
        self._sizes = [len(group["params"]) for group in groups]
        self._params = _params_of(groups)  # held, so that no other object can take over their identity
        state_tensors = _state_of(state)
        self._state = [*map(id, state), *chain.from_iterable(state.values()), *map(id, state_tensors)]
        self._has_grad = [grad is not None for grad in map(_grad, self._params)]
        grads = list(map(_grad, compress(self._params, self._has_grad)))
        params = self._params
        # Which rows the ranks add up depends on what trains, gradient or not.
        trains = list(map(_requires_grad, params)) if distributed else []
        self._specs = _specs_of(params) if distributed else []  # held, too
        if distributed:
            params, grads, state_tensors = ([*map(local, tensors)] for tensors in (params, grads, state_tensors))
        # Others are the very objects that were found plain; gradients usually are new ones.
        odd = set(map(type, grads)) - PLAIN_TYPES or any(map(Tensor.is_neg, grads))
        if odd and not all(map(is_plain, grads)):
            raise RuntimeError("a gradient has no memory, or negates what it reads there")
        self._grad_addresses = [address or NO_ELEMENTS for address in _addresses(grads)]
        self._parts = (
            trains,
            _addresses(params),
            _addresses(state_tensors),
            *(list(map(Tensor.is_neg, tensors)) for tensors in (params, state_tensors)),
            *(list(map(_shape, tensors)) for tensors in (params, state_tensors)),
            *(list(map(_dtype, tensors)) for tensors in (params, state_tensors)),
            *(_layouts(tensors) for tensors in (params, state_tensors)),
        )
        stand_ins = {id(param): grad for param, grad in awaited or ()}
        self._planned = self._has_grad
        aligned = [address % WIDE_BYTES for address in self._grad_addresses]
        if stand_ins:
            self._planned = [has or id(p) in stand_ins for has, p in zip(self._has_grad, self._params, strict=True)]
            grads = [stand_ins[id(p)] if p.grad is None else p.grad for p in compress(self._params, self._planned)]
            aligned = [grad_address(grad) % WIDE_BYTES for grad in grads]
        self._of_grads = (aligned, list(map(_shape, grads)), list(map(_dtype, grads)), _layouts(grads))

    def is_outdated(self) -> bool:
        """Whether the compiled walk has come since, and may do better."""
        return self._without_walk and HOST_WALK.came()

    def follow(self, groups: Groups, state: State) -> Tensor | None:
        """The present addresses of the planned gradients, int64 in the order of the groups, 0 where one is missing and
        may be; None if anything else changed.
        """
        try:
            now = Fingerprint(groups, state, self._distributed)
        except Exception:
            return None
        same = (
            self._sizes == now._sizes
            and all(map(is_, self._params, now._params))
            and all(map(is_, self._specs, now._specs))
            and self._state == now._state
            and self._parts == now._parts
        )
        return self._addresses_of_planned(now) if same else None

    def _addresses_of_planned(self, now: Fingerprint) -> Tensor | None:
        """Of the same parameters."""
        if now._has_grad == self._planned:
            return host.integers(now._grad_addresses) if now._of_grads == self._of_grads else None
        unplanned = any(has and not planned for has, planned in zip(now._has_grad, self._planned, strict=True))
        if unplanned or not self._may_miss:
            return None
        is_there = list(compress(now._has_grad, self._planned))
        if any(0 in shape for shape, there in zip(self._of_grads[1], is_there, strict=True) if not there):
            return None  # nobody would say that those without elements were not stepped
        if now._of_grads != tuple(list(compress(part, is_there)) for part in self._of_grads):
            return None
        found = iter(now._grad_addresses)
        return host.integers(next(found) if there else 0 for there in is_there)


class CompiledFingerprint:
    """The same for plain tensors and DTensors, by the compiled walk."""

    def __init__(
        self, walk: Any, groups: Groups, state: State, distributed: bool, awaited: Awaited | None = None
    ) -> None:
        """Raises TypeError where the walk leaves something to Python, RuntimeError where a tensor has no memory."""
        self._walk = walk
        if distributed:
            from torch.distributed.tensor import DTensor

            if not walk.know_dtensors(DTensor):
                raise TypeError("only Python finds the shards of this torch's DTensors")
        params = _params_of(groups)
        self._held = params, _specs_of(params) if distributed else []
        self._count = sum(grad is not None for grad in map(_grad, params)) + len(awaited or ())
        addresses = torch.empty(self._count, dtype=torch.int64, device="cpu")
        self._recording = walk.record(groups, state, addresses, distributed, None if awaited is None else [*awaited])
        if self._recording is None:
            raise TypeError("only Python understands these tensors")

    def is_outdated(self) -> bool:
        return False

    def follow(self, groups: Groups, state: State) -> Tensor | None:
        """As of ``Fingerprint``."""
        addresses = torch.empty(self._count, dtype=torch.int64, device="cpu")
        try:
            return addresses if self._walk.matches(self._recording, groups, state, addresses) else None
        except Exception:
            return None


def _params_of(groups: Groups) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in groups))


def _specs_of(params: Sequence[Tensor]) -> list[Any]:
    """How each is split over ranks, None for a plain tensor; one object for as long as that is so."""
    return [getattr(param, "_spec", None) for param in params]


def _state_of(state: State) -> list[Tensor]:
    return list(chain.from_iterable(map(dict.values, state.values())))


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Raises RuntimeError where one has elements and no memory."""
    addresses = list(map(Tensor.data_ptr, tensors))
    if 0 in addresses and not all(map(is_plain, tensors)):
        raise RuntimeError("a tensor has no memory")
    return addresses


def _layouts(tensors: Sequence[Tensor]) -> list[Any]:
    """True for a contiguous tensor, the strides of any other."""
    contiguous = list(map(Tensor.is_contiguous, tensors))
    if all(contiguous):
        return contiguous
    return [plain or tensor.stride() for plain, tensor in zip(contiguous, tensors, strict=True)]


def take_fingerprint(
    groups: Groups, state: State, distributed: bool, awaited: Awaited | None = None
) -> Fingerprint | CompiledFingerprint | None:
    """The fingerprint, or None where there can be none: a sparse, meta or lazy tensor, a foreign entry in the state.

    Whatever these raise, subclasses of tensors what they like: the checks of a step say what is wrong, if anything is.
    """
    if HOST_WALK.compiled is not None:
        with suppress(Exception):
            return CompiledFingerprint(HOST_WALK.compiled, groups, state, distributed, awaited)
    with suppress(Exception):
        return Fingerprint(groups, state, distributed, awaited)
    return None
