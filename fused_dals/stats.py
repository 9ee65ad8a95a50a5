"""What a person looks at: inner quantities as plain numbers by parameter name. Reading them may wait for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fused_dals.gather import unique_labels
from fused_dals.kernels.layout import NOT_STEPPED


@dataclass
class TrustRatios:
    """Trust ratios of some parameters of a group, shape [n], as the last step left them on the device.

    It keeps no parameter and no gradient alive.
    """

    group_index: int
    positions: Sequence[int]
    values: Tensor
    stepped: Tensor | None = None  # whether each was, where this rank had no gradient to tell, bool [n]


def trust_ratios_by_label(groups: Sequence[Mapping[str, Any]], measured: Sequence[TrustRatios]) -> dict[str, float]:
    """Label -> r of every parameter that the last step updated, in the order of the groups."""
    found = sorted(
        ((some.group_index, position), ratio)
        for some in measured
        if some.group_index < len(groups)
        for position, ratio, stepped in zip(some.positions, some.values.tolist(), _stepped(some), strict=True)
        if stepped and ratio != NOT_STEPPED and position < len(groups[some.group_index]["params"])
    )
    labels = unique_labels(groups, [place for place, _ in found])
    return dict(zip(labels, (ratio for _, ratio in found), strict=True))


def _stepped(some: TrustRatios) -> Sequence[bool]:
    return [True] * len(some.positions) if some.stepped is None else some.stepped.tolist()
