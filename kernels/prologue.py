"""The scalar work of a step, by one small program before the pass: loss EMA, phase, schedule, clipping, step count.

It turns the groups' hyperparameters into the scalars that the pass reads, from device memory alone. The rules are those
of phase.py and schedule.py, in float64; the tests hold them to each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_dals.kernels import layout
from fused_dals.kernels.rounding import mix

STEP = tl.constexpr(layout.STEP)
LOSS_EMA = tl.constexpr(layout.LOSS_EMA)
LOSS_DROP = tl.constexpr(layout.LOSS_DROP)
SKIPPED_STEPS = tl.constexpr(layout.SKIPPED_STEPS)
DROPPED = tl.constexpr(layout.DROPPED)
GROUP_WIDTH = tl.constexpr(len(layout.GROUP_COLUMNS))
SCALAR_WIDTH = tl.constexpr(len(layout.SCALAR_COLUMNS))
GROUPS_PER_TURN = tl.constexpr(64)
SYNC_PER_TURN = tl.constexpr(1024)
SCAN_PER_TURN = tl.constexpr(256)
PI = tl.constexpr(3.141592653589793)


@triton.jit
def _moved_loss_ema(ema, drop, loss, has_loss):
    """E and D after this step's loss, as phase.update_loss_ema does it."""
    first = ema == float("inf")
    finite = loss - loss == 0
    mean = tl.where(first, 0.0, ema)
    moved = tl.where(first, loss, 0.95 * mean + 0.05 * loss)
    moved_drop = tl.where(first, float("inf"), (mean - moved) / tl.maximum(tl.abs(mean), 1e-8))
    use = has_loss & finite
    return tl.where(use, moved, ema), tl.where(use, moved_drop, drop)


@triton.jit
def _scanned(scan, scan_count):
    """Sum of squares and number of non-finite elements of all gradients, from the rows that grad_scan left."""
    squares = tl.zeros([SCAN_PER_TURN], dtype=tl.float64)
    non_finite = tl.zeros([SCAN_PER_TURN], dtype=tl.float64)
    for start in range(0, scan_count, SCAN_PER_TURN):
        index = start + tl.arange(0, SCAN_PER_TURN)
        mask = index < scan_count
        squares += tl.load(scan + 2 * index, mask=mask, other=0.0)
        non_finite += tl.load(scan + 2 * index + 1, mask=mask, other=0.0)
    return tl.sum(squares), tl.sum(non_finite)


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


@triton.jit(do_not_specialize=["group_count", "sync_count", "scan_count"])
def prologue(
    groups,  # float64 [group_count, GROUP_WIDTH]
    lr_addresses,  # int64 [group_count]: of a tensor lr, else 0
    scalars,  # float32 [group_count, SCALAR_WIDTH], written
    seed,  # int32 [1], written: what stochastic rounding draws from in this step
    state,  # float64 [4]: completed steps, E, D, dropped steps; moved
    loss_sum,  # float64 [1]: sum of the observed losses; [2] where their count follows it; of one loss any float [1]
    loss_count,  # how many they are, a float so that no value of it compiles a variant of its own; -1: see loss_sum
    found_inf,  # float32 [1]: the step is dropped unless it is 0
    grad_scale,  # float32 [1]: the gradients are multiplied by this
    scan,  # float64 [scan_count, 2]: sums of squares and numbers of non-finite gradients
    scan_count,
    skip_nonfinite,  # 1.0: non-finite gradients drop the step, 0.0: they do not
    group_count,
    sync,  # int32 [sync_count]: arrivals, ready flags and ticket counters of all buckets; set to 0, or to DROPPED
    sync_count,
):
    """One program."""
    squares, non_finite = _scanned(scan, scan_count)
    drop_step = (tl.load(found_inf) != 0) | ((non_finite > 0) & (skip_nonfinite != 0))
    flag = tl.where(drop_step, DROPPED, 0)
    for start in range(0, sync_count, SYNC_PER_TURN):
        index = start + tl.arange(0, SYNC_PER_TURN)
        tl.store(sync + index, tl.zeros([SYNC_PER_TURN], dtype=tl.int32) + flag, mask=index < sync_count)

    follows = tl.where(loss_count < 0, 1, 0) != 0
    following = tl.load(loss_sum + 1, mask=follows, other=0.0).to(tl.float64)
    count = tl.where(follows, following, tl.where(loss_count > 0, loss_count, 0.0))
    has_loss = (count > 0) & (drop_step == 0)
    loss = tl.load(loss_sum).to(tl.float64) / tl.where(count > 0, count, 1.0)
    ema, drop = _moved_loss_ema(tl.load(state + LOSS_EMA), tl.load(state + LOSS_DROP), loss, has_loss)
    t = tl.load(state + STEP)
    skipped = tl.load(state + SKIPPED_STEPS)
    # All threads have read the run state before one of them writes it: each warp has groups of its own to go on with.
    tl.debug_barrier()
    tl.store(state + STEP, tl.where(drop_step, t, t + 1.0))
    tl.store(state + LOSS_EMA, ema)
    tl.store(state + LOSS_DROP, drop)
    tl.store(state + SKIPPED_STEPS, tl.where(drop_step, skipped + 1.0, skipped))
    tl.store(seed, mix(t.to(tl.int64).to(tl.int32)))

    inverse_scale = 1.0 / tl.load(grad_scale).to(tl.float64)
    norm = tl.sqrt(squares) * inverse_scale
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
            t + tl.zeros_like(alpha),
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
        sign = tl.load(row + 16, mask=mask, other=1.0)
        # As clip_grad_norm_: a norm that is NaN makes every gradient NaN.
        clip = tl.load(row + 17, mask=mask, other=0.0) / (norm + 1e-6)
        clip = tl.where((clip > 1.0) | (tl.load(row + 17, mask=mask, other=0.0) < 0), 1.0, clip)
        tl.store(out + 9, (sign * clip * inverse_scale).to(tl.float32), mask=mask)
        tl.store(out + 10, (inverse_scale + tl.zeros_like(sign)).to(tl.float32), mask=mask)
