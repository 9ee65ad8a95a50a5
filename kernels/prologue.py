"""The scalar work of a step, by one small program before the pass: loss EMA, phase, schedule, step count.

It turns the groups' hyperparameters into the scalars that the pass reads, from device memory alone. The rules are those
of phase.py and schedule.py, in float64; the tests hold them to each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_dals.kernels import layout

GROUP_WIDTH = tl.constexpr(len(layout.GROUP_COLUMNS))
SCALAR_WIDTH = tl.constexpr(len(layout.SCALAR_COLUMNS))
GROUPS_PER_TURN = tl.constexpr(64)
SYNC_PER_TURN = tl.constexpr(1024)
PI = tl.constexpr(3.141592653589793)


@triton.jit
def _move_loss_ema(loss_ema, loss_drop, loss, has_loss):
    """E and D after this step's loss, as phase.update_loss_ema does it; written back."""
    ema = tl.load(loss_ema)
    drop = tl.load(loss_drop)
    first = ema == float("inf")
    finite = loss - loss == 0
    mean = tl.where(first, 0.0, ema)
    moved = tl.where(first, loss, 0.95 * mean + 0.05 * loss)
    moved_drop = tl.where(first, float("inf"), (mean - moved) / tl.maximum(tl.abs(mean), 1e-8))
    use = has_loss & finite
    ema = tl.where(use, moved, ema)
    drop = tl.where(use, moved_drop, drop)
    tl.store(loss_ema, ema)
    tl.store(loss_drop, drop)
    return ema, drop


@triton.jit
def _schedule_factor(t, total_steps, warmup_steps, restart_steps, restart_mult):
    """s(t) as schedule.schedule_factor has it; 0 stands for None."""
    progress = tl.minimum((t - warmup_steps) / tl.maximum(total_steps - warmup_steps, 1.0), 1.0)
    cosine = (1.0 + tl.cos(progress * PI)) / 2.0
    warmup = t / tl.maximum(warmup_steps, 1.0)
    planned = tl.where(t >= total_steps, 0.0, tl.where(t < warmup_steps, warmup, cosine))

    length = tl.where(restart_steps > 0, restart_steps, 1.0)
    position = tl.where(restart_steps > 0, t + 1.0, 0.0)
    position = tl.where(restart_mult == 1.0, position - tl.floor(position / length) * length, position)
    scale = tl.zeros_like(length) + 1.0
    while tl.max((position >= length).to(tl.int32)) > 0:
        past = position >= length
        position = tl.where(past, position - length, position)
        scale = tl.where(past, scale * restart_mult, scale)
        length = tl.where(past, tl.floor(restart_steps * scale), length)
    restarted = (1.0 + tl.cos(position / length * PI)) / 2.0
    return tl.where(total_steps > 0, planned, tl.where(restart_steps > 0, restarted, 1.0))


@triton.jit(do_not_specialize=["group_count", "sync_count"])
def prologue(
    groups,  # float64 [group_count, GROUP_WIDTH]
    lr_addresses,  # int64 [group_count]: of a tensor lr, else 0
    scalars,  # float32 [group_count, SCALAR_WIDTH], written
    step,  # int64 [1]: completed steps, goes up by one
    loss_ema,  # float64 [1]: E, moved
    loss_drop,  # float64 [1]: D, moved
    loss_sum,  # float64 [1]: sum of the observed losses
    loss_count,  # how many they are, a float so that no value of it compiles a variant of its own
    group_count,
    sync,  # int32 [sync_count]: arrivals, ready flags and ticket counters of all buckets, set to 0
    sync_count,
):
    """One program."""
    for start in range(0, sync_count, SYNC_PER_TURN):
        index = start + tl.arange(0, SYNC_PER_TURN)
        tl.store(sync + index, tl.zeros([SYNC_PER_TURN], dtype=tl.int32), mask=index < sync_count)
    has_loss = loss_count > 0
    loss = tl.load(loss_sum) / tl.where(has_loss, loss_count, 1.0).to(tl.float64)
    ema, drop = _move_loss_ema(loss_ema, loss_drop, loss, has_loss)
    t = tl.load(step)
    tl.store(step, t + 1)
    for start in range(0, group_count, GROUPS_PER_TURN):
        index = start + tl.arange(0, GROUPS_PER_TURN)
        mask = index < group_count
        row = groups + index * GROUP_WIDTH

        threshold_1 = tl.load(row + 10, mask=mask, other=0.0)
        threshold_2 = tl.load(row + 11, mask=mask, other=0.0)
        exploration = tl.load(row + 7, mask=mask, other=0.0)
        exploitation = tl.load(row + 8, mask=mask, other=0.0)
        refinement = tl.load(row + 9, mask=mask, other=0.0)
        alpha = tl.where(drop > threshold_1, exploration, tl.where(drop > threshold_2, exploitation, refinement))
        alpha = tl.where(ema == float("inf"), exploitation, alpha)

        factor = _schedule_factor(
            t.to(tl.float64) + tl.zeros_like(alpha),
            tl.load(row + 12, mask=mask, other=0.0),
            tl.load(row + 13, mask=mask, other=0.0),
            tl.load(row + 14, mask=mask, other=0.0),
            tl.load(row + 15, mask=mask, other=1.0),
        )
        lr = tl.load(row, mask=mask, other=0.0)
        source = tl.load(row + 1, mask=mask, other=0.0)
        address = tl.load(lr_addresses + index, mask=mask, other=0)
        single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=mask & (source == 1), other=0.0)
        double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=mask & (source == 2), other=0.0)
        lr = tl.where(source == 1, single.to(tl.float64), tl.where(source == 2, double, lr))

        out = scalars + index * SCALAR_WIDTH
        tl.store(out, alpha.to(tl.float32), mask=mask)
        tl.store(out + 1, (1.0 - alpha).to(tl.float32), mask=mask)
        tl.store(out + 2, (alpha == 1.0).to(tl.float32), mask=mask)
        tl.store(out + 3, tl.load(row + 3, mask=mask, other=0.0).to(tl.float32), mask=mask)
        tl.store(out + 4, tl.load(row + 4, mask=mask, other=0.0).to(tl.float32), mask=mask)
        tl.store(out + 5, tl.load(row + 5, mask=mask, other=0.0).to(tl.float32), mask=mask)
        tl.store(out + 6, tl.load(row + 6, mask=mask, other=0.0).to(tl.float32), mask=mask)
        tl.store(out + 7, tl.load(row + 2, mask=mask, other=0.0).to(tl.float32), mask=mask)
        tl.store(out + 8, (lr * factor).to(tl.float32), mask=mask)
        tl.store(out + 9, tl.load(row + 16, mask=mask, other=1.0).to(tl.float32), mask=mask)
