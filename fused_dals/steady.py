"""What the last step did, for the next one to do again as long as nothing differs but the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from fused_dals import host
from fused_dals.buckets import NO_ELEMENTS
from fused_dals.fingerprint import CompiledFingerprint, Fingerprint, Groups, State
from fused_dals.fused import FusedPass
from fused_dals.gather import TensorBatch


@dataclass
class Steady:
    """Passes and batches that did the whole last step, and what they were found fit for.

    Between them they have every parameter that has a gradient. Passes may have others too, which await one.
    """

    passes: list[FusedPass]
    batches: list[TensorBatch]  # through torch operations; emptied, for no gradient is kept alive
    fingerprint: Fingerprint | CompiledFingerprint
    plans: tuple[int, int]  # Runtime.plans at that time
    grads_are_own: bool  # the recorded gradients had memory of their own, as a step that writes them needs

    def __post_init__(self) -> None:
        self._addresses = host.integers(())
        self._shares = _shares(self.passes, self.batches)

    @property
    def is_one_pass(self) -> bool:
        """Whether a single pass does everything."""
        return len(self.passes) == 1 and not self.batches

    def still_fits(self, groups: Groups, state: State) -> bool:
        """Whether nothing has changed but the gradients' addresses, which it notes."""
        addresses = self.fingerprint.follow(groups, state)
        if addresses is not None:
            self._addresses = addresses
        return addresses is not None

    def any_grad_twice(self) -> bool:
        """Whether two gradients begin in the same place, of those that are there and have elements."""
        places = [address for address in self._addresses.tolist() if address not in (0, NO_ELEMENTS)]
        return len(set(places)) < len(places)

    def passes_of_now(self) -> list[FusedPass]:
        """The passes, their tables pointed to where the gradients were found."""
        for fused, share in zip(self.passes, self._shares, strict=True):
            fused.follow_grads(self._addresses if share is None else self._addresses[share])
        return self.passes

    def batches_of_now(self) -> list[TensorBatch]:
        """The batches with the tensors that their parameters have now."""
        return [batch.refilled() for batch in self.batches]


def _shares(passes: Sequence[FusedPass], batches: Sequence[TensorBatch]) -> list[Tensor | None]:
    """Which of all gradients are those of each pass; None where all are."""
    if len(passes) == 1 and not batches:
        return [None]
    everywhere = sorted(chain(*(fused.places for fused in passes), *(batch.places for batch in batches)))
    rank = {place: i for i, place in enumerate(everywhere)}
    return [host.integers(rank[place] for place in fused.places) for fused in passes]
