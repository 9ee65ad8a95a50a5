"""The scalar work of a step, by one small program before the pass: loss EMA, phase, schedule, clipping, step count.

It turns the groups' hyperparameters into the scalars that the pass reads, from device memory alone. The rules are those
of phase.py and schedule.py, in float64; the tests hold them to each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_dals.kernels.columns import (
    DROPPED,
    GROUP_CLIP_HIGH,
    GROUP_CLIP_LOW,
    GROUP_EMA_DECAY_0,
    GROUP_EMA_DECAY_1,
    GROUP_EMA_DECAY_2,
    GROUP_LR_SOURCE,
    GROUP_MAX_GRAD_NORM,
    GROUP_MOMENTUM,
    GROUP_RESTART_MULT,
    GROUP_RESTART_STEPS,
    GROUP_SIGN,
    GROUP_THRESHOLD_1,
    GROUP_THRESHOLD_2,
    GROUP_TOTAL_STEPS,
    GROUP_TRUST_COEFFICIENT,
    GROUP_WARMUP_STEPS,
    GROUP_WEIGHT_DECAY,
    GROUP_WIDTH,
    LOSS_DROP,
    LOSS_EMA,
    SCALAR_ALPHA,
    SCALAR_BYPASS,
    SCALAR_CLIP_HIGH,
    SCALAR_CLIP_LOW,
    SCALAR_ETA,
    SCALAR_GRAD_FACTOR,
    SCALAR_INVERSE_SCALE,
    SCALAR_MOMENTUM,
    SCALAR_ONE_MINUS_ALPHA,
    SCALAR_TRUST_COEFFICIENT,
    SCALAR_WEIGHT_DECAY,
    SCALAR_WIDTH,
    SKIPPED_STEPS,
    STEP,
)
from fused_dals.kernels.rounding import mix

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


@triton.jit
def _given(row, COLUMN: tl.constexpr, mask):
    """A hyperparameter of some groups."""
    return tl.load(row + COLUMN, mask=mask, other=0.0)


@triton.jit
def _leave(row, COLUMN: tl.constexpr, value, mask):
    """A scalar of some groups, for the pass."""
    tl.store(row + COLUMN, value.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["group_count", "sync_count", "scan_count"])
def prologue(
    groups,  # float64 [group_count, GROUP_WIDTH]
    lrs,  # float64 [group_count]: what is not in a tensor
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

        threshold_1 = _given(row, GROUP_THRESHOLD_1, mask)
        threshold_2 = _given(row, GROUP_THRESHOLD_2, mask)
        exploration = _given(row, GROUP_EMA_DECAY_0, mask)
        exploitation = _given(row, GROUP_EMA_DECAY_1, mask)
        refinement = _given(row, GROUP_EMA_DECAY_2, mask)
        alpha = tl.where(drop > threshold_1, exploration, tl.where(drop > threshold_2, exploitation, refinement))
        alpha = tl.where(ema == float("inf"), exploitation, alpha)

        factor = _schedule_factor(
            t + tl.zeros_like(alpha),
            _given(row, GROUP_TOTAL_STEPS, mask),
            _given(row, GROUP_WARMUP_STEPS, mask),
            _given(row, GROUP_RESTART_STEPS, mask),
            _given(row, GROUP_RESTART_MULT, mask),
        )
        lr = tl.load(lrs + index, mask=mask, other=0.0)
        source = _given(row, GROUP_LR_SOURCE, mask)
        address = tl.load(lr_addresses + index, mask=mask, other=0)
        single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=mask & (source == 1), other=0.0)
        double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=mask & (source == 2), other=0.0)
        lr = tl.where(source == 1, single.to(tl.float64), tl.where(source == 2, double, lr))

        out = scalars + index * SCALAR_WIDTH
        _leave(out, SCALAR_ALPHA, alpha, mask)
        _leave(out, SCALAR_ONE_MINUS_ALPHA, 1.0 - alpha, mask)
        _leave(out, SCALAR_BYPASS, alpha == 1.0, mask)
        _leave(out, SCALAR_WEIGHT_DECAY, _given(row, GROUP_WEIGHT_DECAY, mask), mask)
        _leave(out, SCALAR_TRUST_COEFFICIENT, _given(row, GROUP_TRUST_COEFFICIENT, mask), mask)
        _leave(out, SCALAR_CLIP_LOW, _given(row, GROUP_CLIP_LOW, mask), mask)
        _leave(out, SCALAR_CLIP_HIGH, _given(row, GROUP_CLIP_HIGH, mask), mask)
        _leave(out, SCALAR_MOMENTUM, _given(row, GROUP_MOMENTUM, mask), mask)
        _leave(out, SCALAR_ETA, lr * factor, mask)
        sign = _given(row, GROUP_SIGN, mask)
        # As clip_grad_norm_: a norm that is NaN makes every gradient NaN.
        max_norm = _given(row, GROUP_MAX_GRAD_NORM, mask)
        clip = max_norm / (norm + 1e-6)
        clip = tl.where((clip > 1.0) | (max_norm < 0), 1.0, clip)
        _leave(out, SCALAR_GRAD_FACTOR, sign * clip * inverse_scale, mask)
        _leave(out, SCALAR_INVERSE_SCALE, inverse_scale + tl.zeros_like(sign), mask)
