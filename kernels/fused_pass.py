"""The fused pass: one kernel, driven by a work list, that does the whole update of any number of tensors.

    stage A   h <- alpha h + (1 - alpha) g;  u <- b g + (1 - b) h + lambda p;  partial sums of p^2 and u^2 per chunk
    between   r <- clamp(gamma ||p|| / ||u||), 1 where a norm is 0, by the last chunk of a tensor to arrive
    stage B   m <- mu m + u;  p <- p - eta r m

Persistent programs draw items (tensor, chunk, stage) from an atomic ticket counter, in list order, each one ahead:
drawing takes as long as an access to memory, and so is done while stores or a flag are waited for anyway. A stage B
item waits for its tensor's ratio; that only ever depends on items with lower tickets, which running programs hold and
work on in order, so that no number of resident programs is needed for progress. Partials are added in index order by
one program: no float atomics, the same bits at every run.

A chunk is the unit of work, of drawing, arriving and waiting; a tile is what a program has in its registers at a time:
of stage B a whole chunk, where stage A leaves it only p and m to read.

Two traps shaped the code. A mask computed from a length that was loaded makes every access scalar, so full tiles of
aligned tensors take an unmasked loop, and everything else goes through a masked one. And pointers come as integers
from a table, so each needs ``tl.multiple_of``, on the pointer and not on the integer, to get 128-bit accesses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_dals.kernels.columns import (
    ACCESS,
    BITS_IN_PAIRS,
    CHUNK_MASK,
    CHUNKS,
    COMPENSATION,
    DIMS,
    DROPPED,
    FIRST_CHUNK,
    GRAD_EMA,
    GROUP,
    MAX_DIMS,
    MOMENTUM_BUFFER,
    NORMS_ROW,
    NORMS_WIDTH,
    NOT_STEPPED,
    NUMEL,
    PARAM,
    ROUNDING_KEY,
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
    STRIDED,
    TENSOR_SHIFT,
    TENSOR_WIDTH,
    WIDE,
)
from fused_dals.kernels.rounding import join, mix, random_bits, split, stochastic_bfloat16

#: Elements that the masked branch handles at a time. With 1024 here and below the kernel needs up to 168 registers at 8
#: warps and spills in some variants; with 512 and 256 at most 128 (sm_90), so that two programs fit on an SM.
PIECE = tl.constexpr(512)
#: Elements that a thread has in a row, whatever the types: of float32, 16 bytes.
RUN = tl.constexpr(4)
#: Partial sums that the last arrival adds per turn.
PARTIALS_PER_TURN = tl.constexpr(256)


@triton.jit
def _load(ptr, at, mask, MASKED: tl.constexpr, POLICY: tl.constexpr):
    """Of full tiles with an eviction policy; strides or odd addresses may bring the masked branch back to a line."""
    if MASKED:
        return tl.load(ptr + at, mask=mask, other=0.0)
    else:
        return tl.load(ptr + at, eviction_policy=POLICY)


@triton.jit
def _store(ptr, at, value, mask, MASKED: tl.constexpr, POLICY: tl.constexpr):
    """As ``_load``."""
    if MASKED:
        tl.store(ptr + at, value, mask=mask)
    else:
        tl.store(ptr + at, value, eviction_policy=POLICY)


@triton.jit
def _load_param(p_ptr, c_ptr, p_at, at, mask, COMPENSATED: tl.constexpr, MASKED: tl.constexpr, POLICY: tl.constexpr):
    """The parameter as it is stored, and its compensation; itself again where it has none."""
    p = _load(p_ptr, p_at, mask, MASKED, POLICY)
    c = p
    if COMPENSATED:
        c = _load(c_ptr, at, mask, MASKED, POLICY)
    return p, c


@triton.jit
def _param(p, c, COMPENSATED: tl.constexpr):
    """The parameter in float32, with the bits that a compensated one keeps beside it."""
    if COMPENSATED:
        p = join(p, c)
    return p.to(tl.float32)


@triton.jit
def _as_stored(value, bits, TYPE: tl.constexpr):
    """A state value in the type it is stored in: bfloat16 is rounded stochastically."""
    if TYPE == tl.bfloat16:
        value = stochastic_bfloat16(value, bits & 0xFFFF)
    return value


@triton.jit
def sums_of_runs(x):
    """Sums of RUN neighbours each, which one thread has together: no other thread is waited for."""
    return tl.sum(tl.reshape(x, [x.shape[0] // RUN, RUN]), axis=1)


@triton.jit
def _sums_of_both(x, y):
    """The sums of two blocks, for which all threads wait together: 18 barriers in the kernel instead of 27.

    As one block and not by ``tl.reduce`` over a pair, for which Triton's interpreter calls Python at every element.
    """
    return tl.split(tl.sum(tl.join(x, y), axis=0))


@triton.jit
def _filtered_update(p, g, h, blend, scalars):
    """h and u of one tile, in float32."""
    alpha = tl.load(scalars + SCALAR_ALPHA)
    one_minus_alpha = tl.load(scalars + SCALAR_ONE_MINUS_ALPHA)
    bypass = tl.load(scalars + SCALAR_BYPASS)
    weight_decay = tl.load(scalars + SCALAR_WEIGHT_DECAY)
    grad_factor = tl.load(scalars + SCALAR_GRAD_FACTOR)
    b = tl.where(bypass != 0, 1.0, blend)
    g = grad_factor * g
    h = alpha * h + one_minus_alpha * g
    u = b * g + (1 - b) * h + weight_decay * p
    return h, u


@triton.jit
def _pointers(
    addresses, PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE_TYPE: tl.constexpr, SAME_RUNS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Parameter, gradient, state and compensation. Said to be aligned only where full tiles are read through them.

    What they are said to be aligned to is how much a thread takes at a time: 16 bytes, or with SAME_RUNS as many
    elements of 16-bit tensors as of their neighbours in 32 bits, so that no thread needs another's.
    """
    NARROW: tl.constexpr = 8 if SAME_RUNS and PARAM_TYPE.primitive_bitwidth != STATE_TYPE.primitive_bitwidth else 16
    P_BYTES: tl.constexpr = NARROW if PARAM_TYPE.primitive_bitwidth == 16 else 16
    G_BYTES: tl.constexpr = NARROW if GRAD_TYPE.primitive_bitwidth == 16 else 16
    STATE_BYTES: tl.constexpr = NARROW if STATE_TYPE.primitive_bitwidth == 16 else 16
    p_ptr = addresses[0].to(tl.pointer_type(PARAM_TYPE))
    g_ptr = addresses[1].to(tl.pointer_type(GRAD_TYPE))
    h_ptr = addresses[2].to(tl.pointer_type(STATE_TYPE))
    m_ptr = addresses[3].to(tl.pointer_type(STATE_TYPE))
    c_ptr = addresses[4].to(tl.pointer_type(tl.int16))
    if not MASKED:
        p_ptr = tl.multiple_of(p_ptr, P_BYTES)
        g_ptr = tl.multiple_of(g_ptr, G_BYTES)
        h_ptr = tl.multiple_of(h_ptr, STATE_BYTES)
        m_ptr = tl.multiple_of(m_ptr, STATE_BYTES)
        c_ptr = tl.multiple_of(c_ptr, P_BYTES)
    return p_ptr, g_ptr, h_ptr, m_ptr, c_ptr


@triton.jit
def _load_stage_a(
    addresses, p_at, g_at, at, mask,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE_TYPE: tl.constexpr, COMPENSATED: tl.constexpr,
    A_WRITES: tl.constexpr, LAST_USE: tl.constexpr, SAME_RUNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Parameter, compensation, gradient, h and m of one tile, as they are stored; p in place of what is not needed."""
    # Stage B comes back for p and m, and for g and h too where it is the one who writes.
    GRADS_USE: tl.constexpr = LAST_USE if A_WRITES else ""
    p_ptr, g_ptr, h_ptr, m_ptr, c_ptr = _pointers(addresses, PARAM_TYPE, GRAD_TYPE, STATE_TYPE, SAME_RUNS, MASKED)
    p, c = _load_param(p_ptr, c_ptr, p_at, at, mask, COMPENSATED, MASKED, "")
    g = _load(g_ptr, g_at, mask, MASKED, GRADS_USE)
    h = _load(h_ptr, at, mask, MASKED, GRADS_USE)
    m = p
    if A_WRITES:
        m = _load(m_ptr, at, mask, MASKED, "")
    return p, c, g, h, m


@triton.jit
def _stage_a_tile(
    loaded, addresses, g_at, at, mask, blend, scalars, key,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE_TYPE: tl.constexpr, COMPENSATED: tl.constexpr,
    UNSCALE: tl.constexpr, A_WRITES: tl.constexpr, LAST_USE: tl.constexpr, SAME_RUNS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """p and u of one tile; writes h, m and the unscaled gradient too where that is stage A's work."""
    p, c, g, h, m = loaded
    _, g_ptr, h_ptr, m_ptr, _ = _pointers(addresses, PARAM_TYPE, GRAD_TYPE, STATE_TYPE, SAME_RUNS, MASKED)
    p = _param(p, c, COMPENSATED)
    g = g.to(tl.float32)
    h, u = _filtered_update(p, g, h.to(tl.float32), blend, scalars)
    if A_WRITES:
        momentum = tl.load(scalars + SCALAR_MOMENTUM)
        m = momentum * m.to(tl.float32) + u
        bits = at
        if STATE_TYPE == tl.bfloat16:
            bits = random_bits(at, key)
        _store(h_ptr, at, _as_stored(h, bits, STATE_TYPE), mask, MASKED, LAST_USE)
        _store(m_ptr, at, _as_stored(m, bits >> 16, STATE_TYPE), mask, MASKED, "")
        if UNSCALE:
            unscaled = g * tl.load(scalars + SCALAR_INVERSE_SCALE)
            _store(g_ptr, g_at, unscaled.to(g_ptr.dtype.element_ty), mask, MASKED, LAST_USE)
    return p, u


@triton.jit
def _add_full_tile(
    p_squares, u_squares, loaded, addresses, at, blend, scalars, key,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE_TYPE: tl.constexpr, COMPENSATED: tl.constexpr,
    UNSCALE: tl.constexpr, A_WRITES: tl.constexpr, LAST_USE: tl.constexpr, SAME_RUNS: tl.constexpr,
):  # fmt: skip
    """Stage A of an unmasked tile; returns the squares of p and u, by runs, with its own added."""
    p, u = _stage_a_tile(
        loaded, addresses, at, at, None, blend, scalars, key,
        PARAM_TYPE, GRAD_TYPE, STATE_TYPE, COMPENSATED, UNSCALE, A_WRITES, LAST_USE, SAME_RUNS, False,
    )  # fmt: skip
    return p_squares + sums_of_runs((p * p).to(tl.float64)), u_squares + sums_of_runs((u * u).to(tl.float64))


@triton.jit
def _stage_b_tile(
    addresses, p_at, g_at, at, mask, blend, ratio, scalars, key,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE_TYPE: tl.constexpr, COMPENSATED: tl.constexpr,
    UNSCALE: tl.constexpr, A_WRITES: tl.constexpr, LAST_USE: tl.constexpr, SAME_RUNS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Write p, and h, m and the unscaled gradient where stage A has not."""
    momentum = tl.load(scalars + SCALAR_MOMENTUM)
    eta = tl.load(scalars + SCALAR_ETA)
    p_ptr, g_ptr, h_ptr, m_ptr, c_ptr = _pointers(addresses, PARAM_TYPE, GRAD_TYPE, STATE_TYPE, SAME_RUNS, MASKED)
    p, c = _load_param(p_ptr, c_ptr, p_at, at, mask, COMPENSATED, MASKED, LAST_USE)
    p = _param(p, c, COMPENSATED)
    m = _load(m_ptr, at, mask, MASKED, LAST_USE).to(tl.float32)
    if not A_WRITES:
        g = _load(g_ptr, g_at, mask, MASKED, LAST_USE).to(tl.float32)
        h, u = _filtered_update(p, g, _load(h_ptr, at, mask, MASKED, LAST_USE).to(tl.float32), blend, scalars)
        bits = at
        if STATE_TYPE == tl.bfloat16:
            bits = random_bits(at, key)
        # p follows the buffer as it is stored, so that both divisions of the work give the same bits.
        stored = _as_stored(momentum * m + u, bits >> 16, STATE_TYPE)
        m = stored.to(tl.float32)
        _store(h_ptr, at, _as_stored(h, bits, STATE_TYPE), mask, MASKED, LAST_USE)
        _store(m_ptr, at, stored, mask, MASKED, LAST_USE)
        if UNSCALE:
            unscaled = g * tl.load(scalars + SCALAR_INVERSE_SCALE)
            _store(g_ptr, g_at, unscaled.to(g_ptr.dtype.element_ty), mask, MASKED, LAST_USE)
    p = p - (eta * ratio) * m
    if COMPENSATED:
        upper, lower = split(p)
        _store(p_ptr, p_at, upper, mask, MASKED, LAST_USE)
        _store(c_ptr, at, lower, mask, MASKED, LAST_USE)
    else:
        _store(p_ptr, p_at, p.to(p_ptr.dtype.element_ty), mask, MASKED, LAST_USE)


@triton.jit
def _as_flag(ratio):
    """A trust ratio as an integer that is not 0: with the sign, which no ratio has, set."""
    return ratio.to(tl.int32, bitcast=True) | -0x80000000


@triton.jit
def _from_flag(flag):
    return (flag & 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _look_and_draw(flag, counter):
    """A flag, acquired, and a ticket: two atomics of one instruction, as each would take half a microsecond."""
    lane = tl.arange(0, 2)
    both = tl.where(lane == 0, flag.to(tl.int64), counter.to(tl.int64)).to(tl.pointer_type(tl.int32))
    found = tl.atomic_add(both, lane, sem="acquire", scope="gpu")  # 0 to the flag, 1 to the counter
    return tl.sum(tl.where(lane == 0, found, 0)), tl.sum(tl.where(lane == 1, found, 0))


@triton.jit
def end_of_chunk(start, numel, g_address, CHUNK: tl.constexpr):
    """Of what there is to do: a tensor without a gradient is left as it is, its chunks drawn and announced for nothing.

    So the work list stays while gradients come and go, and whoever waits for such a tensor finds a ratio, of zeros.
    """
    return tl.where(g_address == 0, start, tl.minimum(start + CHUNK, numel))


@triton.jit
def end_of_full_tiles(start, stop, access, TILE: tl.constexpr):
    """Where unmasked tiles of a chunk end, and what is masked begins: at once, where a tensor cannot be read wide."""
    full = start
    if access == WIDE:
        full += (stop - start) // TILE * TILE
    return full


@triton.jit
def _strided_offsets(at, dims):
    """Offsets of elements in parameter and gradient from their index in the state, innermost dimension first."""
    p_at = tl.zeros_like(at)
    g_at = tl.zeros_like(at)
    for dim in tl.static_range(MAX_DIMS):
        size = tl.load(dims + dim)
        index = at % size
        at = at // size
        p_at += index * tl.load(dims + MAX_DIMS + dim)
        g_at += index * tl.load(dims + 2 * MAX_DIMS + dim)
    return p_at, g_at


@triton.jit
def offsets_of_piece(piece, stop, access, dims, row):
    """Of the masked loop: indices in the state, which of them exist, offsets in parameter and gradient."""
    at = piece + tl.arange(0, PIECE).to(tl.int64)
    p_at = at
    g_at = at
    if access == STRIDED:
        p_at, g_at = _strided_offsets(at, dims + tl.load(row + DIMS) * (3 * MAX_DIMS))
    return at, at < stop, p_at, g_at


@triton.jit
def _sums_of_squares(partials, chunks):
    """|p|^2 and |u|^2 from the partial sums of a tensor, which are complete; added in index order, in float64."""
    p_squares = tl.zeros([PARTIALS_PER_TURN], dtype=tl.float64)
    u_squares = tl.zeros([PARTIALS_PER_TURN], dtype=tl.float64)
    for start in range(0, chunks, PARTIALS_PER_TURN):
        at = start + tl.arange(0, PARTIALS_PER_TURN)
        mask = at < chunks
        p_squares += tl.load(partials + 2 * at, mask=mask, other=0.0).to(tl.float64)
        u_squares += tl.load(partials + 2 * at + 1, mask=mask, other=0.0).to(tl.float64)
    return _sums_of_both(p_squares, u_squares)


@triton.jit
def _trust_ratio(p_squares, u_squares, gamma, low, high):
    """r, elementwise, in float64."""
    p_norm = tl.sqrt(p_squares)
    u_norm = tl.sqrt(u_squares)
    degenerate = (p_norm == 0) | (u_norm == 0)
    ratio = gamma.to(tl.float64) * p_norm / tl.where(degenerate, 1.0, u_norm)
    low = low.to(tl.float64)
    high = high.to(tl.float64)
    ratio = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))  # NaN stays NaN
    return tl.where(degenerate, 1.0, ratio).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def ratios_of_norms(
    tensors,  # int64 [n, TENSOR_WIDTH]
    norms,  # float64 [rows, NORMS_WIDTH]: sums of squares over all ranks
    scalars,  # float32 [groups, SCALAR_WIDTH]
    ratios,  # float32 [n]: r, written
    ready,  # int32 [n], set to r as a flag
    counter,  # int32 [1]: of stage B's list, DROPPED where the step is dropped and r stays as it was
    count,  # n
    BLOCK: tl.constexpr,
):
    """Between the stages of a pass over shards: r of every tensor from norms that other ranks have had a part in."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (at < count) & (tl.load(counter) < DROPPED)
    row = tensors + at * TENSOR_WIDTH
    norm = norms + tl.load(row + NORMS_ROW, mask=mask, other=0) * NORMS_WIDTH
    group = scalars + tl.load(row + GROUP, mask=mask, other=0) * SCALAR_WIDTH
    ratio = _trust_ratio(
        tl.load(norm, mask=mask, other=0.0),
        tl.load(norm + 1, mask=mask, other=0.0),
        tl.load(group + SCALAR_TRUST_COEFFICIENT, mask=mask, other=0.0),
        tl.load(group + SCALAR_CLIP_LOW, mask=mask, other=0.0),
        tl.load(group + SCALAR_CLIP_HIGH, mask=mask, other=0.0),
    )
    tl.store(ratios + at, ratio, mask=mask)
    tl.store(ready + at, _as_flag(ratio), mask=mask)


@triton.jit(do_not_specialize=["item_count"])
def fused_pass(
    tensors,  # int64 [n, TENSOR_WIDTH]
    grads,  # int64 [n]: addresses of the gradients, 0 where there is none
    dims,  # int64 [strided tensors, 3 * MAX_DIMS]
    blends,  # float32 [n]: b
    scalars,  # float32 [groups, SCALAR_WIDTH]
    items,  # int64 [item_count], packed
    partials,  # float32 [all chunks, 2]
    norms,  # float64 [rows, NORMS_WIDTH]: with SHARDED, where sums of squares go
    ratios,  # float32 [n]: r, for whoever looks at it after the step; NOT_STEPPED where there is no gradient
    arrivals,  # int32 [n], 0
    ready,  # int32 [n], 0; r as a flag once it is known
    counter,  # int32 [1], 0; DROPPED where the step is dropped, so that no item is drawn
    seed,  # int32 [1]: this step's, for stochastic rounding
    item_count,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    COMPENSATED: tl.constexpr,
    UNSCALE: tl.constexpr,
    SHARDED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    MOST_IN_B: tl.constexpr,
    PAIRS: tl.constexpr,
    A_WRITES: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
    SAME_RUNS: tl.constexpr,
):
    """Run the items of a work list until none is left.

    SHARDED: tensors are shards, whose ratios need sums over ranks. Stage A and stage B are two launches, each with a
    list and a counter of its own, and ratios_of_norms runs between them.

    COMPENSATED: parameters are bfloat16 with an int16 beside each element; UNSCALE: gradients are written back without
    the scale of a GradScaler. State in bfloat16 is rounded stochastically.

    A tile of stage B is a whole chunk, of MOST_IN_B elements at most, where A_WRITES. PAIRS: stage A loads two tiles
    together where there are registers for it, see BITS_IN_PAIRS.

    EVICT_FIRST: what the step does not touch again is the first to leave the L2 cache, which keeps what stage B comes
    back for. In full tiles only, see _load.

    SAME_RUNS: where parameters and state differ in size, full tiles are read and written without barriers, see
    _pointers.
    """
    LAST_USE: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    BITS: tl.constexpr = PARAM_TYPE.primitive_bitwidth + GRAD_TYPE.primitive_bitwidth + STATE_TYPE.primitive_bitwidth
    IN_PAIRS: tl.constexpr = PAIRS and BITS <= BITS_IN_PAIRS and not COMPENSATED and not UNSCALE
    ticket = tl.atomic_add(counter, 1, sem="relaxed", scope="gpu")
    item = tl.load(items + ticket, mask=ticket < item_count, other=0)
    while ticket < item_count:
        tensor = item >> TENSOR_SHIFT
        chunk = (item >> 1) & CHUNK_MASK
        row = tensors + tensor * TENSOR_WIDTH
        addresses = (
            tl.load(row + PARAM),
            tl.load(grads + tensor),
            tl.load(row + GRAD_EMA),
            tl.load(row + MOMENTUM_BUFFER),
            tl.load(row + COMPENSATION),
        )
        numel = tl.load(row + NUMEL)
        access = tl.load(row + ACCESS)
        scalar_row = scalars + tl.load(row + GROUP) * SCALAR_WIDTH
        blend = tl.load(blends + tensor)
        key = 0
        if STATE_TYPE == tl.bfloat16:
            # No chunk straddles 2^32 elements: the upper half of the index is the same for all of it.
            upper = ((chunk * CHUNK) >> 32).to(tl.int32)
            key = mix(tl.load(row + ROUNDING_KEY).to(tl.int32) ^ tl.load(seed)) ^ mix(upper)
        start = chunk * CHUNK
        stop = end_of_chunk(start, numel, addresses[1], CHUNK)
        full = end_of_full_tiles(start, stop, access, TILE)

        if item & 1 == 0:
            p_square = tl.full([], 0.0, tl.float64)
            u_square = tl.full([], 0.0, tl.float64)
            if full > start:
                # Added up as far as one thread has them: reducing each tile would stop all threads once a tile.
                p_squares = tl.zeros([TILE // RUN], dtype=tl.float64)
                u_squares = tl.zeros([TILE // RUN], dtype=tl.float64)
                paired = start
                if IN_PAIRS:
                    paired += (full - start) // (2 * TILE) * (2 * TILE)
                    for pair in range(start, paired, 2 * TILE):
                        at = pair + tl.arange(0, TILE).to(tl.int64)
                        loaded = _load_stage_a(
                            addresses, at, at, at, None,
                            PARAM_TYPE, GRAD_TYPE, STATE_TYPE, COMPENSATED, A_WRITES, LAST_USE, SAME_RUNS, False,
                        )  # fmt: skip
                        second = at + TILE
                        loaded_second = _load_stage_a(
                            addresses, second, second, second, None,
                            PARAM_TYPE, GRAD_TYPE, STATE_TYPE, COMPENSATED, A_WRITES, LAST_USE, SAME_RUNS, False,
                        )  # fmt: skip
                        p_squares, u_squares = _add_full_tile(
                            p_squares, u_squares, loaded, addresses, at, blend, scalar_row, key,
                            PARAM_TYPE, GRAD_TYPE, STATE_TYPE, COMPENSATED, UNSCALE, A_WRITES, LAST_USE, SAME_RUNS,
                        )  # fmt: skip
                        p_squares, u_squares = _add_full_tile(
                            p_squares, u_squares, loaded_second, addresses, second, blend, scalar_row, key,
                            PARAM_TYPE, GRAD_TYPE, STATE_TYPE, COMPENSATED, UNSCALE, A_WRITES, LAST_USE, SAME_RUNS,
                        )  # fmt: skip
                for tile in range(paired, full, TILE):
                    at = tile + tl.arange(0, TILE).to(tl.int64)
                    loaded = _load_stage_a(
                        addresses, at, at, at, None,
                        PARAM_TYPE, GRAD_TYPE, STATE_TYPE, COMPENSATED, A_WRITES, LAST_USE, SAME_RUNS, False,
                    )  # fmt: skip
                    p_squares, u_squares = _add_full_tile(
                        p_squares, u_squares, loaded, addresses, at, blend, scalar_row, key,
                        PARAM_TYPE, GRAD_TYPE, STATE_TYPE, COMPENSATED, UNSCALE, A_WRITES, LAST_USE, SAME_RUNS,
                    )  # fmt: skip
                p_square, u_square = _sums_of_both(p_squares, u_squares)
            for piece in range(full, stop, PIECE):
                at, mask, p_at, g_at = offsets_of_piece(piece, stop, access, dims, row)
                loaded = _load_stage_a(
                    addresses, p_at, g_at, at, mask,
                    PARAM_TYPE, GRAD_TYPE, STATE_TYPE, COMPENSATED, A_WRITES, LAST_USE, SAME_RUNS, True,
                )  # fmt: skip
                p, u = _stage_a_tile(
                    loaded, addresses, g_at, at, mask, blend, scalar_row, key,
                    PARAM_TYPE, GRAD_TYPE, STATE_TYPE, COMPENSATED, UNSCALE, A_WRITES, LAST_USE, SAME_RUNS, True,
                )  # fmt: skip
                p_piece, u_piece = _sums_of_both((p * p).to(tl.float64), (u * u).to(tl.float64))
                p_square += p_piece
                u_square += u_piece
            sums = partials + 2 * tl.load(row + FIRST_CHUNK)
            tl.store(sums + 2 * chunk, p_square)
            tl.store(sums + 2 * chunk + 1, u_square)
            # The next item comes while the stores above are on their way, which the announcement has to wait for; and
            # what the last to arrive needs, whose every access to memory delays all that wait for the ratio.
            next_ticket = tl.atomic_add(counter, 1, sem="relaxed", scope="gpu")
            next_item = tl.load(items + next_ticket, mask=next_ticket < item_count, other=0)
            chunks = tl.load(row + CHUNKS)
            if SHARDED:
                norm = norms + tl.load(row + NORMS_ROW) * NORMS_WIDTH
            else:
                gamma = tl.load(scalar_row + SCALAR_TRUST_COEFFICIENT)
                low, high = tl.load(scalar_row + SCALAR_CLIP_LOW), tl.load(scalar_row + SCALAR_CLIP_HIGH)
            # All threads of the program have written before one of them announces it, by an arrival or by a flag.
            tl.debug_barrier()
            # A tensor of one chunk has nobody to agree with. Its sums are here, rounded as partials would be.
            p_sum = p_square.to(tl.float32).to(tl.float64)
            u_sum = u_square.to(tl.float32).to(tl.float64)
            last = chunks == 1
            if chunks > 1:
                last = tl.atomic_add(arrivals + tensor, 1, sem="acq_rel", scope="gpu") == chunks - 1
                if last:
                    p_sum, u_sum = _sums_of_squares(sums, chunks)
            if last:
                if SHARDED:
                    # In 24 bits, so that sums over ranks are exact, in whatever order they are made.
                    tl.store(norm, p_sum.to(tl.float32).to(tl.float64))
                    tl.store(norm + 1, u_sum.to(tl.float32).to(tl.float64))
                else:
                    ratio = _trust_ratio(p_sum, u_sum, gamma, low, high)
                    # It comes with the flag: to store it first and announce it then would take twice as long.
                    tl.atomic_xchg(ready + tensor, _as_flag(ratio), sem="release", scope="gpu")
                    # Loaded again: kept since the first tile it would take registers, and some variants would spill.
                    tl.store(ratios + tensor, tl.where(tl.load(grads + tensor) == 0, NOT_STEPPED, ratio))
        else:
            flag, next_ticket = _look_and_draw(ready + tensor, counter)
            next_item = tl.load(items + next_ticket, mask=next_ticket < item_count, other=0)
            while flag == 0:
                flag = tl.atomic_add(ready + tensor, 0, sem="acquire", scope="gpu")
            ratio = _from_flag(flag)
            wide = start
            if A_WRITES:
                B_TILE: tl.constexpr = max(TILE, min(CHUNK, MOST_IN_B))
                wide = end_of_full_tiles(start, stop, access, B_TILE)
                for tile in range(start, wide, B_TILE):
                    at = tile + tl.arange(0, B_TILE).to(tl.int64)
                    _stage_b_tile(
                        addresses, at, at, at, None, blend, ratio, scalar_row, key,
                        PARAM_TYPE, GRAD_TYPE, STATE_TYPE, COMPENSATED, UNSCALE, A_WRITES, LAST_USE, SAME_RUNS, False,
                    )  # fmt: skip
            for tile in range(wide, full, TILE):
                at = tile + tl.arange(0, TILE).to(tl.int64)
                _stage_b_tile(
                    addresses, at, at, at, None, blend, ratio, scalar_row, key,
                    PARAM_TYPE, GRAD_TYPE, STATE_TYPE, COMPENSATED, UNSCALE, A_WRITES, LAST_USE, SAME_RUNS, False,
                )  # fmt: skip
            for piece in range(full, stop, PIECE):
                at, mask, p_at, g_at = offsets_of_piece(piece, stop, access, dims, row)
                _stage_b_tile(
                    addresses, p_at, g_at, at, mask, blend, ratio, scalar_row, key,
                    PARAM_TYPE, GRAD_TYPE, STATE_TYPE, COMPENSATED, UNSCALE, A_WRITES, LAST_USE, SAME_RUNS, True,
                )  # fmt: skip
        ticket = next_ticket
        item = next_item
