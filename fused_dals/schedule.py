"""The built-in learning-rate schedules: pure functions of the number of completed steps.

They return the factor s(t) of SPEC, section "Learning rate"; the optimizer multiplies ``group["lr"]`` by it
when it steps and never writes the product back, so that torch schedulers keep working beside them.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fused_dals import host

#: Nobody takes more steps than this; cycles of restarts are listed up to there.
MAX_STEPS = 2.0**40
#: But no more of them than these, which are listed in half a second; a factor just above 1 would ask for 1e12.
MAX_CYCLES = 1 << 20


def warmup_length(total_steps: int, warmup_fraction: float) -> int:
    """W, the steps of the linear warm-up."""
    return math.floor(warmup_fraction * total_steps)


def warmup_cosine(t: int, total_steps: int, warmup_fraction: float) -> float:
    """s(t) of a linear warm-up over ``W = floor(warmup_fraction * total_steps)`` steps, then a cosine to 0.

    ``s = t / W`` for ``t < W`` (so the first step has s = 0 when there is a warm-up),
    ``s = (1 + cos(pi (t - W) / max(1, T - W))) / 2`` until ``t = T = total_steps``, and 0 from there on.
    ``t`` is the number of completed steps, 0 at the first step.
    """
    if t >= total_steps:
        return 0.0
    warmup_steps = warmup_length(total_steps, warmup_fraction)
    if t < warmup_steps:
        return t / warmup_steps
    progress = (t - warmup_steps) / max(1, total_steps - warmup_steps)
    return (1.0 + math.cos(math.pi * min(progress, 1.0))) / 2.0


def cosine_restarts(t: int, restart_steps: int, restart_mult: float) -> float:
    """s(t) of cosine cycles with warm restarts (SGDR): ``s = (1 + cos(pi c / length)) / 2``.

    Cycle k is ``floor(restart_steps * restart_mult**k)`` steps long. The counter c goes up by one *before*
    each step and falls to 0 when it reaches the length, so that the first cycle takes ``restart_steps - 1``
    steps. In closed form: after t completed steps c has been raised t + 1 times.
    """
    position, scale = t + 1, 1.0
    length = restart_steps
    if restart_mult == 1:  # all cycles alike: no walk over thousands of them
        position %= length
    while position >= length:
        position -= length
        scale *= restart_mult
        length = _whole(restart_steps * scale)
    return (1.0 + math.cos(math.pi * position / length)) / 2.0


def _whole(length: float) -> int:
    """Rounded down; what is infinite is beyond any count of steps."""
    return math.floor(min(length, 2.0**63))


def schedule_factor(
    t: int,
    *,
    total_steps: int | None,
    warmup_fraction: float,
    restart_steps: int | None,
    restart_mult: float,
) -> float:
    """s(t) for the schedule that these hyperparameters ask for; 1 when they ask for none."""
    if total_steps is not None:
        return warmup_cosine(t, total_steps, warmup_fraction)
    if restart_steps is not None:
        return cosine_restarts(t, restart_steps, restart_mult)
    return 1.0


def schedule_factor_of_tensor(
    t: Tensor,
    *,
    total_steps: int | None,
    warmup_fraction: float,
    restart_steps: int | None,
    restart_mult: float,
) -> float | Tensor:
    """The same for a t that only its device knows, 0-dim; 1 where there is no schedule."""
    if total_steps is not None:
        warmup_steps = warmup_length(total_steps, warmup_fraction)
        progress = ((t - warmup_steps) / max(1, total_steps - warmup_steps)).clamp(max=1.0)
        planned = torch.where(t < warmup_steps, t / max(1, warmup_steps), (1 + torch.cos(math.pi * progress)) / 2)
        return torch.where(t >= total_steps, 0.0, planned)
    if restart_steps is not None:
        starts, lengths = _cycles(restart_steps, restart_mult, t.device)
        raised = t + 1
        if restart_mult == 1:
            position, length = raised % restart_steps, torch.full_like(t, restart_steps)
        else:
            # One-element indices, because a 0-dim one would be read by the host.
            cycle = torch.searchsorted(starts, raised.reshape(1), right=True) - 1
            length = lengths[cycle].squeeze(0)
            position = (raised - starts[cycle].squeeze(0)) % length  # beyond the list as if its last came again
        return (1 + torch.cos(math.pi * position / length)) / 2
    return 1.0


@functools.lru_cache(maxsize=64)
def _cycles(restart_steps: int, restart_mult: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the cycles of restarts begin, and their lengths, [cycles] each, in the widest dtype of the device."""
    starts, lengths, scale = [0], [restart_steps], 1.0
    while restart_mult != 1 and starts[-1] < MAX_STEPS and len(starts) < MAX_CYCLES:
        starts.append(starts[-1] + lengths[-1])
        scale *= restart_mult
        lengths.append(_whole(restart_steps * scale))
    table = host.scalars_on(device, torch.tensor([starts, lengths], dtype=torch.float64, device="cpu"))
    return table[0], table[1]
